"""What a model is: the arguments that travel with its checkpoints.

A run that loads a checkpoint takes these from it where its command line says nothing. Every architecture flag that is
not refused stands in one of four lists, which a test checks.
"""

__all__ = ["COMPUTATION", "FUNCTION", "RECIPE", "WEIGHTS"]

WEIGHTS = tuple(
    """num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups
    normalization qk_layernorm attention_output_gate swiglu quick_geglu add_bias_linear add_qkv_bias softmax_type
    position_embedding_type max_position_embeddings untie_embeddings_and_output_weights num_experts moe_layer_freq
    moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size
    moe_router_enable_expert_bias mtp_num_layers mtp_use_repeated_layer kaiyuan_sandwich_norm multi_latent_attention
    experimental_attention_variant hybrid_layer_pattern heterogeneous_layers_config_path""".split()  # noqa: SIM905
)
"""Which tensors there are, and their shapes."""

FUNCTION = tuple(
    """layernorm_epsilon layernorm_zero_centered_gamma qk_l2_norm squared_relu activation_func_clamp_value
    glu_linear_offset rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor
    use_rope_scaling no_rope_freq yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
    yarn_correction_range_round_to_int rotary_scaling_factor mscale mscale_all_dim window_size window_attn_skip_freq
    use_mup mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
    mup_attn_scale_power moe_router_topk moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_score_function moe_apply_probs_on_input moe_mlp_glu_interleave_size
    moe_shared_expert_glu_interleave_size spec kaiyuan_logit_softcap""".split()  # noqa: SIM905
)
"""What is computed from them."""

RECIPE = tuple(
    """attention_dropout hidden_dropout moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
    moe_input_jitter_eps moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_expert_capacity_factor
    moe_expert_rank_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy mtp_loss_scaling_factor
    mtp_detach_heads qk_clip qk_clip_alpha qk_clip_threshold kaiyuan_z_loss kaiyuan_branch_scale_bits
    kaiyuan_raise_branch_scale_below""".split()  # noqa: SIM905
)
"""How it is trained, beside the optimizer; the command line may change these at any start."""

COMPUTATION = tuple(
    """init_method_std embedding_init_method_std perform_initialization use_cpu_initialization data_parallel_random_init
    kaiyuan_post_norm_gain_init kaiyuan_post_norm_depth_scaled make_vocab_size_divisible_by
    use_rotary_position_embeddings rope_type apply_query_key_layer_scaling attention_softmax_in_fp32
    fp32_residual_connection fp16 bf16 transformer_impl attention_backend flash_attention_version use_flash_attn
    cross_entropy_loss_fusion cross_entropy_fusion_impl gradient_accumulation_fusion masked_softmax_fusion
    bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion no_persist_layer_norm
    fused_residual_rmsnorm use_transformer_engine_op_fuser use_te_activation_func use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_fused_weighted_squared_relu moe_grouped_gemm moe_single_grouped_weight
    moe_single_grouped_bias kaiyuan_attention kaiyuan_fusions kaiyuan_recompute_swiglu sequence_parallel
    tensor_model_parallel_size pipeline_model_parallel_size pipeline_model_parallel_comm_backend context_parallel_size
    hierarchical_context_parallel_sizes expert_model_parallel_size expert_tensor_parallel_size
    tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage overlap_p2p_comm_warmup_flush
    use_ring_exchange_p2p tp_comm_bootstrap_backend defer_embedding_wgrad_compute wgrad_deferral_limit
    delay_wgrad_compute clone_scatter_output_in_embedding calculate_per_token_loss config_logger_dir
    deterministic_mode disable_bf16_reduced_precision_matmul recompute_granularity recompute_modules recompute_method
    recompute_num_layers distribute_saved_activations cpu_offloading_num_layers
    cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules
    min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    activation_offload_fraction fine_grained_offloading_max_inflight_offloads mlp_chunks_for_training
    enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps
    moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_dtype moe_router_force_load_balancing
    moe_router_force_biased moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend
    moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs moe_per_layer_logging moe_layer_recompute
    moe_permute_fusion moe_router_fusion moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
    moe_ncclep_static_shape moe_ncclep_zero_copy moe_shared_expert_overlap overlap_moe_expert_parallel_comm
    overlap_dispatch_backward_with_experts_wgrad high_priority_a2a_comm_stream ep_overlap_early_attn_memory_release
    moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_buffer_size_factor_cpu fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval
    fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_param_gather first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather
    te_precision_config_file log_max_attention_logit tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad
    tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
    batch_invariant_mode init_model_with_meta_device""".split()  # noqa: SIM905
)
"""Initial weights, where and how it is computed, and in what precision: no part of the model."""
