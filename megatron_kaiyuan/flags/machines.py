"""Flags of the checkpoints, of the processes, and of what they send to each other."""

import argparse
import importlib.util

from megatron_kaiyuan.flags.rules import Condition, Fate, Rule, only_with, only_with_package

__all__ = ["GROUPS", "MACHINES"]

GROUPS = ("checkpointing", "distributed init", "ft_package")

_CHECKPOINTS = "Megatron's checkpoints"
_LAYOUT = "Megatron's process groups"
_DDP = "Megatron's data parallelism"
_RESILIENCY = "nvidia_resiliency_ext"


def _passed_on(names: tuple[str, ...], says: str) -> Rule:
    return Rule(Fate.PASSED_ON, names, says)


def _is_sharded_optimizer(args: argparse.Namespace) -> bool:
    return bool(args.use_distributed_optimizer or args.use_megatron_fsdp or args.optimizer == "dist_muon")


_SAVING: tuple[Rule, ...] = (
    Rule(Fate.HONOURED, ("save", "save_interval", "load"), "our checks, then " + _CHECKPOINTS),
    *only_with(
        "--load",
        lambda args: args.load is not None,
        ("ckpt_step", "exit_on_missing_checkpoint", "auto_detect_ckpt_format", "load_main_params_from_ckpt"),
        "our checks, then " + _CHECKPOINTS,
    ),
    *only_with(
        "--load or --pretrained-checkpoint",
        lambda args: args.load is not None or args.pretrained_checkpoint is not None,
        ("finetune", "no_load_optim", "no_load_rng"),
        "our checks, then " + _CHECKPOINTS,
    ),
    _passed_on(
        (
            "ckpt_format",
            "pretrained_checkpoint",
            "ckpt_fully_parallel_save",
            "ckpt_fully_parallel_load",
            "ckpt_assume_constant_structure",
            "ckpt_load_validate_sharding_integrity",
            "dist_ckpt_strictness",
            "dist_ckpt_optim_fully_reshardable",
            "dist_ckpt_workers",
            "verify_integrity",
            "stream_ckpt_dequant",
            "no_save_optim",
            "no_save_rng",
        ),
        _CHECKPOINTS,
    ),
    *only_with(
        "--save",
        lambda args: bool(args.save),
        (
            "save_retain_interval",
            "save_params_interval",
            "save_activations_interval",
            "save_tokens_per_expert_interval",
            "save_wgrads_interval",
            "save_dgrads_interval",
            "non_persistent_save_interval",
            "async_save",
        ),
        "Megatron's training loop",
    ),
    *only_with_package("transformer_engine", ("save_activations_interval", "save_dgrads_interval"), "")[:1],
    Rule(
        Fate.REFUSED,
        ("non_persistent_save_interval",),
        "Megatron breaks off at the first of them then; give --non-persistent-ckpt-type global",
        Condition("without --non-persistent-ckpt-type", lambda args: args.non_persistent_ckpt_type is None),
    ),
    Rule(
        Fate.REFUSED,
        ("async_save",),
        "Megatron saves synchronously then; give --use-persistent-ckpt-worker too, or leave it out",
        Condition("without --use-persistent-ckpt-worker", lambda args: not args.use_persistent_ckpt_worker),
    ),
    Rule(
        Fate.REFUSED,
        ("async_save",),
        f"it needs the package {_RESILIENCY}; install it, or add --async-strategy mcore",
        Condition(
            "with --async-strategy nvrx",
            lambda args: args.async_strategy == "nvrx" and importlib.util.find_spec(_RESILIENCY) is None,
        ),
    ),
    *only_with(
        "--async-save",
        lambda args: bool(args.async_save),
        (
            "async_strategy",
            "use_persistent_ckpt_worker",
            "async_ckpt_cpu_priority",
            "async_ckpt_io_priority",
            "async_ckpt_use_cpu_shm",
        ),
        "Megatron's asynchronous saves",
    ),
    *only_with(
        "--ckpt-fully-parallel-load",
        lambda args: bool(args.ckpt_fully_parallel_load),
        ("ckpt_fully_parallel_load_exchange_algo", "ckpt_fully_parallel_load_process_group"),
        _CHECKPOINTS,
    ),
    *only_with(
        "--ckpt-fully-parallel-save",
        lambda args: bool(args.ckpt_fully_parallel_save),
        ("ckpt_fully_parallel_save_process_group",),
        _CHECKPOINTS,
    ),
    *only_with(
        "--dist-ckpt-optim-fully-reshardable",
        lambda args: bool(args.dist_ckpt_optim_fully_reshardable),
        ("distrib_optim_fully_reshardable_mem_efficient",),
        _CHECKPOINTS,
    ),
    Rule(
        Fate.REFUSED,
        ("strict_fsdp_dtensor_load",),
        "what a checkpoint lacks would stay at its random start; leave it out, and give the flags of its model",
    ),
    Rule(
        Fate.REFUSED,
        ("ckpt_step",),
        "once the run has saved, it would mean a step of --load; give --load that folder, with --finetune",
        Condition("with --pretrained-checkpoint", lambda args: args.pretrained_checkpoint is not None),
    ),
    Rule(Fate.HONOURED, ("ckpt_convert_format", "ckpt_convert_save"), "done at a complete run too"),
    Rule(
        Fate.REFUSED,
        ("ckpt_convert_save",),
        "nothing is converted then; give --ckpt-convert-format too, or leave it out",
        Condition("without --ckpt-convert-format", lambda args: args.ckpt_convert_format is None),
    ),
    *only_with(
        "--ckpt-convert-format",
        lambda args: args.ckpt_convert_format is not None,
        ("ckpt_convert_update_legacy_dist_opt_format",),
        _CHECKPOINTS,
    ),
    *only_with(
        "--non-persistent-ckpt-type",
        lambda args: args.non_persistent_ckpt_type is not None,
        (
            "non_persistent_global_ckpt_dir",
            "non_persistent_local_ckpt_dir",
            "non_persistent_local_ckpt_algo",
            "replication",
            "replication_jump",
            "replication_factor",
        ),
        _CHECKPOINTS,
    ),
    _passed_on(("non_persistent_ckpt_type",), _CHECKPOINTS),
    Rule(
        Fate.REFUSED,
        ("override_ckpt_iteration",),
        "the samples that were trained on belong to the iteration of the checkpoint; leave it out (--finetune starts "
        "at 0, --ckpt-step takes an earlier checkpoint)",
    ),
    Rule(
        Fate.HONOURED,
        ("use_dist_ckpt_deprecated", "ckpt_fully_parallel_save_deprecated"),
        "always so",
    ),
    Rule(
        Fate.REFUSED,
        ("use_dist_ckpt_deprecated",),
        "the two contradict each other; leave it out",
        Condition("with --ckpt-format torch", lambda args: args.ckpt_format == "torch"),
    ),
    Rule(
        Fate.REFUSED,
        ("dist_ckpt_format_deprecated",),
        "Megatron ignores it; use --ckpt-format",
    ),
)

