"""A small multiple-choice task in lm-eval's own YAML format, made of held-out text: which words come next?"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

__all__ = ["TASK_NAME", "write_task"]

TASK_NAME = "next_words"
CONTEXT_WORDS, ANSWER_WORDS, CHOICES = 40, 8, 4

_TASK = """# Which words come next? Held-out docstrings; the wrong answers are the next words of other documents.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, texts: Sequence[str], items: int = 300) -> None:
    """Write `next_words.yaml` and its data.

    Args:
        folder: Made when missing.
        texts: Documents to ask about; those that are too short are left out.
        items: At most so many questions.
    """
    chance = random.Random(7)
    pieces = [words for text in texts if len(words := text.split()) >= CONTEXT_WORDS + ANSWER_WORDS][:items]
    context = [" ".join(words[:CONTEXT_WORDS]) for words in pieces]
    answers = [" ".join(words[CONTEXT_WORDS : CONTEXT_WORDS + ANSWER_WORDS]) for words in pieces]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{TASK_NAME}.jsonl"
    with data.open("w", encoding="utf-8") as stream:
        for number, answer in enumerate(answers):
            others = [other for other in range(len(answers)) if answers[other] != answer]
            choices = [answer, *(answers[other] for other in chance.sample(others, CHOICES - 1))]
            order = chance.sample(range(CHOICES), CHOICES)
            row = {
                "context": context[number],
                "choices": [choices[place] for place in order],
                "gold": order.index(0),
            }
            stream.write(json.dumps(row) + "\n")
    (folder / f"{TASK_NAME}.yaml").write_text(_TASK.format(name=TASK_NAME, data=data.resolve()), encoding="utf-8")
