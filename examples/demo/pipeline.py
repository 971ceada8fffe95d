"""The stages of the demo: what each one runs, what it depends on and what it leaves."""

import hashlib
import importlib.metadata
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bpe import corpus_texts, train_tokenizer
from commands import baseline_command, python_tool, run_command, training_command
from corpus import build_corpus
from settings import DemoSettings, planned_text
from stages import Stage, file_digest

from megatron_kaiyuan.data import Plan

__all__ = ["DOMAINS", "DemoRun"]

DOMAINS = {"code": "code.jsonl", "reference": "reference.parquet", "packages": "packages.jsonl"}
"""Corpus file of each source of the plan."""

_WORKERS = 2
"""Processes that tokenize."""

_WARM_UP_STEPS = 2
"""Steps of the baseline that are not counted."""


@dataclass(frozen=True)
class DemoRun:
    """One demo: where it reads and writes, and how large it is."""

    repository: Path
    output: Path
    """Relative to the repository where it lies inside it, as the plan's paths are."""
    settings: DemoSettings
    on_training_line: Callable[[str], None]

    @property
    def plan(self) -> Path:
        """The plan that is trained on."""
        return self.output / "plan.yaml"

    def log(self, name: str) -> Path:
        """Log file of a stage."""
        return self.repository / self.output / "logs" / f"{name}.log"

    def stages(self) -> list[Stage]:
        """All stages in order."""
        return [*self._data_stages(), *self._model_stages()]

    def _data_stages(self) -> list[Stage]:
        here = Path(__file__).parent
        corpus_sources = [file_digest(here / name) for name in ("corpus.py", "documents.py", "quality.py")]
        return [
            Stage(
                name="corpus",
                title="corpus: text that came with Python and the installed packages",
                inputs=[_environment(), asdict(self.settings.corpus), corpus_sources],
                outputs=[self._at("corpus")],
                run=self._corpus,
            ),
            Stage(
                name="tokenizer",
                title=f"tokenizer: byte-level BPE with {self.settings.vocab_size} entries",
                inputs=[self.settings.vocab_size, file_digest(here / "bpe.py")],
                outputs=[self._at("tokenizer")],
                run=self._tokenizer,
            ),
            Stage(
                name="shards",
                title="shards: tools/preprocess_data.py and tools/rank_data.py, domain by domain",
                inputs=[self._plan_seed(), self._code("preprocess", "data")],
                outputs=[self._at("shards")],
                run=self._shards,
            ),
            Stage(
                name="plan",
                title="plan: tools/plan_data.py, the dry run",
                inputs=[self._plan_text(), self._code("data")],
                outputs=[self._at("plan.yaml"), self._at("plan.html"), self._at("plan.json")],
                run=self._plan,
            ),
        ]

    def _model_stages(self) -> list[Stage]:
        command = training_command(
            self.settings, plan=Path("plan"), checkpoints=Path("checkpoints"), tensorboard=Path("tb"), save_interval=0
        )
        return [
            Stage(
                name="train",
                title=f"train: three phases in FP16 under torchrun, {self.settings.place}",
                inputs=[
                    self.settings.device,
                    *command[1:],
                    importlib.metadata.version("megatron-core"),
                    self._code("model", "training"),
                ],
                outputs=[self._at("checkpoints"), self._at("tensorboard"), self.log("train")],
                run=self._train,
                continues=True,
            ),
            Stage(
                name="baseline",
                title="baseline: a few steps of the same shape in plain PyTorch, for the speed",
                inputs=file_digest(self.repository / "benchmarks" / "plain_torch_gpt.py"),
                outputs=[self._at("baseline.json")],
                run=self._baseline,
            ),
            Stage(
                name="average",
                title="average: tools/average_checkpoints.py on the last checkpoints",
                inputs=[],
                outputs=[self._at("averaged")],
                run=self._average,
            ),
            Stage(
                name="evaluate",
                title="evaluate: tools/evaluate.py on held-out documents, before and after",
                inputs=[],
                outputs=[self._at("evaluation.json")],
                run=self._evaluate,
            ),
            Stage(
                name="generate",
                title="generate: tools/generate.py with the averaged weights",
                inputs=[list(self.settings.prompts), self.settings.new_tokens],
                outputs=[self._at("generated.txt")],
                run=self._generate,
            ),
            Stage(
                name="release",
                title="release: tools/release.py, the model for transformers with its cards",
                inputs=[self._code("export", "release")],
                outputs=[self._at("release")],
                run=self._release,
            ),
        ]

    def _code(self, *rooms: str) -> str:
        """Digest of the code of some rooms of the package."""
        files = [path for room in rooms for path in sorted((self.repository / "megatron_kaiyuan" / room).glob("*.py"))]
        return hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()

    def _at(self, name: str) -> Path:
        return self.repository / self.output / name

    def _plan_text(self) -> str:
        return planned_text(Path(__file__).parent / "plan.yaml", self.settings, self.output)

    def _plan_seed(self) -> int:
        return next(int(line.split()[1]) for line in self._plan_text().splitlines() if line.startswith("seed:"))

    def _tool(self, stage: str, name: str, *arguments: object) -> str:
        return run_command(python_tool(self.repository, name, *arguments), self.repository, self.log(stage))

    def _corpus(self) -> None:
        reports = build_corpus(self._at("corpus"), self.settings.corpus)
        (self._at("corpus") / "report.json").write_text(json.dumps([asdict(report) for report in reports], indent=2))

    def _tokenizer(self) -> None:
        files = [self._at("corpus") / file for file in DOMAINS.values()]
        train_tokenizer(corpus_texts(files), self._at("tokenizer"), self.settings.vocab_size)

    def _shards(self) -> None:
        for name, file in DOMAINS.items():
            folder = self.output / "shards" / name
            (self.repository / folder).mkdir(parents=True)
            tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.output / "tokenizer"]
            self._tool(
                "shards",
                "preprocess_data.py",
                *["--input", self.output / "corpus" / file, "--output-prefix", folder / name, *tokenizer],
                *["--score-key", "score", "--append-eod", "--workers", _WORKERS],
            )
            self._tool("shards", "rank_data.py", folder, "--score", "score", "--seed", self._plan_seed())

    def _plan(self) -> None:
        self._at("plan.yaml").write_text(self._plan_text(), encoding="utf-8")
        batch = ["--global-batch-size", self.settings.global_batch]
        print(self._tool("plan", "plan_data.py", self.plan, *batch, "--plot", self.output / "plan.html"))
        self._at("plan.json").write_text(self._tool("plan", "plan_data.py", self.plan, *batch, "--bands", 5, "--json"))

    def _train(self) -> None:
        averaging = Plan.load(self.plan).averaging
        assert averaging is not None, "the demo's plan has the section"
        command = training_command(
            self.settings,
            plan=self.plan,
            checkpoints=self.output / "checkpoints",
            tensorboard=self.output / "tensorboard",
            save_interval=averaging.every,
        )
        run_command(command, self.repository, self.log("train"), on_line=self.on_training_line)

    def _baseline(self) -> None:
        seq_length = Plan.load(self.plan).seq_length
        output = run_command(baseline_command(self.settings, seq_length), self.repository, self.log("baseline"))
        seconds = json.loads(next(line for line in output.splitlines() if line.startswith("{")))["seconds"]
        speed = self.settings.global_batch * seq_length / statistics.median(seconds[_WARM_UP_STEPS:])
        counted = len(seconds) - _WARM_UP_STEPS
        result = {"tokens_per_second": speed, "steps": counted, "place": self.settings.place}
        self._at("baseline.json").write_text(json.dumps(result) + "\n")

    def _average(self) -> None:
        averaging = Plan.load(self.plan).averaging
        assert averaging is not None, "the demo's plan has the section"
        choice = ["--last", averaging.last, "--weights", averaging.weights]
        output = self.output / "averaged"
        print(self._tool("average", "average_checkpoints.py", self.output / "checkpoints", *choice, "--output", output))

    def _evaluate(self) -> None:
        states = [self.output / "checkpoints", self.output / "averaged"]
        self._tool(
            "evaluate",
            "evaluate.py",
            *[*states, "--plan", self.plan, "--untrained", "--json", self.output / "evaluation.json"],
        )

    def _generate(self) -> None:
        command = python_tool(
            self.repository,
            "generate.py",
            *[self.output / "averaged", "--tokenizer", self.output / "tokenizer", "--top-k", 20],
            *["--max-new-tokens", self.settings.new_tokens, "--output", self.output / "generated.txt"],
            *["--prompt", *self.settings.prompts],
        )
        run_command(command, self.repository, self.log("generate"))

    def _release(self) -> None:
        self._tool(
            "release",
            "release.py",
            *[self.output / "checkpoints", "--averaged", self.output / "averaged", "--name", "kaiyuan-demo"],
            *["--tokenizer", self.output / "tokenizer", "--plan", self.plan, "--language", "en"],
            *["--evaluation", self.output / "evaluation.json", "--hardware", self.settings.place],
            *["--output", self.output / "release"],
        )


def _environment() -> Sequence[str]:
    """What the corpus depends on beside its own code: Python and the installed packages."""
    packages = {f"{found.metadata['Name']} {found.version}" for found in importlib.metadata.distributions()}
    return [sys.version, *sorted(packages)]


def remove_output(folder: Path) -> None:
    """Remove everything an earlier demo wrote to a folder, and refuse a folder that no demo wrote."""
    if not folder.exists():
        return
    if not (folder / "stamps").is_dir():
        raise SystemExit(
            f"--fresh: {folder} has no stamps/ of an earlier demo, so it is left alone; remove it yourself"
        )
    shutil.rmtree(folder)
