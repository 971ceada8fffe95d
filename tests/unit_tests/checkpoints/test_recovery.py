import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_kaiyuan.checkpoints.identity import TOKENIZER, check_same_run, store_tokenizer
from megatron_kaiyuan.checkpoints.reading import iteration_folder
from megatron_kaiyuan.checkpoints.recovery import (
    agree_on_start,
    check_pretrained,
    check_save_directory,
    choose_start,
    damage,
)
from megatron_kaiyuan.errors import ResumeError
from megatron_kaiyuan.shards.manifest import TokenizerRecord
from tests.unit_tests.checkpoints.test_averaging import save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for iteration in (10, 20, 30):
        save(tmp_path / "run", iteration)
    return tmp_path / "run"


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def tear(folder: Path, how: str) -> None:
    """What a process killed while it saves, or a full disk, leaves."""
    if how == "truncated":
        path = data_file(folder)
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "data missing":
        data_file(folder).unlink()
    elif how == "pickle torn":
        path = folder / ".metadata"
        path.write_bytes(path.read_bytes()[:100])
    elif how == "json torn":
        (folder / "metadata.json").write_text('{"sharded')
    elif how == "folder missing":
        folder.rename(folder.with_name("elsewhere"))
    else:
        (folder / how).unlink()


TEARS = ["truncated", "data missing", "pickle torn", "json torn", "folder missing", ".metadata", "metadata.json"]


def test_an_intact_checkpoint_has_no_damage(run: Path) -> None:
    assert damage(iteration_folder(run, 30)) is None
    assert choose_start(run, None).step is None
    assert choose_start(run, 20).step is None


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_checkpoint_falls_back_to_the_one_before_and_says_so(run: Path, how: str) -> None:
    tear(iteration_folder(run, 30), how)
    start = choose_start(run, None)
    assert start.step == 20
    assert "iter_0000030" in start.announcement
    assert "FALLING BACK to the checkpoint of iteration 20" in start.announcement


def test_a_checkpoint_of_the_legacy_format_is_not_called_torn(run: Path) -> None:
    folder = iteration_folder(run, 30)
    for path in folder.iterdir():
        path.unlink()
    (folder / "mp_rank_00").mkdir()
    with pytest.raises(ResumeError, match=r"iter_0000030 is in Megatron's legacy format; add --ckpt-format torch"):
        choose_start(run, None)
    assert damage(folder) == "is in Megatron's legacy format: train on with --ckpt-format torch"
    args = arguments(run, None, auto_detect_ckpt_format=True)
    assert agree_on_start(args).step is None, "Megatron detects it, as it was asked to"


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_checkpoint_that_is_asked_for_is_an_error(run: Path, how: str) -> None:
    tear(iteration_folder(run, 20), how)
    with pytest.raises(ResumeError, match=r"--ckpt-step 20: .*intact are 10, 30"):
        choose_start(run, 20)


def test_two_torn_checkpoints_in_a_row_fall_back_to_the_third(run: Path) -> None:
    tear(iteration_folder(run, 30), "truncated")
    tear(iteration_folder(run, 20), "metadata.json")
    assert choose_start(run, None).step == 10


@pytest.mark.parametrize("content", [None, "", "3x"])
def test_a_torn_tracker_falls_back_to_the_newest_intact_checkpoint(run: Path, content: str | None) -> None:
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    if content is not None:
        tracker.write_text(content)
    tear(iteration_folder(run, 30), "metadata.json")
    assert choose_start(run, None).step == 20


