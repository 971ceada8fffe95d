"""The model's options come from the checkpoint, and a difference is named with both values."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_kaiyuan.checkpoints.identity import check_fitting_model, check_same_run, first_difference
from megatron_kaiyuan.checkpoints.model_identity import carried_options, differences
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.flags.identity import FUNCTION, WEIGHTS

DEFAULTS: dict[str, Any] = {
    "num_layers": None,
    "qk_layernorm": False,
    "window_size": None,
    "rotary_base": 10000,
    "attention_dropout": 0.1,
    "normalization": "LayerNorm",
}
SAVED = Namespace(
    num_layers=2,
    qk_layernorm=True,
    rotary_base=500000,
    normalization="RMSNorm",
    attention_dropout=0.0,
    padded_vocab_size=96,
    kaiyuan_sandwich_norm=True,
    kaiyuan_logit_softcap=30.0,
    kaiyuan_branch_scale_bits=6,
)
STOCK = Namespace(num_layers=2, qk_layernorm=True, rotary_base=500000, normalization="RMSNorm")

ONE_HEAD_EACH, GROUPED = {"group_query_attention": False}, {"group_query_attention": True}
ROTARY, LEARNED = {"position_embedding_type": "rope"}, {"position_embedding_type": "learned_absolute"}


def test_what_the_command_line_leaves_open_comes_from_the_checkpoint() -> None:
    carried = carried_options(SAVED, {"rotary_base", "normalization"}, DEFAULTS)
    expected = {
        "num_layers": 2,
        "qk_layernorm": True,
        "attention_dropout": 0.0,
        "padded_vocab_size": 96,
        "kaiyuan_sandwich_norm": True,
        "kaiyuan_logit_softcap": 30.0,
        "kaiyuan_branch_scale_bits": 6,
    }
    assert {name: carried.get(name) for name in expected} == expected
    assert carried.keys().isdisjoint({"rotary_base", "normalization"})
    assert carried["window_size"] is None, "off in the version that saved it"


@pytest.mark.parametrize("given", ["padded_vocab_size", "make_vocab_size_divisible_by", "pad_vocab_size"])
def test_a_padding_that_is_given_is_not_carried(given: str) -> None:
    assert "padded_vocab_size" not in carried_options(SAVED, {given}, DEFAULTS)


def test_a_checkpoint_of_stock_megatron_has_our_options_off() -> None:
    carried = carried_options(STOCK, set(), DEFAULTS)
    assert (carried["kaiyuan_sandwich_norm"], carried["kaiyuan_logit_softcap"]) == (False, 0.0)
    capped = Namespace(load="run", **vars(STOCK), kaiyuan_logit_softcap=30.0)
    with pytest.raises(ResumeError, match=r"--kaiyuan-logit-softcap was 0\.0 and is now 30\.0"):
        check_same_run(capped, STOCK, DEFAULTS)
    off = Namespace(load="run", **vars(STOCK), kaiyuan_logit_softcap=0.0, kaiyuan_sandwich_norm=False)
    check_same_run(off, STOCK, DEFAULTS)


def test_an_option_of_a_later_megatron_was_off_and_what_is_not_known_equals_everything() -> None:
    now = Namespace(**vars(STOCK), window_size=[4, 0], attention_dropout=0.0, layernorm_epsilon=1e-6)
    [found] = differences(STOCK, now, (*WEIGHTS, *FUNCTION), DEFAULTS)
    assert str(found) == "--window-size was None and is now [4, 0]"


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"norm_epsilon": 1e-5}, {"layernorm_epsilon": 1e-6}, "--norm-epsilon was 1e-05 and is now 1e-06"),
        ({"apply_layernorm_1p": True}, {"layernorm_zero_centered_gamma": False}, "--apply-layernorm-1p was True"),
        ({"window_size": (4, 0)}, {"window_size": [4, 0]}, None),
        (ONE_HEAD_EACH | {"num_query_groups": 1}, ONE_HEAD_EACH | {"num_query_groups": 4}, None),
        (GROUPED | {"num_query_groups": 1}, GROUPED | {"num_query_groups": 4}, "--num-query-groups was 1 and is now 4"),
        (ROTARY | {"max_position_embeddings": 8}, ROTARY | {"max_position_embeddings": 16}, None),
        (LEARNED | {"max_position_embeddings": 8}, LEARNED | {"max_position_embeddings": 16}, "--max-position-embed"),
        ({"moe_layer_freq": [1, 0]}, {"moe_layer_freq": 1}, "--moe-layer-freq was [1, 0] and is now 1"),
        ({"kaiyuan_sandwich_norm": True}, {}, "--kaiyuan-sandwich-norm was True and is now False"),
    ],
)  # fmt: skip
def test_options_are_compared_by_what_they_mean(before: dict[str, Any], now: dict[str, Any], found: str | None) -> None:
    told = first_difference(Namespace(**before), Namespace(**now))
    assert told is None if found is None else str(told).startswith(found)


def test_a_new_run_may_change_the_function_but_not_the_weights() -> None:
    changed = vars(SAVED) | {"rotary_base": 10000, "attention_dropout": 0.1, "kaiyuan_logit_softcap": 0.0}
    told = check_fitting_model(Namespace(load="run", **changed), SAVED, DEFAULTS)
    assert told == [
        "--rotary-base was 500000 and is now 10000",
        "--kaiyuan-logit-softcap was 30.0 and is now 0.0",
        "--attention-dropout was 0.0 and is now 0.1",
    ]
    for name, value in (("num_layers", 4), ("kaiyuan_sandwich_norm", False), ("padded_vocab_size", 128)):
        other = Namespace(load="run", **(vars(SAVED) | {name: value}))
        with pytest.raises(ResumeError, match=r"weights come from run and would not fit"):
            check_fitting_model(other, SAVED, DEFAULTS)


def test_another_tokenizer_is_told_when_a_new_run_starts_from_weights() -> None:
    before, now = (Namespace(load="run", **vars(SAVED), kaiyuan_tokenizer=name) for name in "ab")
    assert check_fitting_model(now, before, DEFAULTS) == ["the tokenizer (its fingerprint) was a and is now b"]
