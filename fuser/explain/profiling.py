"""Where the time of a compiled call goes: every kind of step beside the floor that the machine sets for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from fuser.codegen.choice import PYTORCH
from fuser.explain.drawing import duration
from fuser.ir.target import Target
from fuser.kernels.base import Cost
from fuser.module.compiler import Compiled
from fuser.runtime.profile import profile
from fuser.runtime.program import NativeStep, ProgramPlan, TorchStep


@dataclass(frozen=True)
class StepKind:
    """Equal steps: the same kernel with the same extents, or the same PyTorch function on the same shapes.

    ``seconds`` is the mean over the steps of their medians; ``floor`` the time that the step cannot beat on all cores
    used, by its flops over their peak (``bound`` is "compute") or its bytes over the bandwidth ("memory"); None where
    PyTorch runs an operator whose work is not known.
    """

    kernel: str
    family: str
    operators: tuple[str, ...]
    kinds: tuple[str, ...]
    calls: int
    seconds: float
    floor: float | None
    bound: str
    flops: float
    bytes: float

    @property
    def total(self) -> float:
        """Seconds of all calls."""
        return self.calls * self.seconds

    @property
    def fraction(self) -> float | None:
        """Share of the floor that is reached; above 1 when operands stay in caches that are faster than memory."""
        return self.floor / self.seconds if self.floor is not None and self.seconds else None


@dataclass(frozen=True)
class ProgramProfile:
    """``call`` is the median of whole calls in seconds; what the steps do not explain is Python and the launches."""

    kinds: tuple[StepKind, ...]
    call: float
    rounds: int

    @property
    def steps(self) -> float:
        """Seconds of all steps."""
        return sum(kind.total for kind in self.kinds)

    @property
    def floor(self) -> float:
        """Sum of the floors of all kernels."""
        return sum(kind.calls * kind.floor for kind in self.kinds if kind.floor is not None)

    def losses(self) -> list[tuple[str, float]]:
        """Where the time above the floor goes, in seconds, largest first."""
        found: dict[str, float] = {}
        for kind in self.kinds:
            name = "PyTorch steps" if kind.floor is None else f"{kind.family} kernels above their floor"
            found[name] = found.get(name, 0.0) + kind.total - kind.calls * (kind.floor or 0.0)
        found["Python around the steps"] = max(0.0, self.call - self.steps)
        return sorted(found.items(), key=lambda item: -item[1])

    def as_dict(self) -> dict[str, Any]:
        """The profile as JSON values."""
        kinds = [{**asdict(kind), "total": kind.total, "fraction": kind.fraction} for kind in self.kinds]
        return {
            "kinds": kinds,
            "call": self.call,
            "steps": self.steps,
            "floor": self.floor,
            "rounds": self.rounds,
            "losses": dict(self.losses()),
        }


def floor_of(cost: Cost, target: Target, threads: int) -> tuple[float, str]:
    """The time in seconds that work of this size cannot beat, and whether compute or memory sets it."""
    cores = min(target.cores, max(threads, 1)) if target.kind == "cpu" else target.cores
    compute = cost.flops / (cost.peak(target) * cores)
    memory = cost.bytes / target.bandwidth
    return max(compute, memory), "compute" if compute >= memory else "memory"


def profile_compiled(compiled: Compiled, tensors: Sequence[Tensor], target: Target, rounds: int = 20) -> ProgramProfile:
    """Time the steps of a program on ``tensors``, the flat inputs of the call it was compiled for."""
    plan = compiled.assembly.plan
    measured = profile(compiled.program, tensors, rounds)
    found: dict[tuple[object, ...], StepKind] = {}
    for number, seconds in enumerate(measured.steps):
        key = _key(plan, number)
        known = found.get(key)
        if known is None:
            found[key] = _kind(compiled, number, seconds, target)
        else:
            calls = known.calls + 1
            found[key] = replace(known, calls=calls, seconds=known.seconds + (seconds - known.seconds) / calls)
    return ProgramProfile(tuple(found.values()), measured.call, measured.rounds)


def _key(plan: ProgramPlan, number: int) -> tuple[object, ...]:
    step = plan.steps[number]
    if isinstance(step, NativeStep):
        return (step.symbol, step.extents)
    shapes = tuple((slot.shape, slot.strides) for slot in (*step.inputs, *step.results))
    return (str(step.call), shapes)


def _kind(compiled: Compiled, number: int, seconds: float, target: Target) -> StepKind:
    assembly = compiled.assembly
    step, operators = assembly.plan.steps[number], tuple(assembly.labels[number].split("+"))
    by_name = {op.name: op for op in compiled.graph.operators}
    kinds = tuple(by_name[name].kind for name in operators)
    choice = next((c for c in assembly.choices if c.group.names == frozenset(operators)), None)
    kernel = step.symbol if isinstance(step, NativeStep) else _call_name(step)
    if choice is None or choice.kernel is None:
        return StepKind(kernel, PYTORCH, operators, kinds, 1, seconds, None, "", 0.0, 0.0)
    floor, bound = floor_of(choice.cost, target, assembly.plan.threads)
    cost = choice.cost
    return StepKind(kernel, choice.family, operators, kinds, 1, seconds, floor, bound, cost.flops, cost.bytes)


def _call_name(step: TorchStep) -> str:
    text = str(step.call)
    return text if len(text) < 60 and "object at" not in text else type(step.call).__name__


def summary(found: ProgramProfile) -> list[str]:
    """Lines that say how far the call is from the floor and where the rest goes."""
    lines = [
        f"one call {duration(found.call)}, floor of its kernels {duration(found.floor)} "
        f"({found.floor / found.call:.0%} of the call); medians of {found.rounds} rounds"
    ]
    for name, seconds in found.losses():
        if seconds > 0.005 * found.call:
            lines.append(f"  {seconds / found.call:5.1%}  {duration(seconds):>8}  {name}")
    return lines
