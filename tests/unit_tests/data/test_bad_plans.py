"""Plan files that cannot be meant: each refused with the path of the field and a remedy."""

import copy

import numpy as np
import pytest
import yaml

from megatron_kaiyuan.commands import plan as plan_data
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import KaiyuanError, PlanError, ShardError
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_manifest, write_shard, write_source


@pytest.fixture
def spec(tmp_path):
    return plan_of(
        {
            "web": write_source(tmp_path / "web", numbered_documents([6] * 20), range(20)),
            "code": write_source(tmp_path / "code", numbered_documents([6] * 20)),
        },
        phase_of("shuffled", {"web": {"keep": "all"}, "code": {"keep": "all"}}),
    )


def with_field(spec, path, value):
    copied = copy.deepcopy(spec)
    *where, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = copied
    for part in where:
        place = place[part]
    place[last] = value
    return copied


# field: value, part of the message beside the field's path
WRONG_FIELDS = [
    ("sequence", 4, "unknown key; check its spelling"),
    ("phases.0.token", "1k", "unknown key"),
    ("phases.0.sources.web.keeps", "all", "unknown key"),
    ("sources.web.shard", "x", "unknown key"),
    ("seq_length", 0, "greater than 0 (given: 0)"),
    ("seq_length", "long", "(given: 'long')"),
    ("seed", -1, "greater than or equal to 0"),
    ("phases", [], "at least 1 item"),
    ("phases.0.order", "sorted", "'shuffled' or 'curriculum' (given: 'sorted')"),
    ("phases.0.tokens", "1e12", "write 120B, 1.5T, 300M or 120_000_000; 1e12 is 1T"),
    ("phases.0.tokens", "2.5e9", "2.5e9 is 2.5B"),
    ("phases.0.tokens", "_k", "'_k' is not a number of tokens"),
    ("phases.0.sources.web.weight", "30%", "weights are relative to each other, not shares; write 30 for all"),
    ("phases.0.sources.web.except", "random 5%", "except takes out a part by quality, such as top 1%"),
    ("phases.0.sources.web.from", "unsee", "'all' or 'unseen'"),
    ("sources.web.deny", " ", "empty"),
    ("version", 3, "Input should be 1 or 2 (given: 3)"),
    ("phases.0.sources.web.draw", " ", "names no draw; write draw: NAME"),
    ("phases.0.sources.web.draw", "rest of ", "names no draw; write draw: NAME"),
    ("phases.0.sources.web.repeat_order", "sorted", "'ranked' or 'passes'"),
    ("phases.0.sources.web.repeat_spacing", "0%", "a share of 0 is no part of the selection"),
    ("phases.0.sources.web.repeat_spacing", "5", "did you mean 5%?"),
    ("phases.0.tokens", "12 parsecs", "write 120B, 1.5T, 300M or 120_000_000"),
    ("phases.0.tokens", "1.0005k", "not a whole number of tokens"),
    ("phases.0.tokens", "_", "tokens"),
    ("phases.0.tokens", 0, "greater than 0"),
    ("phases.0.tokens", -5, "greater than 0"),
    ("phases.0.sources", {}, "at least 1 item"),
    ("phases.0.sources.web.keep", "top 30", "did you mean 30%?"),
    ("phases.0.sources.web.keep", 0.3, "write all, top 30%"),
    ("phases.0.sources.web.keep", {"kind": "band"}, "write all, top 30%"),
    ("phases.0.sources.web.keep", "band [40%, 20%)", "lower quantile is not below its upper one"),
    ("phases.0.sources.web.repeat", 0, "must be above 0, got 0.0; leave the source out"),
    ("phases.0.sources.web.repeat", -1.5, "must be above 0"),
    ("phases.0.sources.web.repeat", "often", "'often' is not a number"),
    ("phases.0.sources.web.repeat", True, "True is not a number"),
    ("phases.0.sources.web.repeat", ".inf", "is not a number"),
    ("phases.0.sources.web.repeat", float("nan"), "is not a number"),
    ("phases.0.sources.web.max_repeat", 0, "must be above 0"),
    ("phases.0.sources.web.repeat", 1.0e30, "more than 1,000,000 passes; give fewer (given: 1e+30)"),
    ("phases.0.sources.web.repeat", "1000001", "more than 1,000,000 passes"),
    ("phases.0.sources.web.repeat", "1e999999999", "too large or too small"),
    ("phases.0.sources.web.repeat", "0e-999_999_999", "too large or too small"),
    ("phases.0.sources.web.repeat", "-1" + 400 * "0", "too large or too small"),
    ("phases.0.sources.web.max_repeat", 1.0e30, "more than 1,000,000 passes"),
    ("phases.0.sources.web.weight", 1.0e-320, "too large or too small"),
    ("phases.0.sources.web.weight", "1/1" + 400 * "0", "too large or too small"),
    ("phases.0.sources.web.keep", "random 1e-999999999", "too large or too small"),
    ("phases.0.tokens", 1.0e30, "exceeded maximum size (given: 1e+30)"),
    ("phases.0.tokens", "9999999999T", "less than 4611686018427387904"),
    ("phases.0.lr", {"start": float("inf"), "end": float("inf")}, "finite number"),
    ("sources.web.score", "../x", "not the name of a score: it is a part of a file name, P.scores.NAME.npy"),
    ("sources.web.score", "a/b", "not the name of a score"),
    ("sources.web.score", "x\0", "not the name of a score"),
    ("sources.web.score", "", "empty; leave score: out where a source has no scores"),
    ("sources.web.shards", "", "empty; name a prefix, a directory or a glob (. is the working directory)"),
    ("sources.web.shards", [], "an empty list; name a prefix, a directory or a glob"),
    ("sources.web.shards", ["a", ""], "empty; name a prefix"),
    ("sources.web.shards", "a\0", "a path has no zero byte"),
    ("sources.web.shards", 5, "not a path; name a prefix, a directory or a glob"),
    ("sources.web.shards", ["a", 5], "not a path; name a prefix"),
    ("sources.web.rank_index", "", "empty; leave rank_index: out where the index lies beside the shards"),
    ("sources.web.domain", "", "at least 1 character"),
    ("phases.0.lr", {"start": 1e-3, "end": 1e-4}, "make them equal or name a shape"),
    ("phases.0.lr", {"start": 1e-3, "end": 1e-4, "shape": "wobbly"}, "'constant', 'linear', 'cosine'"),
    ("phases.0.lr", {"end": 1e-4}, "Field required"),
    ("phases.0.lr", {"start": -1, "end": 1}, "greater than"),
    ("validation", {"web": {"documents": 0}}, "greater than 0"),
    ("averaging", {"last": 8}, "Field required"),
    ("averaging", {"last": 8, "every": 4, "weights": "ema:2"}, "write mean, wma, ema:ALPHA"),
    ("averaging", {"last": 8, "every": 4, "weights": "ema:0.0"}, "ema:ALPHA with 0 < ALPHA <= 1"),
    ("averaging", {"last": 8, "every": 4, "weights": "median"}, "write mean, wma, ema:ALPHA"),
    ("tokenizer", {"type": "HuggingFaceTokenizer"}, "Field required"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_FIELDS, ids=lambda part: str(part)[:40])
def test_a_wrong_field_is_refused_by_its_path(spec, path, value, message):
    with pytest.raises(PlanError) as caught:
        Plan.from_spec(with_field(spec, path, value))
    assert path in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["seq_length", "sources", "phases"])
