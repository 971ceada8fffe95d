"""Shard building beside Megatron's own path and beside gigatoken alone, on one file in one run.

The text is what lies on this machine: translations of programs (many languages and scripts), documentation, source
code; repeated with changes up to the size asked for. Megatron's path is its tool's: `Pool.imap` over lines with its own
tokenizer wrapper and its own builder, 2 processes; it gets the first `--megatron-seconds` of the file.

    python -m benchmarks.preprocessing --megabytes 600 --workers 2
    python -m benchmarks.preprocessing --megabytes 100 1000 10000 --only ours      # is the time linear, how much memory
"""

import argparse
import gettext
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT_BYTES = 100_000_000
VOCABULARY = 50_257
MEGATRON_CHUNK = 32


def machine_texts() -> Iterator[str]:
    """Translations, then documentation and code, each in an order that a seed decides."""
    generator = random.Random(1)
    catalogues = sorted(Path("/usr/share/locale").rglob("*.mo"))
    generator.shuffle(catalogues)
    for path in catalogues[:600]:
        try:
            with path.open("rb") as stream:
                yield "\n".join(filter(None, gettext.GNUTranslations(stream)._catalog.values()))  # type: ignore[attr-defined]
        except (OSError, ValueError, TypeError, IndexError):  # catalogues of every quality
            continue
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")] + [Path("/usr/share/doc")]
    suffixes = (".py", ".txt", ".md", ".rst", ".html")
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in suffixes and path.is_file()]
    generator.shuffle(files)
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def documents() -> list[str]:
    """`TEXT_BYTES` of text in documents of about 4 KB."""
    generator = random.Random(2)
    found: list[str] = []
    size = 0
    for text in machine_texts():
        start = 0
        while start < len(text) and size < TEXT_BYTES:
            stop = start + int(generator.lognormvariate(8, 0.9)) + 1
            found.append(text[start:stop])
            size += len(found[-1].encode("utf-8", "ignore"))
            start = stop
    generator.shuffle(found)
    return found


def write_corpus(path: Path, texts: list[str], size: int) -> None:
    """JSONL of `size` bytes; from the second copy on one word in fifty is another one."""
    generator = random.Random(3)
    written = number = 0
    with path.open("w", encoding="utf-8", errors="replace") as stream:
        while written < size:
            for text in texts:
                if number >= len(texts):
                    words = text.split(" ")
                    for _ in range(len(words) // 50 + 1):
                        words[generator.randrange(len(words))] = f"w{generator.getrandbits(20):x}"
                    text = " ".join(words)
                row = {"id": f"doc-{number}", "text": text, "score": generator.random()}
                line = json.dumps(row, ensure_ascii=False) + "\n"
                written += len(line.encode("utf-8", "replace"))
                stream.write(line)
                number += 1
                if written >= size:
                    break


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE of GPT-2's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Encoder:
    """What Megatron's tools/preprocess_data.py gives its pool."""

    tokenizer: Any

    def __init__(self, model: Path) -> None:
        self.model = model

    def initializer(self) -> None:
        """In every process."""
        from megatron.core.tokenizers import MegatronTokenizer

        Encoder.tokenizer = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(self.model), metadata_path={"library": "huggingface"}
        )

    def encode(self, line: str) -> tuple[list[int], int]:
        """One document, and how many bytes it was."""
        ids = Encoder.tokenizer.tokenize(json.loads(line)["text"])
        ids.append(Encoder.tokenizer.eod)
        return ids, len(line)


