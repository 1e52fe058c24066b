"""The pipeline: from one call of a model to a program that can be run."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuser.attention.operators import key_in
from fuser.attention.registry import specs_of
from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.choice import Choice, GroupChoice
from fuser.codegen.render import header_folder
from fuser.frontend.calls import FlatCall
from fuser.frontend.capture import capture
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.frontend.output_structure import OutputSpec
from fuser.ir.attention import AttentionSpec
from fuser.ir.graph import OperatorGraph, Region
from fuser.ir.masks import Mask
from fuser.ir.operators import ScoreMask
from fuser.ir.target import Target
from fuser.kernels.base import floating
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module.growing import Growing
from fuser.module.options import Options
from fuser.module.quantizing import Quantizer
from fuser.module.recompute import Routes
from fuser.module.stored_integers import with_stored_integers
from fuser.module.weights import WeightStore
from fuser.runtime.build import build_and_load
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.cuda_program import program_of
from fuser.runtime.library import Kernel
from fuser.runtime.program import Arena, Program, ProgramPlan, States
from fuser.search.partition import default_scheme, pytorch_seconds
from fuser.search.tuning import Tuner

logger = logging.getLogger("fuser")
_MANY_UNFUSED = 8
_LARGE_SHARE = 0.1
_LARGE_MASK = 512 * 512
"""Entries of masks that are worth a look: attention takes hundreds of times as long."""
_DEFAULTS = Options()


@dataclass(frozen=True)
class Compiled:
    """A program with everything that it was made from, for reports and for saving."""

    captured: Captured
    graph_of: Callable[[], OperatorGraph]
    """Gives the ``graph`` that it runs: few calls want to know."""
    mask_inputs: tuple[int, ...]
    """Which inputs are large and end as masks of attention, by position."""
    decided: Mapping[str, Choice]
    """What was decided for every kind of region, by the name of the first operator of its first."""
    assembly: Assembly
    program: Program
    output: OutputSpec
    seconds: Mapping[str, float]
    """Wall time of every stage of compilation."""
    unfused_share: float
    """Of the predicted time, what the operators take that are left to PyTorch."""
    masks: tuple[Mask, ...] = ()
    """The masks of functions in it, as they were."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """The named sizes that it was bound to, if its model was captured for all of them."""
    growing: Growing | None = None
    """How it follows the sizes of objects that it is called with, such as caches; None where it has one plan."""

    @functools.cached_property
    def graph(self) -> OperatorGraph:
        """Its operators, with the sizes that it was bound to."""
        return self.graph_of()

    def serves(self, call: FlatCall) -> bool:
        """Whether it is right for the sizes of a call's objects, which keys do not say."""
        return self.growing is None or self.growing.serves(call)

    def run(self, call: FlatCall) -> list[Tensor]:
        """The results of a call."""
        if self.growing is None:
            return self.program(call.tensors)
        return self.program(call.tensors, self.growing.bound(call).rebound)

    def built(self, call: FlatCall, results: Sequence[Tensor]) -> Any:
        """The output of a call, made of its results; its objects are changed as the model changes them."""
        output = self.output if self.growing is None else self.growing.bound(call).output
        return output.build(results, call.objects)

    @functools.cached_property
    def updated(self) -> frozenset[int]:
        """The positions of the inputs that it writes."""
        return frozenset(self.assembly.plan.updated.values())

    @functools.cached_property
    def choices(self) -> Mapping[str, Choice]:
        """What was decided by the hash of the regions; for the sizes that kernels were chosen for, if others are bound
        now."""
        first = {region.operators[0].name: region.hash for region in self.graph.regions}
        return {first[name]: choice for name, choice in self.decided.items()}

    @functools.cached_property
    def routes(self) -> Routes:
        """Which of the outputs have gradients."""
        return Routes(self.captured)

    @property
    def may_be_slower(self) -> bool:
        """Whether the original model may be faster, which takes many operators that are left to PyTorch: its own
        modules run them with less Python around each."""
        return len(self.assembly.unfused) >= _MANY_UNFUSED and self.unfused_share > _LARGE_SHARE

    @property
    def unfused(self) -> tuple[tuple[str, str], ...]:
        """(operator, reason) for what PyTorch runs between the first and the last operator of the regions."""
        return by_place(self.graph, self.assembly.unfused)[0]

    @property
    def outside(self) -> tuple[tuple[str, str], ...]:
        """(operator, reason) for what PyTorch runs before and after all regions."""
        return by_place(self.graph, self.assembly.unfused)[1]

    @property
    def is_current(self) -> bool:
        """Whether its masks are what they were."""
        return all(mask.is_current for mask in self.masks)