def test_a_missing_field_is_refused_by_its_path(spec, path):
    del spec[path]
    with pytest.raises(PlanError, match=f"{path}: Field required"):
        Plan.from_spec(spec)


def test_every_wrong_field_is_named_at_once(spec):
    spec = with_field(with_field(spec, "seq_length", 0), "phases.0.order", "sorted")
    with pytest.raises(PlanError, match=r"2 wrong fields\n  seq_length: .*\n  phases\.0\.order: "):
        Plan.from_spec(spec)


def broken(**changes):
    def apply(spec):
        for path, value in changes.items():
            spec = with_field(spec, path.replace("__", "."), value)
        return spec

    return apply


PLAN_ERRORS = {
    "unknown source": (
        broken(phases__0__sources={"wob": "all"}),
        r"phases\.0 \(main\)\.sources\.wob: no such source; known are web, code",
    ),
    "unknown held-out source": (broken(validation={"wob": {"documents": 1}}), r"validation\.wob: no such source"),
    "top of an unscored source": (
        broken(phases__0__sources__code="top 50%"),
        r"phases\.0 \(main\)\.sources\.code\.keep: top 50% needs scores, and sources\.code names none; add score:",
    ),
    "weights on some": (
        broken(phases__0__sources__web={"weight": 2}, phases__0__tokens=80),
        r"phases\.0.*web has a weight and code has none; give every source of the phase a weight, or none",
    ),
    "weights without budget": (
        broken(phases__0__sources={"web": {"weight": 2}}),
        r"phases\.0: weights need a token budget; add tokens:",
    ),
    "two phases of one name": (
        lambda spec: spec | {"phases": spec["phases"] * 2},
        r"phases\.1\.name: 'main' names an earlier phase too; names must differ",
    ),
    "nothing kept": (
        broken(phases__0__sources__web="random 1%"),
        r"phase 'main', source 'web': keep random 1% of 20 documents leaves 0 documents, 0 tokens.*keep more",
    ),
    "less than a window kept": (
        broken(phases__0__sources__web="top 5%", seq_length=6),
        r"source 'web': keep top 5% of 20 documents leaves 1 document, 6 tokens with repeat 1; one window needs 7",
    ),
    "budget below a window": (
        broken(phases__0__tokens=3),
        r"phase 'main': tokens 3 is less than one window of seq_length 4; raise it",
    ),
    "all held out": (
        broken(validation={"web": {"documents": 20}}),
        r"validation\.web\.documents: 20 to be held out of 20 documents leaves none to train on; hold out fewer",
    ),
    "more than all held out": (broken(validation={"web": {"documents": 21}}), "hold out fewer"),
    "budget above the streams": (
        broken(phases__0__tokens=1000),
        r"phase 'main': tokens 1,000 asks source 'web' for 500 tokens, its selection x1 has 116: that is 4\.175 passes",
    ),
}


