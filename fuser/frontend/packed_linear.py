"""Linear layers that ``torch.ao.quantization.quantize_dynamic`` has packed, as what they compute.

Their weights are in objects that no trace looks into. What such a layer computes can be said with the operators that
PyTorch's exported quantized models consist of, and so is fused as these are.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_LEVELS = (127, 255)
"""Largest integers of activations, which depend on the engine that has packed the weight: seven bits (``reduce_range``)
or eight."""
_AGREES = 2e-3
"""Of the largest output, how far apart a layer and its stand-in may be, of which a number may be rounded the other way.
"""
_stand_ins: weakref.WeakKeyDictionary[nn.Module, tuple[Any, nn.Module | None]] = weakref.WeakKeyDictionary()


class UnpackedLinear(nn.Module):
    """x · Wᵀ + bias for x (…, K) fp32, rounded to integers from 0 to ``levels`` by one scale and zero point for all of
    it, which are found for every x, and W of int8 ``weight`` (N, K) times ``scales`` (N,) fp32."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None, levels: int) -> None:
        super().__init__()
        # Registers the operators.
        import torch.ao.quantization.fx._decomposed

        self.levels = levels
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        do = torch.ops.quantized_decomposed
        least = torch.finfo(torch.float32).eps
        scale, point = do.choose_qparams.tensor(x, 0, self.levels, least, torch.uint8)
        codes = do.quantize_per_tensor.tensor(x, scale, point, 0, self.levels, torch.uint8)
        restored = do.dequantize_per_tensor.tensor(codes, scale, point, 0, self.levels, torch.uint8)
        weight = do.dequantize_per_channel(self.weight, self.scales, self.zero_points, 0, -128, 127, torch.int8)
        return nn.functional.linear(restored, weight, self.bias)


def stand_in(module: nn.Module) -> nn.Module | None:
    """What computes the same as a packed layer, and has its weight in tensors: the same module at every call, as long
    as the layer has the same weight. None for other modules, and for layers that compute something else."""
    dynamic = sys.modules.get("torch.ao.nn.quantized.dynamic")
    if dynamic is None or type(module) is not dynamic.Linear:
        return None
    layer: Any = module
    packed = layer._packed_params._packed_params
    if module not in _stand_ins or _stand_ins[module][0] is not packed:
        with torch.no_grad():
            _stand_ins[module] = packed, _unpacked(layer)
    return _stand_ins[module][1]


def _unpacked(layer: Any) -> nn.Module | None:
    weight, bias = layer.weight().detach(), layer.bias()
    bias = None if bias is None else bias.detach()
    if not weight.is_quantized:
        # Half precision in memory, and fp32 in products.
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        linear.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
        return linear.requires_grad_(False).eval()
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
    x = torch.arange(weight.shape[1], dtype=torch.float32).sin()[None]
    want = layer(x)
    made = [UnpackedLinear(weight.int_repr(), scales, bias, levels).eval() for levels in _LEVELS]
    apart = [float((unpacked(x) - want).abs().max()) for unpacked in made]
    return made[apart.index(min(apart))] if min(apart) <= _AGREES * float(want.abs().max()) else None
