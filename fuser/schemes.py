"""Fusion schemes in the 16-bit encoding of AToffer (SC'24), as schemes of this compiler.

AToffer sees a BERT layer as a chain of 15 operators. Bit 0 of its integers, the most significant, asks for the
handwritten attention kernel; bits 1 to 15 stand for the operators, and every maximal run of two or more equal bits is
a *segment*, operators fused into one kernel. The attention bit acts only when (2, 6) is a segment, which leaves 16,640
programs among the 65,536 integers.
"""

from __future__ import annotations

import functools
import itertools
import operator as python_operator
import re
from collections.abc import Sequence

import torch

from fuser.ir import expression as ex
from fuser.ir.errors import SchemeError
from fuser.ir.expression import Op
from fuser.ir.graph import Constant, Operator, OperatorGraph, Region, TensorSpec
from fuser.ir.operators import (
    PV,
    QK,
    Activation,
    AdditiveMask,
    Bias,
    Gemm,
    Norm,
    Ref,
    Residual,
    Scale,
    ScoreMask,
    Semantics,
    Softmax,
    TorchCall,
    View,
)
from fuser.ir.scheme import Scheme

__all__ = ["ATOFFER_OPERATORS", "bert_layer", "from_atoffer"]

ATOFFER_OPERATORS = (
    "gemm0",
    "bias0",
    "QK",
    "mask",
    "softmax",
    "PV",
    "transpose",
    "gemm1",
    "bias1+residual",
    "layernorm1",
    "gemm2",
    "bias2+GELU",
    "gemm3",
    "bias3+residual",
    "layernorm2",
)

_LETTERS: tuple[tuple[type[Semantics], str], ...] = (
    (Gemm, "g"),
    (Bias, "b"),
    (QK, "q"),
    (Scale, "s"),
    (ScoreMask, "m"),
    (Softmax, "x"),
    (PV, "p"),
    (Residual, "r"),
    (Norm, "n"),
    (Activation, "a"),
)
# Group names end in the number of AToffer's operator; its number 6, the transpose, is a free view here. Projections
# come as one GEMM or as three, each with its bias.
_ATTENTION = r"(?P<in0>(?:gb?){1,3})(?P<_2>s?qs?)(?P<_3>m*)(?P<_4>x)(?P<_5>p)(?P<_7>g)(?P<_8>b?r)(?P<_9>n)"
_FEED_FORWARD = r"(?P<_10>g)(?P<_11>b?a)(?P<_12>g)(?P<_13>b?r)(?P<_14>n)"
_LAYER = re.compile(f"(?=.)(?:{_ATTENTION})?(?:{_FEED_FORWARD})?")


def from_atoffer(value: int, region: Region | None = None) -> tuple[bool, list[tuple[int, int]], Scheme]:
    """Decode one of AToffer's integers: its attention bit, its segments (first, last) and the scheme they are.

    The scheme is for ``region``: a BERT layer, its attention half or its feed-forward half, operators in AToffer's
    order; :func:`bert_layer` when not given. Where one operator of AToffer is several here (QK includes the scale,
    bias1 the residual, bias2 the GELU) these stay together. The transpose is a free view here: a segment that ends or
    starts with it is one without it, and PV and gemm1 share a kernel exactly when one segment holds 5 to 7. The
    attention bit chooses a kernel, not a scheme, and acts only when (2, 6) is a segment. Bits are as written; a
    segment that no kernel runs is repaired by :func:`fuser.ir.scheme.canonical`.

    Raises SchemeError when ``value`` is not in 0 … 65535 or ``region`` is not a BERT layer or half of one.
    """
    value = python_operator.index(value)
    if not 0 <= value < 1 << 16:
        raise SchemeError(f"an AToffer scheme is an integer from 0 to 65535, not {value}")
    bits = f"{value:016b}"
    segments = _segments(bits[1:])
    region = bert_layer() if region is None else region
    owner = list(range(len(ATOFFER_OPERATORS)))
    for first, last in segments:
        owner[first : last + 1] = [first] * (last + 1 - first)
    at = [owner[number] for number in _numbers(region)]
    return bits[0] == "1", segments, Scheme(region.hash, tuple(at[a] == at[b] for a, b in region.edges))


def _segments(bits: str) -> list[tuple[int, int]]:
    """(first, last) of the maximal runs of two or more equal characters."""
    runs = [list(run) for _, run in itertools.groupby(range(len(bits)), key=bits.__getitem__)]
    return [(run[0], run[-1]) for run in runs if len(run) > 1]