@pytest.mark.parametrize("name", PLAN_ERRORS)
def test_a_plan_that_cannot_be_met_is_refused_with_a_remedy(spec, name):
    change, message = PLAN_ERRORS[name]
    with pytest.raises(PlanError, match=message):
        Plan.from_spec(change(spec))


FILES = {
    "duplicate key": ("seq_length: 4\nseq_length: 8\n", "the key 'seq_length' occurs twice"),
    "not YAML": ("seq_length: [4\n", "not YAML"),
    "a tab": ("seq_length:\n\t4\n", "not YAML"),
    "a template": ("seq_length: {{ length }}\n", "a key is a dict; keys are names"),
    "a list": ("- seq_length\n", "a plan is a mapping with seq_length, sources and phases, got list"),
    "empty": ("", "got NoneType"),
    "no date": ("seq_length: 2024-13-45\n", "not YAML: month must be in 1..12"),
    "no time stamp": ("seq_length: !!timestamp x\n", "not YAML"),
    "no truth": ("seq_length: !!bool x\n", "not YAML"),
    "no number": ("seq_length: !!int x\n", "not YAML"),
    "nothing as a number": ("seq_length: !!int ''\n", "not YAML"),
    "lists in lists": ("a: " + 3000 * "[" + 3000 * "]", "not YAML"),
    "python object": ("!!python/object/apply:os.getcwd []\n", "not YAML"),
    "unquoted band in braces": ("keep: {web: {keep: band [20%, 40%)}}\n", "not YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, name):
    text, message = FILES[name]
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "plan.yaml")
    assert str(tmp_path / "plan.yaml") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"a: \x00"])
def test_a_binary_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.yaml: not YAML"):
        Plan.load(tmp_path / "plan.yaml")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(PlanError, match=r"no\.yaml: cannot be read \(No such file or directory\)"):
        Plan.load(tmp_path / "no.yaml")
    with pytest.raises(PlanError, match=r"cannot be read \(Is a directory\)"):
        Plan.load(tmp_path)


def test_anchors_and_merges_of_yaml_may_be_used(spec, tmp_path):
    text = yaml.safe_dump({key: spec[key] for key in ("seq_length", "sources")})
    text += "phases:\n- &base\n  name: a\n  order: shuffled\n  sources: {web: all}\n- {<<: *base, name: b}\n"
    (tmp_path / "plan.yaml").write_text(text)
    assert [phase.name for phase in Plan.load(tmp_path / "plan.yaml").phases] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "tokens"), [("80", 80), ("0.08k", 80), ("8_0", 80), ("0.1K", 100), (100.0, 100), ("0.0001 M", 100)]
)
def test_token_counts_may_have_units(spec, text, tokens):
    plan = Plan.from_spec(with_field(spec, "phases.0.tokens", text))
    assert plan.phases[0].spec.tokens == tokens
    assert plan.num_samples == tokens // 4


def test_a_part_may_be_written_as_its_selection_alone(spec):
    long = Plan.from_spec(with_field(spec, "phases.0.sources.web", {"keep": "top 50%", "repeat": 1}))
    assert Plan.from_spec(with_field(spec, "phases.0.sources.web", "top 50%")).fingerprint == long.fingerprint
    nothing = with_field(spec, "phases.0.sources.web", None)
    assert Plan.from_spec(nothing).fingerprint == Plan.from_spec(spec).fingerprint


def test_every_error_is_of_the_named_base_class_and_has_no_numpy_in_its_words():
    assert issubclass(PlanError, KaiyuanError)
    assert "np." not in str(PlanError(f"{np.int64(3)}"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"max_repeat": 0.5}, "max_repeat 0.5 is below repeat 1"),
        ({"repeat": 2.5, "max_repeat": "7/3"}, "max_repeat 2.333 is below repeat 2.5"),
    ],
)
def test_a_limit_below_the_repetition_itself_is_refused(spec, part, message):
    with pytest.raises(PlanError) as caught:
        Plan.from_spec(with_field(spec, "phases.0.sources.web", part))
    assert f"phases.0.sources.web: {message}" in str(caught.value)
    equal = Plan.from_spec(with_field(spec, "phases.0.sources.web", part | {"max_repeat": part.get("repeat", 1)}))
    assert equal.num_samples > 0


