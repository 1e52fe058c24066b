"""Programs whose sizes are bound late are those that are made for these sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import golden
import pytest
import torch

from fuser import zoo
from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.choice import GroupChoice
from fuser.codegen.template import ProgramTemplate, generalized
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.captured import Captured
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import FuserError
from fuser.ir.graph import OperatorGraph, TensorSpec
from fuser.ir.operators import TorchCall
from fuser.ir.size import named
from fuser.ir.target import Target
from fuser.module.compiler import choose_all, load_kernels, program_constants
from fuser.module.weights import WeightStore
from fuser.runtime.cache import default_cache
from fuser.runtime.device import cpu_target
from fuser.runtime.program import Program, ProgramPlan

BATCH, SEQUENCE = named("batch"), named("sequence")
# Captured at primes that no size of a model has as a factor, so that every number tells what it is made of.
PRIMES = {"batch": 11, "sequence": 13}
THREADS = 2
SMALL = {"layers": 2, "hidden": 64, "heads": 2, "intermediate": 128}


def call_of(example: str, batch: int, seq: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    chosen = golden.EXAMPLES[example]
    configuration = zoo.configuration(chosen.model)
    vocabulary = 1000 if configuration.sizes.vocabulary else 0
    model, sizes = configuration.build(**SMALL, batch=batch, seq=seq, vocabulary=vocabulary)
    return model, configuration.example(sizes, chosen.padded)


@functools.cache
def captured(example: str, batch: int, seq: int) -> Captured:
    model, inputs = call_of(example, batch, seq)
    return capture(model, flatten_call((), inputs))


@functools.cache
def graph_of(example: str, batch: int, seq: int) -> OperatorGraph:
    return raise_graph(captured(example, batch, seq), golden.EXAMPLES[example].attention)


def with_names(graph: OperatorGraph, sizes: Mapping[int, int]) -> OperatorGraph:
    """``graph`` with named sizes for prime factors."""

    def size(number: int) -> int:
        found: int = 1
        for prime, name in sizes.items():
            while number > 0 and number % prime == 0:
                number //= prime
                found *= name
        return found * number

    def inside(value: Any) -> Any:
        if type(value) is int:
            return size(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(inside, value))
        if isinstance(value, TorchCall):
            return dataclasses.replace(value, args=inside(value.args), kwargs=inside(value.kwargs))
        return value

    def spec(value: TensorSpec) -> TensorSpec:
        return dataclasses.replace(
            value, shape=inside(value.shape), strides=inside(value.strides), offset=size(value.offset)
        )

    def call(owner: Any) -> Any:
        return dataclasses.replace(owner, call=inside(owner.call)) if hasattr(owner, "call") else owner

    return dataclasses.replace(
        graph,
        operators=tuple(dataclasses.replace(op, semantics=call(op.semantics)) for op in graph.operators),
        values={name: spec(value) for name, value in graph.values.items()},
        constants={name: call(constant) for name, constant in graph.constants.items()},
    )


def assembled(graph: OperatorGraph, choices: list[GroupChoice], target: Target) -> Assembly:
    return assemble(graph, generalized(choices, graph, target), target, THREADS)


def template_of(example: str, target: Target, seq: int) -> tuple[ProgramTemplate, list[GroupChoice]]:
    """A template for any batch and, where 13 tokens are, for any length; and the kernels that were chosen."""
    graph = graph_of(example, PRIMES["batch"], seq)
    choices = choose_all(graph, target)[0]
    late = with_names(graph, {PRIMES["batch"]: BATCH, PRIMES["sequence"]: SEQUENCE})
    return assembled(late, choices, target).template, choices


def difference(got: ProgramPlan, expected: ProgramPlan) -> str:
    """The first field, and the first item in it, that is not as expected; empty if there is none."""
    for field in dataclasses.fields(ProgramPlan):
        mine, other = getattr(got, field.name), getattr(expected, field.name)
        if mine == other:
            continue
        if isinstance(mine, tuple) and len(mine) == len(other):
            return next(
                f"{field.name}[{i}]: {a} != {b}" for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b
            )
        return f"{field.name}: {mine} != {other}"
    return ""


@pytest.mark.parametrize("example", golden.EXAMPLES)
def test_a_bound_template_is_the_plan_for_these_sizes(example: str) -> None:
    if example != "transformer-encoder":
        pytest.importorskip("transformers")
    # Patches make a square image, so only the batch varies.
    fixed = 196 if example == "vit-b16" else None
    for name in ("avx2", "sm_90"):
        target, _ = golden.TARGETS[name]
        template, choices = template_of(example, target, fixed or PRIMES["sequence"])
        assert set(template.names) == ({"batch"} if fixed else {"batch", "sequence"})
        for batch, seq in ((5, 22),) if fixed is None else ((3, fixed),):
            graph = graph_of(example, batch, seq)
            expected = assembled(graph, choices, target).plan
            assert difference(template.bind({"batch": batch, "sequence": seq}), expected) == ""


def test_a_bound_program_computes_what_the_model_does() -> None:
    pytest.importorskip("transformers")
    target = cpu_target()
    template, choices = template_of("bert-base", target, PRIMES["sequence"])
    for batch, seq in ((5, 22), (3, 65)):
        graph, parameters = graph_of("bert-base", batch, seq), captured("bert-base", batch, seq).parameters
        assembly = assembled(graph, choices, target)
        kernels = load_kernels(assembly, target, default_cache())
        model, inputs = call_of("bert-base", batch, seq)
        store = WeightStore(model)
        store.register(parameters)
        constants = program_constants(assembly, graph, parameters, store)
        given = flatten_call((), inputs).tensors
        plans = template.bind({"batch": batch, "sequence": seq}), assembly.plan
        late, static = (Program(plan, kernels, constants)(given) for plan in plans)
        assert all(torch.equal(a, b) for a, b in zip(late, static, strict=True))
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        assert any(a.shape == expected.shape and torch.allclose(a, expected, rtol=1e-4, atol=1e-5) for a in late)


def test_a_plan_without_named_sizes_is_bound_as_it_is() -> None:
    target, _ = golden.TARGETS["avx2"]
    graph = graph_of("transformer-encoder", 5, 22)
    assembly = assemble(graph, choose_all(graph, target)[0], target, THREADS)
    assert not assembly.template.names and assembly.template.bind({}) is assembly.plan


def test_a_template_prints_its_formulas() -> None:
    target, _ = golden.TARGETS["avx2"]
    text = str(template_of("transformer-encoder", target, PRIMES["sequence"])[0])
    assert text.startswith("size batch from 2\nsize sequence from 2\n")
    assert "batch*sequence" in text and "workspace_bytes(launch_of(" in text


def test_kernels_that_exist_for_one_length_only_are_refused() -> None:
    target, _ = golden.TARGETS["avx2"]
    graph = graph_of("transformer-encoder", PRIMES["batch"], PRIMES["sequence"])
    choices = choose_all(graph, target)[0]
    late = with_names(graph, {PRIMES["batch"]: BATCH, PRIMES["sequence"]: SEQUENCE})
    norm = next(c for c in choices if c.family == "gemm")
    value = norm.group.operators[0].inputs[0]
    skewed = dataclasses.replace(late.values[value], strides=(1, *late.values[value].strides[1:]))
    with pytest.raises(FuserError, match="exists for some sizes only"):
        generalized([norm], dataclasses.replace(late, values={**late.values, value: skewed}), target)
