"""Random modules: programs of views, casts, elementwise operators, norms, products, attention, writes in place,
branches and outputs that share memory; a seed gives always the same one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH, WIDTH, HEADS = 2, 6, 16, 2


class RandomModule(nn.Module):
    """The program of ``seed``: takes two inputs (BATCH, LENGTH, WIDTH) and returns some of the values that it computes.

    ``steps`` are names of operators with the numbers of their operands; every step adds a value. Numbers count back
    from the newest value. ``rounds`` says whether a step rounds, so that a last bit can become a whole step.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("row", torch.randn(WIDTH))
        self.flag = pick.random() < 0.5
        self.steps = tuple(
            (pick.choice(list(STEPS)), pick.randrange(3), pick.randrange(5)) for _ in range(pick.randint(2, 9))
        )
        self.returned = tuple(pick.choice(list(OUTPUTS)) for _ in range(pick.randint(1, 3)))
        self.picked = tuple(pick.randrange(4) for _ in self.returned)
        self.rounds = any(STEPS[name].rounds for name, _, _ in self.steps)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        values = [x, y]
        for name, a, b in self.steps:
            values.append(STEPS[name].run(self, values[-1 - a % len(values)], values[-1 - b % len(values)]))
        outputs = [
            OUTPUTS[name](self, values[-1 - at % len(values)], x)
            for name, at in zip(self.returned, self.picked, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 and self.flag else tuple(outputs)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, returned={tuple(zip(self.returned, self.picked, strict=True))}, flag={self.flag}"


@dataclass(frozen=True)
class Step:
    """Makes a value of the shape (BATCH, LENGTH, WIDTH) from two of that shape."""

    run: Callable[[RandomModule, Tensor, Tensor], Tensor]
    rounds: bool = False


def _attention(m: RandomModule, x: Tensor, spelling: str) -> Tensor:
    q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    if spelling == "sdpa":
        return F.scaled_dot_product_attention(q, q, q, is_causal=m.flag).transpose(1, 2).flatten(2)
    scores = q @ q.transpose(-1, -2) * 0.3
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    low = torch.finfo(scores.dtype).min
    if spelling == "filled":
        scores = scores.masked_fill(~allowed, float("-inf"))
    elif spelling == "minimum":
        # The first rows see nothing.
        scores = torch.where(allowed.roll(2, 0) & allowed, scores, low)
    elif spelling == "padded":
        scores = scores + (x[:, None, None, :, 0] > 0).logical_not().to(scores.dtype) * low
    return (torch.softmax(scores, -1) @ q).transpose(1, 2).reshape(x.shape)


def _written(x: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    own = x * 1.0
    view(own).mul_(0.5).add_(0.25)
    return own


def _quantized(x: Tensor) -> Tensor:
    return x + (torch.clamp(torch.round(x / 0.05), -128, 127) * 0.05 - x).detach()


STEPS: Mapping[str, Step] = {
    "linear": Step(lambda m, x, y: m.linear(x)),
    "product": Step(lambda m, x, y: torch.tanh(x @ y.transpose(1, 2)) @ x),
    "norm": Step(lambda m, x, y: m.norm(x)),
    "rms": Step(lambda m, x, y: F.rms_norm(x, (WIDTH,), m.row, 1e-5)),
    "softmax": Step(lambda m, x, y: torch.softmax(x, -1)),
    "gelu": Step(lambda m, x, y: F.gelu(x)),
    "residual": Step(lambda m, x, y: x + y),
    "scale": Step(lambda m, x, y: x * 0.5 - m.row),
    "clamp": Step(lambda m, x, y: x.clamp(-1.0, 0.75)),
    "maximum": Step(lambda m, x, y: torch.maximum(x, y)),
    "bf16": Step(lambda m, x, y: x.bfloat16().float() + y, rounds=True),
    "fp16": Step(lambda m, x, y: (x * 3.0).half().float(), rounds=True),
    "fp64": Step(lambda m, x, y: (x.double() * 0.3).float()),
    "integer": Step(lambda m, x, y: x.clamp(-9, 9).mul(4.0).to(torch.int32).float() * 0.25, rounds=True),
    "quantized": Step(lambda m, x, y: _quantized(x), rounds=True),
    "cumsum": Step(lambda m, x, y: torch.cumsum(x, 1)),
    "transposed": Step(lambda m, x, y: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "columns first": Step(lambda m, x, y: x.transpose(1, 2).contiguous().transpose(1, 2) * 2.0),
    "time first": Step(lambda m, x, y: m.linear(x.transpose(0, 1)).transpose(0, 1)),
    "strided": Step(
        lambda m, x, y: x.transpose(1, 2).contiguous().as_strided(x.shape, (LENGTH * WIDTH, WIDTH, 1)) * 0.5
    ),
    "shifted": Step(lambda m, x, y: torch.cat((x[:, 1:], y[:, :1]), 1)),
    "halves": Step(lambda m, x, y: torch.cat(tuple(reversed(x.chunk(2, -1))), -1)),
    "expanded": Step(lambda m, x, y: x.mean(1, keepdim=True).expand_as(y)),
    "windows": Step(lambda m, x, y: x.contiguous().unfold(2, 4, 4).flatten(2)),
    "flipped": Step(lambda m, x, y: x.flip(1)),
    "written": Step(lambda m, x, y: _written(x, lambda t: t)),
    "written part": Step(lambda m, x, y: _written(x, lambda t: t[:, 1:, ::2])),
    "written transposed": Step(lambda m, x, y: _written(x, lambda t: t.transpose(1, 2))),
    "branch": Step(lambda m, x, y: torch.relu(x) if m.flag and x.shape[0] == BATCH else x + 1.0),
    "same": Step(lambda m, x, y: x),
    "dropout": Step(lambda m, x, y: F.dropout(x, 0.25, True)),
    "sdpa": Step(lambda m, x, y: _attention(m, x, "sdpa")),
    "filled attention": Step(lambda m, x, y: _attention(m, x, "filled")),
    "attention of a minimum": Step(lambda m, x, y: _attention(m, x, "minimum")),
    "padded attention": Step(lambda m, x, y: _attention(m, x, "padded")),
}

OUTPUTS: Mapping[str, Callable[[RandomModule, Tensor, Tensor], Any]] = {
    "value": lambda m, v, x: v,
    "clone": lambda m, v, x: v.clone(),
    "transposed": lambda m, v, x: v.transpose(0, 1),
    "part": lambda m, v, x: v[1:, :, 2:],
    "pair": lambda m, v, x: (v, v[0]),
    "expanded": lambda m, v, x: v[:, :1].expand(-1, 3, -1),
    "input": lambda m, v, x: x.transpose(1, 2),
    "parameter": lambda m, v, x: {"weight": m.linear.weight, "row": m.row[2:]},
    "number": lambda m, v, x: v.shape[1],
    "bf16": lambda m, v, x: v.bfloat16(),
}


def inputs_of(seed: int) -> tuple[Tensor, Tensor]:
    """Two inputs, of which one may be transposed."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, BATCH, LENGTH, WIDTH, generator=generator)
    return x.clone(), y.transpose(1, 2).contiguous().transpose(1, 2) if seed % 4 == 0 else y.clone()
