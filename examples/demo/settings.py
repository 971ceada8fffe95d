"""How large the demo is: the full one, and a tiny one for tests that goes the same way."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from corpus import CorpusBudget

__all__ = ["FULL", "QUICK", "DemoSettings", "ModelShape", "planned_text"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of the model.

    Everything else of it is as in Kaiyuan-2B: RoPE, RMSNorm, SwiGLU, QK-norm, sandwich norm, soft-cap.
    """

    layers: int = 4
    hidden: int = 128
    ffn: int = 384
    heads: int = 4
    query_groups: int = 2
    softcap: float = 30.0

    def flags(self) -> list[str]:
        """Megatron's flags."""
        return [
            *f"--num-layers {self.layers} --hidden-size {self.hidden} --ffn-hidden-size {self.ffn}".split(),
            *f"--num-attention-heads {self.heads} --group-query-attention".split(),
            *f"--num-query-groups {self.query_groups} --position-embedding-type rope --normalization RMSNorm".split(),
            *["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--qk-layernorm"],
            *f"--kaiyuan-sandwich-norm --kaiyuan-logit-softcap {self.softcap:g}".split(),
            *["--attention-dropout", "0", "--hidden-dropout", "0"],
        ]


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Everything that may differ between two sizes of the demo."""

    corpus: CorpusBudget
    vocab_size: int
    model: ModelShape
    micro_batch: int
    global_batch: int
    initial_loss_scale: int
    """High on purpose: the first steps overflow, and the log shows the scaler settling at its level."""
    loss_scale_window: int
    """Steps without overflow after which the scale doubles."""
    token_divisor: int
    """Token budgets of the plan are divided by this."""
    held_out_divisor: int
    """So are its held-out documents."""
    baseline_steps: int = 14
    """Steps of the plain PyTorch model."""
    processes: int = 2
    device: str = "cpu"
    """`cpu` or `cuda`."""
    new_tokens: int = 48
    prompts: tuple[str, ...] = field(
        default=(
            "def load_config(path):\n    ",
            "class Iterator(",
            "Returns a new array with",
            "Permission is hereby granted,",
        )
    )

    @property
    def place(self) -> str:
        """Number of processes and the device, in words."""
        if self.device == "cpu":
            return f"{self.processes} processes on the CPU"
        return f"{self.processes} processes, each on a GPU" if self.processes > 1 else "one process on a GPU"

    def as_data(self) -> dict[str, object]:
        """Plain data, for the stages' stamps."""
        return asdict(self)


FULL = DemoSettings(
    corpus=CorpusBudget(),
    vocab_size=8192,
    model=ModelShape(),
    micro_batch=8,
    global_batch=16,
    initial_loss_scale=2**20,
    loss_scale_window=60,
    token_divisor=1,
    held_out_divisor=1,
)
QUICK = DemoSettings(
    corpus=CorpusBudget(code=900_000, reference=500_000, packages=300_000),
    vocab_size=1024,
    model=ModelShape(layers=2, hidden=64, ffn=128),
    micro_batch=2,
    global_batch=4,
    initial_loss_scale=2**20,
    loss_scale_window=10,
    token_divisor=32,
    held_out_divisor=5,
    new_tokens=8,
    prompts=("def load_config(path):\n    ",),
)


def planned_text(plan: Path, settings: DemoSettings, folder: Path) -> str:
    """Return the plan file with its paths moved to `folder` and its budgets divided.

    It is unchanged if there is nothing to change.

    Args:
        plan: The committed plan, whose paths begin with `runs/demo/`.
        settings: Divisors.
        folder: Where the demo writes, relative to the working directory if possible.
    """
    text = plan.read_text(encoding="utf-8")
    if settings.token_divisor == 1 and settings.held_out_divisor == 1:
        return text.replace("runs/demo/", f"{folder.as_posix()}/")
    content = yaml.safe_load(text.replace("runs/demo/", f"{folder.as_posix()}/"))
    for phase in content["phases"]:
        phase["tokens"] //= settings.token_divisor
    for source in content["validation"].values():
        source["documents"] = max(2, source["documents"] // settings.held_out_divisor)
    tokens = sum(phase["tokens"] for phase in content["phases"])
    steps = tokens // (content["seq_length"] * settings.global_batch)
    content["averaging"]["every"] = max(1, steps // (2 * content["averaging"]["last"]))
    return yaml.safe_dump(content, sort_keys=False)
