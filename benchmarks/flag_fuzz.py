"""Try random command lines: each trains, or is refused in one sentence.

None ends in a traceback or never.

    .venv/bin/python -m benchmarks.flag_fuzz --trials 300 --seed 1
    .venv/bin/python -m benchmarks.flag_fuzz --each            # every flag alone, with a value that is not its default
    .venv/bin/python -m benchmarks.flag_fuzz --words "--optimizer sgd --fp16"

A trial adds a few flags of Megatron's and ours, with fitting and unfitting values, to the command of a tiny run over a
plan or over a blend. Every trial is a fork of one process that has imported everything: some two seconds each.
"""

import argparse
import gzip
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "Trials", "judge"]

_LIMIT = 90
"""Seconds."""
_MODEL = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --swiglu --disable-bias-linear "
    "--position-embedding-type rope --normalization RMSNorm --attention-dropout 0 --hidden-dropout 0 "
    "--micro-batch-size 2 --global-batch-size 2 --log-interval 1 --num-workers 0 --lr 1e-3 "
    "--tokenizer-type NullTokenizer --vocab-size 100"
)
_DATA = {
    "plan": "--plan {folder}/plan.yaml --exit-interval 2 --eval-iters 1",
    "blend": "--data-path {folder}/text --split 80,20,0 --eval-iters 1 --seq-length 16 --max-position-embeddings 16 "
    "--train-iters 2",
}
_PLAN = """
seq_length: 16
sources: {{text: {{shards: {folder}/text}}}}
phases: [{{name: only, order: shuffled, tokens: 640, sources: {{text: all}}}}]
validation: {{text: {{documents: 4}}}}
"""
_GOOD = frozenset({"trained", "refused", "usage", "stopped"})
_NEVER = {"help"}
_WRONG = ("-1", "0", "3", "999999", "x", "nan", "0.5")
_COMPANIONS = {
    "loss_scale": "--fp16",
    "initial_loss_scale": "--fp16",
    "min_loss_scale": "--fp16",
    "loss_scale_window": "--fp16",
    "hysteresis": "--fp16",
    "grad_reduce_in_bf16": "--bf16",
    "fp16_lm_cross_entropy": "--fp16",
    "sgd_momentum": "--optimizer sgd",
    "manual_gc_interval": "--manual-gc",
    "manual_gc_eval": "--manual-gc",
    "tensorboard_log_interval": "--tensorboard-dir tb",
    "tensorboard_queue_size": "--tensorboard-dir tb",
    "log_loss_scale_to_tensorboard": "--tensorboard-dir tb",
    "log_validation_ppl_to_tensorboard": "--tensorboard-dir tb",
    "log_memory_to_tensorboard": "--tensorboard-dir tb",
    "log_world_size_to_tensorboard": "--tensorboard-dir tb",
    "log_timers_to_tensorboard": "--tensorboard-dir tb",
    "profile": "--use-pytorch-profiler --tensorboard-dir tb",
    "use_pytorch_profiler": "--profile --tensorboard-dir tb",
    "save": "--save-interval 1",
    "save_interval": "--save s",
    "kaiyuan_keep_checkpoints": "--save s --save-interval 1",
    "log_progress": "--save s --save-interval 1",
    "overlap_param_gather": "--use-distributed-optimizer --overlap-grad-reduce",
    "lr_wsd_decay_iters": "--lr-decay-style WSD",
    "lr_wsd_decay_style": "--lr-decay-style WSD --lr-wsd-decay-iters 1",
    "decoupled_min_lr": "--decoupled-lr 1e-4",
    "kaiyuan_branch_scale_bits": "--kaiyuan-sandwich-norm",
    "kaiyuan_post_norm_gain_init": "--kaiyuan-sandwich-norm",
    "kaiyuan_post_norm_depth_scaled": "--kaiyuan-sandwich-norm",
    "moe_layer_freq": "--num-experts 2",
    "moe_router_topk": "--num-experts 2",
    "moe_ffn_hidden_size": "--num-experts 2",
}
"""Without which a flag is refused, so that `--each` would try nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended."""

    words: tuple[str, ...]
    code: int | None
    """Exit code; None: it was killed after the limit."""
    output: str
    seconds: float
    files: tuple[str, ...] = ()
    """That it left in its folder, in order, with what some of them hold."""

    @property
    def verdict(self) -> str:
        """See `judge`."""
        return judge(self.code, self.output)


