"""Flags of the optimizer, the schedule, the batch, precision, logging and profiling."""

import argparse

from megatron_kaiyuan.flags.rules import Condition, Fate, Rule, only_with, only_with_package
from megatron_kaiyuan.host import cpu_platform

__all__ = ["GROUPS", "TRAINING"]

GROUPS = (
    "regularization",
    "profiling",
    "training",
    "RNG and initialization",
    "learning rate and weight decay",
    "mixed precision",
    "logging",
    "straggler",
    "workload inspector",
    "experimental",
    "one logger",
    "rerun engine",
    "fault injector",
    "autoresume",
    "msc",
)

_LOOP = "Megatron's training loop"
_OPTIMIZER = "Megatron's optimizer"
_WITHOUT_CUDA = Condition("without CUDA", lambda _args: cpu_platform.is_installed())


def _is_muon(args: argparse.Namespace) -> bool:
    return "muon" in args.optimizer


def _passed_on(names: tuple[str, ...], says: str) -> Rule:
    return Rule(Fate.PASSED_ON, names, says)


def _on_a_gpu(names: tuple[str, ...], says: str) -> list[Rule]:
    return [Rule(Fate.REFUSED, names, "it needs a GPU; leave it out", _WITHOUT_CUDA), Rule(Fate.PASSED_ON, names, says)]


_OPTIMIZERS: tuple[Rule, ...] = (
    _passed_on(("weight_decay", "apply_wd_to_qk_layernorm", "no_weight_decay_cond_type", "clip_grad"), _OPTIMIZER),
    _passed_on(("optimizer", "freeze_all_layers", "dump_param_to_param_group_map"), _OPTIMIZER),
    *only_with(
        "--optimizer adam or another that takes Adam's step",
        lambda args: args.optimizer != "sgd",
        ("adam_beta1", "adam_beta2", "adam_eps"),
        _OPTIMIZER,
    ),
    *only_with("--optimizer sgd", lambda args: args.optimizer == "sgd", ("sgd_momentum",), _OPTIMIZER),
    *only_with(
        "--optimizer muon",
        _is_muon,
        (
            "muon_momentum",
            "muon_split_qkv",
            "muon_nesterov",
            "muon_scale_mode",
            "muon_fp32_matmul_prec",
            "muon_coefficient_type",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
            "muon_scalar_optimizer",
        ),
        "the package emerging_optimizers",
    ),
    *only_with(
        "--optimizer lion",
        lambda args: args.optimizer == "lion" or (_is_muon(args) and args.muon_scalar_optimizer == "lion"),
        ("lion_beta1", "lion_beta2"),
        "the package emerging_optimizers",
    ),
    _passed_on(("optimizer_cpu_offload",), _OPTIMIZER),
    *only_with(
        "--optimizer-cpu-offload",
        lambda args: bool(args.optimizer_cpu_offload),
        (
            "optimizer_offload_fraction",
            "use_torch_optimizer_for_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d",
            "pin_cpu_grads",
            "pin_cpu_params",
        ),
        _OPTIMIZER,
    ),
    *_on_a_gpu(("optimizer_cuda_graph",), _LOOP),
    _passed_on(("use_precision_aware_optimizer", "enable_experimental"), _OPTIMIZER),
    *only_with(
        "--use-precision-aware-optimizer",
        lambda args: bool(args.use_precision_aware_optimizer),
        ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
        _OPTIMIZER,
    ),
)

_SCHEDULE: tuple[Rule, ...] = (
    _passed_on(
        (
            "lr",
            "min_lr",
            "lr_decay_style",
            "lr_decay_iters",
            "lr_decay_samples",
            "lr_warmup_fraction",
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_warmup_init",
            "decoupled_lr",
            "start_weight_decay",
            "end_weight_decay",
            "weight_decay_incr_style",
        ),
        "Megatron's schedule, where the plan gives no rate",
    ),
    *only_with(
        "--lr-decay-style WSD",
        lambda args: args.lr_decay_style == "WSD",
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        "Megatron's schedule",
    ),
    *only_with(
        "--decoupled-lr", lambda args: args.decoupled_lr is not None, ("decoupled_min_lr",), "Megatron's schedule"
    ),
    Rule(
        Fate.HONOURED,
        ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
        "which rate a resumed run goes on with",
    ),
)

