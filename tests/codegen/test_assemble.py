"""Plans of random graphs, run by the rules of their slots alone: order, memory, results and outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.choice import GroupChoice
from fuser.ir.errors import FuserError
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, binary, softmax, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Bias, Extern, Gemm, Pointwise, Ref, Semantics, Softmax, TorchCall, View, laid_out
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall, LibraryCall
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.runtime.program import RUNNER, Memory, NativeStep, Slot, TorchStep
from fuser.search.partition import choose, default_scheme

TARGET = Target("cpu", "avx2", frozenset(), 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 2e-6)
N = 4
aten = torch.ops.aten


class Graphs:
    """A graph of matrices and views of them, operator by operator."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.values = {"x": TensorSpec.contiguous((N, N), torch.float32)}
        self.values["row"] = TensorSpec.contiguous((N,), torch.float32)
        self.matrices = ["x"]

    def add(self, semantics: Semantics, *inputs: str, spec: TensorSpec | None = None, name: str = "") -> str:
        output = name or f"v{len(self.operators)}"
        self.values[output] = spec or TensorSpec.contiguous(self.values[inputs[0]].shape, torch.float32)
        self.operators.append(Operator(f"make_{output}", semantics, inputs, (output,)))
        if len(self.values[output].shape) == 2:
            self.matrices.append(output)
        return output

    def unary(self, source: str, op: Op = Op.TANH) -> str:
        return self.add(Pointwise(unary(op)), source)

    def sum(self, first: str, second: str) -> str:
        return self.add(Pointwise(binary(Op.ADD)), first, second)

    def extern(self, source: str, call: TorchCall | None = None) -> str:
        return self.add(Extern(call or TorchCall(torch.cumsum, (Ref(0), 1)), "no kernel sums along rows"), source)

    def same(self, source: str) -> str:
        """What PyTorch returns is the very memory that it was given."""
        spec = dataclasses.replace(self.values[source].layout)
        return self.add(Extern(TorchCall(torch.detach, (Ref(0),)), "returns its input"), source, spec=spec)

    def transposed(self, source: str) -> str:
        spec = self.values[source]
        view = TensorSpec(spec.shape[::-1], spec.dtype, spec.strides[::-1], spec.base or source, spec.offset)
        return self.add(View(TorchCall(torch.transpose, (Ref(0), 0, 1))), source, spec=view)

    def tail(self, source: str) -> str:
        """All rows but the first, as long as there are two."""
        spec = self.values[source]
        rows = max(spec.shape[0] - 1, 1)
        offset = spec.offset + (spec.shape[0] - rows) * spec.strides[0]
        view = TensorSpec((rows, spec.shape[1]), spec.dtype, spec.strides, spec.base or source, offset)
        return self.add(View(TorchCall(torch.narrow, (Ref(0), 0, spec.shape[0] - rows, rows))), source, spec=view)

    def graph(self, *outputs: str) -> OperatorGraph:
        return OperatorGraph(tuple(self.operators), self.values, ("x",), outputs, {"row": Constant("row")})


@st.composite
def graphs(draw: st.DrawFn) -> OperatorGraph:
    made = Graphs()
    for _ in range(draw(st.integers(1, 14))):
        # Mostly of recent values, so that chains get long.
        source, other = (made.matrices[-1 - draw(st.integers(0, min(3, len(made.matrices) - 1)))] for _ in range(2))
        match draw(st.sampled_from(["unary", "unary", "sum", "bias", "softmax", "extern", "same", "view", "tail"])):
            case "unary":
                made.unary(source)
            case "sum":
                alike = made.values[source].shape == made.values[other].shape
                made.unary(made.sum(source, other if alike else source), Op.SIGMOID)
            case "bias" if made.values[source].shape[1] == N:
                made.add(Bias(), source, "row")
            case "softmax":
                made.add(Softmax(masked=False), source)
            case "extern":
                made.unary(made.extern(source))
            case "same":
                made.same(source)
            case "view":
                made.transposed(source)
            case "tail":
                made.tail(source)
    candidates = [v for v in made.matrices if (made.values[v].base or v) != "x"] or [made.unary("x")]
    outputs = draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3, unique=True))
    return made.graph(*outputs)


def assembled(graph: OperatorGraph) -> Assembly:
    choices = [c for region in graph.regions for c in default_scheme(region, IMPLEMENTATIONS, TARGET).groups]
    return assemble(graph, choices, TARGET, 2)


