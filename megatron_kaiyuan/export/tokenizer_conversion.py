"""SentencePiece models and TikTokenizer vocabularies as a `tokenizer.json`, which is what serving engines read.

The conversion follows the file's own options, and nothing is taken for granted: what it writes is compared with the
tokenizer that made the ids, text by text (`require_same_ids`).
"""

import string
from collections.abc import Callable, Sequence
from typing import Any

from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.host.files import read_regular
from megatron_kaiyuan.shards.tiktoken_layout import tiktoken_encoding
from megatron_kaiyuan.shards.tokenizer import DocumentTokenizer, TokenizerConfig, model_file

__all__ = ["SAMPLE_TEXTS", "converted", "require_same_ids"]

SAMPLE_TEXTS = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog; it's 3.14159 or 65,504 (roughly), isn't it?",
    " one space before, and one behind ",
    "runs of  two,   three,    four, and         nine spaces",
    "        eight spaces first\n        and again\n\n\n\tdef f(x):\n\t\treturn x ** 2.5  # half\r\n  \n",
    "   \n   \t \n",
    "naïve Zürich café, ÆØÅ ß ẞ ŐŰ İı, «да» ёлка, Ελληνικά, עברית, العَرَبِيَّة, हिन्दी, ไทย",
    "数据和模型。「引号」，全角ＡＢＣ１２３；日本語のテキスト、한국어 문장 아브라",
    "e\u0301 \u00e9 \ufb01 \u2126 \u00bd x\u00b2 \u200b zero\u00a0width\u3000wide \u2028 line",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 \U0001f9ea\U0010fffd \u0000\u0007\u007f control",
    "x=1;y+=2;z->w::v{}[]()<>|&^%$#@!~`\\/ 1234567890 12 345 6789 CamelCase snake_case kebab-case HTTPServer",
    string.printable * 2,
)
"""What the ids are compared on: spaces, line ends, digits, code, many scripts, combining and invisible characters."""

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Numbers of SentencePiece's own format."""


def converted(config: TokenizerConfig) -> Any:
    """Return the `tokenizers.Tokenizer` with the ids of a SentencePiece model or a TikTokenizer vocabulary.

    Raises:
        ConvertError: a SentencePiece model of words or characters.
    """
    return _from_tiktoken(config) if config.type == "TikTokenizer" else _from_sentencepiece(config)


def require_same_ids(reference: DocumentTokenizer, encode: Callable[[str], Sequence[int]], named: str) -> None:
    """Refuse a tokenizer that gives other ids than the one the model was trained with.

    Args:
        reference: The one that made the ids.
        encode: Ids of a text by the other.
        named: Names the other in the message.

    Raises:
        ConvertError: with the first text and place where they differ.
    """
    for text in SAMPLE_TEXTS:
        expected, found = reference.encode([text]).tokens.tolist(), list(encode(text))
        if found != expected:
            pairs = zip([*expected, None], [*found, None], strict=False)
            place = next(number for number, (one, other) in enumerate(pairs) if one != other)
            raise ConvertError(
                f"{named} does not give the ids that the model was trained with: id {place} of {text[:40]!r} is "
                f"{[*found, None][place]} instead of {[*expected, None][place]}; export without --tokenizer, and put "
                "its own files beside the model"
            )


def _from_tiktoken(config: TokenizerConfig) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = tiktoken_encoding(
        config.model,
        read_regular(model_file(config)),
        pattern=config.tiktoken_pattern,
        num_special_tokens=config.tiktoken_num_special_tokens,
        vocab_size=config.vocab_size,
    )

    class Ranks(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_file: str) -> dict[bytes, int]:
            ranks: dict[bytes, int] = encoding._mergeable_ranks
            return ranks

    vocabulary, merges = Ranks().extract_vocab_merges_from_model("")  # type: ignore[no-untyped-call]
    specials = dict(sorted(encoding._special_tokens.items(), key=lambda entry: entry[1]))
    tokenizer = Tokenizer(models.BPE(vocabulary | specials, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return tokenizer


def _from_sentencepiece(config: TokenizerConfig) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer

    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(read_regular(model_file(config)))
    tokenizer = Tokenizer(_model_of(content, config))
    tokenizer.normalizer = _normalizer_of(content.normalizer_spec)
    tokenizer.decoder = _decoder_of(content.normalizer_spec)
    added = [piece for piece in content.pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in added])
    return tokenizer


def _model_of(content: Any, config: TokenizerConfig) -> Any:
    from tokenizers import models
    from transformers.convert_slow_tokenizer import generate_merges

    spec = content.trainer_spec
    scores = [(piece.piece, piece.score) for piece in content.pieces]
    if spec.model_type == _UNIGRAM:
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != _BPE:
        raise ConvertError(
            f"--tokenizer {config.model}: a SentencePiece model of words or characters, which tokenizer.json cannot "
            "hold; export without --tokenizer"
        )
    whole = {piece.piece for piece in content.pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)}
    vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
    merges = generate_merges(vocabulary, scores, skip_tokens=whole)
    unknown = content.pieces[spec.unk_id].piece
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _normalizer_of(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        if spec.name.startswith("nmt_"):  # two spaces; `Precompiled` looks at the pair as one character, and drops it
            steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder_of(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