def _numbers(region: Region) -> list[int]:
    """For every operator of ``region`` the number of the operator of AToffer that it belongs to."""
    found = _LAYER.fullmatch("".join(map(_letter, region.operators)))
    if found is None:
        kinds = ", ".join(op.kind for op in region.operators)
        raise SchemeError(
            f"AToffer's schemes are for a BERT layer ({', '.join(ATOFFER_OPERATORS)}), its attention half or its "
            f"feed-forward half; this region is {kinds}"
        )
    numbers = [0 if letter == "g" else 1 for letter in found["in0"] or ""]
    for name, text in found.groupdict().items():
        if name != "in0":
            numbers += [int(name[1:])] * len(text or "")
    return numbers


def _letter(op: Operator) -> str:
    return next((letter for kind, letter in _LETTERS if isinstance(op.semantics, kind)), "?")


@functools.cache
def bert_layer(batch: int = 1, sequence: int = 128, hidden: int = 768, heads: int = 12, inner: int = 3072) -> Region:
    """AToffer's encoder layer as one region, BERT-base by default: fp32, one merged projection, run-time mask."""
    layer = _Layer(batch, sequence, hidden)
    width = hidden // heads
    qkv = layer.linear("0", "x", hidden, 3 * hidden)
    q, k, v = (
        layer.view(name, qkv, (batch, heads, sequence, width), (sequence * 3 * hidden, width, 3 * hidden, 1), i)
        for i, name in zip((0, hidden, 2 * hidden), "qkv", strict=True)
    )
    scores = (batch, heads, sequence, sequence)
    s = layer.add("qk", QK(), (q, k), scores)
    s = layer.add("scale", Scale(width**-0.5), (s,), scores)
    s = layer.add("mask", AdditiveMask(), (s, "padding"), scores)
    p = layer.add("softmax", Softmax(masked=False), (s,), scores)
    strides = (sequence * hidden, width, hidden, 1)
    o = layer.add("pv", PV(), (p, v), (batch, heads, sequence, width), strides=strides)
    merged = layer.view("merged", o, (batch, sequence, hidden), (sequence * hidden, hidden, 1), 0)
    y = layer.normalized("1", layer.linear("1", merged, hidden, hidden), "x")
    up = layer.linear("2", y, hidden, inner)
    up = layer.add("gelu", Activation(ex.unary(Op.GELU)), (up,), (batch, sequence, inner))
    out = layer.normalized("2", layer.linear("3", up, inner, hidden), y)
    graph = OperatorGraph(
        tuple(layer.operators), layer.values, ("x", "padding"), (out,), {c: Constant(c) for c in layer.constants}
    )
    return Region(graph, graph.compute)


class _Layer:
    """Collects the operators and values of :func:`bert_layer`."""

    def __init__(self, batch: int, sequence: int, hidden: int) -> None:
        self.rows = (batch, sequence)
        self.operators: list[Operator] = []
        self.constants: list[str] = []
        self.values = {
            "x": TensorSpec.contiguous((*self.rows, hidden), torch.float32),
            "padding": TensorSpec.contiguous((batch, 1, 1, sequence), torch.float32),
        }

    def constant(self, name: str, *shape: int) -> str:
        self.values[name] = TensorSpec.contiguous(shape, torch.float32)
        self.constants.append(name)
        return name

    def add(
        self,
        name: str,
        semantics: Semantics,
        inputs: tuple[str, ...],
        shape: Sequence[int],
        strides: tuple[int, ...] | None = None,
    ) -> str:
        spec = TensorSpec.contiguous(shape, torch.float32)
        self.values[name] = spec if strides is None else TensorSpec(spec.shape, spec.dtype, strides)
        self.operators.append(Operator(name, semantics, inputs, (name,)))
        return name

    def view(self, name: str, base: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> str:
        self.values[name] = TensorSpec(shape, torch.float32, strides, base, offset)
        call = TorchCall(torch.as_strided, (Ref(0), shape, strides, offset))
        self.operators.append(Operator(f"view_{name}", View(call), (base,), (name,)))
        return name

    def linear(self, number: str, x: str, k: int, n: int) -> str:
        weight, bias = self.constant(f"weight{number}", n, k), self.constant(f"offset{number}", n)
        product = self.add(f"gemm{number}", Gemm(transposed=True), (x, weight), (*self.rows, n))
        return self.add(f"bias{number}", Bias(), (product, bias), (*self.rows, n))

    def normalized(self, number: str, x: str, residual: str) -> str:
        shape = self.values[x].shape
        total = self.add(f"residual{number}", Residual(), (x, residual), shape)
        gain, shift = self.constant(f"gain{number}", shape[-1]), self.constant(f"shift{number}", shape[-1])
        return self.add(f"norm{number}", Norm(ex.layer_norm(1e-12)), (total, gain, shift), shape)