_STEPS: tuple[Rule, ...] = (
    _passed_on(("micro_batch_size", "global_batch_size", "step_batch_size_schedule"), _LOOP),
    Rule(Fate.HONOURED, ("train_iters", "train_samples"), "the end of the run, compared with the plan"),
    Rule(Fate.HONOURED, ("iterations_to_skip",), "Megatron's loop, and the counts of our monitor"),
    Rule(
        Fate.REFUSED,
        ("iterations_to_skip",),
        "Megatron would read a batch on a stage that has none; leave it out, and train with one or two stages",
        Condition(
            "with more than two pipeline stages, or virtual ones",
            lambda args: (
                args.pipeline_model_parallel_size > 2
                or args.num_layers_per_virtual_pipeline_stage is not None
                or args.num_virtual_stages_per_pipeline_rank is not None
                or args.pipeline_model_parallel_layout is not None
            ),
        ),
    ),
    Rule(Fate.HONOURED, ("check_for_nan_in_loss_and_grad", "check_for_spiky_loss"), "our loss and Megatron's loop"),
    Rule(Fate.HONOURED, ("use_checkpoint_args",), "the model of a checkpoint"),
    _passed_on(
        (
            "seed",
            "empty_unused_memory_level",
            "check_weight_hash_across_dp_replicas_interval",
            "train_sync_interval",
            "exit_interval",
            "exit_duration_in_mins",
            "exit_signal_handler",
            "exit_signal",
            "manual_gc",
            "recompute_activations",
            "check_for_large_grads",
            "result_rejected_tracker_filename",
            "error_injection_rate",
            "rerun_mode",
        ),
        _LOOP,
    ),
    Rule(Fate.HONOURED, ("deprecated_use_mcore_models",), "always so"),
    Rule(
        Fate.REFUSED,
        ("num_experts",),
        "each token goes to more experts than there are; give more of them, or a smaller --moe-router-topk",
        Condition("below --moe-router-topk", lambda args: 0 < (args.num_experts or 0) < args.moe_router_topk),
    ),
    *only_with("--manual-gc", lambda args: bool(args.manual_gc), ("manual_gc_interval", "manual_gc_eval"), _LOOP),
    *only_with(
        "--error-injection-rate",
        lambda args: bool(args.error_injection_rate),
        ("error_injection_type",),
        "Megatron's rerun machine",
    ),
    *_on_a_gpu(("gpu_sniff_test_interval",), _LOOP),
    *_on_a_gpu(("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph", "nccl_ub", "use_sharp"), "")[:1],
    *only_with_package("transformer_engine", ("external_cuda_graph",), "")[:1],
    Rule(
        Fate.REFUSED,
        ("kv_channels",),
        "rotary positions turn the channels of a head in pairs; give an even number",
        Condition(
            "with rotary positions",
            lambda args: args.position_embedding_type in ("rope", "yarn") and (args.kv_channels or 0) % 2 == 1,
        ),
    ),
    *only_with(
        "--cuda-graph-impl",
        lambda args: args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph,
        ("cuda_graph_modules", "cuda_graph_scope_deprecated"),
        "Megatron's CUDA graphs",
    ),
    *only_with(
        "--tp-comm-overlap", lambda args: bool(args.tp_comm_overlap), ("tp_comm_overlap_cfg",), "Transformer Engine"
    ),
    *only_with_package("transformer_engine", ("te_rng_tracker",), "Transformer Engine's random states"),
    *only_with_package(
        "nvidia_resiliency_ext", ("fault_injector_ranks", "fault_injector_num_ranks"), "Megatron's fault injector"
    ),
    *only_with(
        "--fault-injector-ranks or --fault-injector-num-ranks",
        lambda args: args.fault_injector_ranks is not None or args.fault_injector_num_ranks is not None,
        (
            "fault_injector_fault_types",
            "fault_injector_fault_probabilities",
            "fault_injector_fault_delay",
            "fault_injector_delay_start_iteration",
            "fault_injector_mtti_seconds",
            "fault_injector_offset_seconds",
            "fault_injector_seed",
        ),
        "Megatron's fault injector",
    ),
)

_PRECISION: tuple[Rule, ...] = (
    *only_with(
        "--fp16",
        lambda args: bool(args.fp16),
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "Megatron's loss scaler",
    ),
    *only_with("--bf16", lambda args: bool(args.bf16), ("grad_reduce_in_bf16",), "Megatron's gradient buffers"),
    _passed_on(("accumulate_allreduce_grads_in_fp32",), "Megatron's gradient buffers"),
    *only_with_package("transformer_engine", ("reuse_grad_buf_for_mxfp8_param_ag",), "Megatron's gradient buffers"),
)

