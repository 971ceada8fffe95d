"""Shard building beside Megatron's own path and beside gigatoken alone, on one file in one run.

The text is what lies on this machine: translations of programs (many languages and scripts), documentation, source
code; repeated with changes up to 1 GB, and that gigabyte again and again up to the size asked for. Megatron's path is
its tool's: `Pool.imap` over lines with its own tokenizer wrapper and its own builder, 2 processes; it gets as much of
the file as it can do in `--megatron-seconds`.

    python -m benchmarks.preprocessing --megabytes 600 --workers 1 2
    python -m benchmarks.preprocessing --megabytes 100 1000 10000 --only ours      # is the time linear, how much memory
"""

import argparse
import gettext
import itertools
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
CHANGED_BYTES = 1_000_000_000
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
    """JSONL of about `size` bytes, in whole lines."""
    with path.open("wb") as stream:
        for line in corpus_lines(texts):
            stream.write(line)
            if stream.tell() >= min(size, CHANGED_BYTES):
                break
    with path.open("rb") as again, path.open("ab") as stream:
        stop = stream.tell()
        while stream.tell() < size:
            again.seek(0)
            while again.tell() < stop and stream.tell() < size:
                stream.write(again.read(min(1 << 24, stop - again.tell())))
        if again.tell():
            stream.write(again.readline())  # the rest of the line that was cut


def corpus_lines(texts: list[str]) -> Iterator[bytes]:
    """Yield rows without end.

    From the second copy of the texts on one word in fifty is another one.
    """
    generator = random.Random(3)
    for number in itertools.count():
        text = texts[number % len(texts)]
        if number >= len(texts):
            words = text.split(" ")
            for _ in range(len(words) // 50 + 1):
                words[generator.randrange(len(words))] = f"w{generator.getrandbits(20):x}"
            text = " ".join(words)
        row = {"id": f"doc-{number}", "text": text, "score": generator.random()}
        yield (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


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


def run_gigatoken(corpus: Path, model: Path) -> dict[str, float]:
    """Documents a second of gigatoken alone: all texts of the file in memory, all cores, one call."""
    from gigatoken import Tokenizer

    with corpus.open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    tokenizer = Tokenizer.from_json((model / "tokenizer.json").read_bytes())
    tokenizer.encode("warm")
    began, cpu = time.monotonic(), time.process_time()
    tokenizer.encode_batch(texts, parallel=True)
    elapsed, cpu = time.monotonic() - began, time.process_time() - cpu
    return {"documents": len(texts), "seconds": elapsed, "rate": len(texts) / elapsed, "cpu": cpu}


def run_ours(corpus: Path, model: Path, workers: int, out: Path, shard_size: str) -> dict[str, float]:
    """Run the tool as a user does, start-up included.

    Returns also the largest sum of memory of all its processes.
    """
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
    """Compare all sizes, with the peers beside the first one."""
    model = folder / "tokenizer"
    train_tokenizer(texts, model)
    for number, megabytes in enumerate(args.megabytes):
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, texts, megabytes * 10**6)
        for workers in args.workers:
            rounds = [run_ours(corpus, model, workers, folder / "out", args.shard_size) for _ in range(args.rounds)]
            ours = min(rounds, key=lambda found: found["seconds"])
            rate = f"{megabytes / ours['seconds']:,.1f} MB/s, {1000 * ours['cpu'] / megabytes:,.1f} CPU s a GB"
            print(f"ours, {megabytes} MB, {workers} workers: {_told(ours)}, {rate}", flush=True)
        if number == 0 and args.only != "ours":
            _run_peers(corpus, model, args, ours, folder)
    print(
        f"load {os.getloadavg()}, this process at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )


def _run_peers(corpus: Path, model: Path, args: argparse.Namespace, ours: dict[str, float], folder: Path) -> None:
    gigatoken = max((run_gigatoken(corpus, model) for _ in range(args.rounds)), key=lambda row: row["rate"])
    megatron = run_megatron(corpus, model, args.megatron_seconds, 2, folder)
    print(f"gigatoken, tokenize only: {_told(gigatoken)}")
    print(f"Megatron, imap, 2 workers: {_told(megatron)}")
    print(f"ours / Megatron: {ours['rate'] / megatron['rate']:.1f} times the documents a second")
    cpu = gigatoken["cpu"] / ours["cpu"]
    print(f"ours / gigatoken alone: {ours['rate'] / gigatoken['rate']:.2f} by the clock, {cpu:.2f} by CPU time")


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:,.2f}" for key, value in found.items())


def main() -> None:
    """Run it in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[600], help="sizes of the input (default: 600)")
    parser.add_argument("--workers", nargs="+", type=int, default=[2], help="of ours; the last one is compared")
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
