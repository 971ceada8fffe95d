"""Architecture flags that would build another model than asked are refused by name before anything is built."""

import argparse

import pytest

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.architecture import ARCHITECTURE, GROUPS, OF_OTHER_GROUPS
from megatron_kaiyuan.flags.rules import ALWAYS, Fate, refuse_flags
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.training.parsing import known_flags, parse

ALWAYS_REFUSED = [
    (name, rule.says)
    for rule in ARCHITECTURE
    if rule.fate is Fate.REFUSED and rule.where is ALWAYS
    for name in rule.names
]


def test_every_option_of_megatrons_model_groups_has_a_row() -> None:
    """The first of these groups is generated from the fields of `TransformerConfig`: a new field is a new option."""
    flags = known_flags()
    assert set(GROUPS) <= {flag.group for flag in flags.values()}
    wanted = {name for name, flag in flags.items() if flag.group in GROUPS} | set(OF_OTHER_GROUPS)
    decided = {name for rule in TABLE for name in rule.names}
    assert wanted - decided == set()


@pytest.mark.parametrize(("name", "says"), ALWAYS_REFUSED, ids=[name for name, _ in ALWAYS_REFUSED])
def test_a_flag_of_another_model_is_refused_whatever_else_is_given(name: str, says: str) -> None:
    flags = known_flags()
    defaults = {other: flag.default for other, flag in flags.items()}
    args = argparse.Namespace(**(defaults | {name: "something else"}))
    with pytest.raises(ConfigError) as refused:
        refuse_flags(args, defaults, ARCHITECTURE, flags)
    assert flags[name].usual in str(refused.value)
    assert says in str(refused.value)


LOCAL = "--transformer-impl local"
TE = "--transformer-impl transformer_engine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--hybrid-layer-pattern M*M*", "^--hybrid-layer-pattern .*: it is of .*HybridModel.*pretrain_hybrid.py"),
        ("--multi-latent-attention", "^--multi-latent-attention: .*; use --group-query-attention, or train"),
        ("--experimental-attention-variant dsa", "^--experimental-attention-variant dsa: our layers have softmax"),
        ("--heterogeneous-layers-config-path f", "^--heterogeneous-layers-config-path f: layers of different shapes"),
        (f"{LOCAL} --apply-layernorm-1p", "^--apply-layernorm-1p with --transformer-impl local.*: it is of T"),
        (f"{LOCAL} --fp8-format hybrid", "^--fp8-format hybrid with --transformer-impl local: .*; use"),
        (f"{LOCAL} --fp4-format e2m1", "^--fp4-format e2m1 with --transformer-impl local"),
        (f"{LOCAL} --attention-backend flash", "^--attention-backend flash with .*local: .*; use --kaiyuan-attention"),
        (f"{LOCAL} --qk-l2-norm", "^--qk-l2-norm with --transformer-impl local and no experts: .*; use --qk-layernorm"),
        (f"{TE} --qk-l2-norm --qk-layernorm", "^--qk-l2-norm with --qk-layernorm: .*; give one of them"),
        (f"{LOCAL} --window-size 4,0", "^--window-size 4 0 with .* SDPA: .*; use --kaiyuan-attention unfused"),
        (f"{LOCAL} --softmax-type learnable", "^--softmax-type learnable with .* SDPA"),
        (f"{LOCAL} --num-experts 4 --moe-grouped-gemm", "^--moe-grouped-gemm with --transformer-impl local"),
        (f"{LOCAL} --use-transformer-engine-op-fuser", "^--use-transformer-engine-op-fuser with --transf"),
        (f"{LOCAL} --kaiyuan-attention unfused --use-flash-attn", "^--use-flash-attn without SDPA: it"),
        ("--position-embedding-type mrope", "^--position-embedding-type mrope in a text model: .*; use rope, yarn"),
        ("--position-embedding-type relative", "^--position-embedding-type relative in a text model"),
        # Of features that are off.
        ("--num-query-groups 2", "^--num-query-groups 2 without --group-query-attention: nothing reads it then; give"),
        ("--rotary-base 500000", "^--rotary-base 500000 without --position-embedding-type rope"),
        ("--position-embedding-type none --use-rope-scaling", "^--use-rope-scaling without --position-embedding-type"),
        ("--moe-router-topk 4 --moe-layer-freq 2", "^--moe-layer-freq 2, --moe-router-topk 4 without --num-experts"),
        ("--mtp-loss-scaling-factor 0.3", "^--mtp-loss-scaling-factor 0.3 without --mtp-num-layers"),
        ("--fp8-recipe tensorwise", "^--fp8-recipe tensorwise without --fp8-format"),
        ("--glu-linear-offset 1", "^--glu-linear-offset 1.0 without --swiglu or --quick-geglu"),
        ("--swiglu --glu-linear-offset 1", "^--glu-linear-offset 1.0 with Megatron's fused SwiGLU: .*; add"),
        ("--recompute-modules mlp", "^--recompute-modules mlp without --recompute-granularity"),
        # Megatron 0.19 does nothing with these.
        ("--apply-residual-connection-post-layernorm", "^--apply-residual-connection-post-layernorm: nothing"),
        ("--openai-gelu", "^--openai-gelu: no model of Megatron 0.19 acts on it"),
        ("--rope-scaling-factor 4", "^--rope-scaling-factor 4.0: Megatron 0.19 does not hand it on"),
    ],
)  # fmt: skip
def test_a_flag_that_would_build_another_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    with pytest.raises(ConfigError, match=told):
        parse({"apply_rope_fusion": False})


@pytest.mark.parametrize(
    "words",
    [
        f"{TE} --fp8-format hybrid --fp8-recipe tensorwise --attention-backend flash --apply-layernorm-1p --qk-l2-norm",
        f"{LOCAL} --num-experts 4 --qk-l2-norm --moe-layer-freq 2 --moe-shared-expert-intermediate-size 8",
        f"{LOCAL} --kaiyuan-attention unfused --window-size 4,0 --window-attn-skip-freq 2 --softmax-type learnable",
        f"{LOCAL} --use-flash-attn --position-embedding-type rope --rotary-base 500000 --use-rope-scaling",
        "--group-query-attention --num-query-groups 2 --use-rotary-position-embeddings --rotary-percent 0.5",
        "--position-embedding-type yarn --mscale 0.7 --no-yarn-correction-range-round-to-int",
        "--swiglu --no-bias-swiglu-fusion --glu-linear-offset 1 --activation-func-clamp-value 7",
        "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.3",
        "--recompute-activations --recompute-modules core_attn mlp",
    ],
)
def test_a_flag_that_reaches_the_model_is_taken(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *words.split()])
    parse({})
