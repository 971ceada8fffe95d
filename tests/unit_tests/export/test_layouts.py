"""Stock layouts compute what our own does; scaled branches stay finite where unscaled ones overflow."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from megatron_kaiyuan.checkpoints.reading import Checkpoint, open_checkpoint
from megatron_kaiyuan.commands import convert
from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.from_hugging_face import import_model
from megatron_kaiyuan.export.layouts import LayoutName, choose_layout
from megatron_kaiyuan.export.modeling_kaiyuan import KaiyuanForCausalLM
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.unit_tests.export.small_models import KAIYUAN, SCALED, SmallModel, save_model
from tests.unit_tests.export.test_logits import rounding
from tests.unit_tests.model.reference import Features, random_batch, reference_logits

UNIT = 2.0**-24
LLAMA = SmallModel("llama")
QWEN2 = SmallModel("qwen2", qkv_bias=True)
QWEN3 = SmallModel("qwen3", Features(qk_norm=True))
GEMMA3 = SmallModel("gemma3", Features(sandwich=True, qk_norm=True, softcap=30.0))
STOCK = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As a user does, without trust_remote_code; our own layout by its class."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "kaiyuan":
        return KaiyuanForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = model(tokens).logits.double().numpy()
    return found


@pytest.mark.parametrize(("stock", "model"), STOCK.items(), ids=STOCK)
def test_auto_takes_the_stock_layout_and_it_computes_the_same(stock: str, model: SmallModel, tmp_path: Path) -> None:
    checkpoint = save_model(model, tmp_path / "run", torch.float32)
    exported = export_checkpoint(checkpoint, tmp_path / "stock")
    export_checkpoint(checkpoint, tmp_path / "own", layout="kaiyuan")

    found = load(tmp_path / "stock")
    assert type(found).__name__ == stock
    assert not exported.layout.has_code
    assert not list((tmp_path / "stock").glob("*.py"))
    tokens = random_batch(model.shape)[0]
    right = logits(load(tmp_path / "own"), tokens)
    assert float(np.abs(right).max()) > 25
    np.testing.assert_allclose(logits(found, tokens), right, rtol=0, atol=2 * rounding(model, UNIT))
    if not model.qkv_bias:
        oracle = reference_logits(model.weights(), tokens, model.shape, model.features).numpy()
        np.testing.assert_allclose(logits(found, tokens), oracle, rtol=0, atol=2 * rounding(model, UNIT))


def test_a_dropped_bias_would_be_seen(tmp_path: Path) -> None:
    checkpoint = save_model(QWEN2, tmp_path / "run", torch.float32)
    export_checkpoint(checkpoint, tmp_path / "stock")
    tokens = random_batch(QWEN2.shape)[0]
    model = load(tmp_path / "stock")
    right = logits(model, tokens)
    model.model.layers[0].self_attn.q_proj.bias.data.zero_()
    assert float(np.abs(logits(model, tokens) - right).max()) > 100 * rounding(QWEN2, UNIT)


def test_gemma3_on_request_is_exact_in_fp32(tmp_path: Path) -> None:
    checkpoint = save_model(GEMMA3, tmp_path / "run", torch.float32)
    export_checkpoint(checkpoint, tmp_path / "gemma", layout="gemma3")
    model = load(tmp_path / "gemma")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    tokens = random_batch(GEMMA3.shape)[0]
    oracle = reference_logits(GEMMA3.weights(), tokens, GEMMA3.shape, GEMMA3.features).numpy()
    # gains - 1 and the embedding over sqrt(h) are two roundings more a layer
    np.testing.assert_allclose(logits(model, tokens), oracle, rtol=0, atol=4 * rounding(GEMMA3, UNIT))


@pytest.mark.parametrize("stock", STOCK.items(), ids=STOCK)
def test_a_stock_model_is_imported_and_exported_again_without_a_bit_changed(
    stock: tuple[str, SmallModel], tmp_path: Path
) -> None:
    name, model = stock
    export_checkpoint(save_model(model, tmp_path / "run", torch.float32), tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    for key in ("rope_parameters", "use_sliding_window", "sliding_window", "dtype"):  # as older files have it
        config.pop(key, None)
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))

    architecture = import_model(tmp_path / "first", tmp_path / "back")

    assert architecture == model.architecture
    export_checkpoint(open_checkpoint(tmp_path / "back"), tmp_path / "second")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "second" / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True; the training code has only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'linear'",
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma2", {}, "models of type kaiyuan, llama, qwen2, qwen3 can be imported"),
    ],
)
def test_what_the_training_code_does_not_compute_is_refused(
    kind: str, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": LLAMA}[kind]
    export_checkpoint(save_model(model, tmp_path / "run", torch.float32), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind} | change))
    with pytest.raises(ConvertError, match=message):
        import_model(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("model", "layout", "named"),
    [
        (
            KAIYUAN,
            "llama",
            "QK-norm: yes in the model, no there; sandwich norm: yes in the model, no there; soft-capped",
        ),
        (LLAMA, "qwen3", "QK-norm: no in the model, yes there"),
        (LLAMA, "gemma3", "sandwich norm: no in the model, yes there"),
        (replace(GEMMA3, tied=True), "gemma3", "tied embeddings: yes in the model, no there"),
        (QWEN2, "llama", "a bias on queries"),
    ],
)
def test_a_layout_that_differs_is_refused_by_its_differences(model: SmallModel, layout: LayoutName, named: str) -> None:
    with pytest.raises(ConvertError, match=named):
        choose_layout(model.architecture, layout, torch.float32)


def large_branches(folder: Path) -> Checkpoint:
    """A model with K = 8 whose products before the output norms pass 65 504 by far when they are not scaled."""
    return save_model(replace(SCALED, gain_of_products=2.0**16), folder, torch.float16)


def test_scaled_branches_are_finite_in_fp16_and_equal_to_fp32(tmp_path: Path) -> None:
    checkpoint = large_branches(tmp_path / "run")
    exported = export_checkpoint(checkpoint, tmp_path / "hf", check=True)
    assert exported.largest is not None
    assert exported.largest.value < 65504
    tokens = random_batch(SCALED.shape)[0]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    half, brain, single = (logits(load(tmp_path / "hf", dtype), tokens) for dtype in dtypes)
    assert np.isfinite(half).all()
    assert np.isfinite(brain).all()
    stored = 12 * SCALED.shape.layers + 2
    scale = rounding(SCALED, 1.0) / (2 * (2 * 32 + 48 + 12) + 32)
    np.testing.assert_allclose(half, single, rtol=0, atol=stored * 2.0**-11 * scale)
    np.testing.assert_allclose(brain, single, rtol=0, atol=stored * 2.0**-8 * scale)


def test_without_the_scale_the_check_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = large_branches(tmp_path / "run")
    checkpoint.arguments.kaiyuan_branch_scale_bits = 0
    with pytest.raises(ConvertError, match=r"not finite in float16: model\.layers\.0.*give --dtype bfloat16"):
        export_checkpoint(checkpoint, tmp_path / "hf", check=True)
    assert not (tmp_path / "hf").exists()
    export_checkpoint(checkpoint, tmp_path / "hf", check=True, dtype=torch.bfloat16)
    with pytest.raises(ConvertError, match="overflow FP16 there"):
        choose_layout(replace(GEMMA3, branch_scale_bits=8).architecture, "gemma3", torch.float16)


def test_a_weight_beyond_the_range_of_the_dtype_is_named(tmp_path: Path) -> None:
    checkpoint = save_model(replace(KAIYUAN, gain_of_products=2.0**20), tmp_path / "run", torch.float32)
    with pytest.raises(ConvertError, match=r"(o_proj|down_proj)\.weight reaches .* beyond its range"):
        export_checkpoint(checkpoint, tmp_path / "hf", dtype=torch.float16)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_under_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:  # noqa: FBT001
    export_checkpoint(save_model(KAIYUAN, tmp_path / "run", torch.float32), tmp_path / "hf")
    tokens = random_batch(KAIYUAN.shape)[0]
    found = []
    for checkpointed in (False, True):
        model = load(tmp_path / "hf").train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers; users call it by this name
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens).loss.backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ({"sandwich_norm": False}, "it needs sandwich_norm, which takes it back"),
    ],
)
def test_overrides_of_the_configuration_are_refused_too(
    override: dict[str, object], message: str, tmp_path: Path
) -> None:
    export_checkpoint(save_model(SCALED, tmp_path / "run", torch.float32), tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        KaiyuanForCausalLM.from_pretrained(tmp_path / "hf", **override)


def test_a_window_in_the_configuration_file_is_refused(tmp_path: Path) -> None:
    export_checkpoint(save_model(KAIYUAN, tmp_path / "run", torch.float32), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 8}))
    with pytest.raises(ValueError, match="sliding_window is 8"):
        KaiyuanForCausalLM.from_pretrained(tmp_path / "hf")


class Passed(torch.nn.Module):
    """What a serving engine puts in the place of a layer that another stage of its pipeline holds."""

    def forward(self, *args: Any, **_kwargs: Any) -> Any:
        return args[0]


def test_a_pipeline_stage_of_a_serving_engine_hands_states_on(tmp_path: Path) -> None:
    """The calls of vLLM's Transformers back end: stages by `base_model_pp_plan`, embeddings in, states out."""
    export_checkpoint(save_model(KAIYUAN, tmp_path / "run", torch.float32), tmp_path / "hf")
    tokens = random_batch(KAIYUAN.shape)[0]
    whole = load(tmp_path / "hf").model
    assert set(whole.config.base_model_pp_plan) == {"embed_tokens", "layers", "norm"}
    places = torch.arange(tokens.shape[1])[None]
    right = whole(input_ids=tokens, use_cache=False, position_ids=places, return_dict=False)[0]
    first, last = load(tmp_path / "hf").model, load(tmp_path / "hf").model
    for layer in range(1, KAIYUAN.shape.layers):
        first.layers[layer] = Passed()
    first.norm, last.layers[0] = Passed(), Passed()
    states = first(input_ids=tokens, use_cache=False, position_ids=places, return_dict=False)[0]
    found = last(inputs_embeds=states, use_cache=False, position_ids=places, return_dict=False)[0]
    assert torch.equal(found, right)


def test_the_command_offers_every_layout() -> None:
    """It spells them itself, because its `--help` does without torch."""
    assert ("auto", *get_args(LayoutName)) == convert._LAYOUTS