_LOGS: tuple[Rule, ...] = (
    _passed_on(
        (
            "log_interval",
            "log_params_norm",
            "log_throughput",
            "timing_log_level",
            "timing_log_option",
            "log_memory_interval",
            "log_num_zeros_in_grad",
            "barrier_with_L1_time",
            "logging_level",
            "tensorboard_dir",
        ),
        _LOOP,
    ),
    *_on_a_gpu(("log_device_memory_used",), "Megatron's meter of NVML"),
    *only_with_package("pynvml", ("log_device_memory_used",), "")[:1],
    *_on_a_gpu(("log_memory_to_tensorboard",), "")[:1],
    *only_with("--save", lambda args: bool(args.save), ("log_progress",), _LOOP),
    *only_with_package("transformer_engine", ("log_max_attention_logit",), "Transformer Engine's attention"),
    *only_with(
        "--num-experts",
        lambda args: bool(args.num_experts),
        ("moe_routing_trace_path",),
        "Megatron's trace of the router",
    ),
    *only_with(
        "--moe-routing-trace-path",
        lambda args: bool(args.moe_routing_trace_path),
        (
            "moe_routing_trace_max_training_iters",
            "moe_routing_trace_capture_logits",
            "moe_routing_trace_capture_hidden_states",
            "moe_routing_trace_dump_weights",
        ),
        "Megatron's trace of the router",
    ),
    *only_with(
        "--tensorboard-dir",
        lambda args: bool(args.tensorboard_dir),
        (
            "tensorboard_log_interval",
            "tensorboard_queue_size",
            "log_loss_scale_to_tensorboard",
            "log_validation_ppl_to_tensorboard",
            "log_memory_to_tensorboard",
            "log_world_size_to_tensorboard",
        ),
        _LOOP,
    ),
    *only_with(
        "--tensorboard-dir or --wandb-project",
        lambda args: bool(args.tensorboard_dir or args.wandb_project),
        ("log_timers_to_tensorboard",),
        _LOOP,
    ),
    Rule(Fate.HONOURED, ("wandb_project",), "checked first, then Megatron's writer"),
    *only_with(
        "--wandb-project",
        lambda args: bool(args.wandb_project),
        ("wandb_exp_name", "wandb_save_dir", "wandb_entity"),
        "Megatron's writer",
    ),
    *_on_a_gpu(("log_energy",), "Megatron's meter of NVML"),
    *only_with_package("pynvml", ("log_energy",), "Megatron's meter of NVML")[:1],
    *_on_a_gpu(("log_straggler",), "Megatron's straggler detector, around our forward step"),
    *only_with_package("pynvml", ("log_straggler",), "")[:1],
    *only_with(
        "--log-straggler",
        lambda args: bool(args.log_straggler),
        ("straggler_ctrlr_port", "straggler_minmax_count", "disable_straggler_on_startup"),
        "Megatron's straggler detector",
    ),
    *only_with_package("workload_inspector", ("run_workload_inspector_server",), _LOOP),
    Rule(Fate.HONOURED, ("enable_one_logger",), "off where the package is missing"),
    *only_with_package(
        "one_logger",
        ("one_logger_project", "one_logger_run_name", "one_logger_async", "app_tag_run_name", "app_tag_run_version"),
        "NVIDIA's one_logger",
    ),
)

_PROFILING: tuple[Rule, ...] = (
    _passed_on(("profile",), _LOOP),
    Rule(
        Fate.REFUSED,
        ("profile",),
        "there it starts CUDA's own profiler; add --use-pytorch-profiler, or leave it out",
        Condition("without CUDA", lambda args: cpu_platform.is_installed() and not args.use_pytorch_profiler),
    ),
    *only_with(
        "--profile",
        lambda args: bool(args.profile),
        (
            "profile_step_start",
            "profile_step_end",
            "profile_ranks",
            "use_pytorch_profiler",
            "record_shapes",
            "nvtx_ranges",
        ),
        _LOOP,
    ),
    Rule(
        Fate.REFUSED,
        ("use_pytorch_profiler",),
        "its traces go to a folder beside that one; give it",
        Condition("without --tensorboard-dir", lambda args: not args.tensorboard_dir),
    ),
    *only_with(
        "--use-pytorch-profiler",
        lambda args: bool(args.use_pytorch_profiler),
        ("pytorch_profiler_collect_shapes", "pytorch_profiler_collect_callstack", "pytorch_profiler_collect_chakra"),
        _LOOP,
    ),
    *_on_a_gpu(("nvtx_ranges",), "")[:1],
    Rule(
        Fate.REFUSED,
        ("record_shapes",),
        "CUDA's own profiler alone reads it; use --pytorch-profiler-collect-shapes",
        Condition("with --use-pytorch-profiler", lambda args: bool(args.use_pytorch_profiler)),
    ),
    *_on_a_gpu(("record_memory_history",), _LOOP),
    *only_with(
        "--record-memory-history", lambda args: bool(args.record_memory_history), ("memory_snapshot_path",), _LOOP
    ),
)

TRAINING: tuple[Rule, ...] = (*_OPTIMIZERS, *_SCHEDULE, *_STEPS, *_PRECISION, *_LOGS, *_PROFILING)
