"""Held-out losses treat the documents of a window as the run did: against each document by itself."""

from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.checkpoints.identity import END_OF_TEXT, end_of_text, store_tokenizer
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines

END = 7
DOCUMENTS = [[3, 9, 4, END], [5, END], [11, 12, 13, 14, 15, END], [20, 21, 22, 23, 24]]
"""One window of 16 inputs; the next document's first token is what an end predicts."""
APART = "--reset-attention-mask --reset-position-ids"
NO_MASK = "--no-create-attention-mask-in-dataloader"
CASES = ["", f"{APART} {NO_MASK}", APART, f"{APART} {NO_MASK} --eod-mask-loss"]
RECORD = TokenizerRecord(type="NullTokenizer", model=None, vocab_size=64, eod_id=END, fingerprint="a" * 64)


def losses_of_each(_rank: int, cases: list[str]) -> dict[str, Any]:
    """Of a window under each command line, and of each document by itself."""
    from megatron.core import parallel_state

    from megatron_kaiyuan.evaluation.held_out import document_options, window_losses
    from megatron_kaiyuan.model.samples import SampleOptions

    parallel_state.initialize_model_parallel()
    stream = [token for document in DOCUMENTS for token in document]
    found: dict[str, Any] = {}
    for words in cases:
        model = command_lines.build_stage(f"{words} --kaiyuan-attention auto").eval()
        arguments = command_lines.arguments_of(words)
        options = document_options(arguments, RECORD)
        found[words] = window_losses(model, np.array([stream, stream]), options)
    pieces = [[*document, following[0]] for document, following in zip(DOCUMENTS, [*DOCUMENTS[1:], [0]], strict=True)]
    alone = [window_losses(model, np.array([piece]), SampleOptions())[0][0] for piece in pieces]
    return {**found, "alone": np.concatenate(alone)[: len(stream) - 1]}


@pytest.fixture(scope="module")
def losses() -> dict[str, Any]:
    [found] = run_distributed(losses_of_each, 1, CASES)
    return dict(found)


@pytest.mark.distributed
@pytest.mark.parametrize("words", CASES)
def test_losses_are_those_of_each_document_by_itself_where_the_run_kept_them_apart(
    words: str, losses: dict[str, Any]
) -> None:
    found, counts = losses[words]
    is_end = np.array([token == END for document in DOCUMENTS for token in document][:-1])
    assert np.array_equal(counts, np.tile(~is_end if "--eod-mask-loss" in words else np.ones(16, bool), (2, 1)))
    expected = np.where(counts, losses["alone"], 0.0)
    if words:
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    else:
        assert np.abs(found - expected)[:, 5:].max() > 1e-3, "one stream of text"
        np.testing.assert_allclose(found[:, :4], expected[:, :4], rtol=2e-6)


def test_the_id_that_ends_documents_is_that_of_the_checkpoint_or_else_of_the_shards() -> None:
    from megatron_kaiyuan.evaluation.held_out import document_options

    flags = {"eod_mask_loss": True, "reset_position_ids": False, "reset_attention_mask": False}
    assert document_options(Namespace(**flags, **{END_OF_TEXT: 5}), RECORD).eod_token == 5
    earlier = Namespace(**flags, tokenizer_type="NullTokenizer", null_tokenizer_eod_id=6)
    assert document_options(earlier, RECORD).eod_token == 6
    assert document_options(Namespace(**flags), RECORD).eod_token == END
    with pytest.raises(ConfigError, match="was trained with --eod-mask-loss, but neither it nor the manifests"):
        document_options(Namespace(**flags), None)
    assert document_options(Namespace(), None).eod_token is None


class _WithEnd:
    eod = 9

    def tokenize(self, text: str) -> list[int]:
        return [len(text)]


def test_every_checkpoint_tells_the_id_that_ended_its_documents() -> None:
    planned, plain, stock = Namespace(), Namespace(), Namespace()
    store_tokenizer(planned, RECORD, _WithEnd(), planned=True)
    store_tokenizer(plain, None, _WithEnd(), planned=False)
    store_tokenizer(stock, None, _WithEnd(), planned=True)
    assert [end_of_text(args) for args in (planned, plain, stock)] == [END, 9, 9]
