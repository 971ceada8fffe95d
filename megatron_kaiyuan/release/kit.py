"""The release itself: a folder that appears whole or not at all."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kaiyuan.checkpoints.average_proof import check_average_of_run
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import KaiyuanError, ReleaseError
from megatron_kaiyuan.export.architecture import architecture_from_arguments
from megatron_kaiyuan.export.layouts import LayoutName, choose_layout
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from megatron_kaiyuan.host.atomic import folder_appearing_whole, write_text_atomically
from megatron_kaiyuan.release.cards import render_cards
from megatron_kaiyuan.release.facts import ReleaseRequest, release_facts
from megatron_kaiyuan.release.inputs import Notes, Weights, read_licence
from megatron_kaiyuan.release.publishing import published, published_file_settings

__all__ = ["FACTS_NAME", "ReleaseParts", "examine_release", "facts_of_release", "write_release"]

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


def examine_release(parts: ReleaseParts, request: ReleaseRequest) -> tuple[dict[str, Any], list[str]]:
    """Return what the cards will say, and everything that forbids the release.

    What nobody knows is in `unknown` of the facts. Both lists are whole: no file hides what is wrong with another.

    Raises:
        ConfigError, CheckpointError: the arguments in a checkpoint are missing or damaged.
    """
    notes = Notes()
    main = parts.weights[0].checkpoint
    if parts.averaged is not None:
        _noted(notes, f"--averaged {parts.averaged.folder}", check_average_of_run, parts.averaged, parts.last)
    facts = release_facts(parts.weights, parts.last, request, notes)
    architecture = _noted(notes, str(main.folder), architecture_from_arguments, main.arguments)
    dtype = parts.dtype or main.tensors["embedding.word_embeddings.weight"][1]
    layout = architecture and _noted(
        notes, f"--layout {parts.layout}", choose_layout, architecture, parts.layout, dtype
    )
    if parts.licence_file is None:
        facts["unknown"].append("the text of the licence: --license-file FILE")
    else:
        _noted(notes, f"--license-file {parts.licence_file}", read_licence, parts.licence_file)
    shape = {**(asdict(architecture) if architecture else {}), "parameters": _parameters(main)}
    described = {"name": layout.name, "has_code": layout.has_code} if layout else None
    more = {"shape": shape, "layout": described, "dtype": str(dtype).removeprefix("torch.")}
    return facts | more | {"has_licence_file": parts.licence_file is not None}, notes.refused


def _noted[Result](notes: Notes, what: str, do: Callable[..., Result], *values: Any) -> Result | None:
    """Return what a call returns, None where it refuses its input, which is noted."""
    try:
        return do(*values)
    except (KaiyuanError, OSError) as error:
        notes.refuse(what, error)
        return None


def facts_of_release(parts: ReleaseParts, request: ReleaseRequest) -> dict[str, Any]:
    """Return what the cards will say.

    Raises:
        ReleaseError: says everything that is wrong with the inputs.
    """
    facts, refused = examine_release(parts, request)
    if refused:
        raise ReleaseError("; ".join(refused))
    return facts


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(shape).numel() for shape, _ in checkpoint.tensors.values())


def write_release(
    parts: ReleaseParts,
    request: ReleaseRequest,
    output: Path,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, Any]:
    """Write a release and return its facts.

    What is published of them has neither secrets nor folders of this machine.

    Raises:
        ReleaseError: the output exists, or as `facts_of_release`.
        ConvertError: as `export_checkpoint`.
    """
    if os.path.lexists(output):
        raise ReleaseError(f"--output {output} exists; remove it or name another folder")
    facts = facts_of_release(parts, request)
    with folder_appearing_whole(output) as unfinished:
        unfinished.rmdir()  # the export makes it, whole or not at all
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
            _forget_places(unfinished / weights.folder)
        if parts.licence_file is not None:
            (unfinished / "LICENSE").write_text(read_licence(parts.licence_file), encoding="utf-8")
        shown = published(facts)
        for name, text in render_cards(shown).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        (unfinished / FACTS_NAME).write_text(json.dumps(shown, indent=2, default=str) + "\n", encoding="utf-8")
    return facts


def _forget_places(folder: Path) -> None:
    """Take the folders of the machine that wrote a tokenizer out of its settings."""
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            write_text_atomically(
                path, json.dumps(published_file_settings(settings), indent=2, ensure_ascii=False) + "\n"
            )
