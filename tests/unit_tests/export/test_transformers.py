"""What a user of transformers does with an exported folder, in a process that never saw this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.unit_tests.export.small_models import KAIYUAN, save_model

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.randint(40, (2, 9))
with torch.no_grad():
    whole = model(tokens, use_cache=False).logits
    cache, cached = None, []
    for place in range(9):
        step = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        cached.append(step.logits)
    last = model(tokens, logits_to_keep=1).logits
    eager = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], trust_remote_code=True, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    told = eager(tokens, output_attentions=True, output_hidden_states=True)
    # padded on the left: the same logits at the real tokens
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    shifted = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    ones = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    greedy = [model.generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=use, **ones)
              .tolist() for use in (True, False)]
    flat = {"do_sample": True, "temperature": 50.0, "top_k": 0}
    drawn = model.generate(tokens, max_new_tokens=40, min_new_tokens=40, **flat, **ones)
loss = model(tokens, labels=tokens).loss
loss.backward()
print(json.dumps({
    "cached": float((torch.cat(cached, 1) - whole).abs().max()),
    "last": float((last - whole[:, -1:]).abs().max()),
    "eager": float((told.logits - whole).abs().max()),
    "attentions": [list(weights.shape) for weights in told.attentions],
    "hidden_states": len(told.hidden_states),
    "padded": float((shifted - whole).abs().max()),
    "largest": float(whole.abs().max()),
    "greedy": greedy,
    "drawn": int(drawn.max()),
    "loss": float(loss.detach()),
    "expected_loss": float(torch.nn.functional.cross_entropy(whole[:, :-1].reshape(-1, 64), tokens[:, 1:].reshape(-1))),
    "without_gradient": [name for name, weight in model.named_parameters() if weight.grad is None],
    "text": tokenizer.decode([1, 2]),
    "eos": model.generation_config.eos_token_id,
    "ours": [name for name in sys.modules if name.split(".")[0] == "megatron_kaiyuan"],
}))
"""


def write_tokenizer(folder: Path, size: int) -> Path:
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("user")
    tokenizer = write_tokenizer(folder / "tokenizer", 50)
    export_checkpoint(save_model(KAIYUAN, folder / "run", torch.float32), folder / "hf", tokenizer=tokenizer)
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "hf")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


# FP64: logits of up to 30 from sums of a few hundred terms, most of the 2^-53 relative roundings of which cancel
TINY = 1e-11


@pytest.mark.parametrize("way", ["cached", "last", "eager", "padded"])
def test_every_way_to_the_logits_gives_the_same(outcome: dict[str, Any], way: str) -> None:
    assert 25 < outcome["largest"] <= 30
    assert outcome[way] < TINY


def test_generation_with_the_cache_is_generation_without(outcome: dict[str, Any]) -> None:
    with_cache, without = outcome["greedy"]
    assert with_cache == without
    assert len(with_cache[0]) == 21


def test_padding_of_the_vocabulary_is_never_drawn(outcome: dict[str, Any]) -> None:
    """64 rows, 50 ids: 80 draws, almost even at this temperature, would miss 14 rows in 1 of 10^8 cases."""
    assert outcome["drawn"] < 50


def test_the_loss_is_the_cross_entropy_and_reaches_every_weight(outcome: dict[str, Any]) -> None:
    assert outcome["loss"] == pytest.approx(outcome["expected_loss"], rel=1e-6)  # transformers takes it in FP32
    assert outcome["without_gradient"] == []


def test_states_and_attention_weights_are_told_when_asked_for(outcome: dict[str, Any]) -> None:
    assert outcome["hidden_states"] == KAIYUAN.shape.layers + 1
    assert outcome["attentions"] == [[2, 4, 9, 9]] * 2


def test_the_folder_stands_alone(outcome: dict[str, Any]) -> None:
    assert outcome["ours"] == []
    assert (outcome["text"], outcome["eos"]) == ("w1 w2", 0)
