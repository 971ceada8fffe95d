"""Flags of Megatron's parser that belong to other programs than the pretraining of a language model: all refused.

Megatron has one parser for all of its programs, so `pretrain_gpt.py` takes the flags of image models, of retrieval, of
reinforcement learning and of inference, and does nothing with them.
"""

from megatron_kaiyuan.flags.rules import Condition, Fate, Rule, only_with

__all__ = ["ELSEWHERE"]

_RL = (
    "perform_rl_step",
    "rl_prompts_per_eval",
    "grpo_prompts_per_step",
    "grpo_group_size",
    "rl_generation_lag",
    "rl_submission_granularity",
    "rl_consumption_granularity",
    "grpo_iterations",
    "grpo_clamp_eps_lower",
    "grpo_clamp_eps_upper",
    "grpo_kl_beta",
    "grpo_entropy_term_weight",
    "grpo_filter_groups_with_same_reward",
    "langrl_env_config",
    "rl_default_temperature",
    "rl_default_top_p",
    "rl_default_top_k",
    "rl_offload_optimizer_during_inference",
    "rl_kv_cache_management_mode",
    "rl_persist_cuda_graphs",
    "rl_partial_rollouts",
    "rl_inference_logprobs_is_correction",
    "rl_importance_sampling_truncation_coef",
    "rl_use_sequence_packing",
    "rl_sequence_packing_max_sequences_per_bin",
    "rl_sequence_packing_algo",
    "rl_training_cuda_graphs",
    "rl_inference_tensor_model_parallel_size",
    "rl_inference_pipeline_model_parallel_size",
    "rl_inference_expert_model_parallel_size",
    "rl_inference_expert_tensor_model_parallel_size",
    "rl_inference_model_unified_memory_level",
    "rl_offload_inference_model_weights_when_idle",
    "refit_method",
    "rl_verify_model_weights_swap",
    "rl_skip_bos_token",
    "rl_profile",
    "rl_profile_dir",
    "rl_inference_parsers",
)

_RETRIEVAL = (
    "ict_head_size",
    "biencoder_projection_dim",
    "biencoder_shared_query_context_model",
    "ict_load",
    "bert_load",
    "titles_data_path",
    "query_in_block_prob",
    "use_one_sent_docs",
    "evidence_data_path",
    "retriever_report_topk_accuracies",
    "retriever_score_scaling",
    "block_data_path",
    "embedding_path",
    "indexer_batch_size",
    "indexer_log_interval",
    "output_bert_embeddings",
    "bert_embedder_type",
    "sample_rate",
    "mask_prob",
    "short_seq_prob",
    "vocab_extra_ids",
    "decoder_seq_length",
)

_IMAGES = (
    "num_classes",
    "img_h",
    "img_w",
    "num_channels",
    "patch_dim",
    "classes_fraction",
    "data_per_class_fraction",
    "head_lr_mult",
    "vision_pretraining",
    "vision_pretraining_type",
    "vision_backbone_type",
    "swin_backbone_type",
    "mask_type",
    "mask_factor",
    "iter_per_epoch",
    "dino_local_img_size",
    "dino_local_crops_number",
    "dino_head_hidden_size",
    "dino_bottleneck_size",
    "dino_freeze_last_layer",
    "dino_norm_last_layer",
    "dino_warmup_teacher_temp",
    "dino_teacher_temp",
    "dino_warmup_teacher_temp_epochs",
)

_INFERENCE = (
    "inference_batch_times_seqlen_threshold",
    "max_tokens_to_oom",
    "use_legacy_static_engine",
    "inference_max_requests",
    "inference_max_seq_length",
    "inference_dynamic_batching",
    "inference_dynamic_batching_buffer_size_gb",
    "inference_dynamic_batching_paused_buffer_size_gb",
    "inference_dynamic_batching_mamba_memory_ratio",
    "inference_dynamic_batching_block_size",
    "inference_dynamic_batching_max_requests",
    "inference_dynamic_batching_max_tokens",
    "inference_dynamic_batching_num_cuda_graphs",
    "inference_dynamic_batching_track_paused_request_events",
    "inference_dynamic_batching_track_generated_token_events",
    "decode_only_cuda_graphs",
    "inference_cuda_graph_all_prefills",
    "inference_cuda_graph_max_tokens",
    "inference_dynamic_batching_unified_memory_level",
    "enable_chunked_prefill",
    "num_speculative_tokens",
    "inference_dynamic_batching_enable_prefix_caching",
    "inference_dynamic_batching_prefix_caching_eviction_policy",
    "inference_dynamic_batching_prefix_caching_coordinator_policy",
    "inference_dynamic_batching_prefix_caching_routing_alpha",
    "inference_dynamic_batching_prefix_caching_mamba_gb",
    "inference_dynamic_batching_cuda_graph_mixed_prefill_count",
    "inference_dynamic_batching_cuda_graph_sizing_distribution",
    "inference_dynamic_batching_sampling_backend",
    "offset_sampling_seed_by_dp_rank",
    "inference_dynamic_batching_async_sched_mode",
    "inference_dynamic_batching_logprobs_mode",
    "inference_logging_step_interval",
    "inference_text_gen_server_logging",
    "inference_wandb_logging",
    "inference_coordinator_port",
    "mamba_inference_conv_states_dtype",
    "mamba_inference_ssm_states_dtype",
    "mamba_training_ssm_states_dtype",
    "inference_use_synchronous_zmq_collectives",
    "inference_disable_ep_consensus",
    "inference_shards",
    "inference_rng_tracker",
)

