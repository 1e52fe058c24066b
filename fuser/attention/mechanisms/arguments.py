"""Flags of the command line for a mechanism, under the names of the reference's, and namespaces inside namespaces."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from fuser.attention.mechanisms.configuration import Configuration, choices, types


class NestedNamespace(argparse.Namespace):
    """A namespace in which setting ``"a.b"`` sets ``b`` of the namespace ``a``, which is made if it is not there."""

    def __setattr__(self, name: str, value: Any) -> None:
        outer, dot, inner = name.partition(".")
        if dot:
            nested = self.__dict__.setdefault(outer, NestedNamespace())
            setattr(nested, inner, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # argparse asks whether there is a value before it sets a default.
        outer, dot, inner = name.partition(".")
        if dot and outer in self.__dict__:
            return getattr(self.__dict__[outer], inner)
        raise AttributeError(name)


def add_flags(
    parser: argparse.ArgumentParser, configuration: type[Configuration], struct: str, prefix: str
) -> argparse.ArgumentParser:
    """Add ``--[prefix-]flag`` with the destination ``struct.flag`` for each option of a configuration."""
    group = parser.add_argument_group(f"attention ({prefix})" if prefix else "attention")
    for field in dataclasses.fields(configuration):
        if "help" not in field.metadata:
            continue
        annotation = types(configuration)[field.name]
        flag = "-".join(part for part in (prefix, field.name.replace("_", "-")) if part)
        how: dict[str, Any] = {"dest": f"{struct}.{field.name}", "help": field.metadata["help"]}
        how["default"] = field.metadata.get("flag", field.default)
        if annotation is bool:
            how["action"] = "store_true"
        elif choices(annotation):
            how["choices"] = choices(annotation)
        else:
            optional = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
            how.update(type=optional[0] if optional else annotation, metavar=field.name.upper())
        group.add_argument(f"--{flag}", **how)
    return parser
