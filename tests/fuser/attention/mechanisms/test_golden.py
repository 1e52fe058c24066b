"""Every mechanism gives the numbers of the library that it has its names from, with that library's weights.

``tests/golden/efficient_attention.json`` lists the cases: arguments, and the names of tensors in the file beside it.
They were made by the library itself in float64, one entry of a batch each; outputs are the first 16 of 48 channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fuser.attention import build, names

GOLDEN = Path(__file__).parents[3] / "golden"
CASES = json.loads((GOLDEN / "efficient_attention.json").read_text())
TENSORS = load_file(GOLDEN / "efficient_attention.safetensors")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_numbers_are_those_of_the_reference(case: dict[str, Any]) -> None:
    given = {name: TENSORS[key] for name, key in case["tensors"].items()}
    module = build(case["mechanism"], **case["arguments"]).double().eval()
    module.load_state_dict({name.removeprefix("state."): t for name, t in given.items() if name.startswith("state.")})
    x, padding = given["input"], given.get("key_padding_mask")
    with torch.no_grad():
        out = module(x, x, x, padding)[0] if case["mechanism"] == "causal_eva" else module(x, padding)
    # The reference computes the sums of linear attention in fp32, whatever it is given.
    tolerance = 1e-6 if case["mechanism"] == "performer" else 1e-9
    error = (out[..., :16] - given["output"]).norm() / given["output"].norm()
    assert error < tolerance


def test_there_is_golden_data_of_every_mechanism() -> None:
    assert {case["mechanism"] for case in CASES} == set(names())
    assert len(CASES) == 35
