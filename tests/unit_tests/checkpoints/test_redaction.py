"""A command keeps what makes the run again and loses what opens somebody's account."""

import argparse
import shlex
import sys
import warnings

import pytest

from megatron_kaiyuan.checkpoints.redaction import hide_folders, hide_secrets, redact, without_places

KEY = "s3cr3t-" + "v4lu3"


@pytest.mark.parametrize(
    "words",
    [
        ["--wandb-api-key", KEY],
        [f"--wandb-api-key={KEY}"],
        ["--hf_token", KEY, "other-" + KEY],
        [f"--apiKey={KEY}"],
        ["--db-password", KEY],
        ["--client-secret-id", KEY],
        ["--auth-header", KEY],
        ["--private-key", KEY],
        [f"WANDB_API_KEY={KEY}"],
        [f"HF_TOKEN='{KEY}'"],
        [f"--env=AWS_SECRET_ACCESS_KEY={KEY}"],
        ["--header", f"Authorization: Bearer {KEY}"],
        ["--settings", f'{{"password": "{KEY}", "depth": 2}}'],
        ["--plan", f"https://somebody:{KEY}@example.org/plan.yaml"],
        ["--proxy", f"http://{KEY}@example.org:8080"],
        [f"--plan=https://example.org/plan?sig={KEY}&part=3"],
        ["--plan", f"s3://bucket/plan?X-Amz-Credential={KEY}"],
    ],
    ids=lambda words: words[0].partition("=")[0],
)
def test_a_secret_goes_wherever_it_stands(words: list[str]) -> None:
    assert KEY in shlex.join(words)
    shown = shlex.join(redact(["--lr", "0.1", *words, "--bf16"]))
    assert KEY not in shown
    assert shown.startswith("--lr 0.1 ")
    assert shown.endswith(" --bf16")


@pytest.mark.parametrize(
    "key",
    [
        "hf_" + "a1" * 17,
        "sk-proj-" + "b2" * 12,
        "ghp_" + "c3" * 18,
        "glpat-" + "d4" * 10,
        "AKIA" + "E5" * 8,
        "0f" * 20,
        "eyJ" + "f6" * 9 + ".payload.signature",
    ],
)
def test_a_key_of_a_known_form_goes_under_any_name(key: str) -> None:
    assert key not in hide_secrets(f"note {key}, end")


def test_no_flag_of_training_is_taken_for_a_secret() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments

    from megatron_kaiyuan.arguments import add_kaiyuan_arguments

    parser = add_kaiyuan_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    assert len(flags) > 500
    hidden = [flag for flag in flags if redact([flag, "value"]) != [flag, "value"]]
    assert hidden == []


def test_what_makes_the_run_again_stays() -> None:
    words = shlex.split(
        "--tokenizer-model tokenizers/qwen2 --moe-token-dispatcher-type alltoall --json-keys text --lr 3.0e-3 "
        "--plan plans/a:b=c.yaml --password-file secrets.txt --train-samples 1000"
    )
    assert redact(words) == words
    assert without_places(words) == words


def test_folders_hosts_and_accounts_of_the_machine_are_not_shown() -> None:
    words = ["--plan", "/data/somebody/my plans/plan.yaml", "--save=~somebody/runs/7", "--master-addr", "node7.example"]
    words += ["--wandb-entity", "somebody", "--wandb-host=https://node7.example/x", "--url", "https://node7.example/x"]
    shown = without_places(words)
    assert shown[:5] == ["--plan", ".../plan.yaml", "--save=.../7", "--master-addr", "..."]
    assert shown[5:] == ["--wandb-entity", "...", "--wandb-host=...", "--url", "https://.../x"]


def test_folders_in_a_sentence_are_not_shown_and_addresses_and_fractions_stay() -> None:
    text = "the plan /data/somebody/plan.yaml (of ~/runs/a) cannot be read; see https://example.org/a/b, 3/4 and a/b"
    shown = "the plan .../plan.yaml (of .../a) cannot be read; see https://example.org/a/b, 3/4 and a/b"
    assert hide_folders(text) == shown


def test_a_run_records_the_commands_of_all_its_starts_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_kaiyuan.checkpoints.lineage import commands_of, store_start

    first, resumed = argparse.Namespace(), argparse.Namespace()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--lr", "0.1", "--wandb-api-key", KEY])
    store_start(first, None, "one")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--lr", "0.2", f"HF_TOKEN={KEY}"])
    first.iteration = 20
    store_start(resumed, first, "two")
    assert KEY not in repr(vars(first)) + repr(vars(resumed))
    told = [(iteration, command) for iteration, _, command in commands_of(resumed)]
    assert told == [(0, "--lr 0.1 --wandb-api-key '***'"), (20, "--lr 0.2 'HF_TOKEN=***'")]


def test_commands_that_an_earlier_version_did_not_record_are_unknown() -> None:
    from megatron_kaiyuan.checkpoints.lineage import CODE, COMMAND, STARTS, commands_of

    saved = argparse.Namespace(**{STARTS: [[0, "a"], [20, "b"]], CODE: "0.1", COMMAND: "--lr 0.2"})
    assert commands_of(saved) == [[0, None, None], [20, "0.1", "--lr 0.2"]]
    assert commands_of(argparse.Namespace()) == [[None, None, None]]
