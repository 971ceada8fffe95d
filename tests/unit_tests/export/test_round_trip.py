from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints
from megatron_kaiyuan.checkpoints.model_identity import carried_options
from megatron_kaiyuan.checkpoints.parts import LazyTensor, read_rows, row_groups, write_parts
from megatron_kaiyuan.checkpoints.reading import (
    Checkpoint,
    iteration_folder,
    new_checkpoint_folder,
    open_checkpoint,
)
from megatron_kaiyuan.export.architecture import architecture_from_arguments
from megatron_kaiyuan.export.from_hugging_face import import_model, untrained_state
from megatron_kaiyuan.export.tensor_files import TensorFolder
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.unit_tests.export.small_models import KAIYUAN, VARIANTS, SmallModel, save_model, stacked_weights


def all_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.tensors)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", [VARIANTS[0], VARIANTS[3]], ids=lambda model: model.name)
def test_export_and_import_change_no_bit(model: SmallModel, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = save_model(model, tmp_path / "run", dtype)
    export_checkpoint(checkpoint, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert_equal(all_tensors(back), all_tensors(checkpoint))
    assert back.iteration == checkpoint.iteration
    assert architecture_from_arguments(back.arguments) == model.architecture
    export_checkpoint(back, tmp_path / "again")
    assert_equal(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "hf/model.safetensors"))


def test_pieces_of_any_parallel_layout_give_the_same_export(tmp_path: Path) -> None:
    """A checkpoint of one piece a layer, of one piece in all (an average), and cut across layers and rows."""
    whole = save_model(KAIYUAN, tmp_path / "whole", torch.float16)
    export_checkpoint(whole, tmp_path / "expected")
    expected = load_file(tmp_path / "expected/model.safetensors")
    tensors = stacked_weights(KAIYUAN, torch.float16)
    lazy = {
        name: LazyTensor(tuple(value.shape), value.dtype, [lambda piece=piece: piece for piece in value.chunk(2)])
        for name, value in tensors.items()
    }
    folder = iteration_folder(tmp_path / "pieces", 3)
    with new_checkpoint_folder(folder, {}) as unfinished:
        write_parts(unfinished, lazy, untrained_state(KAIYUAN.architecture, 3, torch.float16))
    pieces = Checkpoint(folder, 3)
    assert row_groups(pieces, "decoder.layers.mlp.linear_fc1.weight") == [(0, 1), (1, 2)]
    assert row_groups(whole, "decoder.layers.mlp.linear_fc1.weight") == [(0, 2)]
    assert row_groups(pieces, "output_layer.weight") == [(0, 32), (32, 64)]
    export_checkpoint(pieces, tmp_path / "found")
    assert_equal(load_file(tmp_path / "found/model.safetensors"), expected)
    rows = read_rows(pieces, "output_layer.weight", 20, 50)
    assert torch.equal(rows, tensors["output_layer.weight"][20:50])


def test_layers_that_are_not_stacked_are_found_by_their_numbers(tmp_path: Path) -> None:
    from megatron_kaiyuan.checkpoints.reading import write_checkpoint

    flat: dict[str, torch.Tensor] = {}
    for name, value in stacked_weights(KAIYUAN, torch.float16).items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.")
            flat |= {f"decoder.layers.{layer}.{rest}": tensor for layer, tensor in enumerate(value)}
        else:
            flat[name] = value
    state = untrained_state(KAIYUAN.architecture, 3, torch.float16)
    write_checkpoint(iteration_folder(tmp_path / "flat", 3), flat, state, {})
    export_checkpoint(Checkpoint(iteration_folder(tmp_path / "flat", 3), 3), tmp_path / "found")
    export_checkpoint(save_model(KAIYUAN, tmp_path / "run", torch.float16), tmp_path / "expected")
    assert_equal(load_file(tmp_path / "found/model.safetensors"), load_file(tmp_path / "expected/model.safetensors"))


def test_an_average_is_exported_with_what_it_averages(tmp_path: Path) -> None:
    checkpoint = save_model(KAIYUAN, tmp_path / "run", torch.float16)
    average_checkpoints([checkpoint], "mean", tmp_path / "average")
    export_checkpoint(open_checkpoint(tmp_path / "average"), tmp_path / "hf")
    export_checkpoint(checkpoint, tmp_path / "expected")
    assert_equal(load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "expected/model.safetensors"))
    assert '"weights": "mean"' in (tmp_path / "hf/conversion.json").read_text()


