"""What cannot be converted is refused before anything is written, with the name of what is wrong and what to do."""

import json
import runpy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ConvertError, TokenizerError
from megatron_kaiyuan.export import configuration_kaiyuan
from megatron_kaiyuan.export.architecture import OPTIONS_WITHOUT_EFFECT, architecture_from_arguments
from megatron_kaiyuan.export.configuration_kaiyuan import KaiyuanConfig
from megatron_kaiyuan.export.from_hugging_face import import_model
from megatron_kaiyuan.export.layouts import architecture_from_config
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from megatron_kaiyuan.model.config import KaiyuanModelOptions
from tests.unit_tests.export.small_models import KAIYUAN, save_model
from tests.unit_tests.export.test_transformers import write_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return save_model(KAIYUAN, tmp_path / "run", torch.float16)


def with_arguments(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    changed = Checkpoint(checkpoint.folder, checkpoint.iteration)
    changed.__dict__["arguments"] = Namespace(**{**vars(checkpoint.arguments), **changes})  # its cached property
    return changed


@pytest.mark.parametrize(
    ("argument", "value", "flag"),
    [
        ("normalization", "LayerNorm", "--normalization"),
        ("swiglu", False, "--swiglu"),
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("rotary_percent", 0.5, "--rotary-percent"),
        ("use_rope_scaling", True, "--use-rope-scaling"),
        ("window_size", (128, 0), "--window-size"),
        ("num_experts", 8, "--num-experts"),
        ("multi_latent_attention", True, "--multi-latent-attention"),
        ("mtp_num_layers", 1, "--mtp-num-layers"),
        ("spec", ["my", "layers"], "--spec"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, argument: str, value: object, flag: str
) -> None:
    with pytest.raises(ConvertError, match=f"{flag} .*KaiyuanForCausalLM does not compute that"):
        export_checkpoint(with_arguments(checkpoint, **{argument: value}), tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_every_option_of_the_variant_is_exported_or_known_to_have_no_effect() -> None:
    """A new option must be added to one side or the other."""
    names = {field.name for field in fields(KaiyuanModelOptions)}
    assert names == {"sandwich_norm", "logit_softcap", "branch_scale_bits"} | OPTIONS_WITHOUT_EFFECT


def test_an_option_that_the_export_does_not_know_is_refused_when_it_is_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_kaiyuan.export.architecture.OPTIONS_WITHOUT_EFFECT", frozenset())
    architecture_from_arguments(checkpoint.arguments)
    with pytest.raises(ConvertError, match="--kaiyuan-z-loss: KaiyuanForCausalLM does not have it yet"):
        architecture_from_arguments(with_arguments(checkpoint, kaiyuan_z_loss=1e-4).arguments)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kaiyuan_sandwich_norm": False}, r"has decoder\.layers\.post_mlp_layernorm\.weight beside"),
        ({"add_qkv_bias": True}, r"has no decoder\.layers\.0\.self_attention\.linear_qkv\.bias"),
        ({"ffn_hidden_size": 50}, r"linear_fc1\.weight is \(2, 96, 32\), its arguments say \(2, 100, 32\)"),
        ({"num_query_groups": 3}, "4 heads do not divide among 3 groups"),
    ],
)
def test_weights_that_are_not_those_of_the_arguments_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConvertError, match=complaint):
        export_checkpoint(with_arguments(checkpoint, **changes), tmp_path / "hf")


def test_an_existing_folder_is_never_written_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "hf")
    with pytest.raises(ConvertError, match="exists; remove it"):
        export_checkpoint(checkpoint, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ConvertError, match="iter_0000003 exists; remove it"):
        import_model(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ConvertError, match="holds iter_0000003, another checkpoint; name a new directory"):
        import_model(tmp_path / "hf", tmp_path / "back", iteration=4)
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_an_export_that_breaks_off_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def full_disk(_bytes: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        export_checkpoint(checkpoint, tmp_path / "hf", progress=full_disk)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="its ids go up to 64, the model has 64 rows"):
        export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=write_tokenizer(tmp_path / "tokenizer", 65))
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor a \.model file"):
        export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=tmp_path)
    assert not (tmp_path / "hf").exists()


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change_config(model_type="gpt2"), "model_type is 'gpt2'; models of type kaiyuan, llama"),
        (change_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (change_config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
        (change_config(rope_parameters={}), "has no 'rope_theta'"),
        (change_config(num_hidden_layers=3), r"has no model\.layers\.2\.input_layernorm\.weight"),
        (change_config(num_hidden_layers=1), r"has model\.layers\.1\..*which the model of its config\.json has not"),
        (change_config(intermediate_size=47), r"gate_proj\.weight is \(48, 32\).* asks for \(47, 32\)"),
        (change_tensors(lambda tensors: tensors.pop("model.norm.weight")), r"has no model\.norm\.weight"),
        (
            change_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
            "is I8; only FP16",
        ),
        (
            change_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)})),
            "of 2 dtypes",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "is not an index"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    export_checkpoint(checkpoint, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConvertError, match=complaint):
        import_model(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("iteration", [0, -1])
def test_an_iteration_that_megatron_would_not_load_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, iteration: int
) -> None:
    export_checkpoint(checkpoint, tmp_path / "hf")
    with pytest.raises(ConvertError, match="from 1 on"):
        import_model(tmp_path / "hf", tmp_path / "back", iteration=iteration)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_act": "gelu"},
        {"final_logit_softcapping": 0.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_the_model_file_refuses_a_config_that_it_would_not_follow(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"the Kaiyuan model knows only|final_logit_softcapping"):
        KaiyuanConfig(**wrong)  # type: ignore[arg-type]


def test_sizes_that_cannot_be_are_named_together() -> None:
    with pytest.raises(ConvertError, match=r"num_layers is 0; .*logit_softcap is -1"):
        replace(KAIYUAN.architecture, num_layers=0, logit_softcap=-1.0)


def test_an_unknown_type_is_told_every_field_that_an_import_needs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """So that whoever has the files of a published model can write its one mapping."""
    export_checkpoint(checkpoint, tmp_path / "hf", layout="kaiyuan")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    with pytest.raises(ConvertError, match="model_type is 'pcmind'") as refusal:
        architecture_from_config(config | {"model_type": "pcmind"}, "config.json")
    needed = [name for name in config if name != "model_type" and is_needed(config, name)]
    assert len(needed) > 8
    assert [name for name in needed if name not in str(refusal.value)] == []


def is_needed(config: dict[str, Any], name: str) -> bool:
    try:
        architecture_from_config({key: value for key, value in config.items() if key != name}, "config.json")
    except ConvertError:
        return True
    return False


@pytest.mark.parametrize("version", ["4.57.1", "5.1.0"])
def test_an_older_transformers_is_refused_by_its_number(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would load the model and then crash, or use other settings of its positions."""
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"needs transformers 5.2 or later, found {version}"):
        runpy.run_path(configuration_kaiyuan.__file__)
