"""The flags of this package."""

from megatron_kaiyuan.flags.rules import Fate, Rule, only_with

__all__ = ["GROUPS", "OURS"]

GROUPS = ("kaiyuan",)

OURS: tuple[Rule, ...] = (
    Rule(
        Fate.HONOURED,
        (
            "kaiyuan_sandwich_norm",
            "kaiyuan_post_norm_gain_init",
            "kaiyuan_post_norm_depth_scaled",
            "kaiyuan_branch_scale_bits",
            "kaiyuan_raise_branch_scale_below",
            "kaiyuan_recompute_swiglu",
            "kaiyuan_logit_softcap",
            "kaiyuan_z_loss",
            "kaiyuan_attention",
            "kaiyuan_fusions",
        ),
        "our layers (docs/model.md)",
    ),
    Rule(
        Fate.HONOURED,
        ("kaiyuan_metrics", "kaiyuan_activation_interval", "kaiyuan_max_skipped_steps"),
        "the run monitor (docs/monitoring.md)",
    ),
    *only_with(
        "--save",
        lambda args: bool(args.save),
        ("kaiyuan_keep_checkpoints", "kaiyuan_evaluate_average"),
        "the keeping of checkpoints (docs/training.md)",
    ),
)
