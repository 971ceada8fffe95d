"""Steps that datatrove does not have: a score in the metadata, and shards at the end."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

__all__ = ["BuildShards", "FastTextScore", "HuggingFaceScore"]

SCORE = "quality"
_BATCH = 32
_CHARACTERS = 8000


class FastTextScore(PipelineStep):
    """metadata[quality] = probability that fastText gives to one label."""

    name = "fastText score"
    type = "SCORE"

    def __init__(self, model: str, label: str) -> None:
        super().__init__()
        self.model = model
        self.label = label

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Score document by document."""
        import fasttext

        classifier = fasttext.load_model(self.model)
        if self.label not in classifier.get_labels():
            raise ValueError(f"--label {self.label}: {self.model} has {classifier.get_labels()[:10]}")
        for document in data:
            # fastText ends a text at a line break
            labels, probabilities = classifier.predict(document.text.replace("\n", " "), k=-1)
            document.metadata[SCORE] = float(min(dict(zip(labels, probabilities, strict=True))[self.label], 1.0))
            yield document


class HuggingFaceScore(PipelineStep):
    """metadata[quality] = output of a regression head (such as FineWeb-Edu's), or probability of the last label."""

    name = "Hugging Face score"
    type = "SCORE"

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Score in batches, on a GPU where there is one."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        model = AutoModelForSequenceClassification.from_pretrained(self.model).to(device).eval()
        for batch in _batches(data):
            texts = [document.text[:_CHARACTERS] for document in batch]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512).to(device)
            with torch.inference_mode():
                logits = model(**inputs).logits.float()
            scores = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]
            for document, score in zip(batch, scores.tolist(), strict=True):
                document.metadata[SCORE] = score
                yield document


def _batches(data: Any) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in data:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class BuildShards(PipelineStep):
    """tools/preprocess_data.py as one task of many: rank r of n builds every n-th shard."""

    name = "build shards"
    type = "SHARDS"

    def __init__(self, documents: str, shards: str, tokenizer: str, python: str) -> None:
        super().__init__()
        self.documents = documents
        self.shards = shards
        self.tokenizer = tokenizer
        self.python = python

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Run the tool, whose exit code says whether the task is done."""
        tool = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
        command = [self.python, str(tool), "--input", self.documents, "--output-dir", self.shards]
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer, "--append-eod"]
        command += ["--score-key", f"metadata.{SCORE}", "--id-key", "id"]
        command += ["--num-tasks", str(world_size), "--task-id", str(rank)]
        subprocess.run(command, check=True)
        if data:
            yield from data
