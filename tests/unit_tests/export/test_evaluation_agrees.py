"""The loss that our evaluation measures is that of the exported model, with documents apart and scaled branches."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.helpers import run_distributed
from tests.unit_tests.export.small_models import KAIYUAN, SCALED, SmallModel, save_model
from tests.unit_tests.model.reference import Features

END = 3
LENGTH = 24
STOCK = SmallModel("qk norm alone", Features(qk_norm=True))


def losses_of_ours(_rank: int, runs: list[Path], rows: Any) -> list[Any]:
    """Entry of `run_distributed`: what evaluation measures for each checkpoint, which tokens it counts included."""
    from megatron_kaiyuan.evaluation.held_out import window_losses
    from megatron_kaiyuan.evaluation.loading import load_model
    from megatron_kaiyuan.model.samples import SampleOptions

    options = SampleOptions(eod_token=END, reset_attention_mask=True, reset_position_ids=True)
    return [window_losses(load_model(open_checkpoint(run))[0], rows, options) for run in runs]


def documents_of(row: Any) -> list[list[int]]:
    """The documents of a window, each with the id that ends it; the last token of the window is predicted only."""
    cuts = [place + 1 for place, token in enumerate(row[:-1]) if token == END]
    bounds = [0, *[cut for cut in cuts if cut < LENGTH], LENGTH]
    return [[int(token) for token in row[a : b + 1]] for a, b in pairwise(bounds)]


@pytest.mark.distributed
@torch.no_grad()
def test_losses_agree_with_each_document_by_itself(tmp_path: Path) -> None:
    """The exported model sees one document at a time, which needs no mask; ours sees windows of several."""
    models = [KAIYUAN, replace(SCALED, gain_of_products=4096.0), STOCK]
    rows = np.random.default_rng(5).integers(4, KAIYUAN.shape.vocab, (3, LENGTH + 1))
    rows[0, [6, 7, 20]] = rows[1, LENGTH - 1] = END
    runs = [tmp_path / f"run{number}" for number in range(len(models))]
    for model, run in zip(models, runs, strict=True):
        export_checkpoint(save_model(model, run, torch.float32), run / "hf")
    [ours] = run_distributed(losses_of_ours, 1, runs, rows)
    for run, (found, counts) in zip(runs, ours, strict=True):
        assert counts.all()
        assert losses_of_exported(run / "hf", rows) == pytest.approx(found.ravel().tolist(), abs=1e-5, rel=1e-5)


def losses_of_exported(folder: Path, rows: Any) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    losses = []
    for document in (document for row in rows for document in documents_of(row)):
        ids = torch.tensor([document])
        logits = model(input_ids=ids[:, :-1]).logits[0].double()
        losses += F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return losses
