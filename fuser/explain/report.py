"""Reports: what was fused, with which kernels and predicted times, and what was not and why, as text and as HTML."""

from __future__ import annotations

import base64
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from fuser.codegen.assemble import KernelRecord
from fuser.codegen.choice import Choice, GroupChoice, Kernel
from fuser.explain.drawing import COLOURS, draw_region, duration, shape_text
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.graph import Operator, Region, is_kind
from fuser.ir.masks import Mask
from fuser.ir.operators import CodedProduct, PatternMask, PredictedAttention, QuantizeRows, View
from fuser.ir.quantization import NAMES
from fuser.ir.target import Target
from fuser.module.compiler import Compiled
from fuser.module.quantizing import Precision
from fuser.module.snapshot import Memory, Snapshot

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Group:
    """One kernel of a region: its operators and the time that the choice was made by."""

    family: str
    operators: tuple[str, ...]
    seconds: float
    measured: bool


@dataclass(frozen=True)
class RegionRow:
    """Equal regions: ``count`` of them share this scheme. ``seconds`` is the time of one under the additive model."""

    hash: str
    count: int
    scheme: str
    seconds: float
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Width:
    """Of one kernel's operators: in which numbers it multiplies, or what it stores, and the relative L2 error of its
    result to that of the unquantized model on a calibration input, NaN where that is not known."""

    operators: tuple[str, ...]
    width: str
    error: float
    narrowed: bool = False
    """Whether it multiplies fewer bits than it stores."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the program: operators of its first use, number of calls, time of one call."""

    name: str
    family: str
    operators: tuple[str, ...]
    calls: int
    seconds: float | None
    measured: bool


@dataclass(frozen=True)
class Report:
    """Everything that a report says, as plain values. Lists are empty and ``target`` None when nothing was compiled."""

    model: str
    programs: tuple[str, ...]
    threads: int
    target: Target | None
    regions: tuple[RegionRow, ...]
    kernels: tuple[KernelRow, ...]
    unfused: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]
    fallbacks: tuple[str, ...]
    specialized: tuple[str, ...]
    padding: tuple[str, ...]
    precision: tuple[str, ...]
    widths: tuple[Width, ...]
    memory: Memory
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Time of all regions under the additive model."""
        return sum(region.count * region.seconds for region in self.regions)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        if self.target is not None:
            values["target"]["features"] = sorted(self.target.features)
        return values


def collect(snapshot: Snapshot) -> Report:
    """The report of what was compiled last."""
    last = snapshot.last
    return Report(
        model=snapshot.model,
        programs=tuple(_signature(compiled) for compiled in snapshot.programs),
        threads=last.assembly.plan.threads if last else 0,
        target=snapshot.target,
        regions=tuple(_regions(last)) if last else (),
        kernels=tuple(_kernels(last)) if last else (),
        unfused=snapshot.unfused,
        outside=snapshot.outside,
        fallbacks=snapshot.fallbacks,
        specialized=snapshot.specialized,
        padding=snapshot.padding,
        precision=() if snapshot.precision is None else snapshot.precision.lines,
        widths=tuple(_widths(last, snapshot.precision)) if last else (),
        memory=snapshot.memory,
        stages=dict(last.seconds) if last else {},
    )


def report(snapshot: Snapshot, path: Path | None = None) -> str:
    """The report as text; with ``path`` also as one HTML file that needs nothing else.

    Raises FuserError when the file cannot be written.
    """
    found = collect(snapshot)
    if path is not None:
        try:
            path.write_text(render_html(found, snapshot.last), encoding="utf-8")
        except OSError as error:
            raise FuserError(f"cannot write the report {path}: {error}") from error
    return render_text(found)


def choice_of(compiled: Compiled, record: KernelRecord) -> GroupChoice | None:
    """The choice behind a kernel's first use."""
    graph = compiled.graph
    names = frozenset(record.operators) - {op.name for op in graph.operators if isinstance(op.semantics, View)}
    return next((c for c in compiled.assembly.choices if c.group.names == names), None)


def regions_of(compiled: Compiled) -> list[tuple[Region, Choice, int]]:
    """One region for every distinct hash, in order, with its choice and how many there are."""
    counts = Counter(region.hash for region in compiled.graph.regions)
    found: dict[str, Region] = {}
    for region in compiled.graph.regions:
        found.setdefault(region.hash, region)
    return [(region, compiled.choices[key], counts[key]) for key, region in found.items()]


# ---- collecting


def _signature(compiled: Compiled) -> str:
    specs = (compiled.graph.values[value] for value in compiled.graph.inputs)
    return ", ".join(f"{shape_text(spec)} {str(spec.dtype).removeprefix('torch.')}" for spec in specs)


def _regions(compiled: Compiled) -> Iterator[RegionRow]:
    for region, choice, count in regions_of(compiled):
        groups = tuple(
            Group(g.family, tuple(op.name for op in g.group.operators), g.seconds, g.measured) for g in choice.groups
        )
        yield RegionRow(region.hash, count, str(choice.scheme), choice.seconds, groups)


_WIDTHS = {"bf16_gemm": "bf16", "int8_gemm": "int8", "int8_weight_gemm": "int8 weights"}


def _widths(compiled: Compiled, precision: Precision | None) -> Iterator[Width]:
    """The groups of a program in order; PyTorch's operators are in what they store."""
    errors = {} if precision is None else precision.errors
    for choice in compiled.assembly.choices:
        operators = choice.group.operators
        graph = choice.group.graph
        # Codes are what the next product multiplies.
        last = next((op for op in reversed(operators) if not is_kind(op, QuantizeRows)), operators[-1])
        stored = graph.values[last.output].dtype
        width = next(filter(None, (_multiplied(op, choice.kernel) for op in operators)), "")
        error = errors.get(last.name, math.nan)
        yield Width(tuple(op.name for op in operators), width or _short(stored), error, bool(width))


