"""The engine of one model: which program a call of it gets, from captures, kernels and packed weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import traceback
from collections.abc import Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fuser.codegen.choice import GroupChoice
from fuser.frontend import traces
from fuser.frontend.arguments import has_objects
from fuser.frontend.attention_operators import check_restricted
from fuser.frontend.calls import FlatCall, Signature
from fuser.frontend.capture import StateError, capture
from fuser.frontend.captured import Captured
from fuser.frontend.garbage import set_aside
from fuser.frontend.graphs import raise_graph
from fuser.ir.errors import (
    CalibrationError,
    CaptureError,
    DeviceMemoryError,
    FuserError,
    InternalError,
    MaskError,
    PlanError,
    TargetError,
)
from fuser.ir.graph import OperatorGraph
from fuser.ir.target import Target
from fuser.kernels.base import floating
from fuser.module.acceptance import acceptable, device_of, form_of, kin_of, text_of
from fuser.module.compiler import Compiled, choose_all, compile_call, program_constants
from fuser.module.forms import Form, Forms, Packing, Variant, form_key
from fuser.module.known import KnownMasks, fingerprint, knowing, pays
from fuser.module.options import Options
from fuser.module.policy import AT_ONCE, Comparison, CompilationPolicy
from fuser.module.programs import ProgramCache
from fuser.module.quantizing import Quantizer
from fuser.module.ragged import Padding
from fuser.module.snapshot import SavedCall, SavedForm
from fuser.module.stored_integers import with_stored_integers
from fuser.module.weights import WeightStore
from fuser.runtime.cuda_program import arena_of
from fuser.runtime.library import run_after_fork
from fuser.runtime.locks import ForkSafeRLock
from fuser.runtime.program import States
from fuser.runtime.targets import on_device, target_of, threads_now
from fuser.search.tuning import Tuner, tuner_for

logger = logging.getLogger("fuser")
_PROGRAMS = 64
"""Programs that an engine keeps; the one that has not run for longest goes first."""
UNMASKED = "the original model knows nothing of the mask that attention= gives"
K = TypeVar("K")
V = TypeVar("V")
Key = tuple[Signature, "int | torch.device", tuple[Any, ...]]
"""A call, the number of threads or the GPU that it runs on, and what else the model's code depends on: its plain
attributes, and PyTorch's modes if it asks for them."""


@dataclass(frozen=True)
class Unpadded:
    """How calls of one shape leave out padding, and the program that comes before there are rows."""

    form: Form
    packing: Packing
    before: Compiled
    complete: set[tuple[Any, ...]] = field(default_factory=set)
    """The numbers of which masks without padding consist."""


