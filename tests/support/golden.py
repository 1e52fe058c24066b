"""What the compiler makes of the built-in models, as hashes: of every model, target and stage one.

``python tests/support/golden.py`` (``make golden``) writes them anew and prints what changed. Every text that was
hashed is kept as ``build/golden/HASH.txt``, so what changed is shown line by line where the text before was ever made
here. Names that PyTorch chooses are replaced by numbers, kernels' symbols too, so a hash tells what is computed, not
what it is called.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fuser import zoo
from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.render import header_folder
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.ir.attention import AttentionSpec
from fuser.ir.graph import OperatorGraph, TensorSpec
from fuser.ir.masks import Mask, SlidingWindow
from fuser.ir.operators import TorchCall
from fuser.ir.target import TF32, Target, cuda_target
from fuser.kernels.base import floating
from fuser.module.compiler import choose_all
from fuser.runtime.build import included_headers
from fuser.runtime.program import NativeStep

ROOT = Path(__file__).parent.parent.parent
HASHES = ROOT / "tests" / "golden" / "programs.json"
TEXTS = ROOT / "build" / "golden"
THREADS = 4
_SIZES = {"layers": 2, "batch": 2, "seq": 64}
_SHOWN_LINES = 12


@dataclasses.dataclass(frozen=True)
class Example:
    """A built-in model with two layers of its published width, and how it is called."""

    model: str
    padded: bool = False
    attention: AttentionSpec | None = None


EXAMPLES: Mapping[str, Example] = {
    "bert-base": Example("bert-base", padded=True),
    "bert-base with a window": Example("bert-base", attention=AttentionSpec(SlidingWindow(8, 8))),
    "minilm": Example("minilm"),
    "vit-b16": Example("vit-b16"),
    "gpt2": Example("gpt2", padded=True),
    "transformer-encoder": Example("transformer-encoder", padded=True),
}


def _cpu(arch: str, *features: str) -> Target:
    return Target(
        kind="cpu",
        arch=arch,
        features=frozenset(features),
        cores=4,
        cache_bytes=(32 << 10, 1 << 20, 32 << 20),
        peak_flops=6e10,
        bandwidth=4e10,
        launch_seconds=2e-6,
    )


# Fixed rates, so that choices do not depend on the machine. The storage is the model's.
TARGETS: Mapping[str, tuple[Target, torch.dtype]] = {
    "avx2": (_cpu("avx2"), torch.float32),
    "avx512": (_cpu("avx512"), torch.float32),
    "avx512 bf16": (_cpu("avx512", "avx512_bf16", "avx512_vnni"), torch.bfloat16),
    "portable": (_cpu("portable"), torch.float32),
    "sm_90": (cuda_target("sm_90", features=frozenset({TF32})), torch.float32),
    "sm_90 bf16": (cuda_target("sm_90"), torch.bfloat16),
}
_IN_BF16 = ("bert-base", "gpt2")
CASES = [
    (example, target)
    for example in EXAMPLES
    for target, (_, dtype) in TARGETS.items()
    if dtype is torch.float32 or example in _IN_BF16
]
"""Examples on targets; capturing takes most of the time, so few are captured in bf16 too."""


class _Names:
    """Values and operators of a graph by number, in the order of the graph."""

    def __init__(self, graph: OperatorGraph) -> None:
        values = [*graph.inputs, *(v for op in graph.operators for v in (*op.inputs, *op.outputs)), *graph.outputs]
        self.values = {value: f"v{i}" for i, value in enumerate(dict.fromkeys(values))}
        for name in graph.constants:
            self.values.setdefault(name, f"v{len(self.values)}")
        self.operators = {op.name: f"o{i}" for i, op in enumerate(graph.operators)}

    def text(self, value: Any) -> str:
        """Dataclasses by their compared fields, strings that name values by number."""
        if isinstance(value, Mask):
            return value.hash
        if isinstance(value, TorchCall):
            return f"{value}({self.text(value.args)} {self.text(value.kwargs)})"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = (getattr(value, field.name) for field in dataclasses.fields(value) if field.compare)
            return f"{type(value).__name__}({', '.join(map(self.text, fields))})"
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self.text, value))})"
        if isinstance(value, str):
            return self.values.get(value, value)
        return str(value)


def _graph(graph: OperatorGraph, names: _Names) -> Iterator[str]:
    yield f"inputs {names.text(graph.inputs)}"
    for name, constant in graph.constants.items():
        yield f"constant {names.text(name)}: {names.text(constant.call)}{names.text(constant.sources)}"
    for value, number in names.values.items():
        spec: TensorSpec = graph.values[value]
        base = names.text(spec.base) if spec.base else ""
        yield f"value {number}: {spec.shape} {spec.dtype} {spec.strides} {base}+{spec.offset}"
    for op in graph.operators:
        wires = f"{names.text(op.outputs)} = {op.kind}{names.text(op.inputs)}"
        yield f"{names.operators[op.name]}: {wires} {names.text(op.semantics)}"
    yield f"outputs {names.text(graph.outputs)}"


def _schemes(graph: OperatorGraph, assembly: Assembly, names: _Names) -> Iterator[str]:
    first: dict[str, int] = {}
    for i, region in enumerate(graph.regions):
        alike = first.setdefault(region.hash, i)
        yield f"region {i} like {alike}: {' '.join(names.operators[op.name] for op in region)}"
    for choice in assembly.choices:
        operators = " ".join(names.operators[op.name] for op in choice.group.operators)
        yield f"{choice.family}: {operators} {choice.seconds:.6g} s"


def _sources(assembly: Assembly, symbols: Mapping[str, str], target: Target) -> Iterator[str]:
    headers: dict[str, bytes] = {}
    for source in assembly.sources:
        yield f"{symbols[source.symbol]}{source.suffix}"
        yield _renamed(_code(source.text), symbols)
        headers |= included_headers(source.text, header_folder(target))
    for name, content in sorted(headers.items()):
        # A compiler for GPUs does not read the emulator.
        if not Path(name).name.startswith("emulator"):
            yield name
            yield _code(content.decode())


def _code(text: str) -> str:
    """What is compiled: neither comments, which in a source name the parameters that decided the rest, nor empty
    lines."""
    lines = re.sub(r"//.*|/\*(?s:.*?)\*/", "", text).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _renamed(text: str, symbols: Mapping[str, str]) -> str:
    for symbol, number in symbols.items():
        text = text.replace(symbol, number)
    return text


def _plan(assembly: Assembly, names: _Names, symbols: Mapping[str, str]) -> Iterator[str]:
    plan = assembly.plan
    for step in plan.steps:
        if isinstance(step, NativeStep):
            yield f"{symbols[step.symbol]} {step.extents}"
            yield from (f"  {names.text(slot)}" for slot in step.tensors)
        else:
            yield f"torch {step.call}"
            yield from (f"  {names.text(slot)}" for slot in step.inputs)
            yield from (f"  -> {names.text(slot)}" for slot in (*step.results, *([step.out] if step.out else [])))
    for part in ("inputs", "outputs", "returns", "constants"):
        yield part
        yield from (f"  {names.text(slot)}" for slot in getattr(plan, part))
    yield f"{plan.result_count} results, {plan.arena_bytes} bytes, {plan.workspace_offset} offset, {plan.threads}"


@functools.cache
def _captured(example: str, dtype: torch.dtype) -> Captured:
    chosen = EXAMPLES[example]
    configuration = zoo.configuration(chosen.model)
    model, sizes = configuration.build(**_SIZES, vocabulary=1000 if configuration.sizes.vocabulary else 0)
    inputs = configuration.example(sizes, chosen.padded)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return capture(model.to(dtype), flatten_call((), inputs))


def stages(example: str, target_name: str) -> dict[str, str]:
    """The text of every stage of a model on a target."""
    target, dtype = TARGETS[target_name]
    graph = raise_graph(_captured(example, dtype), EXAMPLES[example].attention, floating(target))
    assembly = assemble(graph, choose_all(graph, target)[0], target, THREADS)
    names = _Names(graph)
    symbols = {source.symbol: f"kernel{i}" for i, source in enumerate(assembly.sources)}
    lines: dict[str, Iterable[str]] = {
        "graph": _graph(graph, names),
        "schemes": _schemes(graph, assembly, names),
        "sources": _sources(assembly, symbols, target),
        "plan": _plan(assembly, names, symbols),
    }
    return {stage: "\n".join(text) + "\n" for stage, text in lines.items()}


def hashes(texts: Mapping[str, str]) -> dict[str, str]:
    """The hash of every text, which is kept for comparison."""
    TEXTS.mkdir(parents=True, exist_ok=True)
    found = {}
    for stage, text in texts.items():
        found[stage] = hashlib.sha256(text.encode()).hexdigest()[:16]
        (TEXTS / f"{found[stage]}.txt").write_text(text)
    return found


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """The hashes of the repository, by example, target and stage."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(HASHES.read_text())
    return found


