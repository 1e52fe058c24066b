"""Kernel specs to source text, through one Jinja environment."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import jinja2

import fuser.templates
from fuser.codegen import cuda, expressions
from fuser.ir.expression import Op
from fuser.ir.target import Target
from fuser.kernels.base import Access, DType, KernelSpec, canonical
from fuser.runtime.build import Source

TEMPLATES = Path(fuser.templates.__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """The one Jinja environment: undefined names are errors, blocks leave no blank lines."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.globals.update(
        statements=expressions.statements,
        row_function=expressions.row_function,
        literal=expressions.literal,
        c_type=lambda dtype: expressions.C_TYPES[dtype],
        cuda_statements=cuda.statements,
        cuda_element_function=cuda.element_function,
        cuda_row_function=cuda.row_function,
        cuda_type=lambda dtype: cuda.C_TYPES[dtype],
        Access=Access,
        DType=DType,
        Op=Op,
    )
    return env


def render(spec: KernelSpec) -> Source:
    """The source of one kernel, headed by its family, parameters and hash."""
    template = environment().get_template(spec.template)
    text = template.render(p=spec.parameters, symbol=spec.symbol)
    header = f"// fuser {spec.family} kernel {spec.symbol}\n// {spec.template}: {canonical(spec.parameters)}\n"
    # Nothing but printable ASCII may reach a compiler from a parameter.
    if re.search(r"[^\t\n -~]", header):
        raise ValueError(f"the parameters of {spec.symbol} are not printable")
    suffix = Path(spec.template.removesuffix(".j2")).suffix
    return Source(spec.symbol, header + text, suffix, getattr(spec.parameters, "includes", ()))


@functools.cache
def generator_hash(target: Target) -> str:
    """sha256 of all that makes sources of specs for ``target``, and of the headers that they include."""
    files = [*(TEMPLATES / target.kind).rglob("*"), *Path(__file__).parent.glob("*.py")]
    found = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def header_folder(target: Target) -> Path:
    """The folder of the headers that kernels for ``target`` include."""
    return TEMPLATES if target.kind == "cuda" else TEMPLATES / "cpu"