_PROCESSES: tuple[Rule, ...] = (
    _passed_on(
        (
            "distributed_backend",
            "distributed_timeout_minutes",
            "distributed_timeout_seconds_after_init",
            "local_rank",
            "nccl_communicator_config_path",
            "use_tp_pp_dp_mapping",
            "use_gloo_process_groups",
            "high_priority_stream_groups",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "pipeline_model_parallel_layout",
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "overlap_p2p_comm",
            "cp_comm_type",
            "num_distributed_optimizer_instances",
            "create_all_gather_group",
        ),
        _LAYOUT,
    ),
    Rule(
        Fate.REFUSED,
        ("fake_process_group",),
        "its processes send each other nothing and train apart, for Megatron's own measurements; leave it out",
    ),
    _passed_on(("disable_jit_fuser",), "Megatron's fused functions"),
    _passed_on(("use_sharp",), _LAYOUT),
    *only_with("--use-sharp", lambda args: bool(args.use_sharp), ("sharp_enabled_group",), _LAYOUT),
    _passed_on(("flight_recorder_dump_path",), _LAYOUT),
    *only_with(
        "--flight-recorder-dump-path",
        lambda args: args.flight_recorder_dump_path is not None,
        (
            "flight_recorder_trace_buffer_size",
            "flight_recorder_dump_on_timeout",
            "flight_recorder_include_stack_trace",
            "flight_recorder_include_only_active",
            "flight_recorder_extra_dump_on_exec",
        ),
        _LAYOUT,
    ),
    *only_with_package(_RESILIENCY, ("enable_ft_package",), "the package nvidia_resiliency_ext"),
    *only_with(
        "--enable-ft-package",
        lambda args: bool(args.enable_ft_package),
        ("calc_ft_timeouts", "ft_num_warmup_iters"),
        "the package nvidia_resiliency_ext",
    ),
)

_GRADIENTS: tuple[Rule, ...] = (
    _passed_on(
        (
            "use_distributed_optimizer",
            "overlap_grad_reduce",
            "ddp_num_buckets",
            "ddp_bucket_size",
            "ddp_pad_buckets_for_high_nccl_busbw",
            "ddp_reduce_scatter_with_fp32_accumulation",
            "ddp_param_name_patterns_for_fp32_local_accumulation",
            "ddp_average_in_collective",
            "gradient_reduce_div_fusion",
            "nccl_ub",
            "use_layer_wise_param_layout",
        ),
        _DDP,
    ),
    *only_with("--overlap-grad-reduce", lambda args: bool(args.overlap_grad_reduce), ("align_grad_reduce",), _DDP),
    *only_with(
        "--use-distributed-optimizer",
        _is_sharded_optimizer,
        ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        _DDP,
    ),
    *only_with("--overlap-param-gather", lambda args: bool(args.overlap_param_gather), ("align_param_gather",), _DDP),
    *only_with("--nccl-ub", lambda args: bool(args.nccl_ub), ("disable_symmetric_registration",), _DDP),
    _passed_on(("use_megatron_fsdp", "use_torch_fsdp2"), "Megatron's FSDP"),
    *only_with(
        "--use-torch-fsdp2",
        lambda args: bool(args.use_torch_fsdp2),
        ("torch_fsdp2_reshard_after_forward",),
        "Megatron's FSDP",
    ),
    *only_with(
        "--use-megatron-fsdp",
        lambda args: bool(args.use_megatron_fsdp),
        (
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "fsdp_double_buffer",
            "fsdp_manual_registration",
            "suggested_communication_unit_size",
            "keep_fp8_transpose_cache",
            "megatron_fsdp_main_params_dtype",
            "megatron_fsdp_main_grads_dtype",
            "megatron_fsdp_grad_comm_dtype",
            "megatron_fsdp_enable_fine_grained_param_gather",
            "megatron_fsdp_max_pool_double_buffer",
            "fsdp_db_use_persist_buf_on_alloc_fail",
        ),
        "Megatron's FSDP",
    ),
)

MACHINES: tuple[Rule, ...] = (*_SAVING, *_PROCESSES, *_GRADIENTS)
