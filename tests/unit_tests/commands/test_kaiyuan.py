"""`kaiyuan VERB` is each tool under its own name; `train` starts what the machine can run."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kaiyuan import __version__
from megatron_kaiyuan.commands import doctor, train
from megatron_kaiyuan.commands.kaiyuan import VERBS
from megatron_kaiyuan.commands.train import launch_command
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host import cli
from megatron_kaiyuan.host.cli import TOOLS, python_command, tool, tool_command
from megatron_kaiyuan.host.examination import Finding
from megatron_kaiyuan.host.version import code_commit
from tests import REPOSITORY

COMMANDS = REPOSITORY / "megatron_kaiyuan" / "commands"
TRAINER, LAUNCHER = "megatron_kaiyuan.pretrain", "megatron_kaiyuan.host.torchrun"


def kaiyuan(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_kaiyuan", *words],
        cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_every_command_has_a_verb_and_every_tool_is_one() -> None:
    with_main = {path.stem for path in COMMANDS.glob("*.py") if "\ndef main() -> None:" in path.read_text()}
    lines = [line for path in (REPOSITORY / "tools").glob("*.py") for line in path.read_text().splitlines()]
    doors = {line.split(".")[-1].split(" ")[0] for line in lines if line.startswith("from megatron_kaiyuan.commands.")}
    assert {module for module, _ in VERBS.values()} == with_main
    assert doors == with_main - {"train", "doctor"}


def test_messages_name_a_tool_as_its_user_started_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    assert (tool("rank"), tool_command("rank")) == ("tools/rank_data.py", f"{python_command()} tools/rank_data.py")
    monkeypatch.chdir(tmp_path)
    assert tool("rank") == f"{REPOSITORY}/tools/rank_data.py"
    monkeypatch.setattr(sys, "argv", ["kaiyuan plan", "p.yaml"])
    assert (tool("rank"), tool_command("rank")) == ("kaiyuan rank", "kaiyuan rank")
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    monkeypatch.setattr(cli, "_DOORS", tmp_path)  # a wheel has none
    assert (tool("rank"), tool_command("rank")) == ("kaiyuan rank", "kaiyuan rank")


def test_tools_that_messages_name_are_there() -> None:
    modules = {verb: module for verb, (module, _) in VERBS.items() if verb not in ("train", "doctor")}
    doors = {verb: (REPOSITORY / f"tools/{door}.py").read_text() for verb, door in TOOLS.items()}
    assert doors.keys() == modules.keys()
    assert [verb for verb in doors if f"from megatron_kaiyuan.commands.{modules[verb]} import" not in doors[verb]] == []


def spelled_by_hand(source: str) -> list[str]:
    """Return the texts of a module, its docstrings apart, that hold the file of a tool."""
    tree = ast.parse(source)
    documented = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
    ]
    return [text for text in texts if re.search(rf"\b({'|'.join(TOOLS.values())})\.py\b", text)]


def test_no_message_spells_a_tool_by_hand() -> None:
    """A wheel has no folder of tools."""
    package = REPOSITORY / "megatron_kaiyuan"
    assert {
        str(path): found
        for path in package.rglob("*.py")
        if (found := spelled_by_hand(path.read_text(encoding="utf-8")))
    } == {}
    assert spelled_by_hand('"""See tools/rank_data.py."""\nsay(f"run tools/rank_data.py {x}")\n') == [
        "run tools/rank_data.py "
    ]


def test_help_version_and_an_unknown_verb() -> None:
    assert all(f"\n  {verb} " in kaiyuan().stdout for verb in VERBS)
    assert kaiyuan("--version").stdout.startswith(f"megatron_kaiyuan {__version__} (commit ")
    wrong = kaiyuan("trian")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: kaiyuan has no verb 'trian'; it has doctor, preprocess")


def test_a_verb_is_the_tool_with_its_own_name_and_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("sources: 3\n")
    usage = kaiyuan("plan", "--help")
    assert usage.stdout.startswith("usage: kaiyuan plan ")
    refused = kaiyuan("plan", str(tmp_path / "plan.yaml"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


PLAN = ["--plan", "p.yaml", "--num-layers", "2"]


@pytest.mark.parametrize(
    ("words", "gpus", "wanted"),
    [
        (PLAN, 0, ["-m", TRAINER, *PLAN]),
        (PLAN, 1, ["-m", TRAINER, *PLAN]),
        (PLAN, 4, ["-m", LAUNCHER, "--standalone", "--nproc-per-node", "4", "-m", TRAINER, *PLAN]),
        ([*PLAN, "--nproc_per_node", "2"], 0,
         ["-m", LAUNCHER, "--standalone", "--nproc-per-node", "2", "-m", TRAINER, *PLAN]),
        (["--nnodes=2", "--node-rank", "1", *PLAN, "--master-addr", "a"], 8,
         ["-m", LAUNCHER, "--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "1", "--master-addr", "a",
          "-m", TRAINER, *PLAN]),
        # torchrun's --standalone would replace the port.
        ([*PLAN, "--master-port", "29600"], 2,
         ["-m", LAUNCHER, "--nproc-per-node", "2", "--master-port", "29600", "-m", TRAINER, *PLAN]),
    ],
)  # fmt: skip
def test_train_starts_one_process_a_gpu(words: list[str], gpus: int, wanted: list[str]) -> None:
    found = launch_command(words, gpus)
    position = found.index(TRAINER)
    assert found[position:] == wanted[wanted.index(TRAINER) :]
    assert sorted(found[:position]) == sorted(wanted[: wanted.index(TRAINER)])


def test_train_without_flags_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="give --plan PLAN"):
        launch_command(["--nproc-per-node", "2"], 0)


def test_train_starts_without_a_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has none where it was closed: `kaiyuan train ... >&-`."""
    started: list[list[str]] = []
    monkeypatch.setattr(train.os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["train", *PLAN, "--nproc-per-node", "1"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.delenv("RANK", raising=False)
    train.main()
    assert started[0][-len(PLAN) :] == PLAN


def test_an_abbreviation_of_a_launcher_flag_is_left_to_the_trainer_which_refuses_it() -> None:
    assert launch_command([*PLAN, "--nproc", "3"], 0) == ["-m", TRAINER, *PLAN, "--nproc", "3"]


def test_the_commit_is_that_of_the_checkout_or_of_the_record(tmp_path: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert head.stdout.startswith((code_commit() or "").removesuffix("-dirty"))
    package = tmp_path / "package"
    package.mkdir()
    (package / "commit.txt").write_text("0123456789ab\n")
    assert code_commit(package) == "0123456789ab"


def test_doctor_names_what_is_there_and_what_the_plan_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Finding("wandb", "absent", "not installed", "pages", "install it")
    monkeypatch.setattr(doctor, "examine_packages", lambda: [absent])
    needs = ["--plan", str(REPOSITORY / "examples/kaiyuan_2b/plan.yaml"), "--parameters", "1e12"]
    monkeypatch.setattr(sys, "argv", ["doctor", "--json", "--save", str(tmp_path / "not" / "yet"), *needs])
    with pytest.raises(ConfigError, match=r"^disk for the plan: mend this first"):
        doctor.main()
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {one["name"]: one["state"] for one in findings}["torch"] == "ok"
    assert all((one["remedy"] == "") == (one["state"] == "ok") for one in findings)
    # 8 averaged checkpoints and 3 beside them, of 14 bytes a parameter
    assert "11 checkpoints of 13,038.5 GiB" in findings[-1]["value"]
    monkeypatch.setattr(sys, "argv", ["doctor"])
    doctor.main()
    assert "-       wandb" in capsys.readouterr().out
