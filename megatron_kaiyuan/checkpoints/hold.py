"""One folder, one run: rank 0 holds the save folder by a file in it, `run_in_progress.json`, until the run ends.

The file is linked into place, or created with O_EXCL where there are no links: no file system grants either twice. No
lock is used: some file systems have none, others keep those of a host that is gone. Whether the holder of a file still
lives is decided in this order:

1. Slurm has started the holder's job again, which it does when the processes of the last start are gone.
2. The holder ran on this machine, since it booted: the kernel knows whether it still runs.
3. Slurm knows the holder's job, and says that it is over or waits. Another cluster has another job of that number,
   and jobs of other users may be hidden: that Slurm does not know a job proves nothing.
4. Otherwise, as on another machine: the holder touches its file every five seconds. It lives if that is seen, and is
   dead if it is not seen for 45 seconds. Clocks are not compared.

A holder that was taken for dead, such as one that was stopped for a minute, detects this before it saves, and ends.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.host.atomic import rename_durably

__all__ = ["HOLD_NAME", "Hold", "Holder", "hold_folder", "release_holds", "taken_by"]

HOLD_NAME = "run_in_progress.json"
_BEAT_SECONDS = 5.0
_PATIENCE_SECONDS = 45.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV)
_OVER = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PENDING|PREEMPTED|TIMEOUT")
"""States of a Slurm job without processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds a folder."""

    token: str
    """Like no other."""
    host: str
    boot: str
    """Of the machine since it started; no other has it."""
    process_namespace: str
    """Of the container, in which process numbers have a meaning."""
    process: int
    process_start: int
    """In clock ticks after boot. It distinguishes a process from an earlier one of the same number."""
    job: str
    """Slurm's number with its cluster; empty without Slurm."""
    job_restart: int
    since: str
    """UTC."""

    @staticmethod
    def of_this_process() -> "Holder":
        """Describe the process that calls this."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return Holder(
            token=uuid.uuid4().hex,
            host=platform.node(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            process_namespace=_link("/proc/self/ns/pid"),
            process=os.getpid(),
            process_start=_start_of(os.getpid()) or 0,
            job=f"{job}@{os.environ.get('SLURM_CLUSTER_NAME', '')}" if job else "",
            job_restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job.partition('@')[0]}" if self.job else ""
        return f"process {self.process} on host {self.host}{job}, since {self.since}"


class Hold:
    """A folder that this process holds."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self._holder = holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hold of the save folder", daemon=True)
        self._thread.start()

    def taken_by(self) -> Holder | None:
        """Return who holds the folder in place of this process.

        None: this process does, as far as can be seen.
        """
        with contextlib.suppress(OSError):
            found = _read_holder(self.path)
            if found is not None and found.token != self._holder.token:
                return found
        return None

    def release(self) -> None:
        """Let other runs have the folder."""
        self._ended.set()
        if os.getpid() == self._holder.process and self.taken_by() is None:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            if self.taken_by() is not None:
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)


_holds: dict[Path, Hold] = {}


def hold_folder(folder: Path) -> Hold:
    """Hold a save folder until `release_holds`, and make it if need be.

    A second call changes nothing.

    Raises:
        ResumeError: another run holds it, or it cannot be written.
    """
    path = folder.absolute() / HOLD_NAME
    if path not in _holds:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _holds[path] = Hold(path, _take(path, Holder.of_this_process()))
        except OSError as error:
            raise ResumeError(f"--save {folder} cannot be written: {error}; mend it or name another folder") from error
    return _holds[path]


def taken_by(folder: Path) -> Holder | None:
    """Return who holds a folder in place of this process.

    None: this process does, or it never did.
    """
    hold = _holds.get(folder.absolute() / HOLD_NAME)
    return None if hold is None else hold.taken_by()


def release_holds() -> None:
    """Let other runs have the folders that this process holds."""
    while _holds:
        _holds.popitem()[1].release()


