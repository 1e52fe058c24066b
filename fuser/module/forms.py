"""Forms: a model captured once for all calls that differ in sizes alone, and compiled by putting numbers to names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.template import generalized
from fuser.frontend.calls import FlatCall
from fuser.frontend.capture import Dynamic, StateError, capture
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.frontend.output_structure import OutputSpec
from fuser.ir.binding import Binder
from fuser.ir.errors import CaptureError, FuserError, PackingError
from fuser.ir.graph import OperatorGraph
from fuser.ir.packing import TOKENS, pack
from fuser.ir.target import Target
from fuser.kernels.base import Packed, floating
from fuser.module.acceptance import device_of
from fuser.module.compiler import (
    Compiled,
    by_first_operator,
    choose_all,
    functions_of,
    large_masks,
    load_kernels,
    mask_inputs,
    tables_of,
    unfused_share,
)
from fuser.module.growing import Growing
from fuser.module.options import Options
from fuser.module.quantizing import Quantizer
from fuser.module.stored_integers import with_stored_integers
from fuser.module.weights import Use, WeightStore
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.cuda_program import program_of
from fuser.runtime.library import Kernel
from fuser.runtime.program import ProgramPlan, States
from fuser.search.tuning import Tuner

_CAPTURES = 4
"""Captures for calls that differ in sizes alone: a model may do something else from some size on."""
_POSTPONED = 2
"""Calls with objects that the original runs before such another capture is made."""
_REASONS = 8
_VARIANTS = 8
"""Graphs of one form, which differ in what was decided by constants that depend on sizes."""


def form_key(call: FlatCall) -> Hashable:
    """Equal for calls that differ in sizes above one alone; None for a call whose tensors are not contiguous."""
    key = []
    for part in call.alike or call.key:
        if isinstance(part, tuple) and part and isinstance(part[0], tuple):
            shape, dtype, device, layout, twin = part
            if layout is not None:
                return None
            part = tuple(min(size, 2) for size in shape), dtype, device, twin
        key.append(part)
    return tuple(key)


def dynamic_dimensions(
    model: nn.Module, call: FlatCall, wanted: bool | Mapping[str, Collection[int]] = True
) -> Dynamic:
    """The dimensions of a call's tensors that may have other sizes: those ``wanted`` for inputs by name, of others
    batch and sequence, as far as one can tell.

    Those are the first two dimensions of tensors with less than four; else the first (of images, say), and those that
    are as long as one of these, or of a cache (of masks). Of tensors in objects, such as caches, they are all.
    """
    given = call.tensors[: len(call.slots)]
    flat = [tensor for tensor in given if tensor.ndim < 4]
    held = call.tensors[len(given) :]
    lengths = {n for sizes in (*(t.shape[:2] for t in flat), *(t.shape for t in held)) for n in sizes if n > 1}
    found: list[Collection[int]] = []
    for tensor in given:
        if tensor.ndim < 4:
            found.append(range(min(tensor.ndim, 2)))
        else:
            found.append([d for d, size in enumerate(tensor.shape) if d == 0 or (d > 1 and size in lengths)])
    found += [range(tensor.ndim) for tensor in held]
    if isinstance(wanted, Mapping):
        for i, name in _names(model, call).items():
            if name in wanted:
                found[i] = [d % call.tensors[i].ndim for d in wanted[name]]
    return found


@dataclass(frozen=True)
class _Place:
    index: int


def _names(model: nn.Module, call: FlatCall) -> dict[int, str]:
    """The names of the arguments that a call's tensors are, or are part of."""
    args, kwargs = call.unflatten([_Place(i) for i in range(len(call.tensors))])
    given = inspect.signature(model.forward).bind(*args, **kwargs)
    arguments = dict(given.arguments)
    kind = inspect.Parameter.VAR_KEYWORD
    more = next((p.name for p in given.signature.parameters.values() if p.kind is kind), "")
    arguments.update(arguments.pop(more, {}))
    return {
        leaf.index: name
        for name, value in arguments.items()
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, _Place)
    }


