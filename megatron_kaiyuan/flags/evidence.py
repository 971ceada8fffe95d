"""How each flag that works was verified: by a test that looks at the model, the numbers or the files, or how else.

`EFFECTS` are run by a slow test and by `benchmarks/flag_effects.py`. Other tests are named in `TESTS`. `NOT_RUN` says
what was read in Megatron, and why nothing was run. A test keeps the three complete, and the names of the tests true.
"""

from collections.abc import Iterator, Mapping

from megatron_kaiyuan.flags.effects import EFFECTS, Effect
from megatron_kaiyuan.flags.spelling import Spelling

__all__ = ["EFFECTS_TEST", "NOT_RUN", "TESTS", "evidence"]

EFFECTS_TEST = "tests/functional_tests/test_flag_fuzz.py::test_each_flag_changes_what_its_line_says"

_MODEL = "tests/unit_tests/model/"
_RUNS = "tests/functional_tests/"
_TRAINING = "tests/unit_tests/training/"
_SPLITS = f"{_TRAINING}test_plain_splits.py"
_LENGTH = f"{_TRAINING}test_run_length.py"

TESTS: Mapping[str, str] = {
    f"{_MODEL}test_parallel.py::test_every_rank_has_the_float64_models_loss_and_its_part_of_the_gradients": (
        "tensor_model_parallel_size pipeline_model_parallel_size"
    ),
    f"{_MODEL}test_experts.py::test_split_experts_are_built_as_stock_builds_them": (
        "expert_model_parallel_size sequence_parallel"
    ),
    f"{_RUNS}test_training.py::test_two_ranks_continue_as_one_rank_would": (
        "tensor_model_parallel_size pipeline_model_parallel_size use_distributed_optimizer"
    ),
    f"{_RUNS}test_training.py::test_fused_kernels_with_overlapped_gathers_on_two_ranks_train_as_one_unfused_rank": (
        "overlap_param_gather overlap_grad_reduce"
    ),
    f"{_RUNS}test_training.py::test_a_run_without_a_plan_trains_on_a_megatron_blend": "data_path",
    f"{_RUNS}test_training.py::test_tokens_see_only_their_own_document_where_the_flags_ask_for_it": (
        "reset_attention_mask reset_position_ids"
    ),
    f"{_RUNS}test_training.py::test_resuming_in_half_precision_repeats_the_unbroken_run_bit_for_bit": "plan",
    f"{_RUNS}test_wandb.py::test_an_offline_run_holds_the_loss_and_tokens_of_each_source": (
        "wandb_project wandb_exp_name wandb_save_dir"
    ),
    f"{_RUNS}test_rising_scale.py::test_the_scale_rises_on_all_ranks_and_stays_after_a_resume": (
        "kaiyuan_raise_branch_scale_below"
    ),
    f"{_RUNS}test_average_in_training.py::test_the_losses_told_are_those_of_the_average_made_by_the_tool": (
        "kaiyuan_evaluate_average"
    ),
    "tests/unit_tests/monitoring/test_monitor.py::test_a_run_that_only_skips_is_stopped_and_the_layer_that_overflowed_is"
    "_named": "kaiyuan_max_skipped_steps",
    f"{_MODEL}test_architecture_flags.py::test_another_spec_builds_its_own_layers": "spec",
    f"{_MODEL}test_builder.py::test_a_command_line_becomes_the_config_it_asks_for": "transformer_impl",
    f"{_MODEL}test_model.py::test_with_every_switch_off_the_model_is_bit_identical_to_megatrons": (
        "kaiyuan_attention kaiyuan_fusions"
    ),
    f"{_SPLITS}::test_data_that_last_are_taken_and_no_data_to_evaluate_on_switches_evaluation_off": (
        "train_data_path valid_data_path test_data_path"
    ),
    f"{_TRAINING}test_blend.py::test_the_words_of_a_file_are_checked": "data_args_path",
    f"{_TRAINING}test_blend.py::test_the_blends_of_a_split_file_are_checked": "per_split_data_args_path",
    f"{_LENGTH}::test_a_new_run_makes_all_whole_batches_and_one_counted_in_steps_those": "train_samples",
    f"{_TRAINING}test_blend.py::test_mock_data_needs_no_files": "mock_data",
    f"{_TRAINING}test_plan_arguments.py::test_the_tokenizer_of_the_shards_is_accepted_wherever_it_lies": (
        "tokenizer_type tokenizer_model"
    ),
    f"{_TRAINING}test_loop_repairs.py::test_a_step_that_is_not_finite_when_repeated_ends_the_run_in_a_sentence": (
        "check_for_nan_in_loss_and_grad"
    ),
    f"{_TRAINING}test_loop_repairs.py::test_a_loss_far_above_the_earlier_ones_asks_for_the_step_again": (
        "check_for_spiky_loss"
    ),
    f"{_RUNS}test_stopping.py::test_a_second_start_is_refused_and_an_interrupt_saves_the_first": "exit_signal_handler",
    f"{_TRAINING}test_load_arguments.py::test_a_checkpoint_that_is_not_there_is_named": "exit_on_missing_checkpoint",
}
"""Names of arguments by the test that looks at what they do."""

