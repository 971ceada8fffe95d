"""The curation example: its settings anywhere, its pipeline where datatrove is installed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "curate"
FLAGS = ["--input", "raw", "--output", "out", "--tokenizer", "tok", "--model", "q.bin"]


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("settings", "steps", "curate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(name)
    for name in ("settings", "steps", "curate"):
        sys.modules.pop(name, None)


def test_minhash_has_the_settings_of_the_paper(curate: Any) -> None:
    settings = curate("settings").parse_arguments(FLAGS)
    assert (settings.permutations, settings.bands, settings.rows_per_band, settings.n_grams) == (128, 14, 9, 5)
    assert settings.threshold == pytest.approx(0.746, abs=1e-3)
    numbers = [round(100 * settings.probability(similarity)) for similarity in (0.75, 0.85, 0.6)]
    text = (FOLDER / "README.md").read_text()
    assert all(f"{number} %" in text for number in numbers), numbers


def test_more_rows_than_permutations_are_refused(curate: Any) -> None:
    module = curate("settings")
    fields = {name: getattr(module.parse_arguments(FLAGS), name) for name in module.CurationSettings.__slots__}
    with pytest.raises(ValueError, match="14 x --rows-per-band 10 needs more than the 128"):
        module.CurationSettings(**{**fields, "rows_per_band": 10})


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")
def test_the_stages_carry_the_settings(curate: Any) -> None:
    settings = curate("settings").parse_arguments([*FLAGS, "--tasks", "5"])
    stages = curate("curate").stages(settings)
    assert [(stage.name, stage.tasks) for stage in stages] == [
        ("signatures", 5),
        ("buckets", 14),
        ("clusters", 1),
        ("documents", 5),
        ("shards", 5),
    ]
    config = stages[0].steps[-1].config
    assert (config.n_grams, config.num_buckets, config.hashes_per_bucket) == (5, 14, 9)