def test_several_files_hold_what_one_would_and_none_is_too_large(tmp_path: Path) -> None:
    checkpoint = save_model(KAIYUAN, tmp_path / "run", torch.float32)
    export_checkpoint(checkpoint, tmp_path / "one")
    export_checkpoint(checkpoint, tmp_path / "many", max_file_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    merged = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert_equal(merged, load_file(tmp_path / "one/model.safetensors"))
    for path in files:  # none but a file with a single tensor is larger
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000 or len(load_file(path)) == 1
    import_model(tmp_path / "many", tmp_path / "back")
    assert_equal(all_tensors(open_checkpoint(tmp_path / "back")), all_tensors(checkpoint))
    assert TensorFolder(tmp_path / "many").forms == TensorFolder(tmp_path / "one").forms


def test_progress_adds_up_to_the_size_of_the_model_both_ways(tmp_path: Path) -> None:
    checkpoint = save_model(KAIYUAN, tmp_path / "run", torch.float16)
    out: list[int] = []
    back: list[int] = []
    export_checkpoint(checkpoint, tmp_path / "hf", progress=out.append)
    import_model(tmp_path / "hf", tmp_path / "back", progress=back.append)
    assert sum(out) == sum(back) == checkpoint.num_bytes


def test_a_bias_of_query_key_and_value_goes_along(tmp_path: Path) -> None:
    from dataclasses import replace

    from megatron_kaiyuan.checkpoints.reading import write_checkpoint

    architecture = replace(KAIYUAN.architecture, add_qkv_bias=True)
    bias = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    tensors = stacked_weights(KAIYUAN, torch.float32) | {"decoder.layers.self_attention.linear_qkv.bias": bias}
    folder = iteration_folder(tmp_path / "run", 3)
    write_checkpoint(folder, tensors, untrained_state(architecture, 3, torch.float32), {})
    export_checkpoint(Checkpoint(folder, 3), tmp_path / "hf")
    query = load_file(tmp_path / "hf/model.safetensors")["model.layers.1.self_attn.q_proj.bias"]
    assert torch.equal(query, torch.cat((bias[1, :16], bias[1, 32:48])))
    import_model(tmp_path / "hf", tmp_path / "back")
    assert_equal(all_tensors(open_checkpoint(tmp_path / "back")), tensors)


def test_a_checkpoint_of_stock_megatron_has_all_options_off(tmp_path: Path) -> None:
    arguments = Namespace(**vars(save_model(VARIANTS[1], tmp_path, torch.float32).arguments))
    for name in list(vars(arguments)):
        if name.startswith("kaiyuan_"):
            delattr(arguments, name)
    assert architecture_from_arguments(arguments) == VARIANTS[1].architecture


def test_an_imported_model_has_no_dropout_for_megatrons_own_default_is_another(tmp_path: Path) -> None:
    export_checkpoint(save_model(KAIYUAN, tmp_path / "run", torch.float32), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back")
    arguments = open_checkpoint(tmp_path / "back").arguments
    assert (arguments.attention_dropout, arguments.hidden_dropout) == (0.0, 0.0)
    given = carried_options(arguments, set(), {"attention_dropout": 0.1, "hidden_dropout": 0.1})
    assert (given["attention_dropout"], given["hidden_dropout"]) == (0.0, 0.0), "training on takes them from there"
