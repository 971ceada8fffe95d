"""Model options and the Megatron transformer config that carries them.

Every option is off by default, so a stock Megatron command line gives the stock model. The one exception is
`attention`, which picks another kernel for the same mathematics.
"""

import argparse
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from torch.nn import functional

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.kernels.support import cuda_kernels_available

__all__ = [
    "ARGUMENT_PREFIX",
    "KaiyuanModelOptions",
    "KaiyuanTransformerConfig",
    "kaiyuan_config_from_args",
    "model_options_from_args",
]

ARGUMENT_PREFIX = "kaiyuan_"
"""An option `x` is the attribute `kaiyuan_x` of Megatron's argument namespace, and the flag `--kaiyuan-x`."""

LocalAttention = Literal["sdpa", "sdpa-flash", "sdpa-torch-order", "unfused"]
AttentionKernel = Literal["auto", "sdpa", "sdpa-flash", "sdpa-torch-order", "unfused"]
FUSIONS = ("norm", "rotary", "swiglu", "loss")
"""What `fusions` can name."""
MAX_BRANCH_SCALE_BITS = 8
"""Values of size 1 keep 6 bits of range below them: 2^-8 / 2^-14, the smallest normal FP16 number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KaiyuanModelOptions:
    """What the Kaiyuan variant adds to Megatron's GPT. Argued one by one in docs/model.md.

    Raises:
        ConfigError: a value out of its range.
    """

    sandwich_norm: bool = False
    """RMSNorm on the outputs of attention and MLP too, in the residual branch: `x += norm(f(norm(x)))` (Kaiyuan-2B)."""
    post_norm_gain_init: float = 1.0
    """Initial gain of those output norms (no unit). 1.0 as in Gemma 2; the Kaiyuan report does not give it."""
    post_norm_depth_scaled: bool = False
    """Divide that gain by sqrt(num_layers): the depth-scaled sandwich norm of Pangu Ultra (arXiv 2504.07866)."""
    branch_scale_bits: int = 0
    """K: attention and MLP compute 2^-K of their output, which their output norm takes back; 0 = off. The function is
    the same, and FP16 holds products 2^K times as large (`model/layers.py`). Needs `sandwich_norm`."""
    raise_branch_scale_below: float = 0.0
    """H: raise K, up to `MAX_BRANCH_SCALE_BITS`, when the run monitor measures a headroom below H in a product of
    attention or the MLP (`monitoring/branch_scale.py`). 0 = never. `branch_scale_bits` is then where K starts."""
    recompute_swiglu: bool = False
    """Do not keep silu(gate) * up for the backward pass of `linear_fc2`, but compute it again there: bit for bit equal
    training with f values a token and layer less (`kernels/swiglu.py`)."""
    logit_softcap: float = 0.0
    """c of `c * tanh(logits / c)`, in logit units (nats); 0 = off. Gemma 2 uses 30; Kaiyuan's own c is unpublished."""
    z_loss: float = 0.0
    """Weight of `logsumexp(logits)^2` in the loss of each training token; 0 = off. PaLM (arXiv 2204.02311): 1e-4."""
    attention: AttentionKernel = "auto"
    """Core attention of the local spec: torch SDPA, cuDNN's kernel first; the same without cuDNN, or in torch's own
    order of kernels; or Megatron's unfused one. `auto` = SDPA; with TE, TE's own."""
    fusions: str = "auto"
    """Kernels of `megatron_kaiyuan.kernels`, for the same mathematics: names of `FUSIONS` joined by commas, `none`, or
    `auto`: all of them where CUDA and Triton are present, none elsewhere."""

    def __post_init__(self) -> None:
        _require_number("logit_softcap", self.logit_softcap, minimum=0.0, off_hint="0 switches the soft-cap off")
        _require_number("z_loss", self.z_loss, minimum=0.0, off_hint="0 switches it off")
        _require_number("post_norm_gain_init", self.post_norm_gain_init, minimum=None, off_hint="the default is 1.0")
        if self.attention not in get_args(AttentionKernel):
            raise ConfigError(
                f"{_flag('attention')} {self.attention!r} is unknown; use one of {', '.join(get_args(AttentionKernel))}"
            )
        unknown = sorted(set(self.fusions.split(",")) - set(FUSIONS)) if self.fusions not in ("auto", "none") else []
        if unknown:
            raise ConfigError(
                f"{_flag('fusions')} {self.fusions}: {', '.join(unknown)} is unknown; use auto, none, or names of "
                f"{', '.join(FUSIONS)} joined by commas"
            )
        self._check_branch_scale()
        if not self.sandwich_norm and (self.post_norm_depth_scaled or self.post_norm_gain_init != 1.0):
            raise ConfigError(
                f"{_flag('post_norm_gain_init')} and {_flag('post_norm_depth_scaled')} set the gain of the output "
                f"norms, but there are none: add {_flag('sandwich_norm')} or remove them"
            )

    def _check_branch_scale(self) -> None:
        flag, bits = _flag("branch_scale_bits"), self.branch_scale_bits
        if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= MAX_BRANCH_SCALE_BITS:
            raise ConfigError(
                f"{flag} must be a whole number from 0 to {MAX_BRANCH_SCALE_BITS}, got {bits}; 0 switches it off, and "
                "more bits would push ordinary values below the smallest normal FP16 number"
            )
        below = self.raise_branch_scale_below
        _require_number("raise_branch_scale_below", below, minimum=0.0, off_hint="0 leaves the scale where it is")
        if 0 < below <= 1:
            raise ConfigError(
                f"{_flag('raise_branch_scale_below')} {below:g}: what is finite in FP16 has a headroom of at least 1, "
                "so the scale would rise after an overflow only; give more than 1, such as 8, or 0 to leave it alone"
            )
        for option, value in (("raise_branch_scale_below", below), ("branch_scale_bits", bits)):
            if value and not self.sandwich_norm:
                raise ConfigError(
                    f"{_flag(option)} {value:g} scales what attention and MLP compute, and only an output norm takes "
                    f"that back: add {_flag('sandwich_norm')} or remove it"
                )

    @property
    def branch_scale(self) -> float:
        """2^-K, what attention and MLP multiply their output by."""
        return 2.0**-self.branch_scale_bits

    @property
    def scales_branches(self) -> bool:
        """Whether attention and MLP have to obey a scale, now or later."""
        return self.branch_scale_bits > 0 or self.raise_branch_scale_below > 0

    def fuses(self, what: str) -> bool:
        """Whether the fusion of that name is on in this process."""
        if self.fusions == "auto":
            return cuda_kernels_available()
        return what in self.fusions.split(",")

    def post_norm_gain(self, num_layers: int) -> float:
        """Initial gain of each output norm in a model of `num_layers` layers (whole model, not one pipeline stage)."""
        return self.post_norm_gain_init / (math.sqrt(num_layers) if self.post_norm_depth_scaled else 1.0)


