"""Text of others stays text: in a cell, in back-ticks, in a fence, and without the folders of the machine."""

import pytest

from megatron_kaiyuan.release.markdown import address, bash, cell, code
from megatron_kaiyuan.release.publishing import published, published_file_settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b\nc", r"a\|b c"),
        ("<b>`x`</b>", r"\<b\>\`x\`\</b\>"),
        ("[x](http://y)", r"\[x\](http\://y)"),
        ("www.example.org", r"www\.example.org"),
        ("# head", r"\# head"),
        ("1. one", r"1\. one"),
        ("- one", r"\- one"),
        ("0.1.0 (commit 12)", "0.1.0 (commit 12)"),
        (None, "unknown"),
        ([], "none"),
    ],
)
def test_markup_is_shown_as_it_was_typed(text: object, shown: str) -> None:
    assert cell(text) == shown


def test_back_ticks_and_links_hold_only_what_cannot_leave_them() -> None:
    assert (code("qwen3"), code("a`b|c")) == ("`qwen3`", r"a\`b\|c")
    assert address("https://example.org/a?b=c") == "<https://example.org/a?b=c>"
    assert address("https://example.org/> <b>") == r"https\://example.org/\> \<b\>"


def test_a_fence_is_longer_than_what_it_holds_and_a_word_is_one_line() -> None:
    assert bash([["python", "a\n```\nb"]]) == "````bash\npython $'a\\n```\\nb'\n````"


def test_no_text_of_the_facts_names_a_folder_and_no_setting_a_place() -> None:
    facts = {"tokenizer": {"model": "/data/somebody/qwen2"}, "lines": ["see /data/somebody/x", "HF_TOKEN=abc"]}
    assert published(facts) == {"tokenizer": {"model": ".../qwen2"}, "lines": ["see .../x", "HF_TOKEN=***"]}
    settings = {"name_or_path": "/data/somebody/qwen2", "eos_token": "</s>", "tokenizer_class": "T"}
    assert published_file_settings(settings) == {"eos_token": "</s>", "tokenizer_class": "T"}