class Template:
    """Kernels and a plan with named sizes, for sizes of one order of magnitude."""

    def __init__(
        self,
        late: OperatorGraph,
        graph: OperatorGraph,
        target: Target,
        threads: int,
        tuner: Tuner | None,
        cache: KernelCache,
        lap: Callable[[str], None],
        others: Iterable[Template],
    ) -> None:
        """``late`` with the kernels that are chosen for ``graph``, which is ``late`` for some sizes; ``lap`` is told
        the end of every stage. All but times is that of one of the ``others`` of ``late`` that has the same kernels."""
        chosen, choices = choose_all(graph, target, tuner)
        self.decided = by_first_operator(graph, choices)
        self._made_of = target, threads, [(*(op.name for op in c.group.operators), c.kernel_key) for c in chosen]
        self._like: Template = next((other for other in others if other._made_of == self._made_of), self)
        lap("schemes")
        if self._like is self:
            made = assemble(late, generalized(chosen, late, target), target, threads)
            self.plan = made.template
        else:
            made, self.plan = self._like.assembly, self._like.plan
        self.assembly: Assembly = dataclasses.replace(made, choices=tuple(chosen))
        self.unfused_share = unfused_share(graph, self.assembly, target)
        lap("render")
        self.kernels: dict[str, Kernel] = (
            load_kernels(self.assembly, target, cache) if self._like is self else self._like.kernels
        )
        lap("build")
        # Constants that follow from sizes are each program's own.
        self._own = [_is_late(late, ref) for ref in self.assembly.plan.constants]
        self._shared: tuple[int, list[Tensor]] | None = None
        self._late = late

    @functools.cached_property
    def late(self) -> tuple[ProgramPlan, list[int], dict[str, Any]]:
        """The plan with named sizes, the positions of its constants that depend on them, and what these are made of."""
        refs = [ref for ref, own in zip(self.plan.plan.constants, self._own, strict=True) if own]
        found: dict[str, Any] = {}
        pending = [v for ref in refs for v in (ref.values if isinstance(ref, Packed) else (ref,)) if isinstance(v, str)]
        while pending:
            name = pending.pop()
            if name not in found:
                found[name] = self._late.constants[name]
                pending += found[name].sources
        return self.plan.plan, [i for i, own in enumerate(self._own) if own], found

    @functools.cached_property
    def _made(self) -> Binder[dict[str, Any]]:
        """What constants that depend on sizes are made of."""
        return Binder(self.late[2])

    def use(self, parameters: Mapping[str, Tensor]) -> Use:
        """The constants that all of its programs share."""
        refs = [ref for ref, own in zip(self.assembly.plan.constants, self._own, strict=True) if not own]
        return refs, self._late.constants, parameters

    def constants(
        self,
        plan: ProgramPlan,
        sizes: Mapping[str, int],
        parameters: Mapping[str, Tensor],
        store: WeightStore,
        folder: Path,
        device: torch.device,
    ) -> list[Tensor]:
        """Those of the program with this ``plan`` for these ``sizes``, in its order."""
        if self._like is not self:
            return self._like.constants(plan, sizes, parameters, store, folder, device)
        if self._shared is None or self._shared[0] != store.generation:
            refs, constants, _ = self.use(parameters)
            tables = tables_of(self._late)
            self._shared = store.generation, store.load(refs, constants, parameters, tables, folder, device)
        shared, made = iter(self._shared[1]), self._made(sizes)
        return [
            store.made(ref, made, parameters, device) if own else next(shared)
            for ref, own in zip(plan.constants, self._own, strict=True)
        ]


def _is_late(graph: OperatorGraph, ref: Any) -> bool:
    """Whether a constant depends on named sizes."""
    if isinstance(ref, Packed):
        return any(_is_late(graph, value) for value in ref.values)
    if not isinstance(ref, str):
        return bool(Binder(ref).names)
    found = graph.constants[ref]
    return bool(Binder(found.call).names) or any(_is_late(graph, source) for source in found.sources)


