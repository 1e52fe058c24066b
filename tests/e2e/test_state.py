"""What lives across calls, with a kernel that writes it: rows are appended to a buffer that later kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
import torch
from torch import Tensor, fx, nn

from fuser.codegen.assemble import assemble
from fuser.codegen.render import TEMPLATES, environment, header_folder
from fuser.frontend.aten import HANDLERS
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.frontend.raising import Raiser
from fuser.frontend.views import View
from fuser.ir.errors import IndexRangeError, KernelError
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, binary, unary
from fuser.ir.extents import Extents
from fuser.ir.graph import Operator, OperatorGraph, OperatorGroup, TensorSpec
from fuser.ir.operators import Extern, Pointwise, Ref, Semantics, Shape, TorchCall
from fuser.ir.target import Target, emulated_target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec, Table
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.module import compiler
from fuser.module.weights import WeightStore
from fuser.runtime.build import Source, build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.cuda_program import program_of
from fuser.runtime.device import cpu_target
from fuser.runtime.program import Arena, NativeStep, Program, States, TorchStep
from fuser.saved import codec
from fuser.search.measure import measure
from fuser.search.standalone import standalone, subgraph
from fuser.search.worker import Unit, _Bench

CAPACITY, COLUMNS = 8, 20
TARGETS: Sequence[Callable[[], Target]] = (cpu_target, emulated_target)


@dataclass(frozen=True)
class AppendRows(Semantics):
    """Writes the second input into the first, from the row on that the third holds; makes nothing."""

    kind = "append rows"
    writes = (0,)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        state, x, at = inputs
        state[int(at) : int(at) + len(x)] = x
        return ()

    def flops(self, inputs: Sequence[Shape], output: Shape) -> float:
        return 0.0

    def describe(self, inputs: Sequence[Shape], output: Shape) -> str:
        return f"{inputs[1][0]} rows of {output[0]}"


@dataclass(frozen=True)
class AppendRowsExtents(Extents):
    rows: int
    capacity: int


@dataclass(frozen=True)
class AppendRowsParameters:
    columns: int

    @property
    def extents(self) -> str:
        return AppendRowsExtents.declaration()


class AppendRowsFamily:
    name = "append_rows"

    def match(self, group: OperatorGroup, target: Target) -> OperatorGroup | None:
        return group if len(group.operators) == len(group.of(AppendRows)) == 1 else None


@dataclass(frozen=True)
class AppendRowsKernel(Implementation[OperatorGroup, AppendRowsParameters]):
    template: str

    def space(self, match: OperatorGroup, target: Target) -> Sequence[AppendRowsParameters]:
        return [AppendRowsParameters(match.graph.values[match.operators[0].inputs[1]].shape[-1])]

    def cost(self, match: OperatorGroup, parameters: AppendRowsParameters, target: Target) -> Cost:
        return Cost(0.0, 2.0 * match.graph.values[match.operators[0].inputs[1]].nbytes)

    def call(self, match: OperatorGroup, parameters: AppendRowsParameters, target: Target, threads: int) -> KernelCall:
        state, x, at = match.operators[0].inputs
        extents = AppendRowsExtents(match.graph.values[x].shape[0], match.graph.values[state].shape[0])
        return KernelCall(KernelSpec("append_rows", self.template, parameters), (state, x, at), extents, match.outputs)


TABLE: Table = {
    (AppendRowsFamily(), "cpu"): (AppendRowsKernel("append_rows.cpp.j2"),),
    (AppendRowsFamily(), "cuda"): (AppendRowsKernel("append_rows.cu.j2"),),
    **IMPLEMENTATIONS,
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", TABLE)
    loader = jinja2.FileSystemLoader([TEMPLATES, Path(__file__).parent])
    monkeypatch.setattr(environment(), "loader", loader)
    yield


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def graph_of(rows: int) -> OperatorGraph:
    """Twice the state before ``rows`` rows are appended, and after."""
    twice = Pointwise(binary(Op.ADD))
    operators = (
        Operator("read", twice, ("cache", "cache"), ("before",)),
        Operator("write", AppendRows(), ("cache", "x", "at"), ()),
        Operator("again", twice, ("cache", "cache"), ("after",)),
    )
    values = dict.fromkeys(("cache", "before", "after"), spec(CAPACITY, COLUMNS))
    values |= {"x": spec(rows, COLUMNS), "at": spec(1, dtype=torch.int64)}
    return OperatorGraph(operators, values, ("x", "at"), ("before", "after"), {}, states=("cache",))


def program_for(rows: int, target: Target, states: States | None = None) -> Program:
    graph = graph_of(rows)
    choices, _ = compiler.choose_all(graph, target)
    assembly = assemble(graph, choices, target, 2)
    assert all(isinstance(step, NativeStep) for step in assembly.plan.steps)
    kernels = compiler.load_kernels(assembly, target, default_cache())
    states = States(Arena()) if states is None else states
    return program_of(assembly.plan, kernels, [], target, states.arena, states=states)


def rows_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", TARGETS)
def test_two_programs_grow_one_state_in_the_order_of_their_operators(make: Callable[[], Target]) -> None:
    states = States(Arena())
    prompt, token = (program_for(rows, make(), states) for rows in (3, 1))
    cache = torch.zeros(CAPACITY, COLUMNS)
    for at, program, count in ((0, prompt, 3), (3, token, 1), (4, token, 1), (5, prompt, 3), (2, token, 1)):
        x = rows_of(count, at)
        before, after = program([x, torch.tensor([at])])
        reference = evaluate(graph_of(count), {"x": x, "at": torch.tensor([at]), "cache": cache})
        assert torch.equal(before, 2 * cache)
        cache[at : at + count] = x
        assert torch.equal(after, 2 * cache) and torch.equal(after, reference["after"])
        assert torch.equal(states["cache"], cache) and torch.equal(states["cache"], reference["cache"])
    states.reset()
    before, _ = token([rows_of(1, 9), torch.tensor([0])])
    assert torch.equal(before, torch.zeros(CAPACITY, COLUMNS))


@pytest.mark.parametrize("make", TARGETS)
def test_rows_past_the_end_are_refused_and_leave_the_state_alone(make: Callable[[], Target]) -> None:
    program = program_for(3, make())
    program([rows_of(3, 0), torch.tensor([5])])
    kept = program.states["cache"].clone()
    for at in (6, -1):
        with pytest.raises(IndexRangeError):
            program([rows_of(3, 1), torch.tensor([at])])
        assert torch.equal(program.states["cache"], kept)


def test_programs_have_states_of_their_own_unless_they_are_given_some() -> None:
    one, other = program_for(1, cpu_target()), program_for(1, cpu_target())
    one([rows_of(1, 0), torch.tensor([0])])
    assert one.states["cache"].any() and not other.states["cache"].any()


def test_new_constants_and_a_larger_arena_leave_states_alone() -> None:
    program = program_for(1, cpu_target())
    program([rows_of(1, 0), torch.tensor([0])])
    kept = program.states["cache"].clone()
    program.set_constants([])
    with program.states.arena.lock:
        program.states.arena.require(1 << 20)
    before, _ = program([rows_of(1, 1), torch.tensor([1])])
    assert torch.equal(before, 2 * kept)


def test_pytorch_runs_a_write_that_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IMPLEMENTATIONS", IMPLEMENTATIONS)
    graph, target = graph_of(2), cpu_target()
    assembly = assemble(graph, compiler.choose_all(graph, target)[0], target, 1)
    assert [type(step) for step in assembly.plan.steps] == [NativeStep, TorchStep, NativeStep]
    program = program_of(assembly.plan, compiler.load_kernels(assembly, target, default_cache()), [], target, Arena())
    before, after = program([x := rows_of(2, 0), torch.tensor([4])])
    assert not before.any() and torch.equal(after[4:6], 2 * x) and int(after.any(-1).sum()) == 2


def test_plans_with_states_are_plain_data() -> None:
    graph, target = graph_of(2), cpu_target()
    plan = assemble(graph, compiler.choose_all(graph, target)[0], target, 1).plan
    assert codec.load(codec.dump(plan.states)) == plan.states
    assert codec.load(codec.dump(plan.returns)) == plan.returns


def test_what_writes_is_measured_on_a_state_of_its_own() -> None:
    graph, target = graph_of(2), cpu_target()
    choices, _ = compiler.choose_all(graph, target)
    (write,) = (c for c in choices if c.family == "append_rows")
    alone = standalone(graph.regions[0])
    assert alone.graph.states == ("cache",) and set(alone.graph.inputs) == {"x", "at"}
    reader = standalone(type(graph.regions[0])(graph, (graph.operators[0],)))
    assert reader.graph.states == () and reader.graph.inputs == ("cache",)
    (found,) = measure([[write]], target, 1, default_cache())
    assert found.seconds > 0


def test_the_search_checks_what_is_written(tmp_path: Path) -> None:
    graph, target = graph_of(2), cpu_target()
    (write,) = (c for c in compiler.choose_all(graph, target)[0] if c.family == "append_rows")
    assembly = assemble(subgraph([write]), [write], target, 1)
    paths = build(list(assembly.sources), target, headers=header_folder(target), cache=default_cache())
    (symbol,) = (spec.symbol for spec in assembly.specs)
    idle = build(
        [Source(symbol, f'#include "abi.h"\nextern "C" int {symbol}(const FuserArgs*, void*) {{ return 0; }}')],
        target,
        headers=header_folder(target),
        cache=KernelCache(tmp_path),
    )
    bench = _Bench(target, 1, torch.device("cpu"), lambda *what: None)
    found = bench.time(
        [Unit("good", "region", (write,), dict(paths), 1), Unit("idle", "region", (write,), {**paths, **idle}, 1)],
        0.01,
        False,
    )
    assert found["good"].seconds is not None, found["good"]
    assert found["idle"].seconds is None and "wrong numbers: the relative error of cache" in found["idle"].failure


# ---- from a model on: a handler that makes a state of what it is given


class Model(nn.Module):
    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return torch.index_select(x, 0, at)


def raise_append(r: Raiser, node: fx.Node) -> View:
    """Appends, and gives twice the state."""
    x, at = (r.realize(r.view(node.args[i])) for i in (0, 2))
    r.add_state("cache", spec(CAPACITY, COLUMNS))
    r.operators.append(Operator(f"{node.name}_append", AppendRows(), ("cache", x, at), ()))
    return r.emit(Pointwise(binary(Op.ADD)), node.name, ("cache", "cache"), spec(CAPACITY, COLUMNS))


def test_programs_of_a_model_share_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HANDLERS, torch.ops.aten.index_select.default, raise_append)
    model, states = Model().eval(), States(Arena())
    cache = torch.zeros(CAPACITY, COLUMNS)
    for at, count in ((0, 4), (4, 2)):
        call = flatten_call((x := rows_of(count, at), torch.tensor([at])), {})
        compiled = compiler.compile_call(model, call, WeightStore(model), cpu_target(), 2, states=states)
        compiled.program([x, torch.tensor([at])])
        cache[at : at + count] = x
    assert torch.equal(states["cache"], cache)


def test_writes_are_neither_dropped_nor_moved_across(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch runs goes first, but not before a write that it sees, nor after one that it does not see."""

    def raise_them(r: Raiser, node: fx.Node) -> View:
        x, at = (r.realize(r.view(node.args[i])) for i in (0, 2))
        r.add_state("cache", spec(CAPACITY, COLUMNS))
        r.add_state("other", spec(CAPACITY, COLUMNS))
        seen = r.emit(Pointwise(unary(Op.EXP)), "exp", (x,), r.values[x])
        copied = Extern(TorchCall(torch.clone, (Ref(0),)), "copied for this test")
        r.operators.append(Operator("write", AppendRows(), ("cache", seen.base, at), ()))
        between = r.emit(copied, "between", ("cache",), spec(CAPACITY, COLUMNS))
        r.emit(copied, "elsewhere", ("other",), spec(CAPACITY, COLUMNS))
        r.operators.append(Operator("rewrite", AppendRows(), ("cache", "elsewhere", at), ()))
        r.operators.append(Operator("last", AppendRows(), ("other", seen.base, at), ()))
        return between

    monkeypatch.setitem(HANDLERS, torch.ops.aten.index_select.default, raise_them)
    call = flatten_call((rows_of(CAPACITY, 0), torch.tensor([0])), {})
    graph = raise_graph(capture(Model().eval(), call))
    assert [op.name for op in graph.compute] == ["elsewhere", "exp", "write", "between", "rewrite", "last"]
    assert set(graph.states) == {"cache", "other"}


# ---- bad use


def test_a_state_of_another_size_is_refused() -> None:
    states = States(Arena())
    program_for(1, cpu_target(), states)
    plan = program_for(1, cpu_target()).plan
    ((name, slot),) = plan.states.items()
    with pytest.raises(KernelError, match=r"the state cache is torch.float32 \(8, 20\).*takes torch.float32 \(9, 20\)"):
        states.require({name: type(slot)(slot.memory, 0, 0, (9, 20), (20, 1), slot.dtype)})


def test_programs_that_share_states_share_an_arena() -> None:
    program = program_for(1, cpu_target())
    with pytest.raises(ValueError, match="share the arena"):
        program_of(program.plan, program.kernels, [], cpu_target(), Arena(), states=program.states)
