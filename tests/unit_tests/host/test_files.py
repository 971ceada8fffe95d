"""Files that others wrote: a pipe under their name, YAML that stands for too much, text with control characters."""

import io
import os
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.errors import ShardError
from megatron_kaiyuan.evaluation.token_bytes import token_bytes
from megatron_kaiyuan.host.cli import run_tool
from megatron_kaiyuan.host.console import SafeConsole
from megatron_kaiyuan.host.files import open_regular, read_regular
from megatron_kaiyuan.host.terminal import counted, shell_command, visible, visible_data
from megatron_kaiyuan.host.yaml_file import NotYamlError, read_yaml
from megatron_kaiyuan.inspection.describe import describe_source
from megatron_kaiyuan.shards.manifest import load_manifest
from megatron_kaiyuan.shards.score_import import read_scores
from tests.unit_tests.data.tiny import numbered_documents, write_shard


def test_a_pipe_is_refused_at_once_and_a_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device, not a file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "file").write_bytes(b"data")
    assert read_regular(tmp_path / "file") == b"data"


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".manifest.json", ".scores.score.npy"])
def test_no_reader_of_shards_waits_for_a_pipe(tmp_path: Path, suffix: str) -> None:
    prefix = write_shard(tmp_path / "s", numbered_documents([3, 4]), [1, 2])
    Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    os.mkfifo(f"{prefix}{suffix}")
    assert describe_source("s", str(tmp_path))["findings"]
    with pytest.raises((ShardError, OSError), match=r"s\.(idx|bin|manifest|scores)"):
        open_source("s", str(tmp_path)).load_scores("score")


def test_a_manifest_and_imported_scores_are_no_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.manifest.json")
    os.mkfifo(tmp_path / "s.npy")
    with pytest.raises(OSError, match="a pipe or a device"):
        load_manifest(str(tmp_path / "s"))
    with pytest.raises(OSError, match="a pipe or a device"):
        read_scores(str(tmp_path / "s.npy"))


NINE_OF_THE_LAST = [", ".join([f"*k{number}"] * 9) for number in range(12)]
BOMBS = {
    "aliases": "k0: &k0 [x]\n" + "".join(f"k{n + 1}: &k{n + 1} [{last}]\n" for n, last in enumerate(NINE_OF_THE_LAST)),
    "merge keys": "k0: &k0 {x: 1}\n"
    + "".join(f"k{n + 1}: &k{n + 1} {{<<: [{last}]}}\n" for n, last in enumerate(NINE_OF_THE_LAST)),
    "itself": "a: &a [1, *a]\n",
    "itself by a merge key": "a: &a\n  <<: *a\n",
    "depth": "[" * 5000 + "]" * 5000,
    "not UTF-8": "a: caf\xe9\n",
    "a key twice": "a: 1\na: 2\n",
    "an object": "a: !!python/object/apply:os.system [true]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_stands_for_too_much_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(BOMBS[name].encode("latin-1"))
    with pytest.raises(NotYamlError):
        read_yaml(path)


def test_yaml_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "plan.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(NotYamlError, match="more than 16 MiB"):
        read_yaml(tmp_path / "plan.yaml")


def test_aliases_and_merge_keys_of_a_person_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


@given(st.text())
def test_visible_text_has_nothing_that_a_terminal_acts_on(text: str) -> None:
    shown = visible(text)
    assert all(character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") for character in shown)
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
    assert visible(shown) == shown
    shown.encode()


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31mb\r\n\tc\x9bd\u202e") == "a\\x1b[31mb\\x0d\n\tc\\x9bd\\u202e"
    assert visible_data({"\x1b": [("\x07", 1)]}) == {"\\x1b": [("\\x07", 1)]}


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_a_printed_command_is_read_by_a_shell_as_it_was_meant(words: list[str]) -> None:
    assert shlex.split(shell_command(*words)) == words


def test_a_shell_agrees(tmp_path: Path) -> None:
    words = ["my run", "a'b", '"$HOME"', "-x", "*", "a;b", str(tmp_path)]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {shell_command(*words)}"], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == words


def test_one_is_not_counted_in_the_plural() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]


def test_a_console_and_an_error_show_control_characters_and_keep_colours(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_column("na\x1b[2Jme")
    table.add_row(Text("a\x1b]0;title\x07b", style="red"))
    told = io.StringIO()
    console = SafeConsole(file=told, force_terminal=True, width=80, color_system="standard")
    console.print(table)
    console.print(Text("a\x1b]0;title\x07b", style="red"))
    assert "\\x1b[2J" in told.getvalue()
    assert "\\x1b]0;titleb" in told.getvalue()  # rich itself drops the bell
    assert "\x1b[31m" in told.getvalue()  # the console's own red
    assert "\x1b[2J" not in told.getvalue()
    assert "\x07" not in told.getvalue()

    def fails() -> None:
        raise ShardError("a\x1b[2Jb")

    assert run_tool(fails) == 1
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\n"


@pytest.mark.parametrize("content", [b"\x0a\x0e\x0a\x05<unk>\xff\xfe", b'[{"rank": 0, "token_bytes": "AA=="}]'])
def test_bytes_of_other_tokenizers_are_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert token_bytes(tmp_path / "tokenizer.model") is None