def _take(path: Path, me: Holder) -> Holder:
    """Become the holder, in place of one that is dead."""
    while not _create(path, me):
        other = _read_holder(path)
        if other is not None and (reason := _why_dead(other, me)):
            print(f"> --save {path.parent}: was held by {other}: {reason}", flush=True)
        elif _shows_life(path, other):
            raise ResumeError(
                f"--save {path.parent} is in use by another run: {other or 'its file cannot be read'}. Wait until it "
                f"ends, or end it{_how_to_end(other, me)}; another run needs another folder ({path})"
            )
        _remove(path, other)
    return me


def _create(path: Path, me: Holder) -> bool:
    """Write the file unless there is one, and return whether this process now holds the folder."""
    own = path.with_name(f".{path.name}.{me.token}")
    try:
        _write_new(own, me)
        os.link(own, path)  # whole at once
    except FileExistsError:
        found = _read_holder(path)
        return found is not None and found.token == me.token  # NFS may have lost the answer to the first attempt
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            _write_new(path, me)
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _write_new(path: Path, me: Holder) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "w") as stream:
        json.dump(asdict(me), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _read_holder(path: Path) -> Holder | None:
    """Return who holds the folder.

    None where the file is gone or torn.
    """
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _remove(path: Path, dead: Holder | None) -> None:
    """Remove the file of a dead holder.

    One that another start has put in its place meanwhile is put back.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        rename_durably(path, aside)
        found = _read_holder(aside)
        if found is not None and found != dead and not path.exists():
            rename_durably(aside, path)
            return
        aside.unlink()


def _why_dead(other: Holder, me: Holder) -> str:
    """Return what proves that a holder is dead, empty where nothing does."""
    if other.job and other.job == me.job and other.job_restart < me.job_restart:
        return "Slurm has started the job again"
    if _same_processes(other, me):
        return "" if _runs(other) else "the process is gone"
    return _why_job_is_over(other, me)


def _same_processes(other: Holder, me: Holder) -> bool:
    """Whether the kernel of this process knows the other one by its number."""
    return bool(me.boot) and (other.boot, other.process_namespace) == (me.boot, me.process_namespace)


def _why_job_is_over(other: Holder, me: Holder) -> str:
    job, _, cluster = other.job.partition("@")
    asks_the_same_slurm = bool(me.job) and me.job.partition("@")[2] == cluster
    if not job or not asks_the_same_slurm or shutil.which("squeue") is None:
        return ""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    states = [] if told.returncode else told.stdout.split()  # a live job of another user may be unreadable
    over = bool(states) and all(_OVER.fullmatch(state) for state in states)
    return f"Slurm says {', '.join(states)} of the job" if over else ""


def _shows_life(path: Path, other: Holder | None, wait: Callable[[float], None] = time.sleep) -> bool:
    """Whether the holder touches its file, or the kernel knows that it runs."""
    if other is not None and _same_processes(other, Holder.of_this_process()):
        return True
    whom = other or "a run whose file cannot be read"
    print(f"> --save {path.parent}: held by {whom}; waiting {_PATIENCE_SECONDS:.0f} s for a sign of life", flush=True)
    before = _touched(path)
    for _ in range(int(_PATIENCE_SECONDS)):
        wait(1.0)
        if (now := _touched(path)) != before:
            return now is not None
    return False


def _touched(path: Path) -> int | None:
    """Return when the file was changed.

    Opened, because a network file system then asks its server.
    """
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _how_to_end(other: Holder | None, me: Holder) -> str:
    if other is None:
        return ""
    if other.job:
        return f" with a checkpoint (scancel --batch --signal=TERM {other.job.partition('@')[0]})"
    return f" with a checkpoint (kill -TERM {other.process}{'' if other.host == me.host else f' on {other.host}'})"


def _runs(other: Holder) -> bool:
    """Whether a process that this kernel knows by its number still runs."""
    try:
        os.kill(other.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, and maybe not to be seen below /proc
        return _start_of(other.process) in (None, other.process_start)
    return _start_of(other.process) == other.process_start


def _start_of(process: int) -> int | None:
    """Return when a process started, in clock ticks after boot.

    None where it is gone or a zombie.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)  # noqa: PTH115 - what it names is no path
    return ""