def _flag(option: str) -> str:
    return "--" + (ARGUMENT_PREFIX + option).replace("_", "-")


def _require_number(option: str, value: float, *, minimum: float | None, off_hint: str) -> None:
    """Refuse NaN, infinities and values below `minimum` (None = must be positive)."""
    allowed = value > 0 if minimum is None else value >= minimum
    if not (math.isfinite(value) and allowed):
        wanted = "a positive number" if minimum is None else f"a finite number >= {minimum:g}"
        raise ConfigError(f"{_flag(option)} must be {wanted}, got {value}; {off_hint}")


@dataclass
class KaiyuanTransformerConfig(TransformerConfig):
    """Megatron's transformer config with the Kaiyuan options beside its own fields.

    Raises:
        ConfigError: options that contradict Megatron's fields; the message names both flags and the remedy.
    """

    kaiyuan: KaiyuanModelOptions = field(default_factory=KaiyuanModelOptions)
    """The variant's options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_output_head()
        self._check_sandwich_norm()
        self._check_own_swiglu()
        self._check_attention()

    @property
    def local_attention_kernel(self) -> LocalAttention:
        """The kernel that the local spec uses, `auto` resolved."""
        return "sdpa" if self.kaiyuan.attention == "auto" else self.kaiyuan.attention

    @property
    def uses_own_norms(self) -> bool:
        """Whether our RMSNorm stands in for the one that Megatron's local spec has: bit for bit the same function."""
        return bool(self.transformer_impl == "local" and self.normalization == "RMSNorm")

    @property
    def has_stock_layers(self) -> bool:
        """Whether the layers are exactly Megatron's own, so that Megatron's own spec is to be used."""
        unfused_if_local = self.transformer_impl != "local" or self.local_attention_kernel == "unfused"
        fused = any(self.kaiyuan.fuses(what) for what in ("norm", "rotary", "swiglu"))
        ours = self.kaiyuan.sandwich_norm or self.kaiyuan.recompute_swiglu or fused
        # Megatron's local RMSNorm does not know sequence parallelism.
        return unfused_if_local and not ours and not (self.uses_own_norms and self.sequence_parallel)

    def _check_output_head(self) -> None:
        options = self.kaiyuan
        if self.cross_entropy_loss_fusion and "loss" in options.fusions.split(","):
            raise ConfigError(
                f"{_flag('fusions')} {options.fusions} and --cross-entropy-loss-fusion both name a kernel for the "
                "loss; give one of them"
            )
        wanted = {_flag("logit_softcap"): options.logit_softcap, _flag("z_loss"): options.z_loss}
        active = " and ".join(flag for flag, value in wanted.items() if value > 0)
        if not active:
            return
        if self.mtp_num_layers:
            raise ConfigError(f"{active} is not defined for multi-token prediction; remove --mtp-num-layers")
        if self.cross_entropy_loss_fusion and self.cross_entropy_fusion_impl == "native":
            raise ConfigError(
                f"{active} cannot be used with Megatron's native fused cross-entropy, which rounds the gradient of the "
                "logits to bf16 (8 bits); remove --cross-entropy-loss-fusion"
            )
        if self.cross_entropy_loss_fusion and options.z_loss > 0:
            raise ConfigError(
                f"{_flag('z_loss')} needs the log-partition, which the fused cross-entropy does not return; "
                "remove --cross-entropy-loss-fusion"
            )

    def _check_sandwich_norm(self) -> None:
        if not self.kaiyuan.sandwich_norm:
            return
        unsupported = {
            "--multi-latent-attention": self.multi_latent_attention,
            "--mtp-num-layers": self.mtp_num_layers,
            "--heterogeneous-layers-config-path": self.heterogeneous_block_specs,
            "--experimental-attention-variant": self.experimental_attention_variant,
            "--apply-layernorm-1p": self.layernorm_zero_centered_gamma,
            "--inference-fuse-tp-communication": self.inference_fuse_tp_communication,
        }
        present = [flag for flag, value in unsupported.items() if value]
        if present:
            raise ConfigError(f"{_flag('sandwich_norm')} does not support {', '.join(present)}; remove one of the two")
        if self.normalization != "RMSNorm":
            raise ConfigError(
                f"{_flag('sandwich_norm')} is made of RMSNorm, but --normalization is {self.normalization}; "
                "add --normalization RMSNorm"
            )

    def _check_own_swiglu(self) -> None:
        """Refuse options of our SwiGLU where it is not used, because nothing else obeys them.

        The branch scale is also that of our attention's values.
        """
        if self.kaiyuan.recompute_swiglu:
            graphs = self.cuda_graph_impl != "none"  # memory freed and filled again while a graph is captured: untried
            others = {"--num-experts": self.num_moe_experts, "--cuda-graph-impl": graphs}
            self._require_plain_swiglu("recompute_swiglu", others)
        single_kernel: dict[str, object] = {
            "--fused-single-qkv-rope": self.fused_single_qkv_rope,
            "--num-experts": self.num_moe_experts,  # experts do not scale what they output
        }
        if self.kaiyuan.branch_scale_bits:
            self._require_plain_swiglu("branch_scale_bits", single_kernel)
        if self.kaiyuan.raise_branch_scale_below:
            graphs = self.cuda_graph_impl != "none"  # a captured graph goes on with the old scale
            self._require_plain_swiglu("raise_branch_scale_below", single_kernel | {"--cuda-graph-impl": graphs})

    def _require_plain_swiglu(self, option: str, others: dict[str, object]) -> None:
        """Refuse whatever our MLP leaves to Megatron's, and `others`."""
        flag = _flag(option)
        if not self.gated_linear_unit or self.activation_func is not functional.silu:
            raise ConfigError(f"{flag} acts on the output of SwiGLU; add --swiglu or remove it")
        if self.add_bias_linear:
            raise ConfigError(f"{flag} does not know the biases of the linear layers; add --disable-bias-linear")
        unsupported = {
            "--activation-func-clamp-value": self.activation_func_clamp_value is not None,
            "--glu-linear-offset": self.glu_linear_offset,
            "--use-te-activation-func": self.use_te_activation_func,
            **others,
        }
        present = [name for name, value in unsupported.items() if value]
        if present:
            raise ConfigError(f"{flag} does not support {', '.join(present)}; remove one of the two")

    def _check_attention(self) -> None:
        if self.transformer_impl != "local":
            if self.kaiyuan.attention != "auto":
                raise ConfigError(
                    f"{_flag('attention')} {self.kaiyuan.attention} chooses a kernel of --transformer-impl local, but "
                    f"--transformer-impl is {self.transformer_impl}; use --attention-backend there, or local here"
                )
            return
        if self.context_parallel_size > 1:
            raise ConfigError(
                f"--context-parallel-size {self.context_parallel_size} needs --transformer-impl transformer_engine"
            )
        unsupported = {"--window-size": self.window_size, "--softmax-type": self.softmax_type != "vanilla"}
        present = [flag for flag, value in unsupported.items() if value]
        if present and self.local_attention_kernel != "unfused":
            raise ConfigError(f"{', '.join(present)} is not supported by SDPA; use {_flag('attention')} unfused")