def test_weights_and_repetitions_far_apart_are_exact_or_refused(spec):
    """Each was an error of Python's own at another place."""
    for weight in ("1e-100", "1e100", "1e-30"):
        parts = {"web": {"weight": weight}, "code": {"weight": weight, "max_repeat": 1_000_000}}
        assert Plan.from_spec(with_field(with_field(spec, "phases.0.sources", parts), "phases.0.tokens", 80)).phases[
            0
        ].used.tolist() == [10, 10]
        parts["code"]["weight"] = 1
        with pytest.raises(PlanError, match=r"too small to show it even once|passes\. Lower"):
            Plan.from_spec(with_field(with_field(spec, "phases.0.sources", parts), "phases.0.tokens", 80))
    most = Plan.from_spec(with_field(spec, "phases.0.sources.web", {"repeat": 1_000_000}))
    assert most.phases[0].streams["web"].num_tokens == 120_000_000


def test_a_phase_of_too_many_samples_to_be_ordered_exactly_is_refused(spec):
    for name in ("web", "code"):
        spec["sources"][name] |= {"expected": {"documents": "1B", "tokens": "1000000T"}}
    with pytest.raises(PlanError, match=r"phase 'main': 2,000,000,000,000,000,000 tokens .*at most 35,184,372,088,832"):
        Plan.from_spec(spec, simulate=True)
    parts = {"web": {"repeat": 1_000_000}, "code": "all"}
    with pytest.raises(PlanError, match=r"phase 'main': .* tokens .*lower repeat"):
        Plan.from_spec(with_field(spec, "phases.0.sources", parts) | {"seq_length": 1 << 40}, simulate=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"draw": "dev"}, "draw dev names a random part, and keep is all; write keep: random 30%"),
        ({"keep": "random 5%", "draw": "rest of dev"}, "draw rest of dev names its documents already; leave out keep"),
        ({"draw": "rest of dev"}, r"sources.web.draw: no part of web has draw: dev; .*\(draws of web: none\)"),
        ({"repeat_order": "passes"}, "sources.web.repeat_order: only for a scored source in a curriculum"),
        ({"repeat_spacing": "1%"}, "sources.web.repeat_spacing: only for a scored source in a curriculum"),
        ({"repeat_order": "passes", "repeat_spacing": "1%"}, "leave it out with repeat_order: passes"),
    ],
)
def test_draws_and_repetitions_that_do_nothing_are_refused(spec, part, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_spec(with_field(spec, "phases.0.sources.web", part))


def test_the_rest_of_a_draw_of_two_sizes_is_refused(spec):
    sizes = [phase_of("shuffled", {"web": {"keep": f"random {n}%", "draw": "dev"}}, f"p{n}") for n in (20, 50)]
    rest = phase_of("shuffled", {"web": {"draw": "rest of dev"}}, "rest")
    with pytest.raises(PlanError, match=r"phases.2 \(rest\).*kept as random 20% and as random 50%, so its rest is not"):
        Plan.from_spec(spec | {"phases": [*sizes, rest]})
    Plan.from_spec(spec | {"phases": [sizes[0], rest]})


def test_the_dry_run_refuses_what_a_run_would(tmp_path, monkeypatch, capsys):
    """Held-out documents shorter than a window, ids outside the vocabulary, a batch larger than the plan."""
    prefix = write_shard(tmp_path / "s", numbered_documents([5] * 9))
    spec = plan_of({"s": {"shards": prefix}}, phase_of("shuffled", {"s": "all"}), validation={"s": {"documents": 1}})
    with pytest.raises(PlanError, match=r"validation\.s: 1 held-out document with 5 tokens, one window needs 6"):
        Plan.from_spec(spec | {"seq_length": 5})
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(spec))
    monkeypatch.setattr("sys.argv", ["plan_data", str(path), "--global-batch-size", "100"])
    with pytest.raises(PlanError, match="--global-batch-size 100: the plan has only"):
        plan_data.main()
    write_manifest(prefix, max_token_id=44, tokenizer={"vocab_size": 44})
    monkeypatch.setattr("sys.argv", ["plan_data", str(path)])
    with pytest.raises(ShardError, match=r"token id 44, but the vocabulary has 44 ids; .*has gaps"):
        plan_data.main()
    write_manifest(prefix, max_token_id=44, tokenizer={"vocab_size": 45})
    plan_data.main()
    assert "1 document held out" in capsys.readouterr().out
