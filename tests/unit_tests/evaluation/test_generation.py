from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_kaiyuan.errors import ConfigError, TokenizerError
from megatron_kaiyuan.evaluation.generation import Sampling, sample_next, sample_tokens
from megatron_kaiyuan.evaluation.token_bytes import token_bytes


class Counter:
    """A model that is sure the next token is the present one plus one, and remembers the contexts it saw."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.lengths: list[int] = []

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: None) -> torch.Tensor:
        assert torch.equal(positions, torch.arange(ids.shape[1])[None])
        self.lengths.append(ids.shape[1])
        return 50.0 * torch.nn.functional.one_hot((ids + 1) % self.vocabulary, self.vocabulary).half()


@pytest.fixture(autouse=True)
def _stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert sample_next(logits, Sampling(temperature=0.0), torch.Generator()) == 1


def test_top_k_never_leaves_the_k_likeliest_and_reaches_all_of_them() -> None:
    logits = torch.tensor([0.1, 0.0, 5.0, 0.2, 5.1])
    generator = torch.Generator().manual_seed(0)
    drawn = {sample_next(logits, Sampling(temperature=1.0, top_k=2), generator) for _ in range(100)}
    assert drawn == {2, 4}


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sample_next(logits, Sampling(temperature=0.5), generator) for _ in range(4000)]
    expected = 1 / (1 + np.exp(-2.0))
    # four standard deviations of a mean of 4000 draws
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))


def test_generation_stops_at_the_end_of_the_text() -> None:
    tokens = sample_tokens(Counter(10), [3], Sampling(temperature=0.0), positions=64, vocabulary=10, end=7)
    assert tokens == [4, 5, 6]


def test_padding_of_the_vocabulary_is_never_drawn_and_old_tokens_are_forgotten() -> None:
    model = Counter(10)
    sampling = Sampling(temperature=1.0, max_new_tokens=30)
    tokens = sample_tokens(model, [3], sampling, positions=4, vocabulary=6, end=None)
    assert len(tokens) == 30
    assert max(tokens) < 6
    assert model.lengths == [1, 2, 3] + [4] * 27


def test_the_same_seed_gives_the_same_text() -> None:
    def flat(ids: torch.Tensor, positions: torch.Tensor, mask: None) -> torch.Tensor:
        return torch.zeros(*ids.shape, 50)

    texts = [
        sample_tokens(flat, [1], Sampling(temperature=1.0, seed=seed), positions=8, vocabulary=50, end=None)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_name_their_flag(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(tmp_path: Path) -> None:
    text = "naïve café, 模型 and\ttabs\n" * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = token_bytes(tmp_path)
    assert sizes is not None
    assert int(sizes[tokenizer.encode(text + "<end>").ids].sum()) == len(text.encode())


def test_bytes_are_unknown_without_a_byte_level_tokenizer(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(tmp_path) is None


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        token_bytes(tmp_path)
