"""The entry point end to end, on the CPU platform: one process and two, unbroken and resumed, with a plan and without.

All runs train the same tiny model on the same 48 samples. The runs that must agree bit for bit use FP16 and the dynamic
loss scaler, started so high that the first steps overflow. Those that may round differently use FP32, where the
tolerance can be small; see `ROUNDING`.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kaiyuan.data import NUM_BANDS, CurriculumDataset, HeldOutDataset, Plan
from megatron_kaiyuan.monitoring.metrics_file import held_out_path, read_metrics
from megatron_kaiyuan.training.provider import spread_evenly
from tests.functional_tests.training_run import BATCH, STEPS, Finished, saved_tensors, train, train_well, write_corpus

HALF = ("--fp16", "--initial-loss-scale", str(2**20), "--hysteresis", "1")
SAVE_EVERY_THREE = ("--save-interval", "3")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")

ANOTHER_PHASE = """
  - name: after
    order: shuffled
    tokens: 256
    lr: {start: 5.0e-2, end: 5.0e-2, jump: true}
    sources: {plain: all}
"""

# A split run sums the same FP32 terms in another order. Each gradient is a sum of at most 256 tokens x 96 logits, so
# two orders differ by a few 2^-24 of the sum of magnitudes, here taken as 2^-19 of the gradient. Adam turns this into
# at most 2^-18 lr a weight and step; over three steps with lr <= 0.01 and 25 000 weights the weights differ by at most
# 3 * 2^-18 * 0.01 * sqrt(25 000) = 1.8e-5 in norm, and the loss by that times the gradient norm, below 2.
ROUNDING = 4e-5
# The same in FP16, whose unit is 2^-11 and not 2^-24, with gradients accumulated in FP16: at worst 2^-10 lr a weight.
HALF_ROUNDING = 2 * 3 * 2**-10 * 0.01 * 25_000**0.5


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def half(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """Six steps in FP16, checkpoints after three and six."""
    folder = tmp_path_factory.mktemp("half")
    return folder, train_well(folder, "--plan", str(plan), "--save", "saved", *SAVE_EVERY_THREE, *HALF)


@pytest.fixture(scope="module")
def single(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The same in FP32, with the distributed optimizer, whose checkpoints fit other numbers of ranks."""
    folder = tmp_path_factory.mktemp("single")
    return folder, train_well(folder, "--plan", str(plan), "--save", "saved", *SAVE_EVERY_THREE, *SHARDED)


def resume(folder: Path, plan: Path, origin: Path, *flags: str, processes: int = 1) -> Finished:
    """Continue after step 3 of the run in `origin`."""
    loaded = ("--plan", str(plan), "--load", str(origin / "saved"), "--ckpt-step", "3")
    return train_well(folder, *loaded, *flags, processes=processes)


def assert_same_tail(finished: Finished, unbroken: Finished, tolerance: float) -> None:
    """Loss and gradient norm of steps 4 to 6, and the rate exactly."""
    for name in ("lm loss", "grad-norm"):
        expected = {step: value for step, value in unbroken.logged(name).items() if step > 3}
        assert finished.logged(name) == pytest.approx(expected, rel=0, abs=tolerance), name
        assert len(expected) == 3
    rates = {step: rate for step, rate in unbroken.logged("learning-rate").items() if step > 3}
    assert finished.logged("learning-rate") == rates