def judge(code: int | None, output: str) -> str:
    """Return one of `_GOOD`.

    Anything else says what is wrong.

    `stopped`: by Megatron's rerun machine, whose exit codes ask for another start.
    """
    sentences = [line for line in output.splitlines() if re.match(r"\w*(Error|Stopped): ", line)]
    if code is None:
        return "never ended"
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if code in (16, 17) and "Exiting now. " in output:
        return "stopped"
    if code == 2 and "error: " in output:
        return "usage"
    if code == 1 and sentences:
        return "refused"
    if code == 0 and re.search(
        r"iteration +\d+/|converted checkpoint|nothing is left to train on|skipping train", output
    ):
        return "trained"
    return f"code {code} without a reason"


class Trials:
    """Runner of command lines in forks of this process.

    Build one before any thread is started.
    """

    def __init__(self, folder: Path) -> None:
        """Import everything, and write the data of the trials below `folder`."""
        os.environ.update(OMP_NUM_THREADS="1", KAIYUAN_DEVICE="cpu")
        from megatron_kaiyuan import pretrain

        os.environ.setdefault("RANK", "0")
        pretrain._start()
        del os.environ["RANK"]
        self._main = pretrain.main
        self.folder = folder
        self._write_data()

    def _write_data(self) -> None:
        import numpy as np
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(str(self.folder / "text.bin"), dtype=np.uint16)
        for document in range(60):
            builder.add_document((torch.arange(40) * 7 + document) % 90, [40])
        builder.finalize(str(self.folder / "text.idx"))
        (self.folder / "plan.yaml").write_text(_PLAN.format(folder=self.folder))

    def run(self, words: Sequence[str], data: str = "plan") -> Outcome:
        """Run one command line, in a folder of its own that is removed afterwards."""
        own = Path(tempfile.mkdtemp(dir=self.folder))
        line = _command(f"{_MODEL} {_DATA[data].format(folder=self.folder)}", words)
        began = time.perf_counter()
        child = os.fork()
        if not child:
            self._be_a_run(own, line)
        code = _wait(child, began + _LIMIT)
        output = (own / "output").read_text(errors="replace").replace(str(own), "OWN")
        files = tuple(sorted(name for path in own.rglob("*") for name in _described(path, own)))
        shutil.rmtree(own, ignore_errors=True)
        return Outcome(tuple(words), code, output, time.perf_counter() - began, files)

    def _be_a_run(self, own: Path, line: Sequence[str]) -> None:
        """Never returns."""
        os.setsid()
        os.chdir(own)
        log = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["pretrain", *line]
        code = 0
        try:
            self._main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _described(path: Path, folder: Path) -> Iterator[str]:
    """Yield a file's name without times, and what a diagnostic file holds: lines, or TensorBoard's tags."""
    name = re.sub(r"\d{6,}[\w.-]*", "N", str(path.relative_to(folder)))
    yield name
    if path.suffix in (".jsonl", ".txt"):
        yield f"{name}: {len(path.read_bytes().splitlines())} lines"
    elif "tfevents" in path.name:
        tags = Counter(re.findall(rb"\n[\x01-\x7f]((?!text)[A-Za-z][\w /-]+)\x15", path.read_bytes()))
        yield from (f"{name}: {count} x {tag.decode()}" for tag, count in tags.items())
    elif path.name.endswith(".json.gz"):
        trace = gzip.decompress(path.read_bytes())
        words = (b"Input Dims", b"python_function", b"ProfilerStep#")
        yield f"{name}: {[bool(trace.count(word)) for word in words]} {trace.count(words[-1])} steps"


