"""Small models for the tests of the export: weights of the model oracle, as a training checkpoint."""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_kaiyuan.checkpoints.reading import Checkpoint, iteration_folder, open_checkpoint, write_checkpoint
from megatron_kaiyuan.export.architecture import Architecture
from megatron_kaiyuan.export.from_hugging_face import untrained_state
from tests.unit_tests.model.reference import Features, Shape, random_weights

LARGE = 40.0
"""Factor on the output matrix that takes logits far beyond the cap."""


@dataclass(frozen=True)
class SmallModel:
    """One of the variants."""

    name: str
    features: Features = field(default_factory=Features)
    shape: Shape = field(default_factory=Shape)
    tied: bool = False
    branch_scale_bits: int = 0
    qkv_bias: bool = False
    gain_of_products: float = 1.0
    """Factor on the matrices before the output norms, which leaves the function as it is."""

    @property
    def architecture(self) -> Architecture:
        shape, features = self.shape, self.features
        return Architecture(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_query_groups=shape.groups,
            kv_channels=shape.head_size,
            padded_vocab_size=shape.vocab,
            max_position_embeddings=64,
            rotary_base=float(shape.rotary_base),
            layernorm_epsilon=shape.epsilon,
            init_method_std=0.02,
            qk_layernorm=features.qk_norm,
            sandwich_norm=features.sandwich,
            logit_softcap=features.softcap,
            add_qkv_bias=self.qkv_bias,
            tied_embeddings=self.tied,
            branch_scale_bits=self.branch_scale_bits,
        )

    def weights(self) -> dict[str, Tensor]:
        """FP64 under the names of Megatron's modules, exact in FP16; logits reach far beyond the cap."""
        weights = random_weights(self.shape, self.features)
        weights["output_layer.weight"] *= LARGE
        for name, value in weights.items():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                value *= self.gain_of_products
        if self.qkv_bias:
            weights |= _biases(weights)
        if self.tied:
            weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
        return weights


def _biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One for each matrix of queries, keys and values, as large as its outputs, exact in FP16."""
    generator = torch.Generator().manual_seed(7)
    return {
        name.replace(".weight", ".bias"): torch.randn(len(value), generator=generator, dtype=torch.float64)
        .half()
        .double()
        for name, value in weights.items()
        if name.endswith("linear_qkv.weight")
    }


KAIYUAN = SmallModel("kaiyuan", Features(sandwich=True, qk_norm=True, softcap=30.0))
SCALED = replace(KAIYUAN, name="scaled branches", branch_scale_bits=8)
VARIANTS = [
    KAIYUAN,
    SmallModel("stock"),
    SmallModel("qk norm alone", Features(qk_norm=True)),
    SmallModel("tied", Features(sandwich=True, softcap=5.0), tied=True),
    SmallModel("a group for each head", Features(softcap=30.0), Shape(heads=3, groups=3, rotary_base=500_000)),
    SCALED,
    SmallModel("one group", Features(sandwich=True, qk_norm=True), Shape(heads=4, groups=1, layers=3)),
]


def save_model(model: SmallModel, directory: Path, dtype: torch.dtype) -> Checkpoint:
    """Write the model as training does: layers stacked, the norms before a matrix named after it."""
    tensors = stacked_weights(model, dtype)
    state = untrained_state(model.architecture, 3, dtype)
    if model.branch_scale_bits:
        state = {
            name: _with_argument(value, "kaiyuan_branch_scale_bits", model.branch_scale_bits)
            for name, value in state.items()
        }
    write_checkpoint(iteration_folder(directory, 3), tensors, state, {})
    (directory / "latest_checkpointed_iteration.txt").write_text("3")
    return open_checkpoint(directory)


def _with_argument(stored: io.BytesIO, name: str, value: object) -> io.BytesIO:
    """A stored object, with one of its arguments set if it holds arguments."""
    [content] = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    if not isinstance(content, dict) or "args" not in content:
        return stored
    setattr(content["args"], name, value)
    changed = io.BytesIO()
    torch.save([content], changed)
    return changed


def stacked_weights(model: SmallModel, dtype: torch.dtype) -> dict[str, Tensor]:
    layers: dict[str, list[Tensor]] = {}
    tensors = {}
    for name, value in model.weights().items():
        if not name.startswith("decoder.layers."):
            tensors[name] = value.to(dtype)
            continue
        rest = name.split(".", 3)[3]
        rest = rest.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        rest = rest.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        layers.setdefault(f"decoder.layers.{rest}", []).append(value.to(dtype))
    if model.tied:
        del tensors["output_layer.weight"]
    return tensors | {name: torch.stack(values) for name, values in layers.items()}