_DISTILLATION = (
    "logits_save_top_k",
    "logits_save_top_p",
    "logits_save_top_p_min_k",
    "logits_save_dir",
    "logits_save_dtype",
    "logits_load_dir",
    "logits_load_decode_threads",
    "logits_load_prefetch_factor",
    "logits_load_msc_prefetch_depth",
    "logits_load_kd_loss_alpha",
    "logits_load_ignore_errors",
)

_FINE_TUNING = ("sft", "sft_tokenizer_prompt_format")

_FILL_IN_THE_MIDDLE = (
    "fim_data",
    "fim_rate",
    "fim_spm_rate",
    "fim_split_sample",
    "fim_fragment_rate",
    "fim_no_prefix",
    "fim_prefix_token",
    "fim_middle_token",
    "fim_suffix_token",
    "fim_pad_token",
    "fim_eod_token",
)

_RESTART = (
    "inprocess_restart",
    "inprocess_max_iterations",
    "inprocess_monitor_thread_interval",
    "inprocess_monitor_process_interval",
    "inprocess_progress_watchdog_interval",
    "inprocess_heartbeat_interval",
    "inprocess_soft_timeout",
    "inprocess_hard_timeout",
    "inprocess_heartbeat_timeout",
    "inprocess_barrier_timeout",
    "inprocess_completion_timeout",
    "inprocess_last_call_wait",
    "inprocess_termination_grace_time",
    "inprocess_granularity",
    "inprocess_active_world_size",
    "inprocess_empty_cuda_cache",
)

_EXTERNAL = Condition("external", lambda args: args.dataloader_type == "external")
_TRAINING_SIGNALS = (
    "it would leave at once with exit code 0 and save nothing; SIGTERM, SIGUSR1 and Ctrl-C save and end the run here, "
    "so leave it out"
)


def _refused(names: tuple[str, ...], says: str) -> Rule:
    return Rule(Fate.REFUSED, names, says)


ELSEWHERE: tuple[Rule, ...] = (
    _refused(_RL, "reinforcement learning is another program of Megatron-LM's; leave it out"),
    _refused(_RETRIEVAL, "it is read by Megatron-LM's BERT, T5 and retrieval programs alone; leave it out"),
    _refused(_IMAGES, "it is read by Megatron-LM's image models alone; leave it out"),
    _refused(_INFERENCE, "it is read by Megatron's inference alone; leave it out (the tool generate writes text)"),
    _refused(_DISTILLATION, "distillation is not supported by this entry point; leave it out"),
    _refused(
        _FINE_TUNING,
        "conversations and their masks are not supported by this entry point; leave it out, and train on text",
    ),
    _refused(
        _FILL_IN_THE_MIDDLE,
        "no text is cut and turned around while training; leave it out, and write such documents into the shards",
    ),
    _refused(
        _RESTART,
        "a run is not restarted inside its process; leave it out, and let torchrun (--max-restarts) or Slurm start it "
        "again: with --load it continues from its last checkpoint",
    ),
    _refused(("exit_signal_handler_for_training",), _TRAINING_SIGNALS),
    _refused(("exit_signal_handler_for_dataloader",), "nothing in Megatron 0.19 reads it; leave it out"),
    _refused(
        ("adlr_autoresume", "adlr_autoresume_interval"),
        "it needs software of NVIDIA's own cluster; leave it out, and add --requeue to the Slurm job",
    ),
    _refused(
        ("enable_msc", "disable_msc_deprecated", "object_storage_cache_path"),
        "shards and checkpoints are read as files; leave it out, and mount the store or copy from it",
    ),
    _refused(
        ("config_logger_dir",),
        "Megatron fails to write what its configuration holds; leave it out: the log tells every argument",
    ),
    _refused(("lazy_mpu_init",), "Megatron's own loop does not finish such a start; leave it out"),
    _refused(
        ("dataloader_inter_document_masking", "hybrid_context_parallel"),
        "batches of packed documents are not supported by this entry point; leave it out (--reset-attention-mask "
        "--reset-position-ids keep documents apart)",
    ),
    _refused(
        ("rampup_batch_size",),
        "this Megatron ignores it and would train with full batches from the start; give --step-batch-size-schedule "
        "'TOKENS:BATCH ...' in place of it and of --global-batch-size",
    ),
    _refused(
        ("decrease_batch_size_if_needed",),
        "it would train with a smaller batch than --global-batch-size says; leave it out, and give a batch that "
        "--micro-batch-size times the data-parallel size divides",
    ),
    _refused(("batch_size",), "Megatron has dropped it; use --micro-batch-size"),
    _refused(("warmup",), "Megatron has dropped it; use --lr-warmup-fraction"),
    _refused(("model_parallel_size",), "Megatron has dropped it; use --tensor-model-parallel-size"),
    _refused(("checkpoint_activations",), "Megatron has dropped it; use --recompute-activations"),
    _refused(("dist_ckpt_save_pre_mcore_014",), "nothing in Megatron 0.19 reads it; leave it out"),
    _refused(("enable_full_sharding_in_hsdp",), "nothing in Megatron 0.19 reads it; leave it out"),
    Rule(
        Fate.REFUSED,
        ("dataloader_type",),
        "the caller would pass loaders of its own, and there is no caller; use single or cyclic",
        _EXTERNAL,
    ),
    *only_with(
        "--use-checkpoint-args",
        lambda args: bool(args.use_checkpoint_args),
        ("use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args"),
        "Megatron's reading of the arguments in a checkpoint",
    ),
)
