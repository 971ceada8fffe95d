"""Ids are Megatron's on real text in many languages, type by type: translations and documents found on this machine."""

import gettext
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer

from megatron_kaiyuan.preprocess import TokenizerConfig
from megatron_kaiyuan.preprocess.fast_tokenize import choose_backend, difficult_texts
from tests.unit_tests.preprocess.corpus import build, needs_gigatoken, save_bpe, save_tiktoken, write_jsonl
from tests.unit_tests.shards.test_tokenizer import megatron, sentencepiece_model

__all__ = ["sentencepiece_model"]  # a fixture

CATALOGUES = 12
STRINGS = 25


def translations() -> list[str]:
    """Messages of installed programs in up to `CATALOGUES` languages; empty where none are installed."""
    folders = sorted(path for path in Path("/usr/share/locale").glob("*/LC_MESSAGES") if any(path.glob("*.mo")))
    random.Random(7).shuffle(folders)
    found = []
    for folder in folders[:CATALOGUES]:
        path = max(folder.glob("*.mo"), key=lambda path: path.stat().st_size)
        try:
            with path.open("rb") as stream:
                catalogue: dict[Any, str] = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
        except (ValueError, IndexError, OSError):
            continue
        found.append("\n".join([text for text in catalogue.values() if text][:STRINGS]))
    return found


def names_of_characters() -> list[str]:
    """Every script of Unicode's first planes with its characters' names: text that is there on every machine."""
    return [
        " ".join(f"{chr(code)} {unicodedata.name(chr(code), '')}" for code in range(first, first + 96, 3))
        for first in range(0xA0, 0xFFFF, 0x7D3)
        if not 0xD800 - 96 <= first < 0xE000
    ]


def texts() -> list[str]:
    own = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    return [text for text in [*translations(), *names_of_characters(), *own, *difficult_texts()] if text]


@pytest.fixture(autouse=True)
def known_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron warns when it has to guess


def assert_shard_is_megatrons(
    folder: Path, config: TokenizerConfig, theirs: MegatronTokenizer, **settings: Any
) -> None:
    """Build a shard, read it with Megatron, and compare with what its tool's encoder gives for each document."""
    documents = [text for text in texts() if theirs.tokenize(text)]  # white space alone may have no ids: see Reason
    path = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in documents])
    build([path], folder / "out", tokenizer=config, append_eod=True, **settings)
    stored = IndexedDataset(str(folder / "out_text_document"))
    assert len(stored) == len(documents)
    for number, text in enumerate(documents):
        assert stored[number].tolist() == [*theirs.tokenize(text), theirs.eod], text[:60]


@needs_gigatoken
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hugging_face_shards_are_those_of_megatron(tmp_path: Path, backend: str) -> None:
    folder = save_bpe(tmp_path / "bpe")
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    assert choose_backend(config, texts()).fast
    assert_shard_is_megatrons(tmp_path, config, megatron("huggingface", folder), backend=backend)


def test_sentencepiece_shards_are_those_of_megatron(tmp_path: Path, sentencepiece_model: Path) -> None:
    config = TokenizerConfig(type="SentencePieceTokenizer", model=str(sentencepiece_model))
    theirs = megatron("sentencepiece", sentencepiece_model, legacy=False, ignore_extra_whitespaces=True)
    assert_shard_is_megatrons(tmp_path, config, theirs)


def test_tiktoken_shards_are_those_of_megatron(tmp_path: Path) -> None:
    path = save_tiktoken(tmp_path / "vocabulary.json")
    sizes = {"vocab_size": 273, "num_special_tokens": 10}
    config = TokenizerConfig(type="TikTokenizer", model=str(path), vocab_size=273, tiktoken_num_special_tokens=10)
    assert_shard_is_megatrons(tmp_path, config, megatron("tiktoken", path, pattern="v2", **sizes))


def test_the_text_is_of_many_scripts() -> None:
    joined = "".join(texts())
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in set(joined) if character.isalpha()}
    assert {"LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "HANGUL"} <= scripts