def magnitude(counts: Sequence[str] | None, sizes: Mapping[str, int]) -> int:
    """Powers of four of the product of sizes: of those with names in ``counts``, or of all."""
    return math.prod(sizes.values() if counts is None else [sizes[name] for name in counts]).bit_length() // 2


@dataclass
class Variant:
    """A graph with named sizes, and what it was compiled to, by target, threads and order of magnitude."""

    graph: OperatorGraph
    dtypes: frozenset[torch.dtype]
    binder: Binder[OperatorGraph]
    assumptions: Binder[tuple[bool, ...]]
    templates: dict[tuple[Target, int, int], Template] = field(default_factory=dict)
    counts: tuple[str, ...] | None = None
    """The sizes that the number of rows follows from; None: all."""
    packing: Packing | str | None = None
    """The graph without padding, or why there is none. (An error would keep the frames that it was raised through.)"""

    @classmethod
    def of(cls, graph: OperatorGraph, dtypes: frozenset[torch.dtype], counts: tuple[str, ...] | None = None) -> Variant:
        return cls(graph, dtypes, Binder(graph), Binder(graph.assumptions), counts=counts)

    @functools.cached_property
    def mask_inputs(self) -> tuple[int, ...]:
        """Which inputs end as masks of attention, by position."""
        return mask_inputs(self.graph)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the graph is right for these sizes."""
        return all(self.assumptions(sizes))

    def magnitude(self, sizes: Mapping[str, int]) -> int:
        """Powers of four of the number of rows: kernels want other tiles for few than for many."""
        return magnitude(self.counts, sizes)

    def packed(self) -> Packing:
        """The graph without rows that are padding. Raises PackingError for one that has none."""
        if self.packing is None:
            try:
                self.packing = Packing(self)
            except PackingError as error:
                self.packing = str(error)
        if isinstance(self.packing, str):
            raise PackingError(self.packing)
        return self.packing


class Packing:
    """A graph in two parts, with what was compiled of each (see :class:`fuser.ir.packing.PackedGraph`)."""

    def __init__(self, variant: Variant) -> None:
        self.graph = pack(variant.graph)
        self.before = Variant.of(self.graph.before, variant.dtypes)
        self.rows = Variant.of(self.graph.rows, variant.dtypes, (TOKENS,))


@contextlib.contextmanager
def _evaluating() -> Iterator[None]:
    """What PyTorch says against the constants of a model for some sizes, as the reason why these are not served."""
    try:
        yield
    except FuserError:
        raise
    except Exception as error:
        raise CaptureError(f"what the model makes of its constants for these sizes fails: {error!s:.200}") from error


class Form:
    """A model captured for all sizes of calls of one form.

    A call binds a plan with named sizes to its own: nothing is captured, no code is built and no operator is looked at,
    but for the first sizes of an order of magnitude, for which kernels are chosen, and for sizes for which constants
    such as masks decide otherwise. Raises CaptureError when the model cannot be captured so.
    """

    def __init__(
        self,
        model: nn.Module,
        call: FlatCall,
        store: WeightStore,
        options: Options,
        quantizer: Quantizer | None = None,
    ) -> None:
        start = time.perf_counter()
        self.captured: Captured = capture(model, call, dynamic_dimensions(model, call, options.dynamic))
        self._seconds = {"capture": time.perf_counter() - start}
        self._plain = len(call.slots)
        self.options = options
        self._quantizer = quantizer
        self.device = device_of(call)
        self._output: Binder[OutputSpec] = Binder(self.captured.output)
        self._variants: list[Variant] = []
        self._attention = options.attention_now()
        self._masks = tuple(functions_of(self.captured, self._attention))
        store.register(self.captured.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """The sizes that calls may differ in."""
        return tuple(self.captured.sizes.names)

    @property
    def variants(self) -> Sequence[Variant]:
        """Its graphs, each for some of the sizes, with what was compiled of them."""
        return tuple(self._variants)

    @property
    def graphs(self) -> list[OperatorGraph]:
        """The graphs that programs were made of."""
        return [variant.graph for variant in self._variants]

    @property
    def is_current(self) -> bool:
        """Whether its masks are what they were."""
        return all(mask.is_current for mask in self._masks)

    def compile(
        self,
        call: FlatCall,
        store: WeightStore,
        target: Target,
        threads: int,
        states: States,
        tuner: Tuner | None = None,
        cache: KernelCache | None = None,
    ) -> Compiled:
        """The program of a call. Raises CaptureError for a call that the captured graph does not hold for, and
        BuildError, ToolchainError or CacheError when kernels cannot be built."""
        start = time.perf_counter()
        sizes = self.sizes(call)
        with _evaluating():
            variant = self._variant(sizes, target)
        self._seconds["raise"] = time.perf_counter() - start
        return self.compile_part(variant, sizes, store, target, threads, states, tuner, cache)

    def compile_part(
        self,
        variant: Variant,
        sizes: Mapping[str, int],
        store: WeightStore,
        target: Target,
        threads: int,
        states: States,
        tuner: Tuner | None = None,
        cache: KernelCache | None = None,
    ) -> Compiled:
        """The program of one of its graphs, or of a part of one."""
        cache = default_cache() if cache is None else cache
        clock, seconds = time.perf_counter(), self._seconds
        self._seconds = {}

        def lap(stage: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[stage], clock = seconds.get(stage, 0.0) + now - clock, now

        captured = self.captured
        key = (target, threads, variant.magnitude(sizes))
        if key not in variant.templates:
            with _evaluating():
                graph = variant.binder(sizes)
            lap("raise")
            others = variant.templates.values()
            variant.templates[key] = Template(variant.graph, graph, target, threads, tuner, cache, lap, others)
        template = variant.templates[key]
        arena = states.arena
        with _evaluating():
            assembly = dataclasses.replace(template.assembly, plan=template.plan.bind(sizes))
            lap("bind")
            constants = template.constants(assembly.plan, sizes, captured.parameters, store, cache.root, arena.device)
        program = program_of(
            assembly.plan, template.kernels, constants, target, arena, self.options.cuda_graphs, states
        )
        growing = self._growing(variant, template, sizes, store, arena.device) if target.kind == "cpu" else None
        lap("pack")
        return Compiled(
            captured,
            functools.partial(variant.binder, sizes),
            large_masks(variant.mask_inputs, assembly.plan),
            template.decided,
            assembly,
            program,
            self._output(sizes),
            seconds,
            template.unfused_share,
            self._masks,
            sizes,
            growing,
        )

    def _growing(
        self, variant: Variant, template: Template, sizes: Mapping[str, int], store: WeightStore, device: torch.device
    ) -> Growing | None:
        """How a program follows the sizes that calls' objects alone have, if there are such."""
        if sizes.keys() != self.captured.sizes.names.keys():
            # A part of the model, which nobody calls.
            return None
        fixed = {name: sizes[name] for name in self._arguments}
        if len(fixed) == len(sizes):
            return None
        plan, own, constants = template.late
        parameters = self.captured.parameters

        def made(ref: Any, constants: Mapping[str, Any], known: dict[str, Tensor]) -> Tensor:
            return store.made(ref, constants, parameters, device, known)

        tree = plan, constants, self.captured.output
        return Growing(self.captured.sizes, fixed, tree, own, made, variant.holds)

    @property
    def _arguments(self) -> list[str]:
        """The sizes that are read from arguments that are tensors."""
        return [name for name, (i, _) in self.captured.sizes.names.items() if i < self._plain]

    def sizes(self, call: FlatCall) -> dict[str, int]:
        """The named sizes of a call. Raises CaptureError for one that the captured graph does not hold for."""
        return self.captured.sizes.sizes([tensor.shape for tensor in call.tensors])

    def exact(self, call: FlatCall, target: Target) -> OperatorGraph:
        """The graph of a call without quantization. Raises CaptureError as :meth:`compile` does."""
        sizes = self.sizes(call)
        with _evaluating():
            graph = raise_graph(self.captured, self._attention, floating(target), sizes)
            graph = with_stored_integers(graph, self.captured.parameters, target)
            return Binder(graph)(sizes)

    def packing(self, sizes: Mapping[str, int], target: Target) -> Packing:
        """The graph for these sizes without rows that are padding. Raises PackingError for one that has none, and
        CaptureError as :meth:`compile` does."""
        with _evaluating():
            return self._variant(sizes, target).packed()

    @property
    def parts(self) -> Iterator[Variant]:
        """Everything that programs are made of."""
        for variant in self._variants:
            yield variant
            if isinstance(variant.packing, Packing):
                yield from (variant.packing.before, variant.packing.rows)

    def release(self) -> None:
        """Forget kernels and constants until another call wants them."""
        for part in self.parts:
            part.templates.clear()

    @property
    def uses(self) -> Iterator[Use]:
        """The constants that its programs share."""
        for part in self.parts:
            for template in part.templates.values():
                yield template.use(self.captured.parameters)

    def _variant(self, sizes: Mapping[str, int], target: Target) -> Variant:
        dtypes = floating(target)
        for variant in self._variants:
            if variant.dtypes == dtypes and variant.holds(sizes):
                return variant
        if len(self._variants) >= _VARIANTS:
            raise CaptureError("constants of the model decide otherwise for each of its sizes")
        graph = raise_graph(self.captured, self._attention, dtypes, sizes)
        graph = with_stored_integers(graph, self.captured.parameters, target)
        if self._quantizer is not None:
            graph = self._quantizer.apply(graph, self.captured.parameters, target)
        variant = Variant.of(graph, dtypes, tuple(self._arguments) if len(self._arguments) < len(self.names) else None)
        self._variants.append(variant)
        return variant