def test_checkpoints_after_that_of_the_tracker_are_of_another_attempt(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("20")
    assert choose_start(run, None).step is None
    tear(iteration_folder(run, 20), "truncated")
    assert choose_start(run, None).step == 10


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(run: Path) -> None:
    for iteration in (10, 20, 30):
        tear(iteration_folder(run, iteration), "truncated")
    with pytest.raises(ResumeError, match="no intact checkpoint"):
        choose_start(run, None)


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_run_killed_in_its_first_saves_starts_anew(tmp_path: Path, saves: int) -> None:
    for iteration in range(10, 10 + saves):
        save(tmp_path, iteration)
        tear(iteration_folder(tmp_path, iteration), "metadata.json")
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    start = agree_on_start(arguments(tmp_path, tmp_path))
    assert start.step is None
    assert "starts at its first sample" in start.announcement
    assert all(
        f"iter_{iteration:07d} has no metadata.json" in start.announcement for iteration in range(10, 10 + saves)
    )


def test_checkpoints_that_had_ended_are_not_passed_over_because_the_tracker_is_gone(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").unlink()
    for iteration in (10, 20, 30):
        tear(iteration_folder(run, iteration), "truncated" if iteration == 20 else "metadata.json")
    with pytest.raises(ResumeError, match="no intact checkpoint"):
        choose_start(run, None)


def arguments(load: Path | None, save: Path | None, **values: object) -> Namespace:
    defaults = {"ckpt_format": "torch_dist", "non_persistent_ckpt_type": None, "ckpt_step": None, "finetune": False}
    paths = {name: None if path is None else str(path) for name, path in (("load", load), ("save", save))}
    defaults["pretrained_checkpoint"] = None
    return Namespace(**defaults | {"auto_detect_ckpt_format": False} | paths | values)


def test_the_fallback_mends_the_tracker_of_its_own_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tear(iteration_folder(run, 30), "truncated")
    assert agree_on_start(arguments(run, run)).step == 20
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "20"
    assert "FALLING BACK" in capsys.readouterr().err


def test_another_spelling_of_the_folder_is_the_same_run(run: Path) -> None:
    tear(iteration_folder(run, 30), "truncated")
    assert agree_on_start(arguments(Path(f"{run}/../{run.name}"), run)).step == 20


def test_the_checkpoint_of_another_run_is_not_chosen_in_silence(run: Path, tmp_path: Path) -> None:
    tear(iteration_folder(run, 30), "truncated")
    with pytest.raises(ResumeError, match="--ckpt-step 20"):
        agree_on_start(arguments(run, tmp_path / "new"))
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "30"


@pytest.mark.parametrize("how", TEARS)
def test_pretrained_weights_that_are_damaged_are_refused_and_not_replaced(
    run: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are looked at where Megatron would read them: as long as --load has no checkpoint."""
    args = arguments(tmp_path / "new", tmp_path / "new", pretrained_checkpoint=str(run))
    agree_on_start(args)
    check_pretrained(tmp_path / "nothing here")
    tear(run / "iter_0000030", how)
    with pytest.raises(ResumeError, match=rf"^--pretrained-checkpoint {run}: .*iter_0000030 .*there are 10, 20.*\)$"):
        agree_on_start(args)
    assert "FALLING BACK" not in capsys.readouterr().err
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    agree_on_start(args)
    (run / "latest_checkpointed_iteration.txt").write_text("")
    with pytest.raises(ResumeError, match=r"latest_checkpointed_iteration.txt says ''; restore it"):
        check_pretrained(run)
    own = tmp_path / "own"
    save(own, 5)
    agree_on_start(arguments(own, own, pretrained_checkpoint=str(run)))


def test_an_output_directory_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"already holds a run.*: 30.*continues it"):
        agree_on_start(arguments(None, run))
    with pytest.raises(ResumeError, match="continues it"):
        check_save_directory(run, tmp_path / "other", finetune=False)
    with pytest.raises(ResumeError, match="--finetune would overwrite"):
        check_save_directory(run, run, finetune=True)
    check_save_directory(run, run, finetune=False)
    check_save_directory(tmp_path / "new", run, finetune=True)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("seed", 8, "--seed was 7 and is now 8"),
        ("hidden_size", 64, "--hidden-size"),
        ("kaiyuan_tokenizer", "b", "the tokenizer"),
        ("kaiyuan_logit_softcap", 0.0, "--kaiyuan-logit-softcap"),
    ],
)
def test_another_seed_tokenizer_or_model_is_refused(name: str, value: object, flag: str) -> None:
    saved = Namespace(seed=7, hidden_size=32, kaiyuan_tokenizer="a", kaiyuan_logit_softcap=30.0)
    now = Namespace(load="run", **{**vars(saved), name: value})
    with pytest.raises(ResumeError, match=f"{flag}.*--finetune"):
        check_same_run(now, saved)
    check_same_run(Namespace(load="run", **vars(saved)), saved)
    check_same_run(now, None)


def test_the_metadata_of_the_test_is_that_of_megatron(run: Path) -> None:
    assert json.loads((iteration_folder(run, 10) / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


class Letters:
    """A tokenizer that numbers letters from `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) + self.first for letter in text]


class Numbers:
    """A tokenizer that reads numbers only."""

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


TOLD = TokenizerRecord(type="T", model=None, vocab_size=50, eod_id=3, fingerprint="told by manifests")


def test_shards_without_a_manifest_leave_it_to_the_tokenizer_of_the_command_line() -> None:
    first, second, again, numbers = (Namespace(load="run") for _ in range(4))
    store_tokenizer(first, None, Letters(0), planned=True)
    store_tokenizer(second, None, Letters(1), planned=True)
    store_tokenizer(again, None, Letters(0), planned=True)
    store_tokenizer(numbers, None, Numbers(), planned=True)
    check_same_run(again, first)
    check_same_run(numbers, first)
    with pytest.raises(ResumeError, match=r"--load run: --tokenizer-model .* was .* and is now"):
        check_same_run(second, first)


def test_a_tokenizer_named_beside_shards_with_a_manifest_stays_the_same() -> None:
    first, second, again, silent = (Namespace(load="run") for _ in range(4))
    store_tokenizer(first, None, Letters(0), planned=True)
    # manifests were added to the shards since
    store_tokenizer(second, TOLD, Letters(1), planned=True)
    store_tokenizer(again, TOLD, Letters(0), planned=True)
    store_tokenizer(silent, TOLD, Numbers(), planned=True)
    assert vars(again)[TOKENIZER] == "told by manifests"
    check_same_run(again, first)
    check_same_run(silent, first)
    check_same_run(again, silent)
    with pytest.raises(ResumeError, match=r"--load run: --tokenizer-model .* was .* and is now"):
        check_same_run(second, first)