def run_megatron(corpus: Path, model: Path, seconds: float, workers: int, out: Path) -> dict[str, float]:
    """Documents and seconds of Megatron's path, its start-up left out."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder = Encoder(model)
    builder = IndexedDatasetBuilder(str(out / "megatron.bin"), dtype=np.uint16)
    count = 0
    pool = multiprocessing.get_context("fork").Pool(workers, initializer=encoder.initializer)
    with corpus.open(encoding="utf-8") as stream, pool:
        began = 0.0
        for ids, _ in pool.imap(encoder.encode, stream, MEGATRON_CHUNK):
            if not began:  # the first chunk waits for the tokenizers to load
                began = time.monotonic()
            builder.add_document(torch.tensor(ids), [len(ids)])
            count += 1
            if time.monotonic() - began > seconds:
                break
        elapsed = time.monotonic() - began
        pool.terminate()
    return {"documents": count, "seconds": elapsed, "rate": count / elapsed}


def run_gigatoken(corpus: Path, model: Path, rows: int) -> dict[str, float]:
    """Documents a second of gigatoken alone, on texts in memory, all cores, as one call."""
    from gigatoken import Tokenizer

    with corpus.open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for _, line in zip(range(rows), stream, strict=False)]
    tokenizer = Tokenizer.from_json((model / "tokenizer.json").read_bytes())
    tokenizer.encode("warm")
    began, cpu = time.monotonic(), time.process_time()
    tokenizer.encode_batch(texts, parallel=True)
    elapsed, cpu = time.monotonic() - began, time.process_time() - cpu
    return {"documents": len(texts), "seconds": elapsed, "rate": len(texts) / elapsed, "cpu_rate": len(texts) / cpu}


def run_ours(corpus: Path, model: Path, workers: int, out: Path, shard_size: str) -> dict[str, float]:
    """The tool as a user runs it, start-up included; the largest sum of memory of all its processes."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(corpus), "--output-dir", str(out)]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod"]
    command += ["--score-key", "score", "--id-key", "id", "--workers", str(workers), "--shard-size", shard_size]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = cpu = 0.0
    while process.poll() is None:
        used, seconds = _memory_and_cpu(process.pid)
        peak, cpu = max(peak, used), max(cpu, seconds)
        time.sleep(0.1)
    elapsed = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    manifests = [json.loads(path.read_bytes()) for path in out.glob("*.manifest.json")]
    count = sum(manifest["documents"] for manifest in manifests)
    shutil.rmtree(out)
    return {"documents": count, "seconds": elapsed, "rate": count / elapsed, "peak_gib": peak / 2**30, "cpu": cpu}


def _memory_and_cpu(pid: int) -> tuple[float, float]:
    """Proportional memory, so that pages that processes share count once, and CPU seconds of a tree of processes."""
    memory = cpu = 0.0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    for process in tree:
        try:
            memory += process.memory_full_info().pss
            times = process.cpu_times()
            cpu += times.user + times.system
        except psutil.Error:
            continue
    return memory, cpu


def compare(folder: Path, args: argparse.Namespace, texts: list[str]) -> None:
    """All sizes; the peers beside the first one."""
    model = folder / "tokenizer"
    train_tokenizer(texts, model)
    for number, megabytes in enumerate(args.megabytes):
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, texts, megabytes * 10**6)
        rounds = [run_ours(corpus, model, args.workers, folder / "out", args.shard_size) for _ in range(args.rounds)]
        ours = min(rounds, key=lambda found: found["seconds"])
        told = ", ".join(f"{key} {value:,.2f}" for key, value in ours.items())
        print(
            f"ours, {megabytes} MB, {args.workers} workers: {told}, {megabytes / ours['seconds']:,.1f} MB/s", flush=True
        )
        if number or args.only == "ours":
            continue
        gigatoken = max((run_gigatoken(corpus, model, 25_000) for _ in range(args.rounds)), key=lambda row: row["rate"])
        megatron = run_megatron(corpus, model, args.megatron_seconds, 2, folder)
        print("gigatoken, tokenize only:", {key: round(value, 2) for key, value in gigatoken.items()})
        print("Megatron, imap, 2 workers:", {key: round(value, 2) for key, value in megatron.items()})
        print(f"ours / Megatron: {ours['rate'] / megatron['rate']:.1f} times the documents a second")
        print(f"ours / gigatoken alone: {ours['rate'] / gigatoken['rate']:.2f} by the clock")
    print(
        f"load {os.getloadavg()}, this process at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )


def main() -> None:
    """Run it in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[600], help="sizes of the input (default: 600)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts (default: 2)")
    parser.add_argument("--shard-size", default="50MB", help="as of tools/preprocess_data.py (default: 50MB)")
    parser.add_argument("--megatron-seconds", type=float, default=20)
    parser.add_argument("--only", choices=["ours"], help="leave the peers out")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="preprocessing"))
    try:
        compare(folder, args, documents())
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