class Interpreter:
    """Runs a plan step by step: PyTorch's steps as they are, kernels by the meaning of their operators, on memory that
    holds NaN until it is written."""

    def __init__(self, assembly: Assembly, values: Mapping[str, Tensor]) -> None:
        plan = assembly.plan
        self.assembly = assembly
        self.memory: dict[tuple[Memory, int], Tensor] = {(Memory.ARENA, 0): self._poisoned(plan.arena_bytes)}
        for i, spec in enumerate(plan.outputs):
            self.memory[Memory.OUTPUT, i] = self._poisoned(4 * (1 + sum((n - 1) * s for n, s in _dims(spec))))
        self.memory[Memory.INPUT, 0] = values["x"].flatten()
        self.memory |= {(Memory.CONSTANT, i): values[name].flatten() for i, name in enumerate(plan.constants)}
        self.groups = {"+".join(op.name for op in c.group.operators): c for c in assembly.choices}

    @staticmethod
    def _poisoned(size: int) -> Tensor:
        return torch.full((-(-size // 4),), torch.nan)

    def tensor(self, slot: Slot) -> Tensor:
        memory = self.memory[slot.memory, slot.index]
        assert slot.offset % 4 == 0 and slot.dtype is torch.float32
        return memory.as_strided(slot.shape, slot.strides, memory.storage_offset() + slot.offset // 4)

    def run(self) -> tuple[Tensor, ...]:
        plan = self.assembly.plan
        for label, step in zip(self.assembly.labels, plan.steps, strict=True):
            if isinstance(step, NativeStep):
                self._launch(self.groups[label], step)
                continue
            assert step.out is None
            results = step.call(*map(self.tensor, step.inputs))
            for slot, result in zip(step.results, results, strict=True):
                assert slot.memory is Memory.RESULT and slot.shape == result.shape and slot.offset == 0
                own = result if result.stride() == slot.strides else laid_out(result, slot.strides)
                self.memory[Memory.RESULT, slot.index] = own
        return tuple(self.tensor(slot).clone() for slot in plan.returns)

    def _launch(self, choice: GroupChoice, step: NativeStep) -> None:
        call = choice.call(TARGET, 2)
        assert isinstance(call, KernelCall) and call.spec.symbol == step.symbol
        slots = dict(zip(call.tensors, step.tensors, strict=True))
        written = {v: self.tensor(slots.pop(v)) for v in call.outputs}
        read = {v: self.tensor(slot) for v, slot in slots.items() if isinstance(v, str)}
        for a, b in itertools.product(written.values(), read.values()):
            assert not _addresses(a) & _addresses(b), "a kernel writes what it still reads"
        found = evaluate(choice.group, read, torch.float64)
        for value, tensor in written.items():
            tensor.copy_(found[value])


def _dims(slot: Slot) -> Sequence[tuple[int, int]]:
    return list(zip(slot.shape, slot.strides, strict=True))


def _addresses(tensor: Tensor) -> set[int]:
    numbers = torch.arange(tensor.untyped_storage().nbytes() // 4)
    start = tensor.untyped_storage().data_ptr()
    return {
        start + 4 * int(i) for i in numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
    }


def values_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(N, N, generator=generator), "row": torch.randn(N, generator=generator)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_a_plan_computes_its_graph_in_any_memory(graph: OperatorGraph) -> None:
    values = values_of(0)
    expected = evaluate(graph, values, torch.float64)
    found = Interpreter(assembled(graph), values).run()
    for value, result in zip(graph.outputs, found, strict=True):
        torch.testing.assert_close(result.double(), expected[value], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graphs())
def test_every_operator_that_does_work_is_in_exactly_one_step(graph: OperatorGraph) -> None:
    assembly = assembled(graph)
    steps = [label.split("+") for label in assembly.labels]
    assert sorted(name for step in steps for name in step) == sorted(op.name for op in graph.compute)
    at = {name: i for i, step in enumerate(steps) for name in step}
    assert all(at[a] <= at[b] for a, b in graph.digraph.edges), "a step reads what a later one makes"
    native = [step for step in assembly.plan.steps if isinstance(step, NativeStep)]
    assert sum(kernel.calls for kernel in assembly.kernels) == len(native)
    assert set(assembly.plan.symbols) == {source.symbol for source in assembly.sources}
    assert [name for name, _ in assembly.unfused] == [
        label for label, step in zip(assembly.labels, assembly.plan.steps, strict=True) if isinstance(step, TorchStep)
    ]


# ---- memory


def test_values_live_in_the_arena_results_in_pytorchs_memory_and_what_is_returned_in_storage_of_the_call() -> None:
    made = Graphs()
    first = made.add(Bias(), "x", "row")
    listed = made.extern(first)
    second = made.unary(listed)
    again = made.extern(second)
    third = made.unary(again)
    assembly = assembled(made.graph(third, again, made.transposed(third)))
    plan = assembly.plan
    assert [type(step) for step in plan.steps] == [NativeStep, TorchStep, NativeStep, TorchStep, NativeStep]
    assert plan.constants == ("row",) and plan.result_count == 2
    kernel, summed, tanh, resummed, last = plan.steps
    assert isinstance(kernel, NativeStep) and isinstance(tanh, NativeStep) and isinstance(last, NativeStep)
    assert isinstance(summed, TorchStep) and isinstance(resummed, TorchStep)
    assert [slot.memory for slot in kernel.tensors] == [Memory.INPUT, Memory.CONSTANT, Memory.ARENA]
    assert summed.inputs == kernel.tensors[-1:] and summed.results[0].memory is Memory.RESULT
    assert tanh.tensors[0] == summed.results[0] and tanh.tensors[1] == resummed.inputs[0]
    # PyTorch may return a view of what it was given, so what it made a returned value of is no place in the arena.
    assert [slot.memory for slot in plan.outputs] == [Memory.OUTPUT, Memory.OUTPUT]
    assert resummed.inputs[0] in plan.outputs
    assert plan.returns == (last.tensors[-1], resummed.results[0], dataclasses.replace(plan.returns[0], strides=(1, N)))
    assert plan.returns[0] in plan.outputs and plan.returns[1].memory is Memory.RESULT


def test_a_buffer_is_used_again_only_when_its_last_reader_has_run() -> None:
    made = Graphs()
    kept = made.unary("x")
    value = kept
    for _ in range(4):
        value = made.unary(made.extern(value))
    plan = assembled(made.graph(made.unary(made.sum(value, kept)))).plan
    written = [step.tensors[-1].offset for step in plan.steps[:-1] if isinstance(step, NativeStep)]
    # The first value is alive to the end; another one as long as what PyTorch made of it, and so until the next but one
    # is written.
    assert written[0] not in written[1:] and written[1] == written[3] != written[2]
    assert plan.arena_bytes == plan.workspace_offset == 3 * N * N * 4


def test_what_pytorch_may_return_a_view_of_stays_as_long_as_the_result() -> None:
    made = Graphs()
    value = made.unary("x")
    alias = made.same(made.same(value))
    other = made.unary(made.extern(value))
    plan = assembled(made.graph(made.sum(made.extern(other), alias))).plan
    first, *_, last = (step for step in plan.steps if isinstance(step, NativeStep))
    between = [step.tensors[-1] for step in plan.steps if isinstance(step, NativeStep)][1:-1]
    assert between and all(slot.offset != first.tensors[-1].offset for slot in between)
    assert {slot.memory for slot in last.tensors} == {Memory.RESULT, Memory.OUTPUT}


def test_scratch_memory_follows_the_values() -> None:
    made = Graphs()
    made.values["w"] = TensorSpec.contiguous((N, N), torch.float32)
    value = made.add(Gemm(transposed=True), made.unary("x"), "w")
    graph = made.graph(made.unary(made.extern(value)))
    graph = dataclasses.replace(graph, constants={"w": Constant("w")})
    assembly = assembled(graph)
    calls = [c.call(TARGET, 2) for c in assembly.choices]
    scratch = max(call.workspace_bytes for call in calls if isinstance(call, KernelCall))
    assert assembly.plan.arena_bytes == assembly.plan.workspace_offset + scratch
    assert isinstance(calls[1], (KernelCall, LibraryCall)) and len(assembly.plan.constants) == 1


# ---- order


def test_random_operators_draw_in_the_order_of_the_model() -> None:
    draw = TorchCall(aten.bernoulli.p, (Ref(0), 0.5))
    made = Graphs()
    a = made.unary("x")
    first = made.extern(a, draw)
    second = made.extern("x", draw)
    late = made.extern("x")
    both = made.sum(a, late)
    graph = made.graph(first, second, both)
    # The first one waits for a kernel that waits for an operator behind the second one.
    group = graph.group(op for op in graph.operators if isinstance(op.semantics, Pointwise))
    labels = assemble(graph, choose([group], IMPLEMENTATIONS, TARGET), TARGET, 2).labels
    assert labels == (f"make_{late}", f"make_{a}+make_{both}", f"make_{first}", f"make_{second}")


def test_groups_that_wait_for_each_other_are_refused() -> None:
    made = Graphs()
    a, b = made.unary("x"), made.unary("x", Op.SIGMOID)
    c, d = made.unary(made.extern(b)), made.unary(made.extern(a))
    graph = made.graph(made.sum(a, c), made.sum(b, d))
    by_output = {op.output: op for op in graph.operators}
    crossed = [graph.group(by_output[v] for v in values) for values in ((a, c, "v6"), (b, d, "v7"))]
    with pytest.raises(FuserError, match="wait for each other"):
        assemble(graph, choose(crossed, IMPLEMENTATIONS, TARGET), TARGET, 2)


# ---- what the report is told


def test_equal_kernels_are_one_source_with_the_number_of_its_calls() -> None:
    made = Graphs()
    value = "x"
    for _ in range(3):
        value = made.extern(made.unary(value))
    assembly = assembled(made.graph(made.add(Pointwise(softmax()), value)))
    assert [(k.family, k.operators, k.calls) for k in assembly.kernels] == [
        ("pointwise", ("make_v0",), 3),
        ("rowwise", ("make_v6",), 1),
    ]
    assert [source.symbol for source in assembly.sources] == [*(k.name for k in assembly.kernels), RUNNER]
    assert assembly.unfused == tuple((f"make_v{i}", "no kernel sums along rows") for i in (1, 3, 5))
