"""What was given is what the run has, or Megatron's replacement is refused by name."""

import argparse

import pytest
import torch

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.replaced import refuse_replaced
from megatron_kaiyuan.flags.spelling import Spelling

FLAGS = {name: Spelling((f"--{name}",), None) for name in ("width", "dtype", "layers", "sequence_parallel", "size")}


def refuse(given: dict[str, object], **used: object) -> None:
    refuse_replaced(given.keys(), given, (argparse.Namespace(), argparse.Namespace(**used)), FLAGS)


@pytest.mark.parametrize(("given", "now"), [(2.0, 1.0), (True, False), ("a", "b"), (24, None)])
def test_a_value_that_megatron_replaces_is_refused(given: object, now: object) -> None:
    with pytest.raises(ConfigError, match=rf"^--width.*: Megatron replaces it by {now} with .*; leave it out, or") as e:
        refuse({"width": given, "size": 3}, width=now, size=3)
    assert "--size" not in str(e.value)


def test_a_value_in_other_words_passes() -> None:
    refuse({"dtype": "fp32", "layers": "4,0", "size": 2}, dtype=torch.float32, layers=(4, 0), size=2.0)
    refuse({"layers": 2}, layers=[0, 1])
    refuse({"sequence_parallel": True}, sequence_parallel=False)
    refuse({"width": 1})
    refuse({"width": 0, "size": -1}, width=None, size=None)
