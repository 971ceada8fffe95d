"""Run the real entry point in processes of its own, and read what it logged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.functional_tests.warm_start import run_warm
from tests.unit_tests.data.tiny import write_shard

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 96
"""A multiple of 16, so that two tensor-parallel ranks pad it as one does: not at all. The softmax sees the padding."""
STEPS = 6
BATCH = 8

PLAN = """
seq_length: 32
seed: 7
sources:
  scored: {{shards: {folder}/scored, score: score}}
  plain: {{shards: {folder}/plain}}
phases:
  - name: warm
    order: shuffled
    tokens: 768
    lr: {{start: 1.0e-4, end: 1.0e-2, shape: warmup}}
    sources: {{scored: all, plain: all}}
  - name: decay
    order: curriculum
    tokens: 768
    lr: {{start: 1.0e-2, end: 1.0e-3, shape: sqrt}}
    sources:
      scored: {{keep: top 50%, repeat: 2}}
      plain: {{keep: random 40%}}
validation:
  scored: {{documents: 20}}
  plain: {{documents: 10}}
"""
"""48 samples, 24 a phase: six steps of eight."""

MODEL_FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --qk-layernorm "
    "--attention-dropout 0 --hidden-dropout 0 --kaiyuan-sandwich-norm --kaiyuan-logit-softcap 30 "
    f"--vocab-size {VOCABULARY} --make-vocab-size-divisible-by 8"
).split()
TRAINING_FLAGS = (
    f"--micro-batch-size 2 --global-batch-size {BATCH} --num-workers 0 --eval-iters 1 --eval-interval 100 "
    "--log-interval 1 --tensorboard-log-interval 1 --seed 11"
).split()


def write_corpus(folder: Path, longer: int = 0, end: int | None = None) -> Path:
    """Two tiny sources and a plan over them; returns the plan.

    Args:
        folder: For all files.
        longer: Tokens more in each document of `scored`.
        end: Token at the end of each document, and nowhere else.
    """
    rng = np.random.default_rng(0)
    for name, largest, more in (("scored", 60, longer), ("plain", VOCABULARY if end is None else end, 0)):
        documents = [rng.integers(0, largest, size=int(rng.integers(20, 90)) + more).tolist() for _ in range(200)]
        documents = [document if end is None else [*document, end] for document in documents]
        write_shard(folder / name, documents, rng.random(200).tolist())
    plan = folder / "plan.yaml"
    plan.write_text(PLAN.format(folder=folder))
    return plan


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, well or not."""

    returncode: int
    output: str
    """stdout and stderr."""
    events: Path

    def logged(self, name: str) -> dict[int, float]:
        """Values of a TensorBoard scalar by step, exactly as logged (float32)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(self.events))
        accumulator.Reload()
        return {event.step: event.value for event in accumulator.Scalars(name)}


def train(folder: Path, *flags: str, processes: int = 1, training: Sequence[str] = TRAINING_FLAGS) -> Finished:
    """Run `python -m megatron_kaiyuan.pretrain`, with its imports done (`warm_start`).

    Args:
        folder: Receives the TensorBoard events.
        *flags: After the flags of the tiny model.
        processes: Number of ranks.
        training: Flags of its training.
    """
    events = folder / "events"
    arguments = [*MODEL_FLAGS, *training, "--tensorboard-dir", str(events), *flags]
    code, output = run_warm("megatron_kaiyuan.pretrain", arguments, folder, ranks=processes)
    return Finished(code, output, events)


def train_well(folder: Path, *flags: str, processes: int = 1, training: Sequence[str] = TRAINING_FLAGS) -> Finished:
    """`train`, which must succeed."""
    finished = train(folder, *flags, processes=processes, training=training)
    assert finished.returncode == 0, finished.output[-6000:]
    return finished


def saved_tensors(checkpoint: Path, *, random_states: bool = False) -> dict[str, torch.Tensor]:
    """Weights, master weights and optimizer state of a torch_dist checkpoint under their global names.

    The random states only if asked for: starting a data loader draws from torch's CPU generator, on every platform, so
    a run that started twice has drawn once more. Nothing else draws without dropout.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, whole)
    found: dict[str, torch.Tensor] = {}
    _collect(torch.load(whole, weights_only=False), "", found)
    return {name: tensor for name, tensor in found.items() if random_states or not name.startswith("/rng_state")}


def _collect(value: object, name: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _collect(inner, f"{name}/{number}", found)
