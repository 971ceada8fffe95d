"""Refusal of options that look for ends of documents in shards that have none."""

import numpy as np

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.samples import SampleOptions

__all__ = ["check_document_ends"]

_PROBED = 64
"""Documents of a source that are looked at."""


def check_document_ends(plan: Plan, options: SampleOptions) -> None:
    """Look at the last token of some documents of each source.

    A document ends where a token is the tokenizer's end-of-document id. If another tokenizer is named than the one that
    built the shards, or they were built without `--append-eod`, no token is, and options that keep documents apart
    would do nothing, without a word.

    Raises:
        ConfigError: such an option is on, and no document that was looked at ends with the id; or there is no id.
    """
    wanted = {
        "--eod-mask-loss": options.eod_mask_loss,
        "--reset-position-ids": options.reset_position_ids,
        "--reset-attention-mask": options.reset_attention_mask,
    }
    flags = ", ".join(flag for flag, on in wanted.items() if on)
    if not flags:
        return
    if options.eod_token is None:
        raise ConfigError(f"{flags}: the tokenizer has no end-of-document id; remove it, or name another tokenizer")
    for name, opened in plan.opened.items():
        last = last_tokens(opened)
        if last and options.eod_token not in last:
            seen = ", ".join(map(str, sorted(last)[:5]))
            raise ConfigError(
                f"{flags}: documents of source {name} end with {seen}{', ...' if len(last) > 5 else ''}, and none with "
                f"the tokenizer's end-of-document id {options.eod_token}; leave --tokenizer-type out where the shards "
                "have manifests, give --null-tokenizer-eod-id with NullTokenizer, or build the shards with "
                f"--append-eod; or remove {flags}"
            )


def last_tokens(opened: OpenedSource) -> set[int]:
    """Return the last tokens of some documents, spread evenly over the source.

    Empty documents have none.
    """
    source = opened.source
    documents = np.unique(np.linspace(0, source.num_documents - 1, _PROBED).astype(np.int64))
    lengths, starts = source.lengths(documents), source.token_starts(documents)
    token = np.empty(1, dtype=np.int64)
    found = set()
    for end in (starts + lengths)[lengths > 0].tolist():
        source.read_tokens(end - 1, token)
        found.add(int(token[0]))
    return found
