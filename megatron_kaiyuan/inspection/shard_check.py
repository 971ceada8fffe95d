"""The full check of one shard: all of its files against each other and against its manifest."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_kaiyuan.errors import ScoreError, ShardError
from megatron_kaiyuan.host.terminal import agreed, counted
from megatron_kaiyuan.inspection.shard_scan import count_missing_scores, hash_file, scan_tokens
from megatron_kaiyuan.shards.index_check import index_faults
from megatron_kaiyuan.shards.manifest import FileRecord, Manifest
from megatron_kaiyuan.shards.shard import Shard, open_shard
from megatron_kaiyuan.shards.shard_files import ShardFiles

__all__ = ["Finding", "ShardCheck", "without_file"]

_REMEDY = "copy it again, or build the shard again"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """missing, index, size, checksum, swapped, manifest, tokenizer, dtype, vocabulary, scores, rank index, duplicate,
    unreadable, or leftover."""
    file: str
    message: str
    """What is wrong with it, with both values, and what to do."""


class ShardCheck:
    """The check of one shard, whose `run` is called once, in a thread."""

    def __init__(
        self,
        files: ShardFiles,
        manifest: Manifest | None,
        owners: Mapping[str, str],
        vocab_size: int | None,
        advance: Callable[[int], None],
    ) -> None:
        self.files = files
        self.manifest = manifest
        self.owners = owners
        self.advance = advance
        self.vocab_size = vocab_size or (manifest.tokenizer.vocab_size if manifest else None)
        self.shard: Shard | None = None

    def run(self) -> list[Finding]:
        """All findings of this shard, in the order idx, bin, scores."""
        findings = list(self._open())
        for part in (self._check_manifest, self._check_index, self._check_tokens, self._check_sidecars):
            try:
                findings += part()
            except (OSError, EOFError) as error:
                findings.append(
                    Finding("unreadable", getattr(error, "filename", None) or self.files.prefix, str(error))
                )
        return findings

    def _open(self) -> Iterator[Finding]:
        try:
            self.shard = open_shard(self.files.prefix)
        except (ShardError, OSError) as error:
            absent = [path for path in (self.files.idx, self.files.bin) if not path.is_file()]
            of_bin = str(error).startswith(f"{self.files.bin}:")
            kind = "missing" if absent else "size" if of_bin else "index"
            file = absent[0] if absent else self.files.bin if of_bin else self.files.idx
            yield Finding(kind, str(file), without_file(str(error), file))

    def _check_manifest(self) -> Iterator[Finding]:
        manifest, shard = self.manifest, self.shard
        if manifest is None:
            return
        path = str(self.files.manifest)
        if shard is not None:
            told = {"documents": manifest.documents, "tokens": manifest.tokens, "dtype": manifest.dtype}
            found = {"documents": shard.documents, "tokens": shard.tokens, "dtype": shard.dtype.name}
            for field in told:
                if told[field] != found[field]:
                    yield Finding("manifest", path, f"{field} {told[field]}, the shard has {found[field]}; {_REMEDY}")
        name = manifest.files["bin"].name if "bin" in manifest.files else None
        if name != self.files.bin.name:
            yield Finding(
                "swapped",
                path,
                f"describes {name}, not {self.files.bin.name}: it belongs to another shard, or the shard was renamed "
                "without it; restore the names",
            )
        for role in manifest.files:
            if role.startswith("scores.") and role.removeprefix("scores.") not in self.files.sidecars:
                yield Finding(
                    "missing", f"{self.files.prefix}.{role}.npy", f"the manifest lists these scores; {_REMEDY}"
                )

    def _check_index(self) -> Iterator[Finding]:
        if self.shard is not None:
            for fault in index_faults(self.shard, one_each=True):
                yield Finding("index", str(self.files.idx), f"{fault}; {_REMEDY}")
        if self.files.idx.is_file():
            yield from self._compare("idx", self.files.idx, hash_file(self.files.idx, self.advance))

    def _check_tokens(self) -> Iterator[Finding]:
        path = self.files.bin
        if not path.is_file():
            return
        if self.shard is None:
            yield from self._compare("bin", path, hash_file(path, self.advance))
            return
        dtype = self.shard.dtype
        limit = self.vocab_size or 1 << (8 * dtype.itemsize - (dtype.kind == "i"))
        scan = scan_tokens(path, dtype, limit, self.advance)
        different = list(self._compare("bin", path, scan.sha256))
        yield from different
        if scan.outside:
            document = self.shard.document_of_token(scan.first_outside)
            token = int(self.shard.token_data[scan.first_outside])
            yield Finding(
                "vocabulary",
                str(path),
                f"ids outside a vocabulary of {limit:,}: {scan.outside:,}, the first is {token} in document "
                f"{document:,}; the shard was built with another tokenizer, or is damaged",
            )
        elif self.manifest and scan.largest != self.manifest.max_token_id and not different:
            told = self.manifest.max_token_id
            message = f"max_token_id {told}, the largest id is {scan.largest}; {_REMEDY}"
            yield Finding("manifest", str(self.files.manifest), message)

    def _check_sidecars(self) -> Iterator[Finding]:
        for score, path in self.files.sidecars.items():
            if self.shard is not None:
                try:
                    missing, first = count_missing_scores(path, self.shard.documents)
                except ScoreError as error:
                    yield Finding("scores", str(path), without_file(str(error), path))
                else:
                    if missing:
                        message = (
                            f"{counted(missing, 'score')} {agreed(missing, 'is', 'are')} NaN, the first for "
                            f"document {first:,}; write them again"
                        )
                        yield Finding("scores", str(path), message)
            yield from self._compare(f"scores.{score}", path, hash_file(path, self.advance))
        yield from self._check_document_table()

    def _check_document_table(self) -> Iterator[Finding]:
        """Check the table that says where documents come from.

        Shards made elsewhere have none.
        """
        if self.manifest is None or "documents" not in self.manifest.files:
            return
        path = self.files.documents
        if path.is_file():
            yield from self._compare("documents", path, hash_file(path, self.advance))
        else:
            yield Finding("missing", str(path), f"the manifest lists this table; {_REMEDY}")

    def _compare(self, role: str, path: Path, sha256: str) -> Iterator[Finding]:
        """A file against what the manifest records of it."""
        record = self.manifest.files.get(role) if self.manifest else None
        if record is None or record.sha256 == sha256:
            return
        owner = self.owners.get(sha256)
        if owner is not None and owner != str(path):
            message = f"holds the bytes of {owner}: the files were swapped; restore their names, or copy both again"
            yield Finding("swapped", str(path), message)
        elif owner is None:
            yield _different(path, role, record, sha256)


def _different(path: Path, role: str, record: FileRecord, sha256: str) -> Finding:
    size = path.stat().st_size
    if size != record.bytes:
        return Finding("size", str(path), f"{counted(size, 'byte')}, the manifest says {record.bytes:,}; {_REMEDY}")
    rewritten = "the scores were written again since, or " if role.startswith("scores.") else ""
    return Finding(
        "checksum",
        str(path),
        f"sha256 {sha256[:16]}..., the manifest says {record.sha256[:16]}...: {rewritten}bits have flipped; {_REMEDY}",
    )


def without_file(message: str, path: Path) -> str:
    """Return a message without the file that it begins with, which a finding names already."""
    return message.removeprefix(f"{path}: ")
