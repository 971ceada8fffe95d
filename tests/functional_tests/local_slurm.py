"""A Slurm of our own for a test: authentication, controller and two nodes, all on this machine, gone afterwards.

The nodes are called 127.0.0.2 and 127.0.0.3, names that resolve to this machine everywhere, and differ from the name of
the machine that submits. One machine plays both nodes because Debian's slurmd may run several times on one host.
"""

import contextlib
import getpass
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Slurm lets a requeued job wait until the credentials of its first start have expired: two minutes unless told so.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs={cpus} RealMemory={memory}
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs={cpus} RealMemory={memory}
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of Slurm that are not installed, and what else keeps one from starting here."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return missing + ([] if os.geteuid() == 0 else ["root (slurmd starts jobs as their users)"])


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@dataclass(frozen=True)
class LocalSlurm:
    """A running Slurm."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to talk to it; nothing of another allocation leaks in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run one of its commands, which must succeed, and return what it prints."""
        finished = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"
        return finished.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(
            field.split("=", 1) for field in self.run("scontrol", "-o", "show", "job", number).split() if "=" in field
        )

    def wait(self, number: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in one of these states.

        Raises:
            AssertionError: the time ran out; tells the job's fields.
        """
        end = time.monotonic() + timeout
        while (fields := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"not {' or '.join(states)} after {timeout:.0f} s: {fields}"
            time.sleep(0.3)
        return fields


@contextmanager
def local_slurm(folder: Path, cpus: int = 1) -> Iterator[LocalSlurm]:
    """Start it, wait for its nodes, and stop it with all its jobs.

    Args:
        folder: Short path (a socket's name may have 108 characters), readable by all.
        cpus: That each node says it has, with 4 GB for each; jobs share what this machine has.
    """
    slurm = LocalSlurm(folder)
    _configure(folder, cpus)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in _daemons(folder):
            with (folder / f"{command[0]}.out").open("ab") as log:
                started.append(
                    subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log, start_new_session=True)
                )
            if command[0] == "munged":
                _wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        _wait_for(lambda: _idle_nodes(slurm) == len(NODES), "the nodes")
        yield slurm
    finally:
        if len(started) > 1:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=slurm.environment, check=False, timeout=30)
            time.sleep(1)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _configure(folder: Path, cpus: int) -> None:
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().split(".")[0]
    names = {"host": host, "folder": folder, "user": getpass.getuser(), "nodes": NODES, "ports": _free_ports(3)}
    text = CONFIGURATION.format(**names, cpus=cpus, memory=4000 * cpus)
    (folder / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range from which the kernel gives ports to whoever asks for any."""
    ports: list[int] = []
    for port in random.sample(range(15_000, 20_000), 200):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def _daemons(folder: Path) -> list[list[str]]:
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    configuration = str(folder / "slurm.conf")
    nodes = [["slurmd", "-D", "-N", node, "-f", configuration] for node in NODES]
    return [munge, ["slurmctld", "-D", "-f", configuration], *nodes]


def _idle_nodes(slurm: LocalSlurm) -> int:
    told = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.split().count("idle")


def _wait_for(condition: object, what: str, timeout: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what} did not come up within {timeout:.0f} s"
        time.sleep(0.2)
