"""Linear layers that ``torch.ao.quantization.quantize_dynamic`` has packed, as what they compute.

Their weights are in objects that no trace looks into. What such a layer computes can be said with the operators that
PyTorch's exported quantized models consist of, and so is fused as these are.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuser.ir.quantization import packed_range

_LEVELS = (127, 255)
"""Largest integers of activations, which depend on the engine that has packed the weight: seven bits (``reduce_range``)
or eight."""
_ROWS = 4
"""Of an input that layers are tried on."""
_AGREES = 2e-3
"""Of the largest output, how far apart a layer and what it is taken for may be, as an element may be rounded the other
way."""


torch.library.define("fuser::packed_range", "(Tensor x, int levels) -> (Tensor, Tensor)")


@torch.library.impl("fuser::packed_range", "default")
def _packed_range(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    scale, point = packed_range(x, levels)
    return torch.tensor([scale], dtype=torch.float32), torch.tensor([point])


@torch.library.register_fake("fuser::packed_range")  # type: ignore[untyped-decorator]
def _fake_range(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(1), x.new_empty(1, dtype=torch.int64)


@dataclass(frozen=True)
class _Unpacked:
    """x · Wᵀ + bias for x (…, K) fp32, rounded to integers from 0 to ``levels`` by one scale and zero point for all of
    it, which are found for every x, and W of int8 ``weight`` (N, K) times ``scales`` (N,) fp32; or without ``levels``
    of x as it is and ``weight`` in fp32."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    levels: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"packed layers take fp32, not {x.dtype}")
        weight = self.weight
        if self.levels is not None and self.scales is not None:
            do, ends = torch.ops.quantized_decomposed, (0, self.levels)
            points = torch.zeros_like(self.scales, dtype=torch.int64)
            weight = do.dequantize_per_channel(weight, self.scales, points, 0, -128, 127, torch.int8)
            if x.numel() != 0:
                scale, point = torch.ops.fuser.packed_range(x, self.levels)
                codes = do.quantize_per_tensor.tensor(x, scale, point, *ends, torch.uint8)
                x = do.dequantize_per_tensor.tensor(codes, scale, point, *ends, torch.uint8)
        return nn.functional.linear(x, weight, self.bias)


class _Layer:
    """A packed layer with its weight in tensors."""

    unpacked_weight: Tensor
    unpacked_bias: Tensor | None
    unpacked_scales: Tensor | None
    levels: int | None

    def forward(self, x: Tensor) -> Tensor:
        return _Unpacked(self.unpacked_weight, self.unpacked_bias, self.unpacked_scales, self.levels)(x)


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, _Unpacked | None]] = weakref.WeakKeyDictionary()


@functools.cache
def _unpacked_class(base: Any) -> Any:
    return type(base.__name__, (_Layer, base), {})


def stand_in(module: nn.Module) -> nn.Module | None:
    """What computes the same as a packed layer, and has its weight in tensors, of the layer's class and with its hooks
    and attributes. The tensors are the same at every call, as long as the layer has the same weight. None for other
    modules, and for layers that compute something else."""
    dynamic = sys.modules.get("torch.ao.nn.quantized.dynamic")
    if dynamic is None or type(module) is not dynamic.Linear:
        return None
    layer: Any = module
    kind: Any = type(module)
    packed = layer._packed_params._packed_params
    if module not in _known or _known[module][0] is not packed:
        with torch.no_grad():
            _known[module] = packed, _unpacked(layer)
    found = _known[module][1]
    if found is None:
        return None
    made: nn.Module = object.__new__(_unpacked_class(kind))
    tensors = {"weight": found.weight, "bias": found.bias, "scales": found.scales}
    # No trace takes a module that holds what is packed.
    members = {
        "_modules": layer._modules | {"_packed_params": nn.Module()},
        "_buffers": layer._buffers | {f"unpacked_{name}": tensor for name, tensor in tensors.items()},
        "levels": found.levels,
    }
    vars(made).update(vars(layer) | members)
    return made


def _unpacked(layer: Any) -> _Unpacked | None:
    # Registers the operators.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    weight, bias = layer.weight().detach(), layer.bias()
    bias = None if bias is None else bias.detach()
    if not weight.is_quantized:
        # Half precision in memory, and fp32 in products.
        return _Unpacked(weight.float(), bias)
    if weight.dtype != torch.qint8:
        return None
    if weight.qscheme() == torch.per_tensor_affine:
        scales, points = torch.full(weight.shape[:1], weight.q_scale()), torch.tensor(weight.q_zero_point())
    elif weight.qscheme() == torch.per_channel_affine and weight.q_per_channel_axis() == 0:
        scales, points = weight.q_per_channel_scales().float(), weight.q_per_channel_zero_points()
    else:
        return None
    if points.any():
        return None
    x = torch.arange(_ROWS * weight.shape[1], dtype=torch.float32).sin().view(_ROWS, -1)
    want = type(layer).forward(layer, x)
    made = [_Unpacked(weight.int_repr(), bias, scales, levels) for levels in _LEVELS]
    apart = [float((unpacked(x) - want).abs().max()) for unpacked in made]
    return made[apart.index(min(apart))] if min(apart) <= _AGREES * float(want.abs().max()) else None