def test_resuming_in_half_precision_repeats_the_unbroken_run_bit_for_bit(
    half: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    origin, unbroken = half
    finished = resume(tmp_path, plan, origin, "--save", "saved", *SAVE_EVERY_THREE, *HALF)
    assert_same_tail(finished, unbroken, tolerance=0)
    ours = saved_tensors(tmp_path / "saved" / "iter_0000006")
    theirs = saved_tensors(origin / "saved" / "iter_0000006")
    assert len(ours) > 20
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_first_steps_overflow_and_the_scaler_recovers(half: tuple[Path, Finished]) -> None:
    """What makes the test above worth something: it resumes a scaler that has acted."""
    scales = half[1].logged("loss-scale")
    assert scales[1] == 2**19
    assert scales[STEPS] < 2**20
    assert scales[STEPS] == scales[3]


def test_the_rate_follows_the_samples_through_overflowing_steps(half: tuple[Path, Finished], plan: Path) -> None:
    skipped = [step for step in range(1, STEPS + 1) if step not in half[1].logged("grad-norm")]
    assert skipped
    logged = half[1].logged("learning-rate")
    warm, decay = (phase.lr for phase in Plan.load(plan).phases)
    assert warm is not None
    assert decay is not None
    expected = {step: warm.start + (warm.end - warm.start) * (step - 1) / 3 for step in (1, 2, 3)}
    for step in (4, 5, 6):
        done = ((step - 4) / 3) ** 0.5
        expected[step] = decay.start * (1 - done) + decay.end * done
    for step in set(expected) - set(skipped):
        assert logged[step] == pytest.approx(expected[step], rel=1e-6), step


def test_a_half_precision_checkpoint_of_one_rank_resumes_on_two_tensor_parallel_ranks(
    half: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    finished = resume(tmp_path, plan, half[0], "--tensor-model-parallel-size", "2", *HALF, processes=2)
    assert_same_tail(finished, half[1], HALF_ROUNDING)


@pytest.mark.parametrize(
    "split",
    [
        ("--tensor-model-parallel-size", "2"),
        ("--pipeline-model-parallel-size", "2"),
        (),
    ],
    ids=["tensor", "pipeline", "data"],
)
def test_two_ranks_continue_as_one_rank_would(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path, split: tuple[str, ...]
) -> None:
    metrics = ("--kaiyuan-metrics", str(tmp_path / "saved" / "metrics.jsonl"))
    finished = resume(tmp_path, plan, single[0], *SHARDED, *split, *metrics, processes=2)
    assert_same_tail(finished, single[1], ROUNDING)
    assert_same_held_out(tmp_path, single[0])


def test_the_distributed_optimizer_resumes_from_its_default_format(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    optimizer = "--use-distributed-optimizer"
    train_well(tmp_path, "--plan", str(plan), "--save", "saved", *SAVE_EVERY_THREE, "--exit-interval", "3", optimizer)
    (tmp_path / "resumed").mkdir()
    assert_same_tail(resume(tmp_path / "resumed", plan, tmp_path, optimizer), single[1], tolerance=0)


def counted(folder: Path) -> list[tuple[int, dict[str, tuple[int, list[int]]]]]:
    """Tokens by source and band of each line of a run's metrics."""
    lines = read_metrics(folder / "saved" / "metrics.jsonl")
    return [
        (line["iteration"], {name: (sums["tokens"], sums["bands"]) for name, sums in line["sources"].items()})
        for line in lines
    ]


def expected_counts(plan: Path) -> list[tuple[int, dict[str, tuple[int, list[int]]]]]:
    """The same from the order of the samples alone."""
    order = CurriculumDataset(plan)
    names = list(order.plan.sources)
    expected = []
    for step in range(1, STEPS + 1):
        sums: dict[str, tuple[int, list[int]]] = {}
        for sample in range((step - 1) * BATCH, step * BATCH):
            name = names[order.source_index(sample)]
            tokens, bands = sums.get(name, (0, [0] * NUM_BANDS))
            more = order.band_tokens(sample).tolist()
            assert sum(more) in (0, order.plan.seq_length)
            sums[name] = tokens + order.plan.seq_length, [a + b for a, b in zip(bands, more, strict=True)]
        expected.append((step, sums))
    return expected


def test_tokens_are_counted_by_source_and_band_and_losses_add_up(single: tuple[Path, Finished], plan: Path) -> None:
    folder, finished = single
    assert counted(folder) == expected_counts(plan)
    for line in read_metrics(folder / "saved" / "metrics.jsonl"):
        parts = line["sources"].values()
        mean = sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)
        assert mean == pytest.approx(line["loss"], rel=1e-5)
    totals = finished.logged("source tokens/scored")
    assert totals[STEPS] == sum(sums["scored"][0] for _, sums in counted(folder) if "scored" in sums)
    assert "loss by source at step 6 (share of 256 tokens): " in finished.output
    scored = [(step, sums["scored"][1]) for step, sums in counted(folder) if "scored" in sums]
    assert scored
    for step, bands in scored:
        shares = " ".join(f"{band / sum(bands):.0%}" for band in bands)
        assert f"tokens by quantile band at step {step} (lowest scores first): scored {shares}" in finished.output


def test_each_step_is_logged_and_counted_once_whatever_is_skipped(plan: Path, tmp_path: Path) -> None:
    """The loss of the second line is its own, and a skipped step is in no line, though its samples are used up."""
    flags = ("--plan", str(plan), "--iterations-to-skip", "3", "4", "--kaiyuan-metrics", "saved/metrics.jsonl")
    finished = train_well(tmp_path, *flags)
    assert counted(tmp_path) == [line for line in expected_counts(plan) if line[0] not in (3, 4)]
    lines = read_metrics(tmp_path / "saved" / "metrics.jsonl")
    assert [(line["iteration"], line["tokens"], line["consumed_samples"]) for line in lines] == [
        (step, BATCH * 32, BATCH * step) for step in (1, 2, 5, 6)
    ]
    logged = re.findall(r" iteration +(\d+)/.* lm loss: (\S+) ", finished.output)
    assert {int(step): float(loss) for step, loss in logged} == pytest.approx(finished.logged("lm loss"), rel=1e-5)


def held_out_lines(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What each evaluation of a run wrote, by step."""
    lines = read_metrics(held_out_path(folder / "saved" / "metrics.jsonl"))
    return {line["iteration"]: line["sources"] for line in lines}


def assert_same_held_out(folder: Path, reference: Path) -> None:
    """The last evaluations of two runs: the same tokens, and losses equal to rounding."""
    found, expected = held_out_lines(folder)[STEPS], held_out_lines(reference)[STEPS]
    assert found.keys() == expected.keys()
    for name, source in expected.items():
        assert found[name]["band_tokens"] == source["band_tokens"]
        assert found[name]["loss"] == pytest.approx(source["loss"], abs=ROUNDING)


def expected_band_tokens(plan: Path) -> dict[str, list[int]]:
    """Held-out tokens by band that one evaluation, of one batch, sees; last those without a band."""
    windows = [HeldOutDataset(plan, name) for name in ("scored", "plain")]
    counts = {"scored": [0] * (NUM_BANDS + 1), "plain": [0] * (NUM_BANDS + 1)}
    for source, window in spread_evenly([len(one) for one in windows])[:BATCH].tolist():
        for band in windows[source].bands(window).tolist():
            counts[windows[source].source][band] += 1
    return counts


def test_held_out_losses_are_told_by_source_and_band(single: tuple[Path, Finished], plan: Path) -> None:
    folder, finished = single
    sources = held_out_lines(folder)[STEPS]
    counts = expected_band_tokens(plan)
    assert {name: [*found["band_tokens"], counts[name][-1]] for name, found in sources.items()} == counts
    scored = sources["scored"]
    pairs = zip(scored["bands"], scored["band_tokens"], strict=True)
    mean = sum(loss * tokens for loss, tokens in pairs if loss is not None) / scored["tokens"]
    assert scored["loss"] == pytest.approx(mean, rel=1e-9)
    total = sum(found["loss"] * found["tokens"] for found in sources.values())
    tokens = sum(found["tokens"] for found in sources.values())
    assert finished.logged("lm loss validation")[STEPS] == pytest.approx(total / tokens, rel=1e-6)
    assert finished.logged("held-out loss/scored")[STEPS] == pytest.approx(scored["loss"], rel=1e-6)
    assert "held-out loss at step 6 by source (by quantile band): scored " in finished.output


def test_a_full_validation_reads_each_window_once_on_two_tensor_parallel_ranks(plan: Path, tmp_path: Path) -> None:
    """Their number is no multiple of the batch, and the second rank loads none of them."""
    windows = {name: len(HeldOutDataset(plan, name)) for name in ("scored", "plain")}
    assert sum(windows.values()) % BATCH
    flags = ("--plan", str(plan), "--full-validation", "--tensor-model-parallel-size", "2", "--exit-interval", "1")
    metrics = ("--kaiyuan-metrics", str(tmp_path / "saved" / "metrics.jsonl"), "--eval-interval", "1")
    train_well(tmp_path, *flags, *metrics, processes=2)
    told = {name: source["tokens"] for name, source in held_out_lines(tmp_path)[1].items()}
    assert told == {name: number * 32 for name, number in windows.items()}


def test_fused_kernels_with_overlapped_gathers_on_two_ranks_train_as_one_unfused_rank(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    """The kernels read weights in their modules' place, so they have to wait for the gathers as the modules would."""
    origin, unbroken = single
    overlap = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000")
    fused = ("--kaiyuan-fusions", "norm,rotary,swiglu,loss")
    metrics = tmp_path / "saved" / "metrics.jsonl"
    arguments = (*SHARDED, *overlap, *fused, "--kaiyuan-metrics", str(metrics), "--kaiyuan-activation-interval", "5")
    finished = resume(tmp_path, plan, origin, *arguments, processes=2)
    assert_same_tail(finished, unbroken, tolerance=ROUNDING)
    assert counted(tmp_path) == [line for line in expected_counts(plan) if line[0] > 3]
    [metered] = [line for line in read_metrics(metrics) if "activations" in line]
    assert metered["iteration"] == 5
    assert_same_held_out(tmp_path, origin)
    assert list(metered["activations"])[:2] == ["embedding", "decoder.layers.0.self_attention.linear_qkv"]
    assert list(metered["activations"])[-1] == "output_layer"


def test_a_run_without_a_plan_trains_on_a_megatron_blend(plan: Path, tmp_path: Path) -> None:
    blend = (
        "--data-path",
        "0.3",
        str(plan.parent / "scored"),
        "0.7",
        str(plan.parent / "plain"),
        "--split",
        "80,10,10",
    )
    sizes = ("--seq-length", "32", "--max-position-embeddings", "32", "--train-iters", "2", "--lr", "1e-2")
    finished = train_well(tmp_path, *blend, *sizes, "--tokenizer-type", "NullTokenizer", "--data-cache-path", "cache")
    losses = finished.logged("lm loss")
    assert sorted(losses) == [1, 2]
    assert losses[1] == pytest.approx(4.6, abs=0.3)  # ln(96): the untrained model knows nothing
    assert "validation loss at iteration 2" in finished.output


def test_tokens_see_only_their_own_document_where_the_flags_ask_for_it(tmp_path: Path) -> None:
    """Documents of `scored` end in none of its windows: before the first update their loss stays what it was."""
    end_of_document = 90
    plan = write_corpus(tmp_path, longer=300, end=end_of_document)
    order = CurriculumDataset(plan)
    windows: dict[int, list[bool]] = {0: [], 1: []}
    for sample in range(BATCH):
        inputs = order[sample]["tokens"][:-2]  # a document that ends at the last input starts none in the window
        windows[order.source_index(sample)].append(end_of_document in inputs)
    assert sum(windows[0]) == 0
    assert windows[1] == [True]
    apart = ("--reset-attention-mask", "--reset-position-ids", "--null-tokenizer-eod-id", str(end_of_document))
    found = []
    for flags in ((), apart):
        metrics = tmp_path / f"metrics{len(flags)}.jsonl"
        train_well(tmp_path, "--plan", str(plan), "--exit-interval", "1", "--kaiyuan-metrics", str(metrics), *flags)
        found += [line["sources"] for line in read_metrics(metrics)]
    reference, first = found
    assert first["scored"]["tokens"] == reference["scored"]["tokens"] > 0
    assert first["scored"]["loss"] == pytest.approx(reference["scored"]["loss"], abs=ROUNDING)
    assert abs(first["plain"]["loss"] - reference["plain"]["loss"]) > 10 * ROUNDING


@pytest.mark.parametrize("fusions", ["none", "loss"])
def test_a_fatal_loss_names_the_layer_it_came_from(plan: Path, tmp_path: Path, fusions: str) -> None:
    """Of weights of this size the MLP's second product, of three of them, is the first beyond 3.4e38."""
    huge = ("--init-method-std", "3e17", "--kaiyuan-fusions", fusions)
    finished = train(tmp_path, "--plan", str(plan), *huge)
    assert finished.returncode != 0
    reason = "the first activation that is not finite is that of decoder.layers.0.mlp.linear_fc2"
    assert finished.output.count(f" the loss on rank 0 is nan: {reason}") == 1


def test_the_run_tells_which_defaults_it_changed(single: tuple[Path, Finished]) -> None:
    for line in (
        "> default from the plan: train_samples = 48",
        "> default from the plan: lr = 0.01",
        "> default from this platform (without CUDA): distributed_backend = gloo",
        "> the phases of the plan give the learning rate",
        "validation loss at iteration 6",
    ):
        assert line in single[1].output
    assert f"consumed samples: {STEPS * BATCH:12d}" in single[1].output


def test_a_plan_that_changes_consumed_samples_is_refused_before_training(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "plan.yaml"
    changed.write_text(plan.read_text().replace("seed: 7", "seed: 8"))
    finished = train(tmp_path, "--plan", str(changed), "--load", str(single[0] / "saved"), "--ckpt-step", "3")
    assert finished.returncode == 1
    assert "ResumeError: resume after 24 samples: seed was 7 and is now 8" in finished.output
    assert "Traceback" not in finished.output
    assert "building" not in finished.output


def test_a_vocabulary_padded_to_another_size_is_refused(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    more = ("--make-vocab-size-divisible-by", "64")
    finished = train(tmp_path, "--plan", str(plan), "--load", str(single[0] / "saved"), "--ckpt-step", "3", *more)
    assert finished.returncode == 1
    assert "padded to 96 ids, that of this run to 128" in finished.output
    assert "add --padded-vocab-size 96" in finished.output


def test_a_plan_with_another_phase_at_its_end_resumes_where_it_was(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "plan.yaml"
    longer.write_text(plan.read_text().replace("validation:", ANOTHER_PHASE + "validation:"))
    finished = resume(tmp_path, longer, single[0], *SHARDED)
    losses, rates = finished.logged("lm loss"), finished.logged("learning-rate")
    expected = single[1].logged("lm loss")
    assert {step: losses[step] for step in (4, 5, 6)} == {step: expected[step] for step in (4, 5, 6)}
    assert sorted(losses) == [4, 5, 6, 7]
    assert rates[7] == pytest.approx(0.05)


def test_a_checkpoint_of_a_plan_is_not_resumed_without_one(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path
) -> None:
    data = ("--data-path", str(plan.parent / "plain"), "--split", "80,10,10", "--tokenizer-type", "NullTokenizer")
    sizes = ("--seq-length", "32", "--max-position-embeddings", "32", "--train-samples", "48", "--lr", "1e-2")
    finished = train(tmp_path, *data, *sizes, "--load", str(single[0] / "saved"))
    assert finished.returncode == 1
    assert "48 samples were trained on with a plan, and this run has none" in finished.output
