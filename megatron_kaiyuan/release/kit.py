"""The release itself: a folder that appears whole or not at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ReleaseError
from megatron_kaiyuan.export.architecture import architecture_from_arguments
from megatron_kaiyuan.export.layouts import Layout, LayoutName, choose_layout
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from megatron_kaiyuan.host.atomic import publish_folder
from megatron_kaiyuan.release.cards import render_cards
from megatron_kaiyuan.release.facts import ReleaseRequest, Weights, release_facts

__all__ = ["FACTS_NAME", "ReleaseParts", "facts_of_release", "write_release"]

FACTS_NAME = "release.json"
"""File of a release with all facts that its cards are made of."""
LAST = "last"
"""Subfolder of the run's last weights, where the main ones are an average."""


@dataclass(frozen=True, slots=True)
class ReleaseParts:
    """The checkpoints of a release and the form of their weights."""

    last: Checkpoint
    averaged: Checkpoint | None = None
    layout: LayoutName | str = "auto"
    dtype: torch.dtype | None = None
    licence_file: Path | None = None

    @property
    def weights(self) -> list[Weights]:
        """The main ones first: the average, where there is one."""
        if self.averaged is None:
            return [Weights(".", self.last)]
        return [Weights(".", self.averaged), Weights(LAST, self.last)]


def facts_of_release(parts: ReleaseParts, request: ReleaseRequest) -> dict[str, Any]:
    """Return what the cards will say, with what they cannot in `unknown`.

    Raises:
        ReleaseError: a file that the person names cannot be read or is of another run.
        ConvertError: the model cannot be exported in that layout.
    """
    main = parts.weights[0].checkpoint
    architecture = architecture_from_arguments(main.arguments)
    dtype = parts.dtype or main.tensors["embedding.word_embeddings.weight"][1]
    layout = choose_layout(architecture, parts.layout, dtype)  # type: ignore[arg-type]  # a name of the command line
    facts = release_facts(parts.weights, parts.last, request)
    shape = {**asdict(architecture), "parameters": _parameters(main)}
    told = {"shape": shape, "layout": _layout(layout), "dtype": str(dtype).removeprefix("torch.")}
    if parts.licence_file is None:
        facts["unknown"].append("the text of the licence: --license-file FILE")
    return facts | told


def _layout(layout: Layout) -> dict[str, Any]:
    return {"name": layout.name, "has_code": layout.has_code}


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(shape).numel() for shape, _ in checkpoint.tensors.values())


def write_release(
    parts: ReleaseParts,
    request: ReleaseRequest,
    output: Path,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, Any]:
    """Write a release and return its facts.

    Raises:
        ReleaseError: the output exists, or as `facts_of_release`.
        ConvertError: as `export_checkpoint`.
    """
    if output.exists():
        raise ReleaseError(f"--output {output} exists; remove it or name another folder")
    facts = facts_of_release(parts, request)
    unfinished = output.with_name(f".{output.name}.release")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for weights in parts.weights:
            export_checkpoint(
                weights.checkpoint,
                unfinished / weights.folder,
                tokenizer=request.tokenizer,
                layout=parts.layout,  # type: ignore[arg-type]  # a name of the command line
                dtype=parts.dtype,
                check=True,
                progress=progress,
            )
        if parts.licence_file is not None:
            shutil.copyfile(parts.licence_file, unfinished / "LICENSE")
        for name, text in render_cards(facts).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        (unfinished / FACTS_NAME).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
        publish_folder(unfinished, output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return facts
