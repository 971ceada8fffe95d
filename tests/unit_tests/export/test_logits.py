"""Exported models give the logits of Megatron and of the oracle, values and not only their order, soft-cap included."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.export.configuration_kaiyuan import KaiyuanConfig
from megatron_kaiyuan.export.from_hugging_face import import_model
from megatron_kaiyuan.export.modeling_kaiyuan import KaiyuanForCausalLM
from megatron_kaiyuan.export.tensor_files import TensorFolder
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.helpers import run_distributed
from tests.unit_tests.export.small_models import KAIYUAN, SCALED, VARIANTS, SmallModel, save_model
from tests.unit_tests.model.reference import random_batch, reference_logits


def logits_of_megatron(_rank: int, checkpoints: list[Path], tokens: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Entry of `run_distributed`: what the training code computes for each checkpoint."""
    from megatron_kaiyuan.checkpoints.reading import open_checkpoint
    from megatron_kaiyuan.evaluation.loading import load_model

    ids = torch.from_numpy(tokens)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    found = []
    for path in checkpoints:
        model, _ = load_model(open_checkpoint(path))
        with torch.no_grad():
            found.append(model(ids, places, None).float().numpy())
    return found


def exported(model: SmallModel, folder: Path, dtype: torch.dtype) -> tuple[Path, Any]:
    """The model as a checkpoint, and what transformers makes of its export."""
    checkpoint = save_model(model, folder / "run", dtype)
    export_checkpoint(checkpoint, folder / "hf", layout="kaiyuan")
    return folder / "run", load_exported(folder / "hf")


def load_exported(folder: Path) -> Any:
    files = TensorFolder(folder)
    model = KaiyuanForCausalLM(KaiyuanConfig.from_pretrained(folder)).eval()
    missing, unknown = model.load_state_dict({name: files.read(name) for name in files.forms}, strict=False)
    assert unknown == []
    assert set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model.to(next(iter(files.forms.values()))[1])


def rounding(model: SmallModel, unit: float) -> float:
    """How far two orders of the same sums may differ in a logit.

    A value passes at most 2 h + ffn + s products in each layer and h in the output: so many roundings of one unit,
    relative to the sum of magnitudes |x|_2 |w_v|_2, where the last norm gives |x|_2 <= sqrt(h) max|gain|. The cap only
    shrinks differences.
    """
    shape, weights = model.shape, model.weights()
    depth = shape.layers * (2 * shape.hidden + shape.ffn + shape.sequence) + shape.hidden
    norm = shape.hidden**0.5 * float(weights["decoder.final_layernorm.weight"].abs().max())
    return depth * unit * norm * float(weights["output_layer.weight"].norm(dim=1).max())


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = model(tokens).logits.double().numpy()
    return values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return {model.name: exported(model, tmp_path_factory.mktemp("export"), torch.float32) for model in VARIANTS}


@pytest.fixture(scope="module")
def of_megatron(models: dict[str, tuple[Path, Any]]) -> dict[str, NDArray[np.float32]]:
    tokens = random_batch(KAIYUAN.shape)[0].numpy()
    found = run_distributed(logits_of_megatron, 1, [path for path, _ in models.values()], tokens)[0]
    return dict(zip(models, found, strict=True))


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.name)
def test_in_double_precision_the_exported_model_is_the_oracle(
    model: SmallModel, models: dict[str, tuple[Path, Any]]
) -> None:
    tokens = random_batch(model.shape)[0]
    expected = reference_logits(model.weights(), tokens, model.shape, model.features).numpy()
    exact = logits_of(load_exported(models[model.name][0].parent / "hf").double(), tokens)
    # transformers' epsilon and ours are the same FP64; what is left is rounding
    np.testing.assert_allclose(exact, expected, rtol=0, atol=rounding(model, 2.0**-53))


@pytest.mark.distributed
@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.name)
def test_the_logits_are_those_of_megatron(
    model: SmallModel, models: dict[str, tuple[Path, Any]], of_megatron: dict[str, NDArray[np.float32]]
) -> None:
    tokens = random_batch(model.shape)[0]
    tolerance = 2 * rounding(model, 2.0**-24)
    np.testing.assert_allclose(
        logits_of(models[model.name][1], tokens), of_megatron[model.name], rtol=0, atol=tolerance
    )


def test_a_round_trip_of_scaled_branches_keeps_the_scale(models: dict[str, tuple[Path, Any]]) -> None:
    usual, scaled = (models[model.name][0].parent / "hf" for model in (KAIYUAN, SCALED))
    names = sorted(path.name for path in usual.iterdir())
    assert names == sorted(path.name for path in scaled.iterdir())
    different = {name for name in names if (usual / name).read_bytes() != (scaled / name).read_bytes()}
    assert different <= {"conversion.json", "config.json"}  # the weights are the same
    import_model(scaled, scaled.parent / "back")
    assert open_checkpoint(scaled.parent / "back").arguments.kaiyuan_branch_scale_bits == 8


def test_a_model_without_the_cap_would_be_seen_though_its_best_tokens_are_the_same(
    models: dict[str, tuple[Path, Any]], of_megatron: dict[str, NDArray[np.float32]]
) -> None:
    """What makes the test above worth something: tanh keeps the order, so tokens cannot show whether it is there."""
    uncapped = load_exported(models[KAIYUAN.name][0].parent / "hf")
    uncapped.config.final_logit_softcapping = None
    values = logits_of(uncapped, random_batch(KAIYUAN.shape)[0])
    right = of_megatron[KAIYUAN.name]
    assert float(np.abs(right).max()) <= 30.0
    assert float(np.abs(values).max()) > 90.0
    assert float(np.median(np.abs(values - right))) > 100 * 2 * rounding(KAIYUAN, 2.0**-24)
    clear = np.abs(right).max(axis=-1) < 29.99  # beyond, FP32 rounds neighbours to one value
    assert clear.any()
    assert (values.argmax(axis=-1) == right.argmax(axis=-1))[clear].all()


@pytest.mark.distributed
def test_in_half_precision_too(tmp_path: Path) -> None:
    run, model = exported(KAIYUAN, tmp_path, torch.float16)
    tokens = random_batch(KAIYUAN.shape)[0]
    expected = run_distributed(logits_of_megatron, 1, [run], tokens.numpy())[0][0]
    found = model(tokens).logits
    assert found.dtype == torch.float32  # the cap's output, as in training
    # FP16 stores each intermediate with unit 2^-11 but sums in FP32: as many roundings as stored tensors (12 a layer)
    stored = 12 * KAIYUAN.shape.layers + 2
    scale = rounding(KAIYUAN, 1.0) / (2 * (2 * 32 + 48 + 12) + 32)
    assert float(np.abs(expected).max()) > 25.0
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=stored * 2.0**-11 * scale)
