from collections.abc import Callable
from pathlib import Path

import pytest
from stages import Stage, run_stages


class Interrupted(Exception):
    """Stands for a stage that is stopped half-way."""


class Workshop:
    """Two stages, the second of which can go on where it was interrupted; counts what runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.said: list[str] = []
        self.first_inputs = "a"
        self.fail = False

    def run(self) -> list[bool]:
        stages = [
            self._stage("first", self.first_inputs, self._write("first")),
            self._stage("second", "b", self._append, continues=True),
        ]
        return [outcome.skipped for outcome in run_stages(stages, self.folder / "stamps", self.said.append)]

    def _stage(self, name: str, inputs: str, run: Callable[[], None], *, continues: bool = False) -> Stage:
        outputs = [self.folder / name]
        return Stage(name=name, title=name, inputs=inputs, outputs=outputs, run=run, continues=continues)

    def _write(self, name: str) -> Callable[[], None]:
        def write() -> None:
            self.ran.append(name)
            (self.folder / name).write_text("made")

        return write

    def _append(self) -> None:
        self.ran.append("second")
        with (self.folder / "second").open("a") as stream:
            stream.write("x")
        if self.fail:
            raise Interrupted


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_second_run_repeats_nothing_and_says_so(workshop: Workshop) -> None:
    assert workshop.run() == [False, False]
    assert workshop.run() == [True, True]
    assert workshop.ran == ["first", "second"]
    assert workshop.said[-2:] == ["[1/2] first: up to date, skipped", "[2/2] second: up to date, skipped"]


def test_a_changed_input_repeats_its_stage_and_all_that_follow(workshop: Workshop) -> None:
    workshop.run()
    workshop.first_inputs = "changed"
    assert workshop.run() == [False, False]
    assert (workshop.folder / "second").read_text() == "x", "the old output is removed first"


def test_a_missing_output_is_made_again(workshop: Workshop) -> None:
    workshop.run()
    (workshop.folder / "second").unlink()
    assert workshop.run() == [True, False]


def test_an_interrupted_stage_goes_on_from_its_outputs(workshop: Workshop) -> None:
    workshop.fail = True
    with pytest.raises(Interrupted):
        workshop.run()
    workshop.fail = False
    assert workshop.run() == [True, False]
    assert (workshop.folder / "second").read_text() == "xx"


def test_an_interrupted_stage_with_changed_inputs_starts_anew(workshop: Workshop) -> None:
    workshop.fail = True
    with pytest.raises(Interrupted):
        workshop.run()
    workshop.fail = False
    workshop.first_inputs = "changed"
    workshop.run()
    assert (workshop.folder / "second").read_text() == "x"
