"""Efficient attention as modules that train in PyTorch: windows, random features, EVA, LARA and their kin, by name.

Parameters have the names of the library ``efficient_attention`` of Zheng et al., whose checkpoints load.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from fuser.attention.mechanisms.arguments import NestedNamespace, add_flags
from fuser.attention.mechanisms.causal_eva import CausalEvaAttention
from fuser.attention.mechanisms.configuration import Configuration
from fuser.attention.mechanisms.eva import EvaAttention
from fuser.attention.mechanisms.local import LocalAttention
from fuser.attention.mechanisms.performer import PerformerAttention
from fuser.attention.mechanisms.randomized import LaraAttention, RandomizedAttention
from fuser.attention.mechanisms.scatterbrain import ScatterbrainAttention
from fuser.attention.mechanisms.softmax import SoftmaxAttention
from fuser.ir.errors import MechanismError

__all__ = ["NestedNamespace", "add_arguments", "build", "configure", "names"]


class _Mechanism(Protocol):
    configuration_type: type[Configuration]

    def __call__(self, configuration: Any) -> nn.Module: ...


_MECHANISMS: dict[str, _Mechanism] = {
    "softmax": SoftmaxAttention,
    "local": LocalAttention,
    "performer": PerformerAttention,
    "ra": RandomizedAttention,
    "lara": LaraAttention,
    "scatterbrain": ScatterbrainAttention,
    "eva": EvaAttention,
    "causal_eva": CausalEvaAttention,
}


def names() -> tuple[str, ...]:
    """The names of all mechanisms."""
    return tuple(_MECHANISMS)


def configure(name: str, **arguments: Any) -> Configuration:
    """The typed, immutable arguments of a mechanism.

    Raises MechanismError for an unknown name or argument, one that is missing, and values that fit no module.
    """
    kind = _mechanism(name).configuration_type
    fields = dataclasses.fields(kind)
    for argument in arguments:
        if argument not in {field.name for field in fields}:
            known = [field.name for field in fields]
            raise MechanismError(f"{name} has no argument {argument!r}; {_nearest(argument, known)}")
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in arguments]
    if missing:
        raise MechanismError(f"{name} needs {' and '.join(missing)}")
    return kind(**arguments)


def build(name: str, **arguments: Any) -> nn.Module:
    """A mechanism by its name, as a module in training mode; its class says what it computes and what it takes.

    ``dim``, ``num_heads`` and others are arguments of all but ``causal_eva``, whose are fairseq's (``embed_dim``, …).
    Raises MechanismError as :func:`configure` does.
    """
    configuration = configure(name, **arguments)
    return _mechanism(name)(configuration)


def add_arguments(
    parser: argparse.ArgumentParser, name: str, struct: str = "attn_args", prefix: str = ""
) -> argparse.ArgumentParser:
    """Add the flags of a mechanism to ``parser`` and return it.

    A flag is ``--[prefix-]name``; its value is ``name`` of the namespace ``struct`` if arguments are parsed into a
    :class:`NestedNamespace`, so that ``build(name, dim=…, num_heads=…, **vars(args.attn_args))`` takes them all. Raises
    MechanismError for an unknown name.
    """
    return add_flags(parser, _mechanism(name).configuration_type, struct, prefix)


def _mechanism(name: str) -> _Mechanism:
    try:
        return _MECHANISMS[name]
    except KeyError:
        raise MechanismError(f"there is no attention {name!r}; {_nearest(name, _MECHANISMS)}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