def _multiplied(op: Operator, kernel: Kernel | None) -> str:
    """The numbers that an operator multiplies, if they are not those that it stores."""
    if is_kind(op, PredictedAttention):
        how = op.semantics.quantize
        if how.may_be_exact and kernel is not None and not getattr(kernel.parameters, "few_bits", False):
            return ""
        return f"{type(how).__name__} {how.bits} bits"
    if isinstance(op.semantics, CodedProduct):
        return NAMES[op.semantics.codes]
    return _WIDTHS.get(op.kind, "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _kernels(compiled: Compiled) -> Iterator[KernelRow]:
    for record in compiled.assembly.kernels:
        choice = choice_of(compiled, record)
        seconds, measured = (choice.seconds, choice.measured) if choice else (None, False)
        yield KernelRow(record.name, record.family, record.operators, record.calls, seconds, measured)


# ---- text


def _error(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.1e}"


def render_text(found: Report) -> str:
    """The report as plain text."""
    lines = [f"fuser report: {found.model}"]
    if not found.programs:
        lines.append("nothing is compiled: the model has not been called, or the original model runs")
    if found.target is not None:
        team = f", {found.threads} threads" if found.target.kind == "cpu" else ""
        lines.append(f"target    {target_text(found.target)}{team}")
    for signature in found.programs:
        lines.append(f"program   {signature}")
    if found.stages:
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in found.stages.items())
        lines.append(f"compiled  in {duration(sum(found.stages.values()))}: {stages}")
    if found.regions:
        lines += ["", f"regions   {duration(found.seconds)} in all (≈ marks predicted times)"]
        for region in found.regions:
            lines.append(f"  × {region.count:<3} scheme {region.scheme}, {duration(region.seconds)} each")
            for group in region.groups:
                time = duration(group.seconds) if group.measured else f"≈ {duration(group.seconds)}"
                lines.append(f"        {group.family:<10} {time:>10}  {', '.join(group.operators)}")
        lines += ["", "kernels"]
        lines += [
            f"  {row.name:<36} {row.family:<10} × {row.calls:<4} {', '.join(row.operators)}" for row in found.kernels
        ]
    lines += ["", *_reasons("unfused inside the regions", found.unfused, found.programs)]
    lines += _reasons("outside the regions, run by PyTorch", found.outside, found.programs)
    lines += [f"the original model ran: {reason}" for reason in found.fallbacks]
    lines += [f"not captured for all sizes: {reason}" for reason in found.specialized]
    lines += [f"padding: {line}" for line in found.padding]
    lines += [f"precision: {line}" for line in found.precision]
    if found.precision or any(w.narrowed for w in found.widths):
        lines += [f"  {w.width:<13} {_error(w.error):>9}  {', '.join(w.operators)}" for w in found.widths]
    memory = found.memory
    lines += [
        "",
        f"memory    arena {size_text(memory.arena)}, packed and derived weights {size_text(memory.constants)}, "
        f"originals in files {size_text(memory.offloaded)}",
    ]
    if memory.offload_error:
        lines.append(f"          originals stay in memory: {memory.offload_error}")
    return "\n".join(lines)


def _reasons(title: str, found: Sequence[tuple[str, str]], programs: Sequence[str]) -> list[str]:
    if not found:
        return [f"{title}: nothing"] if programs else []
    return [title, *(f"  {name}: {reason}" for name, reason in found)]


def target_text(target: Target) -> str:
    """One line about a target."""
    features = f" ({', '.join(sorted(target.features))})" if target.features else ""
    return (
        f"{target.kind} {target.arch}{features}, {target.cores} cores, {target.peak_flops / 1e9:.0f} Gflop/s a core, "
        f"{target.bandwidth / 1e9:.1f} GB/s"
    )


def size_text(size: int) -> str:
    """Bytes with their unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


# ---- HTML


def render_page(template: str, **values: Any) -> str:
    """A page of ``data`` as one HTML document; undefined names are errors, and text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "data"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, size=size_text)
    return environment.get_template(template).render(**values)


def render_html(found: Report, compiled: Compiled | None) -> str:
    """The report as one HTML document with its pictures inside."""
    pictures = {}
    masks: list[tuple[str, str, str]] = []
    if compiled is not None:
        for region, choice, _ in regions_of(compiled):
            pictures[region.hash] = draw_region(region, choice)
        masks = [(mask.name, f"{n}×{m}", _mask_picture(mask, n, m)) for mask, n, m in _masks(compiled)]
    slowest = max((row.calls * (row.seconds or 0.0) for row in found.kernels), default=0.0)
    return render_page(
        _TEMPLATE,
        report=found,
        target=target_text(found.target) if found.target is not None else "",
        pictures=pictures,
        masks=masks,
        colours=COLOURS,
        families=sorted({group.family for region in found.regions for group in region.groups}),
        slowest=slowest,
    )


def _masks(compiled: Compiled) -> list[tuple[Mask, int, int]]:
    """Constant masks of the model's attentions, each once, with the lengths that it is used for."""
    found: dict[tuple[str, int, int], tuple[Mask, int, int]] = {}
    for op in compiled.graph.operators:
        if isinstance(op.semantics, PatternMask) and (pattern := op.semantics.pattern) is not None:
            n, m = compiled.graph.values[op.output].shape[-2:]
            found.setdefault((pattern.hash, n, m), (pattern, n, m))
    return list(found.values())


def _mask_picture(mask: Mask, n: int, m: int) -> str:
    """A data URI of the mask's picture; empty without matplotlib."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.png"
        try:
            mask.draw(path, n, m)
        except MaskError:
            return ""
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
