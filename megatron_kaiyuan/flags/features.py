"""Architecture flags that are read only where another one switches their feature on."""

import argparse
from collections.abc import Callable

from megatron_kaiyuan.flags import conditions as when
from megatron_kaiyuan.flags.rules import Rule, only_with

__all__ = ["OF_FEATURES", "idle"]


def idle(names: str, master: str, holds: Callable[[argparse.Namespace], bool]) -> Rule:
    """Return the refusal of flags of a feature that another flag switches on."""
    return only_with(master, holds, tuple(names.split()), "")[0]


OF_FEATURES = (
    idle("num_query_groups", "--group-query-attention", when.uses("group_query_attention")),
    idle(
        "rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor no_rope_freq",
        "--position-embedding-type rope",
        when.rotates,
    ),
    idle(
        "use_rope_scaling",
        "--position-embedding-type rope",
        lambda args: when.rotates(args) and args.position_embedding_type != "yarn",
    ),
    idle(
        """yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
        rotary_scaling_factor mscale mscale_all_dim""",
        "--position-embedding-type yarn",
        lambda args: bool(args.position_embedding_type == "yarn"),
    ),
    idle("window_attn_skip_freq", "--window-size", when.uses("window_size")),
    idle("activation_func_clamp_value glu_linear_offset", "--swiglu or --quick-geglu", when.gated),
    idle("use_fused_weighted_squared_relu", "--squared-relu", when.uses("squared_relu")),
    idle(
        "mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads",
        "--mtp-num-layers",
        when.uses("mtp_num_layers"),
    ),
    idle(
        "mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power",
        "--use-mup",
        when.uses("use_mup"),
    ),
    idle("qk_clip_alpha qk_clip_threshold", "--qk-clip", when.uses("qk_clip")),
    idle(
        """fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
        fp8_output_proj""",
        "--fp8-format",
        when.uses("fp8"),
    ),
    idle("fp4_recipe fp4_quantizer_factory", "--fp4-format", when.uses("fp4")),
    idle(
        "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
        "--fp8-format or --fp4-format",
        when.uses("fp8", "fp4"),
    ),
    idle(
        """tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
        tp_comm_split_ag tp_comm_split_rs""",
        "--tp-comm-overlap",
        when.uses("tp_comm_overlap"),
    ),
    idle(
        "recompute_method recompute_num_layers recompute_modules",
        "--recompute-granularity",
        when.uses("recompute_granularity", "recompute_activations"),
    ),
    idle("cross_entropy_fusion_impl", "--cross-entropy-loss-fusion", when.uses("cross_entropy_loss_fusion")),
    idle("wgrad_deferral_limit", "--defer-embedding-wgrad-compute", when.uses("defer_embedding_wgrad_compute")),
    idle(
        "cpu_offloading_retain_pinned_cpu_buffers",
        "--cpu-offloading-num-layers",
        when.uses("cpu_offloading_num_layers"),
    ),
    idle(
        """offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads""",
        "--fine-grained-activation-offloading",
        when.uses("fine_grained_activation_offloading"),
    ),
    idle(
        "cuda_graph_warmup_steps",
        "--cuda-graph-impl",
        when.uses("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"),
    ),
    idle("disable_bf16_reduced_precision_matmul", "--bf16", when.uses("bf16")),
    idle(
        """moe_shared_expert_gate moe_shared_expert_overlap use_grouped_gemm_for_shared_expert
        moe_shared_expert_glu_interleave_size""",
        "--moe-shared-expert-intermediate-size",
        when.uses("moe_shared_expert_intermediate_size"),
    ),
    idle(
        "moe_router_bias_update_rate",
        "--moe-router-enable-expert-bias",
        when.uses("moe_router_enable_expert_bias"),
    ),
    idle(
        "moe_token_drop_policy moe_pad_expert_input_to_capacity",
        "--moe-expert-capacity-factor",
        when.uses("moe_expert_capacity_factor"),
    ),
    idle(
        "moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu",
        "--moe-paged-stash",
        when.uses("moe_paged_stash"),
    ),
    idle(
        """moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy""",
        "--moe-token-dispatcher-type flex",
        lambda args: bool(args.moe_token_dispatcher_type == "flex"),
    ),
    idle(
        "moe_router_quantile_balancing_ema",
        "--moe-router-load-balancing-type quantile_balancing",
        lambda args: "quantile_balancing" in args.moe_router_load_balancing_type,
    ),
    idle(
        "high_priority_a2a_comm_stream",
        "--overlap-moe-expert-parallel-comm",
        when.uses("overlap_moe_expert_parallel_comm"),
    ),
)
"""Refusals of what is read only where another flag is given."""