class Forms:
    """The captures for all sizes of one model, by what the calls that they serve have in common: one, or several where
    the model does something else for some sizes, or why there can be none."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[Form]] = {}
        self._failed: dict[Hashable, str] = {}
        self._refused: dict[str, None] = {}
        self._postponed: dict[Hashable, int] = {}

    def of(self, name: Hashable) -> list[Form]:
        """Those for calls with ``name`` in common."""
        found = [form for form in self._found.get(name, ()) if form.is_current]
        if name in self._found:
            self._found[name] = found
        return found

    def capture(self, name: Hashable, make: Callable[[], Form]) -> Form | None:
        """Another one, unless that has failed before, or could not serve more calls than those that there are. Raises
        StateError, after which it may be tried again."""
        found = self._found.get(name, [])
        if name is None or name in self._failed or len(found) >= _CAPTURES or not all(form.names for form in found):
            return None
        try:
            form = make()
        except StateError:
            raise
        except FuserError as error:
            self._failed[name] = str(error)
            return None
        self._found[name] = [*found, form]
        return form

    def postpones(self, name: Hashable) -> bool:
        """Whether another capture is to wait for more such calls: the steps in which caches reach their windows are
        unlike those before and after them."""
        if not self._found.get(name):
            return False
        count = self._postponed.get(name, 0)
        self._postponed[name] = (count + 1) % (_POSTPONED + 1)
        return count < _POSTPONED

    def has_failed(self, name: Hashable) -> bool:
        """Whether there can be none for calls with ``name`` in common."""
        return name in self._failed

    def refused(self, reason: str) -> None:
        """A call was not served, for a reason."""
        self._refused[reason] = None
        while len(self._refused) > _REASONS:
            del self._refused[next(iter(self._refused))]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why calls were captured for their shapes alone, the last few."""
        return tuple(dict.fromkeys((*self._failed.values(), *self._refused)))

    def keep(self, condition: Callable[[Form], bool]) -> None:
        """Forget the others, and what has failed."""
        self._found = {name: [form for form in found if condition(form)] for name, found in self._found.items()}
        self._failed.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self._failed.clear()
        self._refused.clear()
        self._postponed.clear()

    def items(self) -> list[tuple[Any, Form]]:
        """All with the names of their calls."""
        return [(name, form) for name, found in self._found.items() for form in found]

    def __iter__(self) -> Iterator[Form]:
        return (form for found in self._found.values() for form in found)
