"""From calls to flat tensors and back."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fuser.frontend.calls import flatten_call
from fuser.ir.errors import CaptureError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
Named = collections.namedtuple("Named", "a b")


def key(*args: Any, **kwargs: Any) -> Any:
    return flatten_call(args, kwargs).key


def test_calls_are_taken_apart_and_put_together() -> None:
    call = flatten_call((X, [1, X[0]]), {"mask": None, "named": Named(X[1], 2.0)})
    assert [tuple(t.shape) for t in call.tensors] == [(2, 8), (8,), (8,)]
    args, kwargs = call.unflatten([10, 20, 30])
    assert args == (10, [1, 20])
    assert kwargs == {"mask": None, "named": Named(30, 2.0)}


def test_calls_that_may_share_a_program_have_one_key() -> None:
    assert key(X) == key(X + 1) == key(X.clone().requires_grad_()) == key(torch.zeros(3, 8)[1:])
    # Slices of buffers of any size are alike.
    assert key(torch.zeros(2, 9)[:, :8]) == key(torch.zeros(2, 100)[:, 5:13]) == key(torch.zeros(4, 8)[::2])
    assert hash(key(X, a=1.5)) == hash(key(X, a=1.5))
    assert key(X, float("nan")) == key(X, float("nan"))
    different = [
        key(X),
        key(X[:1]),
        key(X[0]),
        key(X.double()),
        key(x=X),
        key(X, 1),
        key(X, 1.0),
        key(X, True),
        key(X, None),
        key(X, 0.0),
        key(X, -0.0),
        key(X, "1"),
        key(X, X),
        key(X, X.clone()),
        key(torch.randn(8, 2).t()),
        key(torch.randn(2, 16)[:, ::2]),
        key(torch.randn(2, 9)[:, :8]),
        key(torch.randn(1, 8).expand(2, 8)),
        key([X]),
        key((X,)),
        key({"x": X}),
    ]
    assert len(set(different)) == len(different)


def test_arguments_that_nothing_is_known_about_are_refused() -> None:
    with pytest.raises(CaptureError, match="an argument is a object"):
        flatten_call((X, object()), {})


PLAIN = st.sampled_from([X, nn.Parameter(X), True, 2, -0.5, "text", None])


@given(st.lists(PLAIN, max_size=4), st.dictionaries(st.sampled_from("dcbaz"), PLAIN))
def test_calls_without_containers_are_what_pytorch_makes_of_them(args: list[Any], kwargs: dict[str, Any]) -> None:
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    call = flatten_call(tuple(args), kwargs)
    assert call.spec == spec and hash(call.spec) == hash(spec)
    assert all(a is b for a, b in zip(call.tensors, (x for x in leaves if isinstance(x, Tensor)), strict=True))
    again_args, again_kwargs = call.unflatten(call.tensors)
    assert len(again_args) == len(args) and all(a is b for a, b in zip(again_args, args, strict=True))
    assert list(again_kwargs) == list(kwargs) and all(again_kwargs[name] is kwargs[name] for name in kwargs)
