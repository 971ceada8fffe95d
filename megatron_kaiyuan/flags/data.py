"""Flags of the data, its loader, the tokenizer and the evaluations."""

from megatron_kaiyuan.flags.rules import Condition, Fate, Rule, only_with

__all__ = ["DATA", "GROUPS"]

GROUPS = ("data and dataloader", "tokenizer", "validation", "sft")

_WITH_PLAN = Condition("with --plan", lambda args: args.plan is not None)

_OF_BLENDS = (
    "split",
    "data_cache_path",
    "per_dataset_sequences_path",
    "dataloader_fast_cache_load",
    "dataloader_defer_npy_index_mmap",
    "mmap_bin_files",
    "num_dataset_builder_threads",
    "mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens",
    "phase_transition_iterations",
    "data_sharding",
)
_NAMES_OF_DATA = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
    "mock_data",
)
_OF_A_TOKENIZER = (
    "tokenizer_model",
    "metadata_path",
    "special_tokens",
    "vocab_file",
    "merge_file",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "tokenizer_sentencepiece_legacy",
    "tokenizer_sentencepiece_ignore_extra_whitespaces",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
    "trust_remote_code",
    "chat_template",
)
_EXCHANGE = (
    "the plan says which documents are trained on and which are held out, and its order is built from nothing; leave "
    "it out (docs/plan.md: sources, phases, validation)"
)


def _cyclic(names: tuple[str, ...]) -> list[Rule]:
    return only_with(
        "--dataloader-type cyclic", lambda args: args.dataloader_type == "cyclic", names, "Megatron's loader"
    )


DATA: tuple[Rule, ...] = (
    Rule(Fate.REFUSED, _OF_BLENDS, _EXCHANGE, _WITH_PLAN),
    Rule(Fate.REFUSED, _NAMES_OF_DATA, "both name the data; give one of them", _WITH_PLAN),
    Rule(Fate.PASSED_ON, tuple(name for name in _OF_BLENDS if name != "data_sharding"), "Megatron's datasets"),
    Rule(Fate.HONOURED, _NAMES_OF_DATA, "read strictly first, then by Megatron's datasets"),
    *_cyclic(("data_sharding",)),
    Rule(
        Fate.REFUSED,
        ("phase_transition_iterations",),
        "Megatron cuts the samples of the run there and needs their number; give --train-samples",
        Condition("without --train-samples", lambda args: args.train_samples is None),
    ),
    Rule(
        Fate.HONOURED,
        (
            "seq_length",
            "reset_position_ids",
            "reset_attention_mask",
            "eod_mask_loss",
            "create_attention_mask_in_dataloader",
            "plan",
        ),
        "our samples and our attention; Megatron's datasets without a plan",
    ),
    Rule(Fate.PASSED_ON, ("encoder_seq_length",), "another name of --seq-length"),
    Rule(Fate.PASSED_ON, ("num_workers", "dataloader_type"), "Megatron's loader"),
    Rule(
        Fate.HONOURED,
        ("tokenizer_type", "vocab_size"),
        "compared with the shards' manifests, then Megatron's tokenizers",
    ),
    Rule(Fate.PASSED_ON, ("padded_vocab_size", "pad_vocab_size"), "the rows of Megatron's embedding"),
    Rule(
        Fate.REFUSED,
        ("pad_vocab_size",),
        "Megatron knows no number of rows then; give --padded-vocab-size N, or --make-vocab-size-divisible-by 1 in "
        "place of it",
        Condition("without --padded-vocab-size", lambda args: args.padded_vocab_size is None),
    ),
    *only_with(
        "--tokenizer-type", lambda args: args.tokenizer_type is not None, _OF_A_TOKENIZER, "Megatron's tokenizers"
    ),
    *only_with(
        "--tokenizer-type NullTokenizer",
        lambda args: args.tokenizer_type == "NullTokenizer" or (args.plan is not None and args.tokenizer_type is None),
        ("null_tokenizer_eod_id", "null_tokenizer_pad_id"),
        "Megatron's NullTokenizer",
    ),
    Rule(Fate.HONOURED, ("eval_iters", "full_validation"), "which held-out windows an evaluation reads"),
    Rule(
        Fate.REFUSED,
        ("full_validation",),
        "Megatron ends in an error at its first evaluation then; use --eval-iters, or a plan",
        Condition(
            "without --plan and --multiple-validation-sets",
            lambda args: args.plan is None and not args.multiple_validation_sets,
        ),
    ),
    Rule(
        Fate.REFUSED,
        ("multiple_validation_sets",),
        "Megatron evaluates several sets as a whole only; give --full-validation too, or leave it out",
        Condition("without --full-validation", lambda args: args.plan is None and not args.full_validation),
    ),
    Rule(
        Fate.REFUSED,
        ("multiple_validation_sets",),
        "Megatron's ranks do not agree on how many batches they are then; leave it out",
        Condition(
            "with tensor or pipeline parallelism",
            lambda args: args.plan is None and args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1,
        ),
    ),
    Rule(
        Fate.REFUSED,
        ("split",),
        "Megatron parts its mock data evenly; leave it out",
        Condition("with --mock-data", lambda args: bool(args.mock_data)),
    ),
    Rule(
        Fate.PASSED_ON,
        ("eval_interval", "start_eval_at_iter", "eval_global_batch_size", "eval_micro_batch_size", "skip_train"),
        "Megatron's training loop",
    ),
    Rule(
        Fate.REFUSED,
        ("multiple_validation_sets",),
        "each evaluation tells the loss of every source already (held-out loss/SOURCE); leave it out",
        _WITH_PLAN,
    ),
    Rule(Fate.PASSED_ON, ("multiple_validation_sets",), "Megatron's training loop"),
    *only_with(
        "--multiple-validation-sets",
        lambda args: bool(args.multiple_validation_sets),
        ("validation_set_names",),
        "Megatron's training loop",
    ),
    Rule(Fate.REFUSED, ("test_mode",), "it is for Megatron's own tests; leave it out"),
)