NOT_RUN: Mapping[str, str] = {
    "not run, for want of Transformer Engine; read in Megatron 0.19.2: handed to those layers or kernels": """
        tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards context_parallel_size
        hierarchical_context_parallel_sizes cp_comm_type tp_comm_overlap tp_comm_overlap_cfg tp_comm_bulk_wgrad
        tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
        tp_comm_split_rs tp_comm_bootstrap_backend cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
        attention_backend flash_attention_version layernorm_zero_centered_gamma qk_clip qk_clip_alpha qk_clip_threshold
        init_model_with_meta_device use_fused_weighted_squared_relu fused_residual_rmsnorm
        use_transformer_engine_op_fuser fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval
        fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_param_gather first_last_layers_bf16
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather
        use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert moe_grouped_gemm moe_single_grouped_weight
        moe_single_grouped_bias moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size moe_latent_size
        moe_permute_fusion moe_router_fusion moe_router_padding_for_quantization moe_router_padding_for_fp8
        batch_invariant_mode use_te_activation_func te_precision_config_file te_rng_tracker
        reuse_grad_buf_for_mxfp8_param_ag delay_wgrad_compute log_max_attention_logit
        overlap_dispatch_backward_with_experts_wgrad fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads use_precision_aware_optimizer
        save_activations_interval save_dgrads_interval main_grads_dtype main_params_dtype exp_avg_dtype
        exp_avg_sq_dtype cross_entropy_fusion_impl""",
    "not run, for want of a dispatcher of DeepEP's; read in Megatron 0.19.2: `token_dispatcher.py` hands it on": """
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_expert_rank_capacity_factor moe_paged_stash
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu""",
    "not run, it needs a GPU; read in Megatron 0.19.2: no loss depends on it": """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps cuda_graph_modules
        cuda_graph_scope_deprecated optimizer_cuda_graph gpu_sniff_test_interval nccl_ub
        disable_symmetric_registration use_sharp sharp_enabled_group record_memory_history memory_snapshot_path
        log_memory_to_tensorboard log_device_memory_used log_energy log_straggler straggler_ctrlr_port
        straggler_minmax_count disable_straggler_on_startup nvtx_ranges record_shapes use_ring_exchange_p2p
        nccl_communicator_config_path optimizer_cpu_offload optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params""",
    "not run with enough ranks; read in Megatron 0.19.2: it says which rank holds or sends what, and when": """
        distribute_saved_activations defer_embedding_wgrad_compute wgrad_deferral_limit
        overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers pipeline_model_parallel_layout
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank overlap_p2p_comm
        overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split overlap_param_gather_with_optimizer_step
        pipeline_model_parallel_comm_backend num_distributed_optimizer_instances""",
    "not run, for want of the package; read in Megatron 0.19.2: it is handed to that package": """
        muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type
        muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2
        enable_ft_package calc_ft_timeouts ft_num_warmup_iters fault_injector_ranks fault_injector_num_ranks
        fault_injector_fault_types fault_injector_fault_probabilities fault_injector_fault_delay
        fault_injector_delay_start_iteration fault_injector_mtti_seconds fault_injector_offset_seconds
        fault_injector_seed one_logger_project one_logger_run_name one_logger_async app_tag_run_name
        app_tag_run_version run_workload_inspector_server wandb_entity non_persistent_local_ckpt_dir
        non_persistent_local_ckpt_algo replication replication_jump replication_factor""",
    "not run, for Megatron's FSDP needs a GPU; read in Megatron 0.19.2: it is handed to that": """
        use_megatron_fsdp use_torch_fsdp2 torch_fsdp2_reshard_after_forward data_parallel_sharding_strategy
        outer_dp_sharding_strategy fsdp_double_buffer fsdp_manual_registration suggested_communication_unit_size
        keep_fp8_transpose_cache megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype
        megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail""",
    "read in Megatron 0.19.2: it acts on how the process runs or ends, on no model and no loss": """
        moe_routing_trace_dump_weights exit_duration_in_mins error_injection_rate error_injection_type
        async_ckpt_cpu_priority
        async_ckpt_io_priority async_ckpt_use_cpu_shm use_persistent_ckpt_worker flight_recorder_trace_buffer_size
        flight_recorder_dump_on_timeout flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec""",
    "not compared; read in Megatron 0.19.2: its own code acts on it, and ours does not stand between": """
        allow_ambiguous_pad_tokens chat_template create_attention_mask_in_dataloader data_cache_path
        data_sharding dataloader_defer_npy_index_mmap dataloader_fast_cache_load dataloader_type
        eod_mask_loss metadata_path mid_level_dataset_surplus mmap_bin_files non_persistent_ckpt_type
        null_tokenizer_eod_id null_tokenizer_pad_id num_dataset_builder_threads num_workers
        per_dataset_sequences_path phase_transition_iterations seq_length special_tokens
        tiktoken_num_special_tokens tiktoken_pattern tokenizer_hf_no_include_special_tokens
        tokenizer_hf_no_use_fast tokenizer_sentencepiece_ignore_extra_whitespaces
        tokenizer_sentencepiece_legacy trust_remote_code vocab_size""",
    "read in Megatron 0.19.2: handed to its tokenizers": "vocab_file merge_file",
    "read in Megatron 0.19.2: another name of --seq-length": "encoder_seq_length",
    "read in Megatron 0.19.2: it acts on checkpoints of old versions": "ckpt_convert_update_legacy_dist_opt_format",
}
"""Names of arguments by how they were verified where nothing was run."""


def evidence(flags: Mapping[str, Spelling]) -> dict[str, list[str]]:
    """Return how each flag was verified, by the name that it is stored under.

    Args:
        flags: Of the parser.
    """
    names = {word: name for name, flag in flags.items() for word in flag.flags}
    found: dict[str, list[str]] = {}
    for effect in EFFECTS:
        found.setdefault(names[effect.name], []).append(f"`{_shown(effect)}`")
    tried = {name: f"`{EFFECTS_TEST}`: {'; '.join(lines)}" for name, lines in found.items()}
    verified = {name: [text] for name, text in tried.items()}
    for test, text in (*_each(TESTS), *_each(NOT_RUN)):
        verified.setdefault(text, []).append(test)
    return verified


def _each(table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for how, names in table.items():
        for name in names.split():
            yield (f"`{how}`" if how.startswith("tests/") else how), name


def _shown(effect: Effect) -> str:
    given = f" beside {effect.given}" if effect.given else ""
    return f"{effect.flag}{given}: {', '.join(sorted(effect.shows)) or 'no number changes'}"
