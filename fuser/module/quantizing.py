"""Which linear layers of a model run in eight bits: chosen by patterns, and by what becomes of the model's outputs."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fuser.codegen.choice import GroupChoice
from fuser.ir.errors import CaptureError, TargetError
from fuser.ir.evaluation import Evaluation, run_graph, value_of
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec, is_kind
from fuser.ir.operators import Bf16Gemm, Gemm, Int8WeightGemm, QuantizedGemm, QuantizeRows, Ref, TorchCall
from fuser.ir.quantization import MAX_TERMS, NAMES, Fixed, integers_of, scales_of
from fuser.ir.target import Target
from fuser.kernels.base import floating
from fuser.module.narrowing import narrowed, narrows
from fuser.module.rounding import rounded

Choose = Callable[[OperatorGraph], Sequence[GroupChoice]]
Compare = Callable[[Sequence[Sequence[GroupChoice]]], "Sequence[float] | None"]
_SMALLEST = 32
"""Columns and rows of weights from which on a layer is worth it: smaller ones are heads, cheap and near the result."""
_SAMPLED = 128
"""Rows of a layer's input that its error is estimated on."""
_PREFIXES = 8
"""Choices that a study begins with: the layers with the largest errors kept, in so many steps."""
BF16, KEPT = "bf16", "kept"
"""What a layer is multiplied in beside codes of eight bits, which :data:`~fuser.ir.quantization.NAMES` has; as without
quantization where it is kept."""
_UNSEEN = "calibration has no rows to try it on"
_BETTER = 0.9
"""Of the error without smoothing, what smoothing has to fall below to be worth its product a number."""