class Engine:
    """What turns the calls of ``model`` into programs, and keeps these.

    Any thread may ask for a program; whoever makes or follows anything holds ``lock``.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.target = options.target
        self.lock = ForkSafeRLock()
        self.store = WeightStore(model)
        self.programs: ProgramCache[Key, Compiled] = ProgramCache(_PROGRAMS)
        self.packed: ProgramCache[Key, Unpadded] = ProgramCache(_PROGRAMS)
        self.forms = Forms()
        self.masks = KnownMasks()
        self.padding = Padding(options.padding)
        self.policy = CompilationPolicy()
        self.comparisons: dict[Key, Comparison] = {}
        self.quantizer = None if options.linear is None else Quantizer(model, options.linear)
        self.failed: dict[Key, str] = {}
        self.slower: dict[Key, str] = {}
        self.said: set[str] = set()
        self.clock = time.perf_counter
        self._excused: set[Key] = set()
        self._by_themselves: set[Signature] = set()
        self._calibrated: dict[Signature, Captured] = {}
        """What calibration has captured for calls of one size, until the call is compiled that it was made for."""
        self._states: dict[torch.device, States] = {}
        self._tuner: Tuner | None = None
        self.asks_modes = False

    # ---- which program

    def key(self, call: FlatCall) -> Key:
        """What calls that one program serves have in common."""
        device = device_of(call)
        place = threads_now() if device.type == "cpu" else device
        signature = call.key
        if call.alike is not None and self.options.dynamic and call.alike not in self._by_themselves:
            signature = call.alike
        return signature, place, (self.store.configuration, call.modes if self.asks_modes else None)

    def program(self, call: FlatCall, key: Key, *, wanted: bool = False, at_once: int = AT_ONCE) -> Compiled | None:
        """The program of a call; None if the original is to run, which ``wanted`` allows only where there can be no
        program. So many calls as ``at_once`` says are compiled when first met, of those that each need a capture of
        their own."""
        compiled = self.programs.use(key)
        if compiled is not None and not self.store.changed and compiled.is_current and compiled.serves(call):
            return compiled
        with self.lock:
            if self.store.changed:
                self.follow()
                # A model of other parts is looked at anew, and its configuration numbered so.
                key = self.key(call)
            compiled = self.programs.use(key)
            if compiled is not None and not compiled.is_current:
                self.programs.remove(key)
                compiled = None
            elif compiled is not None and not compiled.serves(call):
                compiled = None
            if compiled is not None or key in self.failed or key in self.slower:
                return compiled
            device = device_of(call)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self.say("the call is captured into a CUDA graph before it has run once; call the module before that")
                return None
            if torch.get_default_device().type != device.type:
                # Constants would be made there.
                self.say(f"PyTorch's default device is {torch.get_default_device()}, and the inputs are on {device}")
                return None
            form = form_of(call)
            start = self.clock()
            try:
                if self.forms_of(call, key)[1]:
                    if not wanted and not self.policy.attempts(form):
                        return None
                    compiled = self.for_sizes(call, key, device)
                    if compiled is not None:
                        return self._keep(compiled, call, key)
                if not wanted and (self._postpones(call, key) or not self._admits(call, key, form, at_once)):
                    return None
                # A capture that calibration has made may serve the call as well.
                calibrated = self.calibrate(call, key, device)
                compiled = self.for_sizes(call, key, device) if calibrated else None
                compiled = compiled or run_after_fork(self.compile, call, key, device)
                self._calibrated.clear()
            except (MaskError, PlanError, DeviceMemoryError, CalibrationError, TargetError):
                raise
            except FuserError as error:
                self.policy.failed(key, form)
                self._fail(key, error)
                return None
            self._excused.discard(key)
            if compiled.captured.asks_modes and not self.asks_modes:
                self.asks_modes = True
                key = self.key(call)
            self.policy.compiled(key, kin_of(call), self.clock() - start)
            return self._keep(compiled, call, key)

    def settled(self, call: FlatCall, key: Key) -> Compiled | None:
        """The program of a call whose original is not to run in its place. A model that fills a cache in its first call
        gets to do so."""
        compiled = self.program(call, key, wanted=True)
        if compiled is None and key in self._excused:
            args, kwargs = call.unflatten([tensor.clone() for tensor in call.tensors])
            with torch.no_grad():
                self.model(*args, **kwargs)
            compiled = self.program(call, key, wanted=True)
        return compiled

    def _admits(self, call: FlatCall, key: Key, form: Hashable, at_once: int) -> bool:
        common = self.common(call, key)
        return self.policy.admits(
            key if common is None else common,
            form,
            kin_of(call),
            label=text_of(call),
            now=self.programs.tick(),
            oldest=self.programs.oldest,
            at_once=at_once if common is None else AT_ONCE,
        )

    def _postpones(self, call: FlatCall, key: Key) -> bool:
        """Whether a call that no capture holds for runs in the original for now."""
        return bool(call.objects) and self.forms.postpones(self.common(call, key))

    def _keep(self, compiled: Compiled, call: FlatCall, key: Key) -> Compiled:
        """Have a program for the next calls like this."""
        if call.alike is not None and compiled.growing is None and key[0] is call.alike:
            # It serves calls of its very sizes alone.
            self._by_themselves.add(call.alike)
            key = self.key(call)
        if compiled.may_be_slower and self.options.attention_now() is None:
            self.comparisons[key] = Comparison()
        else:
            self.policy.succeeded(form_of(call))
        self.add(key, compiled)
        return compiled

    def add(self, key: Key, compiled: Compiled) -> None:
        """Keep a program in the place of those that have not been used for longest."""
        if any(not gone.sizes for gone in self.programs.add(key, compiled)):
            self.retain()

    def decide(self, comparison: Comparison, compiled: Compiled, key: Key, call: FlatCall) -> None:
        """Keep a program that is faster than the original model, and let the other go."""
        if not comparison.original_is_faster:
            self.policy.succeeded(form_of(call))
            return
        medians, plan = comparison.medians, compiled.assembly.plan
        reason = (
            f"{text_of(call)} took {1e3 * medians[False]:.3g} ms as a program and {1e3 * medians[True]:.3g} ms in the "
            f"original; {len(compiled.assembly.unfused)} of the program's {len(plan.steps)} steps are PyTorch's"
        )
        self.say(reason)
        remember(self.slower, key, reason)
        self.policy.failed(key, form_of(call))
        self.programs.remove(key)
        left = {id(c.captured) for c in self.programs.values()}
        for captured in self.forms_of(call, key)[1]:
            if id(captured.captured) not in left:
                captured.release()
        self.retain()

    def forms_of(self, call: FlatCall, key: Key) -> tuple[Hashable, list[Form]]:
        """What calls that differ in sizes alone have in common, and what has been captured for all of them."""
        common = form_key(call) if self.options.dynamic else None
        name = None if common is None else (common, key[2])
        return name, self.forms.of(name)

    def common(self, call: FlatCall, key: Key) -> Hashable | None:
        """What a call shares with those that one capture may serve as well; None where each has one of its own."""
        name = self.forms_of(call, key)[0]
        return None if name is None or self.forms.has_failed(name) else name

    # ---- making programs

    def for_sizes(self, call: FlatCall, key: Key, device: torch.device, *, capturing: bool = False) -> Compiled | None:
        """The program of a call from what has been captured for all sizes, or, with ``capturing``, from another such
        capture; None where none holds for it, or can be made."""
        target, threads = self.placed(key, device)
        name, forms = self.forms_of(call, key)
        states = self._states_of(device)

        def compiled(form: Form) -> Compiled | None:
            try:
                found = run_after_fork(form.compile, call, self.store, target, threads, states, self._tuner)
            except FuserError as error:
                self.forms.refused(f"{text_of(call)}: {error}")
                return None
            self.check_masked(found)
            self.padding.count(form, found.sizes, target, call.tensors)
            return found

        with making(device):
            if not capturing:
                return next((program for form in forms if (program := compiled(form)) is not None), None)
            form = self.captured_form(name, call)
            return None if form is None else compiled(form)

    def captured_form(self, name: Hashable | None, call: FlatCall) -> Form | None:
        """A new capture for all sizes that serves calls of this name; None where there can be none."""
        return self.forms.capture(name, lambda: Form(self.model, call, self.store, self.options, self.quantizer))

    def compile(self, call: FlatCall, key: Key, device: torch.device) -> Compiled:
        """A program for a call that no capture serves. Raises FuserError where there can be none."""
        bound = self.for_sizes(call, key, device, capturing=True)
        if bound is not None:
            return bound
        target, threads = self.placed(key, device)
        signature, _, variant = key
        like = next(
            (
                c
                for (known, _, other), c in self.programs.items()
                if (known, other) == (signature, variant) and c.program.device == device
                if c.is_current and not c.sizes
            ),
            None,
        )
        with making(device):
            compiled = compile_call(
                self.model,
                call,
                self.store,
                target,
                threads,
                options=self.options,
                tuner=self._tuner,
                states=self._states_of(device),
                captured=self._calibrated.get(call.key) if like is None else like.captured,
                quantizer=self.quantizer,
            )
        self.check_masked(compiled)
        return compiled

    def part(self, form: Form, part: Variant, sizes: Mapping[str, int], key: Key, device: torch.device) -> Compiled:
        """The program of a part of a model without padding, for some sizes."""
        target, threads = self.placed(key, device)
        states = self._states_of(device)
        # A search would have to make up plans of attention.
        tuner = None if self._tuner is None else self._tuner.without_trials()
        with making(device):
            return run_after_fork(form.compile_part, part, sizes, self.store, target, threads, states, tuner)

    def knowing(self, plain: Compiled, call: FlatCall, key: Key) -> Compiled | None:
        """The program for a call's very masks, when they have come before and it is predicted to be faster."""
        prints = tuple(fingerprint(call.tensors[i]) for i in plain.mask_inputs)
        if None in prints:
            return None
        known: Key = ((*call.key, prints), *key[1:])
        compiled = self.programs.use(known)
        if compiled is not None and not self.store.changed and compiled.is_current:
            return compiled
        with self.lock:
            if self.store.changed or not self.masks.returns(key, known):
                return None
            self.masks.tried(known)
            device = device_of(call)
            target, threads = self.placed(key, device)
            try:
                with making(device):
                    captured = plain.captured if not plain.sizes else self.masks.captured(call.key)
                    if captured is None:
                        captured = run_after_fork(capture, self.model, call)
                        self.masks.keep(call.key, captured)
                    told = knowing(captured, call, plain.mask_inputs)
                    if not pays(captured, told, self.options.attention_now(), target, self._tuner):
                        return None
                    states = self._states_of(device)
                    make = functools.partial(
                        compile_call,
                        options=self.options,
                        tuner=self._tuner,
                        states=states,
                        captured=told,
                        quantizer=self.quantizer,
                    )
                    compiled = run_after_fork(make, self.model, call, self.store, target, threads)
            except FuserError as error:
                logger.info("no program for the masks of %s: %s", text_of(call), error)
                return None
            self.programs.add(known, compiled)
            return compiled

    def calibrate(self, call: FlatCall, key: Key, device: torch.device) -> bool:
        """Decide which layers are quantized, by the inputs that were given for it, or else by a call; False if that was
        decided before."""
        quantizer = self.quantizer
        if quantizer is None or quantizer.settled:
            return False
        target, _ = self.placed(key, device)
        calls = [acceptable(self.model, *given, self.options.target) for given in quantizer.options.arguments()]
        for given, reason in calls or [(call, "")]:
            if given is None:
                raise CalibrationError(f"an input in calibrate= cannot be used: {reason}")
            with making(device):
                try:
                    quantizer.observe(*self._exact_graph(given, key, target), given.tensors)
                except FuserError as error:
                    if calls:
                        raise CalibrationError(f"the model cannot run on an input in calibrate=: {error}") from error
                    raise
        tuner = None if self._tuner is None or target.emulated else self._tuner.without_trials()

        def choose(graph: OperatorGraph) -> list[GroupChoice]:
            return choose_all(graph, target, tuner)[0]

        def compare(ways: Sequence[Sequence[GroupChoice]]) -> list[float] | None:
            return [sum(c.seconds for c in way) for way in ways] if tuner is None else tuner.compare(ways)

        quantizer.settle(target, choose, compare)
        return True

    def _exact_graph(self, call: FlatCall, key: Key, target: Target) -> tuple[OperatorGraph, Mapping[str, Tensor]]:
        """The graph of a call without quantization and its parameters, from a capture for all sizes where there can be
        one, which its program is made of as well."""
        name, forms = (None, []) if call.objects else self.forms_of(call, key)
        for form in forms:
            with contextlib.suppress(CaptureError):
                return form.exact(call, target), form.captured.parameters
        made = run_after_fork(self.captured_form, name, call)
        if made is not None:
            with contextlib.suppress(CaptureError):
                return made.exact(call, target), made.captured.parameters
        captured = run_after_fork(capture, self.model, call)
        self._calibrated[call.key] = captured
        graph = raise_graph(captured, self.options.attention_now(), floating(target))
        return with_stored_integers(graph, captured.parameters, target), captured.parameters

    def placed(self, key: Key, device: torch.device) -> tuple[Target, int]:
        """What to compile for, and for how many threads. Raises TargetError for a device that lacks what it needs."""
        target = self.options.target or target_of(device)
        if self.options.linear is not None:
            self.options.linear.check(target)
        self.target = target
        place = key[1]
        threads = place if isinstance(place, int) and target.kind == "cpu" else 1
        if self._tuner is None or self._tuner.target != target:
            self._tuner = tuner_for(self.options.search, target, threads)
        return target, threads

    def _fail(self, key: Key, error: FuserError) -> None:
        self.say(str(error))
        if isinstance(error, StateError) and key not in self._excused:
            # It may have filled a cache, which the next capture finds.
            self._excused.add(key)
            return
        remember(self.failed, key, str(error))

    def give_up(self, key: Key, error: FuserError) -> None:
        """Let the original run from now on where a program cannot."""
        with self.lock:
            remember(self.failed, key, str(error))
            self.comparisons.pop(key, None)
            self.programs.remove(key)

    def say(self, reason: str) -> None:
        """Warn, once, that the original model runs because of ``reason``."""
        if reason not in self.said:
            self.said.add(reason)
            logger.warning("the original model runs: %s", reason)

    def check_unmasked(self, reason: str) -> None:
        """Raise MaskError if the original model, which is to run because of ``reason``, would miss a mask."""
        if self.options.attention is not None:
            raise MaskError(f"{UNMASKED}, and it has to run: {reason}")

    def check_masked(self, compiled: Compiled) -> None:
        """Raise MaskError if something in a program misses the mask that was given for self-attention."""
        if self.options.attention is not None:
            check_restricted(compiled.graph)

    def retain(self) -> None:
        """Keep only what the programs that are left use."""
        self.comparisons = {key: found for key, found in self.comparisons.items() if key in self.programs}
        programs = [c for engine in self.sharing() for c in engine._followed]
        shared = [use for form in self.forms for use in form.uses]
        self.store.retain(
            [*shared, *((c.assembly.plan.constants, c.graph.constants, c.captured.parameters) for c in programs)]
        )

    def sharing(self) -> Sequence[Engine]:
        """The engines whose programs use this store of weights."""
        return [self]

    @property
    def _followed(self) -> list[Compiled]:
        """Everything that has constants made from weights."""
        return [*self.programs.values(), *(found.before for found in self.packed.values())]

    # ---- weights

    def follow(self) -> None:
        """Follow weights that have changed since they were packed."""
        changed = self.store.changes()
        programs = [c for engine in self.sharing() for c in engine._followed]
        if self.store.restructured or any(
            not _follows(c.captured.parameters, c.graph, c.program.device, changed) for c in programs
        ):
            self.refresh()
            return
        self.packed.clear()
        self.forms.keep(
            lambda form: all(_follows(form.captured.parameters, graph, form.device, changed) for graph in form.graphs)
        )
        self.failed.clear()
        try:
            with self.store.refreshing():
                for compiled in programs:
                    parameters = compiled.captured.parameters
                    compiled.program.set_constants(
                        program_constants(
                            compiled.assembly, compiled.graph, parameters, self.store, device=compiled.program.device
                        )
                    )
        except MemoryError:
            raise
        except Exception:
            # Such as zero points of weights that had none: kernels for these do not hold any more.
            self.refresh()

    def refresh(self) -> None:
        """Forget all programs and packed weights, and compile anew when called."""
        with self.lock:
            self.failed.clear()
            self.slower.clear()
            self._excused.clear()
            self.comparisons.clear()
            self.programs.clear()
            self.packed.clear()
            self.forms.clear()
            self.masks = KnownMasks()
            if self.options.linear is not None:
                self.quantizer = Quantizer(self.model, self.options.linear)
            self.policy = CompilationPolicy()
            self.store = WeightStore(self.model)

    def saved_calls(self) -> list[SavedCall]:
        """All programs with their signatures and constants, which follow the weights as they are now; without those for
        calls with objects, such as caches, which a file cannot tell from others, and those that write to inputs."""
        with self.lock:
            if self.store.changed:
                self.follow()
            if any(has_objects(signature) or c.updated for (signature, *_), c in self.programs.items()):
                logger.warning("programs of calls with objects, such as caches, or that write to inputs are not saved")
            return [
                SavedCall(
                    signature,
                    c,
                    [t.detach() for t in program_constants(c.assembly, c.graph, c.captured.parameters, self.store)],
                )
                for (signature, _, variant), c in self.programs.items()
                if variant[0] == self.store.configuration and not c.captured.known
                if not isinstance(signature[0], Packing) and not has_objects(signature) and not c.updated
            ]

    def saved_forms(self) -> list[SavedForm]:
        """What has been captured for all sizes on CPUs, but of calls with objects, or that write to inputs."""
        with self.lock:
            if self.store.changed:
                self.follow()
            return [
                SavedForm(name[0], form, self.store)
                for name, form in self.forms.items()
                if name[1][0] == self.store.configuration and form.device.type == "cpu" and not has_objects(name[0])
                if not form.captured.updated
            ]

    def _states_of(self, device: torch.device) -> States:
        return self._states.setdefault(device, States(arena_of(device, self.options.concurrency)))


