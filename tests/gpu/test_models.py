"""A training step of each spec in each precision, with each fusion, against the float64 model."""

import itertools
from typing import Any

import pytest

from tests.gpu.machine import ENGINE
from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Shape
from tests.unit_tests.model.test_model import FUSED, KAIYUAN, assert_matches_reference
from tests.unit_tests.model.tiny import Case, Outcome

SHAPE = Shape(hidden=96, heads=3, groups=1, head_size=32, ffn=160, vocab=193, sequence=33, batch=3)
FUSE_WEIGHT_GRADIENTS = {"gradient_accumulation_fusion": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SPECS = ["local"] if ENGINE else ["local", "transformer_engine"]
PRECISIONS: dict[str, dict[str, bool]] = {"FP16": {"half": True}, "bf16": {"bf16": True}}


def cases_of(spec: str, precision: str) -> list[Case]:
    """One for each fusion, all of them together, and what changes how they are called."""
    base: dict[str, Any] = {"implementation": spec, "shape": SHAPE, "features": KAIYUAN, **PRECISIONS[precision]}
    variants: dict[str, dict[str, Any]] = {
        "unfused": {},
        **{f"fusion {name}": {"fusions": name} for name in FUSED.split(",")},
        "weight gradients fused": {"overrides": FUSE_WEIGHT_GRADIENTS},
        "all fusions": {"fusions": FUSED, "overrides": FUSE_WEIGHT_GRADIENTS},
        "all fusions, branch scale 4": {"fusions": FUSED, "branch_scale_bits": 4},
        "all fusions, SwiGLU recomputed": {"fusions": FUSED, "recompute_swiglu": True},
        "all fusions, layers recomputed": {"fusions": FUSED, "overrides": RECOMPUTE},
    }
    if spec == "local":
        variants["all fusions, FP32 residual"] = {"fusions": FUSED, "overrides": {"fp32_residual_connection": True}}
        variants["unfused attention"] = {"attention": "unfused"}
    return [Case(name=f"{spec}, {precision}, {what}", **base, **more) for what, more in variants.items()]


CASES = [case for spec, precision in itertools.product(SPECS, PRECISIONS) for case in cases_of(spec, precision)]
CASES.append(Case(name="local, FP32, all fusions", shape=SHAPE, features=KAIYUAN, fusions=FUSED))
pytestmark = pytest.mark.distributed


def attempt_steps(rank: int, cases: list[Case]) -> dict[str, Any]:
    """As `tiny.train_steps`, but a case that fails leaves the others their result."""
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results |= tiny.train_steps(rank, [case])
        except Exception as error:  # reported by that case's own test
            results[case.name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    [found] = run_distributed(attempt_steps, 1, CASES, timeout=300)
    return dict(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_training_step(case: Case, results: dict[str, Any]) -> None:
    found = results[case.name]
    assert isinstance(found, dict), found
    assert_matches_reference(case, Outcome(**tiny.unpacked(found)))


@pytest.mark.skipif(bool(ENGINE), reason=ENGINE or "there")
def test_transformer_engine_is_among_the_specs() -> None:
    assert "transformer_engine" in SPECS