def model_options_from_args(args: argparse.Namespace) -> KaiyuanModelOptions:
    """Collect the options from the `kaiyuan_*` attributes of Megatron's argument namespace.

    An option that the arguments lack is off: they are those of a checkpoint that stock Megatron saved, or an earlier
    version of this package.

    Raises:
        ConfigError: a value is out of range.
    """
    names = {option.name: ARGUMENT_PREFIX + option.name for option in fields(KaiyuanModelOptions)}
    return KaiyuanModelOptions(
        **{name: getattr(args, stored) for name, stored in names.items() if hasattr(args, stored)}
    )


def kaiyuan_config_from_args(args: argparse.Namespace) -> KaiyuanTransformerConfig:
    """Build the transformer config through Megatron's own mapping of its arguments.

    Raises:
        ConfigError: flags that cannot work together, or that would silently replace the config class.
    """
    options = model_options_from_args(args)
    replacing = {
        "--multi-latent-attention": args.multi_latent_attention,
        "--heterogeneous-layers-config-path": args.heterogeneous_layers_config_path,
        "--yaml-cfg": args.yaml_cfg,
    }
    present = [flag for flag, value in replacing.items() if value]
    if present:
        raise ConfigError(
            f"{', '.join(present)} makes Megatron use another config class, without the Kaiyuan options; leave it out"
        )
    if args.seq_length > args.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {args.seq_length} is longer than --max-position-embeddings {args.max_position_embeddings}; "
            "raise the second to at least the first"
        )
    with_options = argparse.Namespace(**vars(args), kaiyuan=options)
    config: KaiyuanTransformerConfig = core_transformer_config_from_args(with_options, KaiyuanTransformerConfig)
    if args.spec is not None:
        _check_spec(args.spec, config)
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        _check_document_attention(args, config)
    return config