@contextlib.contextmanager
def making(device: torch.device) -> Iterator[None]:
    """What a capture and its program are made under. Tensors made in inference mode could not be trained or written to
    later. What goes wrong for other reasons than those that fuser knows is an InternalError, for which the original
    runs as for others."""
    with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten(), set_aside():
        try:
            yield
        except (FuserError, MemoryError):
            raise
        except Exception as error:
            logger.error("a fault of fuser, which should be reported with this traceback:", exc_info=error)
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}, line {last.lineno}"
            raise InternalError(f"fuser fails on this model, {type(error).__name__} in {place}: {error}") from error


def _count_fused_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # ``torch._fused_adam_`` and its like write parameters without advancing their versions.
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(p for p in group["params"] if p.grad is not None)


register_optimizer_step_post_hook(_count_fused_step)


def remember(reasons: MutableMapping[K, V], key: K, reason: V) -> None:
    """Remember a reason, and forget what is too old."""
    reasons[key] = reason
    while len(reasons) > _PROGRAMS:
        del reasons[next(iter(reasons))]


def _follows(
    parameters: Mapping[str, Tensor], graph: OperatorGraph, device: torch.device, changed: Collection[int]
) -> bool:
    """Whether programs of a graph can take the new contents of weights: same shapes, dtypes and device as it was made
    for, and nothing in it was decided by the old ones."""
    values = graph.values
    for name, tensor in parameters.items():
        if id(tensor) not in changed:
            continue
        if name in graph.inspected or tensor.device != device:
            return False
        if name not in values:
            continue
        if tuple(tensor.shape) != values[name].shape or tensor.dtype != values[name].dtype:
            return False
        if tuple(tensor.stride()) != values[name].strides:
            return False
    return True