def mask_inputs(graph: OperatorGraph) -> tuple[int, ...]:
    """Which inputs of a graph are masks of attention and nothing else, by position: what biases are computed from that
    are tokens themselves are none."""
    masks = [op.inputs[1] for op in graph.operators if isinstance(op.semantics, ScoreMask) and len(op.inputs) > 1]
    found, other = _reached(graph, masks), _reached(graph, graph.outputs, masks=False)
    return tuple(i for i, name in enumerate(graph.inputs) if name in found and name not in other)


def _reached(graph: OperatorGraph, values: Sequence[str], masks: bool = True) -> set[str]:
    """What ``values`` are made of, all of it, or but for ``masks`` of attention."""
    found, pending = set[str](), list(values)
    while pending:
        name = graph.base(pending.pop())
        if name not in found:
            found.add(name)
            maker = graph.source(name)
            inputs = maker.inputs if maker else ()
            masked = not masks and maker is not None and isinstance(maker.semantics, ScoreMask)
            pending += inputs[:1] if masked else inputs
    return found


def large_masks(positions: Sequence[int], plan: ProgramPlan) -> tuple[int, ...]:
    """Those of the inputs at these positions that are large, and no row of a mask."""
    shapes = ((i, plan.inputs[i].shape) for i in positions)
    return tuple(i for i, shape in shapes if len(shape) > 1 and math.prod(shape) >= _LARGE_MASK)


Reasons = tuple[tuple[str, str], ...]


def by_place(graph: OperatorGraph, unfused: Reasons) -> tuple[Reasons, Reasons]:
    """Those (operator, reason) between the first and the last operator of a graph's regions, and the others. Kernels
    that only make masks of attention, at the start of a model, do not count."""
    position, computed = graph.position, _reached(graph, graph.outputs, masks=False)
    fused = [
        position[op.name]
        for region in graph.regions
        for op in region.operators
        if not computed.isdisjoint(graph.base(name) for name in op.outputs)
    ]
    is_inside = [bool(fused) and min(fused) <= position[name] <= max(fused) for name, _ in unfused]
    inside, outside = (
        tuple(u for u, there in zip(unfused, is_inside, strict=True) if there == s) for s in (True, False)
    )
    return inside, outside


def compile_call(
    model: nn.Module,
    call: FlatCall,
    store: WeightStore,
    target: Target,
    threads: int,
    *,
    options: Options = _DEFAULTS,
    tuner: Tuner | None = None,
    cache: KernelCache | None = None,
    states: States | None = None,
    captured: Captured | None = None,
    quantizer: Quantizer | None = None,
) -> Compiled:
    """Compile ``model`` for the shapes of ``call``.

    ``tuner`` supplies measured times of kernels; without it the cost model decides. ``states``, and their arena to
    compute in, on the device of the model, are shared with other programs; ``captured`` is what has been captured of
    this model for this call. Raises CaptureError when the model cannot be captured, BuildError, ToolchainError or
    CacheError when its kernels cannot be built.
    """
    cache = default_cache() if cache is None else cache
    attention = options.attention_now()
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage], clock = now - clock, now

    captured = capture(model, call) if captured is None else captured
    store.register(captured.parameters)
    lap("capture")
    graph = raise_graph(captured, attention, floating(target))
    graph = with_stored_integers(graph, captured.parameters, target)
    if quantizer is not None:
        graph = quantizer.apply(graph, captured.parameters, target)
    lap("raise")
    chosen, choices = choose_all(graph, target, tuner)
    lap("schemes")
    assembly = assemble(graph, chosen, target, threads)
    lap("render")
    kernels = load_kernels(assembly, target, cache)
    lap("build")
    states = States(Arena()) if states is None else states
    constants = program_constants(assembly, graph, captured.parameters, store, cache.root, states.arena.device)
    program = program_of(assembly.plan, kernels, constants, target, states.arena, options.cuda_graphs, states)
    lap("pack")
    total = sum(seconds.values())
    logger.info("compiled %d kernels in %.2f s: %s", len(assembly.kernels), total, seconds)
    share = unfused_share(graph, assembly, target)
    masks = tuple(functions_of(captured, attention))
    decided = by_first_operator(graph, choices)
    large = large_masks(mask_inputs(graph), assembly.plan)
    return Compiled(captured, lambda: graph, large, decided, assembly, program, captured.output, seconds, share, masks)