def _check_spec(spec: Sequence[str], config: KaiyuanTransformerConfig) -> None:
    """Refuse a spec that our layers would replace, or one that is not there: Megatron takes its default spec then."""
    flag = f"--spec {' '.join(spec)}"
    if not config.has_stock_layers:
        raise ConfigError(
            f"{flag} replaces the Kaiyuan layers; leave it out, or give {_flag('attention')} unfused, "
            f"{_flag('fusions')} none and no other option of the Kaiyuan layers"
        )
    if len(spec) != 2:
        raise ConfigError(f"{flag}: give a module and the name of a spec in it, or leave it out")
    try:
        getattr(importlib.import_module(spec[0]), spec[1])
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{flag} cannot be imported ({error}); correct it, or leave it out") from error


def _check_document_attention(args: argparse.Namespace, config: KaiyuanTransformerConfig) -> None:
    """Without a mask from the loader, documents are kept apart by our core attention, from the positions."""
    if config.transformer_impl != "local" or config.local_attention_kernel == "unfused":
        kernel = "unfused" if config.transformer_impl == "local" else config.transformer_impl
        raise ConfigError(
            f"--reset-attention-mask without the loader's mask needs SDPA, not {kernel} attention: use "
            f"--transformer-impl local and leave {_flag('attention')} out, or remove --reset-attention-mask"
        )
    if config.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--reset-attention-mask without the loader's mask, but only the first pipeline stage knows where documents "
            f"start; use --pipeline-model-parallel-size 1, not {config.pipeline_model_parallel_size}"
        )
    if not args.reset_position_ids:
        raise ConfigError(
            "--reset-attention-mask without the loader's mask finds the documents by their positions; add "
            "--reset-position-ids"
        )
    if config.cuda_graph_impl != "none":
        raise ConfigError(
            f"--cuda-graph-impl {config.cuda_graph_impl} repeats operations of fixed sizes, but with "
            "--reset-attention-mask and no mask from the loader the number of documents differs from batch to batch; "
            "remove --cuda-graph-impl"
        )
    if config.attention_dropout > 0:
        raise ConfigError("attention inside documents has no dropout; add --attention-dropout 0")