def difference(old: str | None, new: str) -> str:
    """What changed between the texts of two hashes, as far as both are known here."""
    paths = [TEXTS / f"{name}.txt" for name in (old, new)]
    if not all(path.exists() for path in paths):
        return f"    {old} -> {new} (the text before was never made here)"
    before, after = (path.read_text().splitlines() for path in paths)
    lines = [
        line for line in difflib.unified_diff(before, after, lineterm="", n=0) if not line.startswith(("---", "+++"))
    ]
    shown = [f"    {line[:200]}" for line in lines[:_SHOWN_LINES]]
    return "\n".join(
        [*shown, *([f"    … {len(lines) - _SHOWN_LINES} lines more"] if len(lines) > _SHOWN_LINES else [])]
    )


def main() -> None:
    """Write all hashes and print what changed."""
    old = recorded() if HASHES.exists() else {}
    new: dict[str, dict[str, dict[str, str]]] = {}
    changed = 0
    for example, target in CASES:
        found = new.setdefault(example, {})[target] = hashes(stages(example, target))
        for stage, value in found.items():
            before = old.get(example, {}).get(target, {}).get(stage)
            if value != before:
                changed += 1
                print(f"{stage} of {example} on {target}\n{difference(before, value)}")
    HASHES.write_text(json.dumps(new, indent=1) + "\n")
    print(f"{changed} of {sum(len(found) for targets in new.values() for found in targets.values())} hashes changed")


if __name__ == "__main__":
    main()