def _command(base: str, words: Sequence[str]) -> list[str]:
    """Return a command line with more words; `minus:FLAG` takes a flag and its value out of it."""
    line = shlex.split(base)
    for word in words:
        if word.startswith("minus:"):
            first = line.index(word.removeprefix("minus:"))
            last = next((at for at in range(first + 1, len(line)) if line[at].startswith("--")), len(line))
            del line[first:last]
        else:
            line.append(word)
    return line


def _wait(child: int, deadline: float) -> int | None:
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with suppress(ProcessLookupError):  # what it started
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def actions() -> dict[str, argparse.Action]:
    """Return the flags that may be tried, keyed with their names."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_kaiyuan.arguments import arguments_provider

    parser = arguments_provider({})(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    return {action.dest: action for action in parser._actions if action.option_strings and action.dest not in _NEVER}


def words_of(action: argparse.Action, chance: random.Random, *, wrong: bool) -> list[str]:
    """A flag with a value that differs from its default, or one that does not fit it."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [
            flag
            if not isinstance(action, argparse.BooleanOptionalAction) or not action.default
            else action.option_strings[1]
        ]
    if wrong:
        value = chance.choice(_WRONG)
    elif action.choices:
        others = [choice for choice in action.choices if choice != action.default]
        value = str(getattr(others[0], "name", others[0])) if others else str(action.default)
    elif action.type is int:
        value = str((action.default or 0) + 1 if isinstance(action.default, int | None) else 1)
    elif action.type is float:
        value = "0.5" if action.default != 0.5 else "0.25"
    else:
        value = "x"
    return [flag, value]


def random_lines(trials: int, seed: int) -> Iterator[tuple[list[str], str]]:
    """Flags to add to a command, and which command."""
    chance = random.Random(seed)
    known = actions()
    for _ in range(trials):
        chosen = chance.sample(sorted(known), chance.choice([1, 1, 2, 2, 3, 4]))
        words: list[str] = []
        for name in chosen:
            words += words_of(known[name], chance, wrong=chance.random() < 0.3)
            if name in _COMPANIONS and chance.random() < 0.5:
                words += shlex.split(_COMPANIONS[name])
        yield words, chance.choice(["plan", "blend"])


def each_flag() -> Iterator[tuple[list[str], str]]:
    """Each flag alone, with what it needs."""
    chance = random.Random(0)
    for name, action in sorted(actions().items()):
        yield words_of(action, chance, wrong=False) + shlex.split(_COMPANIONS.get(name, "")), "blend"


def main() -> int:
    """Run the trials, report the bad ones, and count.

    Returns:
        1 if a trial trained nothing and gave no reason.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="random command lines (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the random command lines (default 1)")
    parser.add_argument("--each", action="store_true", help="try every flag alone instead")
    parser.add_argument("--words", help="try these flags alone, and print all output")
    parser.add_argument("--data", choices=sorted(_DATA), default="plan", help="command that --words are added to")
    parser.add_argument("--tell", action="store_true", help="print the reason of every refusal")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        if args.words is not None:
            outcome = trials.run(shlex.split(args.words), args.data)
            print(outcome.output, outcome.verdict, sep="\n")
            return 0
        counts: Counter[str] = Counter()
        for words, data in each_flag() if args.each else random_lines(args.trials, args.seed):
            outcome = trials.run(words, data)
            counts[outcome.verdict] += 1
            is_good = outcome.verdict in _GOOD
            if args.tell or not is_good:
                reason = _reason(outcome.output) if outcome.verdict != "trained" else ""
                print(
                    f"{outcome.verdict} ({outcome.seconds:.1f} s): {data} {shlex.join(words)}\n    {reason}", flush=True
                )
    print(dict(counts))
    return int(bool(set(counts) - _GOOD))


def _reason(output: str) -> str:
    lines = [line for line in output.splitlines() if re.match(r"[\w.]*(Error|Stopped|Exception)\b|.*error: ", line)]
    return (lines or output.splitlines() or ["no output"])[-1][:400]


if __name__ == "__main__":
    sys.exit(main())
