"""Faults planted in the arithmetic of the order: the brute-force oracle and the laws must notice each of them."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, interleave, parts, phase, stream, unseen
from megatron_kaiyuan.documents import packing
from megatron_kaiyuan.documents.draws import Draw
from megatron_kaiyuan.documents.runs import DocumentRuns
from tests.unit_tests.data import oracle
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

LENGTHS = [1 + number * 7 % 5 for number in range(80)]
SCORES = np.random.default_rng(5).permutation(80).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return {
        name: write_source(folder / name, numbered_documents(LENGTHS, 1000 * number), SCORES)
        for number, name in enumerate("ab")
    }


def samples_of(sources: dict[str, Any], *phases: dict[str, Any], seq_length: int = 3) -> list[tuple[int, ...]]:
    order = CurriculumDataset(Plan.from_spec(plan_of(sources, *phases, seq_length=seq_length)))
    in_turn = [tuple(order[sample]["tokens"].tolist()) for sample in range(len(order))]
    singly = [tuple(order[sample]["tokens"].tolist()) for sample in reversed(range(len(order)))]
    assert in_turn == singly[::-1]
    return in_turn


def check_curricula(sources: dict[str, Any]) -> None:
    """Budgets, bands of repetition, the mix, against the oracle."""
    for tokens, repeat in ((None, 1), (None, 3), (210, 1), (210, 2)):
        some = [
            oracle.Part(numbered_documents(LENGTHS, 1000 * number), SCORES, repeat=repeat, low=Fraction(1, 5))
            for number in range(2)
        ]
        entries = {name: {"keep": "top 80%", "repeat": repeat} for name in sources}
        more = {} if tokens is None else {"tokens": tokens}
        got = samples_of(sources, phase_of("curriculum", entries, **more))
        assert got == [window for _, window in oracle.curriculum(some, 3, tokens)]


def check_draws(sources: dict[str, Any]) -> None:
    """Exact counts, and no two phases alike."""
    phases = [phase_of("shuffled", {"a": {"keep": "random 30%", "repeat": 1.5}}, name) for name in "pq"]
    plan = Plan.from_spec(plan_of(sources, *phases, seq_length=1))
    streams = [one.streams["a"] for one in plan.phases]
    assert [one.selected.num_documents for one in streams] == [24, 24]
    assert [one.extra.num_documents for one in streams if one.extra] == [12, 12]
    assert 0 < streams[0].selected.common_with(streams[1].selected).num_documents < 24
    small, large = (Draw(streams[0].selected, 1).documents(count) for count in (5, 20))
    assert small.common_with(large).num_documents == 5


def check_passes(sources: dict[str, Any]) -> None:
    """Each window once a pass, in another order each time."""
    shown = samples_of(sources, phase_of("shuffled", {"a": {"repeat": 2}}), seq_length=1)
    size = sum(LENGTHS) - 1
    first, second = shown[:size], shown[size + 1 :]
    assert len(set(first)) == size
    assert first[: len(second)] != second
    assert set(Counter(window[1] for window in shown).values()) <= {1, 2}


def check_unseen(sources: dict[str, Any]) -> None:
    """What one phase left, the others show: all of it, once."""
    for order in ("shuffled", "curriculum"):
        going_on = [phase_of(order, {"a": {"from": "unseen"}}, name, tokens=n) for name, n in (("q", 90), ("r", 87))]
        shown = samples_of(sources, phase_of(order, {"a": "all"}, "p", tokens=60), *going_on)
        assert len(set(shown)) == len(shown) == 79


def check_documents(sources: dict[str, Any]) -> None:
    """Shuffled documents: each whole and once a pass, in another order each time, and within bands in a curriculum."""
    for order in ("shuffled", "curriculum"):
        part = {"a": {"shuffle": "documents", "repeat": 2}}
        plan = Plan.from_spec(plan_of(sources, phase_of(order, part), seq_length=3))
        passes = [plan.phases[0].streams["a"].documents_of_pass(number).order for number in range(2)]
        shown = [one.pieces(0, sum(LENGTHS)) for one in passes]
        for pieces in shown:
            assert sorted(pieces.documents.tolist()) == list(range(80))
            assert pieces.sizes.tolist() == [LENGTHS[number] for number in pieces.documents]
        assert shown[0].documents.tolist() != shown[1].documents.tolist()
        if order == "curriculum":
            bands = [SCORES[number] * 20 // 80 for number in shown[0].documents]
            assert bands == sorted(bands)


def check_packing(sources: dict[str, Any]) -> None:
    """Documents packed whole, against the oracle."""
    spec = plan_of(sources, phase_of("shuffled", {"a": {"packing": "whole"}}), seq_length=12)
    order = CurriculumDataset(Plan.from_spec(spec))
    shown = [order[sample]["tokens"].tolist()[: 13 - order.padding(sample)] for sample in range(len(order))]
    by_hand = oracle.packed_whole(numbered_documents(LENGTHS), 13, 512)
    assert sorted(map(len, shown)) == sorted(sum(map(len, window)) for window in by_hand)
    uneven = [1 + number * number * 7 % 31 for number in range(200)]
    packed = [sum(stop - start for _, start, stop in window) for window in packing.pack_group(uneven, 39)]
    by_hand = oracle.packed_whole(numbered_documents(uneven), 40, 200)
    assert sorted(packed) == sorted(sum(map(len, window)) for window in by_hand)


CHECKS = [check_curricula, check_draws, check_passes, check_unseen, check_documents, check_packing]

Plant = Callable[[pytest.MonkeyPatch], None]
_left_out, _left_out_one = unseen.left_out, unseen.left_out_one
_sort, _taken, _key = interleave._sorted_by_position, Draw._taken, stream.derive_key
_cut = DocumentRuns.between
_shuffled = stream.as_shuffled


def thin_from_the_start(patch: pytest.MonkeyPatch) -> None:
    """The best window of a thinned curriculum is lost."""
    for module in (stream, phase):
        patch.setattr(module, "thinned", lambda samples, used, available: samples * available // used)


def drop_the_best_end(patch: pytest.MonkeyPatch) -> None:
    """The partial window is dropped where the best data is."""
    patch.setattr(stream.Stream, "first_token", 0)


def break_ties_backwards(patch: pytest.MonkeyPatch) -> None:
    """Equal positions go to the last source."""

    def wrong(rates: Any, lowest: Any, highest: Any) -> Any:
        numbers, samples, positions = _sort(rates, lowest, highest)
        order = np.lexsort((-numbers, positions))
        return numbers[order], samples[order], positions[order]

    patch.setattr(interleave, "_sorted_by_position", wrong)


def draw_one_more(patch: pytest.MonkeyPatch) -> None:
    """A draw has a document too many."""
    patch.setattr(Draw, "_taken", lambda self, wanted, **more: _taken(self, wanted + 1, **more))


def forget_the_phase_in_a_draw(patch: pytest.MonkeyPatch) -> None:
    """Random parts of all phases are the same documents."""
    patch.setattr(parts.Part, "key", 7)


def shuffle_all_passes_alike(patch: pytest.MonkeyPatch) -> None:
    """Every pass comes in the order of the first."""
    patch.setattr(stream, "derive_key", lambda key, *rest: _key(key))


def leave_out_the_neighbours(patch: pytest.MonkeyPatch) -> None:
    """What earlier phases left is off by one window."""
    patch.setattr(unseen, "left_out", lambda *given: _left_out(*given) + 1)
    patch.setattr(unseen, "left_out_one", lambda *given: _left_out_one(*given) + 1)


def cut_bands_one_early(patch: pytest.MonkeyPatch) -> None:
    """`top 80%` has one document too many at its lower end."""
    patch.setattr(DocumentRuns, "between", lambda self, first, last: _cut(self, max(first - 1, 0), last))


def repeat_pass_by_pass(patch: pytest.MonkeyPatch) -> None:
    """A ranked repetition ascends once a pass."""
    patch.setattr(parts, "_with_bands", lambda part, found: found)


def shuffle_documents_across_bands(patch: pytest.MonkeyPatch) -> None:
    """A curriculum of shuffled documents does not ascend."""
    patch.setattr(stream.Stream, "_shuffle_edges", lambda self, number: np.array([0, self.selected.num_documents]))


def pack_every_pass_alike(patch: pytest.MonkeyPatch) -> None:
    """Documents come in the same random order in each pass."""
    patch.setattr(stream, "as_shuffled", lambda runs, edges, key, stride: _shuffled(runs, edges, 5, stride))


def pack_where_most_is_free(patch: pytest.MonkeyPatch) -> None:
    """Documents go where they leave most free."""
    patch.setattr(packing, "bisect_left", lambda free, asked: len(free) - (bool(free) and free[-1][0] >= asked[0]))


def take_padding_for_text(patch: pytest.MonkeyPatch) -> None:
    """Nobody knows what is padding."""
    patch.setattr(stream.Stream, "padding", lambda self, window: 0)


FAULTS = [
    pack_where_most_is_free,
    take_padding_for_text,
    shuffle_documents_across_bands,
    pack_every_pass_alike,
    thin_from_the_start,
    drop_the_best_end,
    break_ties_backwards,
    draw_one_more,
    forget_the_phase_in_a_draw,
    shuffle_all_passes_alike,
    leave_out_the_neighbours,
    cut_bands_one_early,
    repeat_pass_by_pass,
]


def test_the_order_as_it_is_passes_every_check(sources: dict[str, Any]) -> None:
    for check in CHECKS:
        check(sources)


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_noticed(sources: dict[str, Any], plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    noticed = []
    for check in CHECKS:
        try:
            check(sources)
        except (AssertionError, IndexError, ValueError):
            noticed.append(check.__name__)
    assert noticed, plant.__doc__
