#!/usr/bin/env python3
"""Deduplicate with MinHash, score with a classifier, build shards with scores.

README.md here explains it.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import CurationSettings, parse_arguments

__all__ = ["Stage", "stages"]


@dataclass(frozen=True)
class Stage:
    """One datatrove pipeline, which waits for the one before it."""

    name: str
    steps: Sequence[Any]
    tasks: int


def stages(settings: CurationSettings) -> list[Stage]:
    """Signatures, buckets (one task a band), clusters (one task), then filter and score, then shards."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from steps import BuildShards, FastTextScore, HuggingFaceScore

    config = MinhashConfig(
        n_grams=settings.n_grams, num_buckets=settings.bands, hashes_per_bucket=settings.rows_per_band
    )
    reader = JsonlReader(str(settings.input))
    signatures, buckets, removed = (settings.folder(name) for name in ("signatures", "buckets", "remove_ids"))
    documents, shards = settings.folder("documents"), settings.folder("shards")
    score = (
        FastTextScore(settings.model, settings.label)
        if settings.classifier == "fasttext"
        else HuggingFaceScore(settings.model)
    )
    sign = MinhashDedupSignature(signatures, config=config, language=settings.language)
    return [
        Stage("signatures", [reader, sign], settings.tasks),
        Stage("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], settings.bands),
        Stage("clusters", [MinhashDedupCluster(buckets, removed, config=config)], 1),
        # the reader must deal out the files as before: a duplicate is known by its task and its place in it
        Stage("documents", [reader, MinhashDedupFilter(removed), score, JsonlWriter(documents)], settings.tasks),
        Stage(
            "shards", [BuildShards(documents, shards, str(settings.tokenizer), settings.project_python)], settings.tasks
        ),
    ]


def executors(settings: CurationSettings) -> list[Any]:
    """Return one executor a stage, chained, so that running the last one runs all.

    A second run skips the tasks that are done.
    """
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    chain: list[Any] = []
    for stage in stages(settings):
        common = {
            "pipeline": list(stage.steps),
            "tasks": stage.tasks,
            "logging_dir": settings.folder(f"logs/{stage.name}"),
            "depends": chain[-1] if chain else None,
        }
        if settings.executor == "local":
            chain.append(LocalPipelineExecutor(**common, workers=settings.workers))
        else:
            slurm = {"time": settings.time, "partition": settings.partition, "qos": settings.qos}
            slurm |= {"workers": settings.workers, "env_command": job_environment()}
            # else the jobs behind a failed one stay in the queue for ever, and the next start adds its own
            slurm |= {"sbatch_args": {"kill-on-invalid-dep": "yes"}}
            chain.append(SlurmPipelineExecutor(**common, **slurm, job_name=stage.name, cpus_per_task=2))
    return chain


def job_environment() -> str:
    """Return the shell line that makes datatrove's programs and the steps of this folder importable in a job.

    A job loads them by their import names.
    """
    programs, here = Path(sys.executable).parent, Path(__file__).resolve().parent
    return f'export PATH={shlex.quote(str(programs))}:"$PATH" PYTHONPATH={shlex.quote(str(here))}:"${{PYTHONPATH:-}}"'


def main() -> None:
    """Run, or submit, all stages."""
    settings = parse_arguments()
    if complaints := settings.complaints():
        raise SystemExit("\n".join(["error: nothing was run", *complaints]))
    found = settings.probability(settings.threshold)
    print(f"MinHash: pairs of similarity {settings.threshold:.2f} are found with a probability of {found:.0%}")
    executors(settings)[-1].run()


if __name__ == "__main__":
    main()