def unfused_share(graph: OperatorGraph, assembly: Assembly, target: Target) -> float:
    """The share of a program's predicted time that operators take which are left to PyTorch."""
    unfused = math.fsum(
        pytorch_seconds(graph, graph.operators[graph.position[name]], target) for name, _ in assembly.unfused
    )
    fused = math.fsum(choice.seconds for choice in assembly.choices if choice.kernel is not None)
    return unfused / (unfused + fused) if unfused else 0.0


def functions_of(captured: Captured, attention: AttentionSpec | None) -> Iterator[Mask]:
    """The masks of functions that a program follows from."""
    if attention is not None and attention.mask.has_functions:
        yield attention.mask
    for node in captured.graph.graph.nodes:
        if (key := key_in(node.target, node.args)) is not None:
            found = (spec.mask for spec in specs_of(key))
            yield from (mask for mask in found if mask.has_functions and mask.is_current)


def choose_all(
    graph: OperatorGraph, target: Target, tuner: Tuner | None = None
) -> tuple[list[GroupChoice], dict[str, Choice]]:
    """Schemes and kernels for all regions: the shortest path over predicted times, refined by measurement where there
    is a tuner. Equal regions are decided once.

    Returns the choices of all groups, and by region hash the choice that stands for its equals.
    """
    distinct: dict[str, Region] = {}
    for region in graph.regions:
        distinct.setdefault(region.hash, region)
    choices = [(default_scheme(region, IMPLEMENTATIONS, target), region) for region in distinct.values()]
    best = [choice for choice, _ in choices] if tuner is None else tuner.refine(choices)
    decided = dict(zip(distinct, best, strict=True))
    chosen: list[GroupChoice] = []
    for region in graph.regions:
        first, choice = distinct[region.hash], decided[region.hash]
        if region is first:
            chosen.extend(choice.groups)
            continue
        twin = dict(zip((op.name for op in first.operators), region.operators, strict=True))
        for group in choice.groups:
            chosen.append(group.on(graph.group(twin[op.name] for op in group.group.operators)))
    return chosen, decided


def by_first_operator(graph: OperatorGraph, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Choices by hash of regions, by the name of the first operator of the first region with that hash: operators keep
    their names when sizes are bound to other numbers."""
    found: dict[str, str] = {}
    for region in graph.regions:
        found.setdefault(region.hash, region.operators[0].name)
    return {found[key]: choice for key, choice in choices.items()}


def load_kernels(assembly: Assembly, target: Target, cache: KernelCache) -> dict[str, Kernel]:
    """Build what the cache lacks and load all kernels of a program."""
    return build_and_load(assembly.sources, target, headers=header_folder(target), cache=cache)


def program_constants(
    assembly: Assembly,
    graph: OperatorGraph,
    parameters: Mapping[str, Tensor],
    store: WeightStore,
    folder: Path | None = None,
    device: torch.device | None = None,
) -> list[Tensor]:
    """The constants of a plan, in its order, on ``device``; with ``folder``, originals that only take memory move to
    files there."""
    return store.load(assembly.plan.constants, graph.constants, parameters, tables_of(graph), folder, device)


def tables_of(graph: OperatorGraph) -> list[str]:
    """The values that rows are gathered from."""
    return [op.inputs[i] for op in graph.operators for i in op.semantics.gathers]