@dataclass(frozen=True)
class LinearQuantization:
    """How linear layers run in eight bits: what ``fuser.Int8`` and ``fuser.FP8`` have in common.

    Weights have a scale for each output, rows of activations one that is found at run time; bias, activation, residual
    and norm are computed in fp32 behind the sums. Before the first program is made, the layers are tried on calibration
    inputs, whose outputs decide: with the layers in eight bits, the mean cosine between rows of the model's outputs and
    those without quantization must be ``quality`` or more, or the layers with the largest errors are multiplied in
    bf16, where the target does that faster than fp32, and else, or where that is not enough, stay as they are. Layers
    stay as they are, too, where eight bits and bf16 are no faster on these inputs, as measured, or with
    ``search="model"`` as predicted. The report lists every layer.

    Args:
        calibrate: inputs of a few calls of the model: for each a tensor, a tuple of positional or a mapping of keyword
            arguments. Without them the first call is the calibration.
        quality: the least mean cosine, in (0, 1]; 0 quantizes without a look at outputs, and needs no calibration:
            without one, no times are compared either.
        smooth: whether factors for the columns of activations move to the weights where that makes errors smaller
            (SmoothQuant with α = 0.5, Xiao et al., arXiv:2211.10438, equation 4); needs calibration.
        trials: how many choices of layers a study of time against error tries (Optuna's NSGA-II); the fastest that has
            the ``quality`` is taken, and the report lists the Pareto front. Without it, layers with the largest errors
            leave eight bits, as many as it takes.
        bf16: whether, on a target that multiplies pairs of bf16 numbers, layers of a model in fp32 may be multiplied
            in bf16 that eight bits do not suit, and values be stored in bf16 that pass from layers in eight bits to
            such layers, with the attention between them. The residual stream and norms stay in fp32.
        include: patterns (as in ``fnmatch``) of the names of modules that may be quantized.
        exclude: patterns of those that may not be; a product of several layers at once is excluded with any of them.

    Raises ValueError for a ``quality`` out of range and for calibration inputs that are none, TypeError for patterns
    that are no strings.
    """

    codes: ClassVar[torch.dtype]
    """What activations and weights are rounded to."""
    calibrate: Sequence[Any] | None = None
    quality: float = 0.999
    smooth: bool = True
    trials: int = 0
    bf16: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 1:
            raise ValueError(f"quality is a cosine between 0 and 1, not {self.quality!r}")
        if type(self.trials) is not int or self.trials < 0:
            raise ValueError(f"trials is a number of choices to try, not {self.trials!r}")
        if self.calibrate is not None:
            given = self.calibrate
            if isinstance(given, (Tensor, Mapping, str)) or not isinstance(given, Sequence):
                raise ValueError(
                    "calibrate is a list of inputs: for each call a tensor, a tuple of arguments or a mapping of names"
                )
            if not given:
                raise ValueError("calibrate holds no inputs; leave it out to calibrate on the first call")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name} takes patterns of module names, not {patterns!r}")
            object.__setattr__(self, name, patterns)

    def check(self, target: Target) -> None:
        """Raise TargetError for a target that has no products of these codes."""

    def arguments(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Positional and keyword arguments of every calibration call."""
        for given in self.calibrate or ():
            if isinstance(given, Mapping):
                yield (), dict(given)
            else:
                yield (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}


@dataclass(frozen=True)
class Int8(LinearQuantization):
    """``fuser.optimize(model, quantize=fuser.Int8())`` runs linear layers in int8, on every target and with the same
    numbers: sums are exact. Its arguments are those of :class:`LinearQuantization`, and one more.

    Args:
        weights_only: keep activations as they are and only store weights in int8, which are widened as they are read:
            smaller errors, and as fast where reading weights is the work, in decoding token by token; with many rows,
            products take what they do without quantization. Nothing is smoothed.
    """

    codes = torch.int8
    weights_only: bool = False


@dataclass(frozen=True)
class FP8(LinearQuantization):
    """``fuser.optimize(model, quantize=fuser.FP8())`` runs linear layers in fp8 (e4m3: ``torch.float8_e4m3fn``), on
    GPUs of compute capability 8.9 and later. Elements keep four significant bits whatever their size, so that outliers
    cost less than in int8, and elements near the largest of their row more. Sums are of fp32. Its arguments are those
    of :class:`LinearQuantization`.
    """

    codes = torch.float8_e4m3fn

    def check(self, target: Target) -> None:
        if not target.fp8:
            where = "CPUs have" if target.kind == "cpu" else f"the GPU architecture {target.arch} has"
            raise TargetError(
                f"{where} no products of fp8, which need a GPU of compute capability 8.9 or later: "
                "use quantize=fuser.Int8() there"
            )


@dataclass
class Layer:
    """One product with constant weights: the modules that it is made of, and what was decided."""

    modules: tuple[str, ...]
    precision: str = NAMES[torch.int8]
    error: float = math.nan
    """Relative error of its result in eight bits, on calibration inputs."""
    factors: Tensor | None = None
    reason: str = ""
    saved: dict[str, float] = field(default_factory=dict)
    """Seconds that a precision saves over the calibration inputs, for those that save some."""
    most: Tensor | None = field(default=None, repr=False)
    sample: Tensor | None = field(default=None, repr=False)

    @property
    def quantized(self) -> bool:
        """Whether it is in eight bits."""
        return self.precision in NAMES.values()

    @property
    def smoothed(self) -> bool:
        """Whether factors move from its input to its weight."""
        return self.quantized and self.factors is not None

    def __str__(self) -> str:
        words = [f"{', '.join(self.modules)}: {self.precision}"]
        if not math.isnan(self.error):
            words.append(f"error {self.error:.1e}")
        if self.smoothed:
            words.append("smoothed")
        return ", ".join([*words, self.reason] if self.reason else words)


@dataclass(frozen=True)
class FrontPoint:
    """A choice of layers that no other beats in time and error: ``seconds`` of the calibration inputs of distinct
    shapes, the mean ``cosine`` of outputs, and how many layers are in eight bits."""

    seconds: float
    cosine: float
    layers: int

    def __str__(self) -> str:
        return f"{self.layers} layers in eight bits, {1e3 * self.seconds:.4g} ms, cosine {self.cosine:.6f}"


@dataclass(frozen=True)
class Precision:
    """What was decided for the layers of a model: ``cosine`` is the mean one of outputs with and without quantization,
    on calibration inputs; NaN without any. ``errors`` are the relative L2 errors of operators' results on one of these
    inputs, with all that was rounded before them, by name."""

    cosine: float
    layers: tuple[Layer, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    front: tuple[FrontPoint, ...] = ()
    """The Pareto front of time and error that a study has found, the fastest first."""
    narrow: bool = False
    """Whether values that pass between layers in eight bits are stored in bf16."""

    @property
    def lines(self) -> tuple[str, ...]:
        """What the report says."""
        cosine = () if math.isnan(self.cosine) else (f"cosine to the unquantized outputs {self.cosine:.6f}",)
        front = [f"front: {point}" for point in self.front]
        narrow = ("values between layers in eight bits: bf16",) if self.narrow else ()
        return (*cosine, *front, *narrow, *map(str, self.layers))


@dataclass(frozen=True)
class _Call:
    """A calibration call: the graph without quantization, what it reads, and what it gives."""

    graph: OperatorGraph
    parameters: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]


class Quantizer:
    """What is decided for the layers of one model, whatever the shapes of its calls."""

    def __init__(self, model: nn.Module, options: LinearQuantization) -> None:
        self.options = options
        self._narrow = NAMES[options.codes]
        self._weights_only = isinstance(options, Int8) and options.weights_only
        self._modules = {id(p): name.rpartition(".")[0] or name for name, p in model.named_parameters()}
        self._layers: dict[tuple[int, ...], Layer] = {}
        self._calls: list[_Call] = []
        self._errors: dict[str, float] = {}
        self._plain_seconds = 0.0
        self._narrows = options.bf16
        self.front: tuple[FrontPoint, ...] = ()
        self.cosine = math.nan
        smooth = options.smooth and not self._weights_only
        self.settled = options.quality == 0 and not (smooth and options.calibrate)
        """Whether there is nothing left to decide."""

    @property
    def layers(self) -> Sequence[Layer]:
        return tuple(self._layers.values())

    @property
    def found(self) -> Precision:
        """What is decided by now."""
        layers = tuple(map(dataclasses.replace, self.layers))
        return Precision(self.cosine, layers, dict(self._errors), self.front, self._narrows and self.settled)

    def apply(self, graph: OperatorGraph, parameters: Mapping[str, Tensor], target: Target) -> OperatorGraph:
        """``graph`` with the chosen layers in eight bits or bf16, and what passes between those in eight bits in bf16
        where ``target`` gains by it and the outputs allow it."""
        operators, values, constants = [], dict(graph.values), dict(graph.constants)
        for op in graph.operators:
            layer = self._layer(graph, op, parameters)
            if layer is None or layer.precision == KEPT:
                operators.append(op)
                continue
            semantics = op.semantics
            assert isinstance(semantics, Gemm)
            if layer.precision == BF16:
                operators.append(dataclasses.replace(op, semantics=Bf16Gemm(semantics.transposed)))
                continue
            if self._weights_only:
                operators.append(_with_integers(op, values, constants))
                continue
            quantized, inputs = QuantizedGemm(semantics.transposed, self.options.codes), op.inputs
            if layer.factors is not None:
                name = f"{op.inputs[1]}_factors"
                values[name] = TensorSpec.contiguous(layer.factors.shape, torch.float32)
                constants[name] = Constant(name, (), TorchCall(Fixed(layer.factors.cpu())))
                inputs = (*inputs, name)
            operators.append(dataclasses.replace(op, semantics=quantized, inputs=inputs))
        made = dataclasses.replace(graph, operators=tuple(operators), values=values, constants=constants)
        made = rounded(made, floating(target))
        return narrowed(made) if self._narrows and narrows(target) else made

    def _layer(self, graph: OperatorGraph, op: Operator, parameters: Mapping[str, Tensor]) -> Layer | None:
        """What is decided for a product, by the tensors that its weight is made of; None for other operators."""
        if not is_kind(op, Gemm) or op.inputs[1] not in graph.constants:
            return None
        weight = op.inputs[1]
        leaves = [v for v in graph.with_sources([weight]) if graph.constants[v].call is None]
        key = tuple(id(parameters[leaf]) for leaf in leaves)
        if key not in self._layers:
            modules = tuple(dict.fromkeys(self._modules.get(i, "") for i in key)) or ("",)
            reason = self._refused(modules, op, graph.values[weight])
            self._layers[key] = Layer(modules, KEPT if reason else self._narrow, reason=reason)
        return self._layers[key]

    def _refused(self, modules: Sequence[str], op: Operator, weight: TensorSpec) -> str:
        """Why a layer is kept whatever its error; empty if it is not."""
        if any(not _matches(name, self.options.include) for name in modules):
            return "not among include="
        if any(_matches(name, self.options.exclude) for name in modules):
            return "among exclude="
        if "" in modules:
            return "its weight is no parameter of a module"
        if self.settled and self.options.quality:
            return _UNSEEN
        if min(weight.shape) < _SMALLEST:
            return f"smaller than {_SMALLEST}"
        terms = weight.shape[1 if op.semantics.transposed else 0]  # type: ignore[attr-defined]
        fit = terms <= MAX_TERMS or self.options.codes.is_floating_point
        return "" if fit else f"sums of more than {MAX_TERMS} products"

    # ---- calibration

    def observe(self, graph: OperatorGraph, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> None:
        """Run a calibration call without quantization, and remember what the layers got and the model gave.

        Raises CaptureError where that fails.
        """
        values = dict(zip(graph.inputs, tensors, strict=True))

        def look(op: Operator, evaluation: Evaluation) -> None:
            if not is_kind(op, Gemm):
                return
            x = evaluation[op.inputs[0]]
            layer = self._layer(graph, op, parameters)
            if layer is None or not layer.quantized:
                return
            rows = x.reshape(-1, x.shape[-1]).float()
            most = rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[-1])
            layer.most = most if layer.most is None else torch.maximum(layer.most, most)
            known = [] if layer.sample is None else [layer.sample[: _SAMPLED // 2]]
            layer.sample = torch.cat([*known, _some(rows)])[:_SAMPLED]

        try:
            outputs = run_graph(graph, parameters, values, look)
        except Exception as error:
            # What PyTorch says about the inputs: an index beyond a table, say.
            raise CaptureError(f"the model fails on the inputs of a calibration: {error!s:.200}") from error
        self._calls.append(_Call(graph, parameters, {v: t.clone() for v, t in values.items()}, outputs))

    def settle(self, target: Target, choose: Choose, compare: Compare) -> None:
        """Decide by what was observed: ``choose`` gives the kernels of a graph, ``compare`` the seconds of ways to do
        the same work, None where they are not to be had."""
        self.settled = True
        self._narrows = self._narrows and narrows(target)
        weights: dict[int, Tensor] = {}
        for call in self._calls:
            for op in call.graph.operators:
                layer = self._layer(call.graph, op, call.parameters)
                if layer is not None and layer.quantized and id(layer) not in weights and layer.sample is not None:
                    weight = value_of(op.inputs[1], call.graph.constants, call.parameters).float()
                    weights[id(layer)] = weight if op.semantics.transposed else weight.mT  # type: ignore[attr-defined]
        for layer in self.layers:
            if id(layer) in weights and layer.sample is not None and layer.most is not None:
                self._estimate(layer, weights[id(layer)])
            layer.sample = layer.most = None
        widths = [self._narrow]
        if self.options.bf16 and not self._weights_only and _prefers_bf16(target):
            widths.append(BF16)
        if not self._weights_only:
            self._keep_fast(widths, choose, compare, target)
        self._keep_quality(target)
        if self._calls:
            last = self._calls[-1]
            self._errors = _errors_of(last, self.apply(last.graph, last.parameters, target))
        self._calls.clear()

    def _estimate(self, layer: Layer, weight: Tensor) -> None:
        """The error of a layer (N, K) on its sample, smoothed where that is better."""
        assert layer.sample is not None and layer.most is not None
        if not len(layer.sample):
            layer.precision, layer.reason = KEPT, _UNSEEN
            return
        exact = layer.sample @ weight.mT
        size = exact.norm()
        if not bool(size.isfinite()):
            layer.precision, layer.reason = KEPT, "its inputs are not finite"
            return
        only = self._weights_only
        got = _int8_weight(layer.sample, weight) if only else self._product(layer.sample, weight)
        layer.error = float((got - exact).norm() / size.clamp_min(1e-30))
        if only or not self.options.smooth:
            return
        most_of_weights = weight.abs().amax(0)
        used = (layer.most > 0) & (most_of_weights > 0)
        factors = torch.where(used, (most_of_weights / layer.most.clamp_min(1e-30)).sqrt(), 1.0)
        # Around one, so that products stay in the range of numbers that they had.
        factors = (factors / factors.log().mean().exp()).contiguous()
        error = float((self._product(layer.sample, weight, factors) - exact).norm() / size.clamp_min(1e-30))
        if error < _BETTER * layer.error:
            layer.error, layer.factors = error, factors

    def _product(self, rows: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
        return QuantizedGemm(True, self.options.codes).evaluate(rows, weight, *factors)[0]

    def _keep_quality(self, target: Target) -> None:
        """Give up what is stored in bf16 if the outputs ask for it; then take from eight bits as many of the layers
        with the largest errors as they ask for, and, where bf16 is not enough for all of these, as many from that; or
        those that a study finds."""
        wanted = self.options.quality
        order = sorted(
            (x for x in self.layers if x.precision != KEPT and not math.isnan(x.error)), key=lambda x: -x.error
        )
        if not self._calls or wanted == 0:
            return
        if self.options.trials and order:
            self._study(order, target)
            return
        self.cosine = self._cosine(target)
        if self.cosine < wanted and self._narrows:
            self._narrows = False
            self.cosine = self._cosine(target)
        for _ in range(2):
            if self.cosine >= wanted:
                return
            self._lower(order, wanted, target)

    def _lower(self, order: Sequence[Layer], wanted: float, target: Target) -> None:
        """Give the fewest of the first layers that are enough the next precision that is faster than none, or all."""
        before = [(layer.precision, layer.reason) for layer in order]

        def cosine(number: int) -> float:
            for i, (layer, (precision, reason)) in enumerate(zip(order, before, strict=True)):
                layer.precision, layer.reason = precision, reason
                if i < number and precision != KEPT:
                    layer.precision = BF16 if precision == self._narrow and BF16 in layer.saved else KEPT
                    layer.reason = f"outputs would fall below a cosine of {wanted:g}"
            return self._cosine(target)

        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cosine(middle) >= wanted else (middle, high)
        self.cosine = cosine(high)

    def _study(self, order: Sequence[Layer], target: Target) -> None:
        """Choose layers by a study of time against error, and keep its Pareto front. Times are additive."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        trials, wanted = self.options.trials, self.options.quality
        sampler = optuna.samplers.NSGAIISampler(seed=0, population_size=max(min(16, trials // 2), 2))
        study = optuna.create_study(directions=("minimize", "minimize"), sampler=sampler)
        # The layers with the largest errors in bf16 or kept, more and more of them; with all of them kept the outputs
        # are what they were.
        widths = [[KEPT, *(p for p in (BF16, self._narrow) if p in (*x.saved, x.precision))] for x in order]
        for kept in sorted({len(order) * i // _PREFIXES for i in range(_PREFIXES + 1)}, reverse=True):
            for lower in (BF16, KEPT):
                ways = [w[-1] if i >= kept else lower if lower in w else KEPT for i, w in enumerate(widths)]
                study.enqueue_trial({str(i): way for i, way in enumerate(ways)}, skip_if_exists=True)

        def judge(trial: optuna.Trial) -> tuple[float, float]:
            for i, layer in enumerate(order):
                layer.precision = trial.suggest_categorical(str(i), widths[i])
            return self._plain_seconds - math.fsum(x.saved.get(x.precision, 0.0) for x in order), 1.0 - self._cosine(
                target
            )

        study.optimize(judge, n_trials=max(trials, len(study.get_trials())))
        front = {}
        for trial in study.best_trials:
            seconds, error = trial.values
            layers = sum(precision == self._narrow for precision in trial.params.values())
            front[seconds, error] = FrontPoint(seconds, 1.0 - error, layers), trial
        self.front = tuple(front[key][0] for key in sorted(front))
        enough = [key for key in front if 1.0 - key[1] >= wanted] or [max(front)]
        point, best = front[min(enough)]
        self.cosine = point.cosine
        for i, layer in enumerate(order):
            layer.precision = best.params[str(i)]
            if not layer.quantized:
                layer.reason = f"left out by a study for a cosine of {wanted:g}"

    def _keep_fast(self, widths: Sequence[str], choose: Choose, compare: Compare, target: Target) -> None:
        """Give layers the fastest of ``widths`` that is faster than none, by the sum over the calls, and note what they
        save."""
        spent: dict[int, tuple[Layer, dict[str, tuple[float, float]]]] = {}
        distinct = {tuple(call.graph.values[v].shape for v in call.graph.inputs): call for call in self._calls}
        chosen = [layer for layer in self.layers if layer.quantized]
        for call in distinct.values():
            exact = choose(call.graph)
            self._plain_seconds += math.fsum(choice.seconds for choice in exact)
            rounded = {}
            for width in widths:
                for layer in chosen:
                    layer.precision = width
                rounded[width] = choose(self.apply(call.graph, call.parameters, target))
            for op in call.graph.operators:
                found = self._layer(call.graph, op, call.parameters)
                if found is None or found.precision == KEPT:
                    continue
                narrow = call.graph.values[op.inputs[0]].dtype != torch.float32
                ways = [width for width in widths if width != BF16 or not narrow]
                seconds = compare(_covering(op.name, exact, *(rounded[width] for width in ways))) if ways else None
                if seconds is not None:
                    times = spent.setdefault(id(found), (found, {}))[1]
                    for width, own in zip(ways, seconds[1:], strict=True):
                        before, after = times.get(width, (0.0, 0.0))
                        times[width] = before + seconds[0], after + own
        for layer in chosen:
            layer.precision = self._narrow
        for layer, times in spent.values():
            layer.saved = {width: before - after for width, (before, after) in times.items() if after < before}
            layer.precision = max(layer.saved, key=layer.saved.__getitem__, default=KEPT)
            if layer.quantized:
                continue
            layer.saved.pop(self._narrow, None)
            before, after = times[self._narrow]
            other = (
                f"{1e6 * before:.3g} µs without"
                if layer.precision == KEPT
                else f"{1e6 * times[BF16][1]:.3g} µs in bf16"
            )
            layer.reason = f"no faster in {self._narrow}: {1e6 * after:.3g} µs, {other}"

    def _cosine(self, target: Target) -> float:
        total, count = 0.0, 0
        for call in self._calls:
            graph = self.apply(call.graph, call.parameters, target)
            outputs = run_graph(graph, call.parameters, call.values)
            for got, exact in zip(outputs, call.outputs, strict=True):
                if not exact.is_floating_point() or exact.numel() == 0 or exact.dim() == 0:
                    continue
                rows = torch.nn.functional.cosine_similarity(got.double(), exact.double(), dim=-1, eps=1e-30)
                seen = (exact != 0).any(-1) & exact.isfinite().all(-1)
                total, count = total + float(rows[seen].sum()), count + int(seen.sum())
        return total / count if count else 1.0


def _prefers_bf16(target: Target) -> bool:
    return target.rate(torch.bfloat16) > target.rate(torch.float32)


def _covering(name: str, *programs: Sequence[GroupChoice]) -> list[list[GroupChoice]]:
    """Of programs of the same operators the groups that the operator ``name`` is in, and those that share operators
    with these, so that all do the same work."""
    covered, grown = {name}, True
    while grown:
        before = len(covered)
        for choice in itertools.chain.from_iterable(programs):
            if covered & choice.group.names:
                covered |= choice.group.names
        grown = len(covered) > before
    return [[c for c in program if covered & c.group.names or _rounds_for(c, covered)] for program in programs]


def _rounds_for(choice: GroupChoice, covered: Collection[str]) -> bool:
    """Whether a kernel does nothing but round the rows of ``covered`` operators."""
    group = choice.group
    readers = (reader.name for value in group.outputs for reader in group.graph.readers(value))
    return all(is_kind(op, QuantizeRows) for op in group.operators) and any(name in covered for name in readers)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(rows: Tensor) -> Tensor:
    """Rows from everywhere, about as many as errors are estimated on."""
    return rows[:: max(len(rows) // _SAMPLED, 1)]


def _errors_of(call: _Call, graph: OperatorGraph) -> dict[str, float]:
    """Relative L2 errors of the results of ``graph`` to those of the call's graph, by operator."""
    exact: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def sample(op: Operator, evaluation: Evaluation) -> Tensor | None:
        result = evaluation[op.output]
        if not result.is_floating_point() or result.dim() == 0 or result.numel() == 0:
            return None
        return _some(result.reshape(-1, result.shape[-1])).double()

    def keep(op: Operator, evaluation: Evaluation) -> None:
        if (found := sample(op, evaluation)) is not None:
            exact[op.name] = found.float().clone()

    def compare(op: Operator, evaluation: Evaluation) -> None:
        if (found := sample(op, evaluation)) is not None and op.name in exact:
            right = exact.pop(op.name).double()
            finite = right.isfinite()
            size = right[finite].norm().clamp_min(1e-30)
            errors[op.name] = float((found[finite] - right[finite]).norm() / size)

    run_graph(call.graph, call.parameters, call.values, after=keep)
    run_graph(graph, call.parameters, call.values, after=compare)
    return errors


def _int8_weight(rows: Tensor, weight: Tensor) -> Tensor:
    return Int8WeightGemm(True).evaluate(rows, integers_of(weight, True), scales_of(weight, True))[0]


def _with_integers(op: Operator, values: dict[str, TensorSpec], constants: dict[str, Constant]) -> Operator:
    """A product with its weight in int8, whose two constants are added."""
    semantics, weight = op.semantics, op.inputs[1]
    assert isinstance(semantics, Gemm)
    n, k = values[weight].shape if semantics.transposed else values[weight].shape[::-1]
    names = f"{weight}_integers", f"{weight}_scales"
    for name, shape, dtype, made in zip(
        names, ((n, k), (n,)), (torch.int8, torch.float32), (integers_of, scales_of), strict=True
    ):
        values[name] = TensorSpec.contiguous(shape, dtype)
        constants[name] = Constant(name, (weight,), TorchCall(made, (Ref(0), semantics.transposed)))
    return dataclasses.replace(op, semantics=Int8WeightGemm(True), inputs=(op.inputs[0], *names))
