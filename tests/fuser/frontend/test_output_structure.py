"""From outputs to flat tensors and back."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.frontend.output_structure import flatten_output
from fuser.ir.errors import CaptureError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Pair:
    first: Any
    second: Any


Named = collections.namedtuple("Named", "a b")

LEAVES = st.one_of(
    st.builds(lambda n: torch.full((n,), float(n)), st.integers(0, 3)),
    st.sampled_from([None, 1, 2.5, "text", True, torch.float32, 1j]),
)
OUTPUTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Named, inner, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


def alike(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return a is b
    if isinstance(b, Pair):
        return isinstance(a, Pair) and alike(a.first, b.first) and alike(a.second, b.second)
    if isinstance(b, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=200, deadline=None, derandomize=True)
@given(OUTPUTS)
def test_outputs_are_rebuilt_from_their_tensors(output: Any) -> None:
    tensors, spec = flatten_output(output)
    assert all(isinstance(t, Tensor) for t in tensors)
    assert alike(spec.build(tensors), output)


def test_outputs_that_hide_tensors_are_refused() -> None:
    with pytest.raises(CaptureError, match="returns a object"):
        flatten_output([X, object()])
