"""What a study costs, before anything runs."""

from dataclasses import dataclass

from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.study import Study

__all__ = ["CostEstimate", "estimate_cost", "format_gpu_time", "format_share"]


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Operations and time of all training runs, without evaluation."""

    runs: int
    steps: int
    """Of each run."""
    parameters: int
    tokens: int
    """Of all runs together."""
    flops: float
    """Of all runs: tokens x `ReferenceModel.flops_per_token`."""
    tokens_per_second: float
    """Of one accelerator, as measured or assumed."""
    gpu_hours: float
    main_run_flops: float
    """6 x parameters x tokens of the main run."""
    assumption: str
    """Where the speed comes from."""
    trunk_tokens: int = 0
    """Of all trunks, among `tokens`; 0 where there are none to train."""

    @property
    def share_of_main_run(self) -> float:
        """Operations relative to the main run's."""
        return self.flops / self.main_run_flops

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{counted(self.runs, 'run')} of {counted(self.steps, 'step')}, "
            f"{(self.tokens - self.trunk_tokens) / self.runs:,.0f} tokens "
            f"each; a reference model of {counted(self.parameters, 'parameter')}",
            *([f"{counted(self.trunk_tokens, 'token')} more for the trunks"] if self.trunk_tokens else []),
            f"{self.flops:.3g} FLOPs of training in all, {format_share(self.share_of_main_run)} of the main run's "
            f"{self.main_run_flops:.3g}",
            f"{format_gpu_time(self.gpu_hours)} at {self.tokens_per_second:,.0f} tokens/s ({self.assumption})",
        ]


def format_gpu_time(hours: float) -> str:
    """GPU time in the unit that leaves a number to read."""
    return f"{hours:,.2f} GPU hours" if hours >= 0.1 else f"{hours * 3600:,.0f} GPU seconds"


def format_share(share: float) -> str:
    """A share in percent with two significant digits."""
    return f"{share * 100:.2g} %" if share >= 1e-4 else "less than 0.01 %"


def estimate_cost(study: Study, vocab_size: int) -> CostEstimate:
    """Estimate from the study alone.

    Args:
        study: The study.
        vocab_size: Rows of the embedding.
    """
    seeds = len(study.training.seeds)
    cells, trunk_tokens = len(study.sources) * len(study.slices.tops), 0
    if study.trunk is not None:
        cells += len(study.sources) + 1  # controls: random documents of each source, and the mix alone
        trunk_tokens = 0 if study.trunk.folder is not None else study.trunk.tokens * seeds
    runs = cells * seeds
    per_token = study.model.flops_per_token(vocab_size, study.seq_length)
    cost = study.cost
    if cost.tokens_per_second is not None:
        speed, assumption = cost.tokens_per_second, "cost.tokens_per_second"
    else:
        speed = cost.peak_tflops * 1e12 * cost.mfu / per_token
        assumption = f"assumed: {cost.mfu:.0%} of {cost.peak_tflops:g} TFLOP/s"
    tokens = runs * study.budget + trunk_tokens
    return CostEstimate(
        runs=runs,
        steps=study.steps,
        parameters=study.model.parameters(vocab_size),
        tokens=tokens,
        flops=tokens * per_token,
        tokens_per_second=speed,
        gpu_hours=tokens / speed / 3600,
        main_run_flops=6.0 * cost.main_run.parameters * cost.main_run.tokens,
        assumption=assumption,
        trunk_tokens=trunk_tokens,
    )
