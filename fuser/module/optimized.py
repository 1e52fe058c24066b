"""`OptimizedModule`: the user's model, faster."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fuser.codegen.assemble import KernelRecord
from fuser.codegen.choice import GroupChoice
from fuser.frontend import traces
from fuser.frontend.arguments import has_objects
from fuser.frontend.attention_operators import check_restricted
from fuser.frontend.capture import FlatCall, Signature, StateError, capture, is_capturing, prepare
from fuser.frontend.graphs import raise_graph
from fuser.integrations import sentence_transformers, sparse_models
from fuser.ir.errors import (
    CalibrationError,
    CaptureError,
    DeviceMemoryError,
    FuserError,
    MaskError,
    PackingError,
    PlanError,
)
from fuser.ir.graph import OperatorGraph
from fuser.ir.masks import Mask
from fuser.ir.target import Target
from fuser.kernels.base import floating
from fuser.module.acceptance import acceptable, device_of, form_of, kin_of, text_of
from fuser.module.compiler import Compiled, choose_all, compile_call, program_constants
from fuser.module.forms import Form, Forms, Packing, Variant, form_key
from fuser.module.known import KnownMasks, fingerprint, knowing, pays
from fuser.module.methods import BoundMethods
from fuser.module.nested import is_nested, padded
from fuser.module.options import Options
from fuser.module.policy import AT_ONCE, Comparison, CompilationPolicy
from fuser.module.programs import ProgramCache
from fuser.module.quantizing import Int8, Quantizer, with_stored_integers
from fuser.module.ragged import Share, keys_of, run_packed
from fuser.module.recompute import Originals, Recorded, is_recomputing, run_recorded
from fuser.module.snapshot import Memory, SavedCall, SavedForm, Snapshot
from fuser.module.weights import WeightStore
from fuser.runtime.cuda_program import arena_of
from fuser.runtime.library import run_after_fork
from fuser.runtime.locks import ForkSafeRLock
from fuser.runtime.program import CPU, Program, States
from fuser.runtime.targets import on_device, target_of, threads_now
from fuser.search.tuning import Tuner, tuner_for

logger = logging.getLogger("fuser")
_PROGRAMS = 64
"""Programs that a module keeps; the one that has not run for longest goes first."""
_MUCH_PADDING = 0.1
"""The share of padding from which on it is worth a word."""
_AT_ONCE_IN_METHODS = 1
"""Calls that compile when first met in a method of the model, of those that each need a capture of their own: a loop
over tokens makes one for every length."""
UNMASKED = "the original model knows nothing of the mask that attention= gives"
K = TypeVar("K")
V = TypeVar("V")
Key = tuple[Signature, "int | torch.device", tuple[Any, ...]]
"""A call, the number of threads or the GPU that it runs on, and what else the model's code depends on: its plain
attributes, and PyTorch's modes if it asks for them."""


@dataclass(frozen=True)
class _Packed:
    """How calls of one shape leave out padding, and the program that comes before there are rows."""

    form: Form
    packing: Packing
    before: Compiled
    complete: set[tuple[Any, ...]] = field(default_factory=set)
    """The numbers of which masks without padding consist."""


class OptimizedModule(nn.Module):
    """A drop-in for ``model`` that runs fused kernels.

    Same signature, same structure of outputs, same ``state_dict`` and attributes. The model is captured once for all
    batch sizes and lengths where it allows that (see ``dynamic`` of :func:`optimize`), and a program for new ones is
    bound in milliseconds. Other calls have a program for each combination of shapes, dtypes and plain arguments: the
    first 8 are compiled when they are called, others when they have been called often enough to pay. The last 64
    programs are kept. The original model runs instead, with one warning and a reason in :meth:`report`, in training
    mode, under autocast and function transforms, when the model cannot be captured or built, and when it is faster than
    the program. Which is faster is found by turns at the first calls, where PyTorch must run many of a program's
    operators.

    Outputs have gradients where the model's have: the backward pass runs the original once more, and raises FuserError
    if weights, attributes or the mode have changed since the call.

    Methods of the model run with this module in the model's place, so that ``generate`` or ``encode`` run programs.

    New weights, parameters, submodules and modes are followed, and so are plain attributes (``model.scale = 2.0``),
    global numbers that the model's code names, and PyTorch's gradient modes where it asks for them. What is kept no
    record of is not seen: writes through ``tensor.data`` or NumPy, and entries of large containers; call
    :meth:`refresh` after those.

    Any thread may call it, also while another compiles; the programs of one module run one after the other. After a
    fork, a child may call it and compile; what runs in the original model hangs or not as it would without fuser.
    """

    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        options: Options,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self._options = options
        self._target = options.target
        self._lock = ForkSafeRLock()
        self._programs: ProgramCache[Key, Compiled] = ProgramCache(_PROGRAMS)
        self._policy = CompilationPolicy()
        self._comparisons: dict[Key, Comparison] = {}
        self._failed: dict[Key, str] = {}
        self._slower: dict[Key, str] = {}
        self._excused: set[Key] = set()
        self._by_themselves: set[Signature] = set()
        self._seconds = time.perf_counter
        self._methods: BoundMethods | None = None
        self._states: dict[torch.device, States] = {}
        self._forms = Forms()
        self._masks = KnownMasks()
        self._quantizer = None if options.quantize is None else Quantizer(model, options.quantize)
        self._packed: ProgramCache[Key, _Packed] = ProgramCache(_PROGRAMS)
        self._padded = Share()
        self._told_of_padding = False
        self._kept: dict[str, None] = {}
        prepare()
        self._store = WeightStore(model)
        self._originals = Originals(model, "" if options.attention is None else UNMASKED)
        self._tuner: Tuner | None = None
        self._said: set[str] = set()
        self._asks_modes = False
        self.training = model.training
        if options.attention is not None:
            # Dynamo would compile the original, without its mask, into a graph.
            object.__setattr__(self, "forward", torch.compiler.disable(self.forward))  # type: ignore[no-untyped-call]
        # Whoever sets, swaps or looks up a parameter or submodule here does so in the model. Last, since the model may
        # have members with the names of our attributes.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, getattr(model, name))

    # ---- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or is_capturing() or is_recomputing():
            # Kernels behind ctypes are nothing another compiler or autograd could look into. (Other exports are known
            # by their tensors.)
            self._check_unmasked("a capture of what it is a part of looks into it")
            return self._model(*args, **kwargs)
        if self._options.padding == "skip" and is_nested(args, kwargs):
            return self._of_nested(args, kwargs)
        call, reason = acceptable(self._model, args, kwargs, self._options.target)
        if call is None:
            return self._replaced(reason, args, kwargs)
        key = self._key(call)
        if self._options.padding == "skip" and not call.objects:
            packed = self._without_padding(call, key)
            if packed is not None:
                return packed
        compiled = self._compiled(call, key) if self._options.attention is None else self._settled(call, key)
        if compiled is not None and torch.is_grad_enabled() and compiled.routes.unregistered:
            return self._replaced("a tensor that is no parameter of a module requires grad", args, kwargs)
        if compiled is None:
            self._check_unmasked(self._failed.get(key, "the report says why"))
            start = self._seconds()
            result = self._original(args, kwargs)
            seconds = self._seconds() - start
            common = self._common(call, key)
            self._policy.ran_original(key if common is None else common, seconds)
            return result
        comparison = self._comparisons.get(key)
        if comparison is not None:
            return self._compare(comparison, compiled, key, call, args, kwargs)
        if compiled.mask_inputs and self._masks.looks_at(key):
            compiled = self._knowing(compiled, call, key) or compiled
        return compiled.built(call, self._run(compiled, call, key))

    def _run(self, compiled: Compiled, call: FlatCall, key: Key) -> list[Tensor]:
        """The results of a program, with gradients where PyTorch would record them."""
        program, routes = compiled.program, compiled.routes
        sources = routes.sources(call.tensors) if torch.is_grad_enabled() else ()
        if not sources:
            return compiled.run(call)
        now = (self._store.generation, key[2][0])
        plan = Recorded(routes, compiled.output, program.plan.aliases, self._originals, self._state, now)
        return run_recorded(compiled.run, call, sources, plan)

    def _without_padding(self, call: FlatCall, key: Key) -> Any | None:
        """The result of a call whose padding is not computed; None where there is none, or it has to be."""
        try:
            found = self._packing(call, key)
            if found is None:
                return None
            outputs = self._run_packed(found, call, key)
        except PackingError as error:
            _remember(self._kept, str(error), None)
            return None
        return None if outputs is None else found.before.output.build(outputs)

    def _run_packed(self, found: _Packed, call: FlatCall, key: Key) -> list[Tensor] | None:
        rows, before = functools.partial(self._rows, found, key), found.before
        layout = found.packing.graph.layout
        return run_packed(layout, before.sizes, before.program, rows, call.tensors, self._padded, found.complete)

    def _of_nested(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of a call with nested tensors. Raises PackingError where padding would have to be computed."""
        given = padded(self._model, args, kwargs)
        call, reason = acceptable(self._model, given.args, given.kwargs, self._options.target)
        if call is None:
            raise PackingError(f"a call with nested tensors needs a program: {reason}")
        key = self._key(call)
        # The second time it is known which of PyTorch's modes the model asks for.
        found = self._packing(call, key) or self._packing(call, key := self._key(call))
        if found is None:
            raise PackingError("the model asks for PyTorch's modes")
        outputs = self._run_packed(found, call, key)
        if outputs is None:
            compiled = self._compiled(call, key, wanted=True)
            if compiled is None:
                raise PackingError(f"a call with nested tensors needs a program: {self._failed.get(key)}")
            outputs = compiled.run(call)
        return found.before.output.build(given.outputs(outputs, found.packing.graph.layout.outputs))

    def _packing(self, call: FlatCall, key: Key) -> _Packed | None:
        """How padding is left out of a call; None where it is not known yet. Raises PackingError where it cannot be."""
        found = self._packed.use(key)
        if found is None or self._store.changed or not found.before.is_current:
            device = device_of(call)
            with self._lock:
                if self._store.changed:
                    self._refresh()
                target, _ = self._placed(key, device)
                if target.kind != "cpu":
                    raise PackingError("rows are packed for programs on CPUs alone")
                if torch.get_default_device() != CPU:
                    raise PackingError(f"PyTorch's default device is {torch.get_default_device()}")
                with _as_reason():
                    self._calibrate(call, key, device)
                    form = self._form(call, key, device)
                    if form.captured.asks_modes and not self._asks_modes:
                        # From now on keys say which modes are on.
                        self._asks_modes = True
                        return None
                    sizes = form.sizes(call)
                    packing = form.packing(sizes, target)
                    found = _Packed(form, packing, self._part(form, packing.before, sizes, key, device))
                self._packed.add(key, found)
        routes = found.before.routes
        if torch.is_grad_enabled() and (routes.unregistered or routes.sources(call.tensors)):
            raise PackingError("outputs are to have gradients; call the model under torch.inference_mode()")
        return found

    def _form(self, call: FlatCall, key: Key, device: torch.device) -> Form:
        """A capture for all sizes that holds for a call. Raises PackingError where there is none."""
        name, forms = self._forms_of(call, key)
        if name is None:
            raise PackingError("the call is captured by itself: inputs are not contiguous, or dynamic=False")
        for form in forms:
            with contextlib.suppress(CaptureError):
                form.sizes(call)
                return form
        with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
            made = run_after_fork(
                self._forms.capture, name, lambda: Form(self._model, call, self._store, self._options, self._quantizer)
            )
        if made is None:
            raise PackingError("; ".join(("the model is not captured for all sizes", *self._forms.reasons)))
        return made

    def _rows(self, packed: _Packed, key: Key, sizes: Mapping[str, int]) -> Program:
        """The program that computes so many rows."""
        part = packed.packing.rows
        wanted = tuple((name, sizes[name]) for name in part.binder.names)
        place: Key = (packed.packing, *wanted), *key[1:]
        compiled = self._programs.use(place)
        if compiled is not None:
            return compiled.program
        with self._lock, _as_reason():
            compiled = self._part(packed.form, part, sizes, place, CPU)
            if any(not gone.sizes for gone in self._programs.add(place, compiled)):
                self._retain()
            return compiled.program

    def _part(self, form: Form, part: Variant, sizes: Mapping[str, int], key: Key, device: torch.device) -> Compiled:
        target, threads = self._placed(key, device)
        states = self._states.setdefault(device, States(arena_of(device, self._options.concurrency)))
        # A search would have to make up plans of attention.
        tuner = None if self._tuner is None else self._tuner.without_trials()
        with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
            return run_after_fork(form.compile_part, part, sizes, self._store, target, threads, states, tuner)

    def _state(self) -> object | None:
        """A value that stays equal while the model computes what the programs do; None once it does not."""
        store = self._store
        return None if store.changed else (store.generation, store.configuration)

    def _original(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._model(*args, **kwargs)

    def _replaced(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of the original model, which runs because of ``reason``."""
        self._check_unmasked(reason)
        self._say(reason)
        return self._original(args, kwargs)

    def _check_unmasked(self, reason: str) -> None:
        """Raise MaskError if the original model, which is to run because of ``reason``, would miss a mask."""
        if self._options.attention is not None:
            raise MaskError(f"{UNMASKED}, and it has to run: {reason}")

    def _compare(
        self,
        comparison: Comparison,
        compiled: Compiled,
        key: Key,
        call: FlatCall,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Let the program or the original run, in turn, until it is known which is faster."""
        device = compiled.program.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return compiled.built(call, self._run(compiled, call, key))
        original = comparison.original_is_next
        start = self._seconds()
        if original:
            result = self._original(args, kwargs)
        else:
            result = compiled.built(call, self._run(compiled, call, key))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        comparison.add(self._seconds() - start, original=original)
        if comparison.is_complete:
            with self._lock:
                if self._comparisons.pop(key, None) is comparison:
                    self._decide(comparison, compiled, key, call)
        return result

    def _decide(self, comparison: Comparison, compiled: Compiled, key: Key, call: FlatCall) -> None:
        """Keep a program that is faster than the original model, and let the other go."""
        if not comparison.original_is_faster:
            self._policy.succeeded(form_of(call))
            return
        medians, plan = comparison.medians, compiled.assembly.plan
        reason = (
            f"{text_of(call)} took {1e3 * medians[False]:.3g} ms as a program and {1e3 * medians[True]:.3g} ms in the "
            f"original; {len(compiled.assembly.unfused)} of the program's {len(plan.steps)} steps are PyTorch's"
        )
        self._say(reason)
        _remember(self._slower, key, reason)
        self._policy.failed(key, form_of(call))
        self._programs.remove(key)
        left = {id(c.captured) for c in self._programs.values()}
        for captured in self._forms_of(call, key)[1]:
            if id(captured.captured) not in left:
                captured.release()
        self._retain()

    def _key(self, call: FlatCall) -> Key:
        device = device_of(call)
        place = threads_now() if device.type == "cpu" else device
        signature = call.key
        if call.alike is not None and self._options.dynamic and call.alike not in self._by_themselves:
            signature = call.alike
        return signature, place, (self._store.configuration, call.modes if self._asks_modes else None)

    def _compiled(self, call: FlatCall, key: Key, *, wanted: bool = False) -> Compiled | None:
        """The program of a call; None if the original is to run, which ``wanted`` allows only where there can be no
        program."""
        compiled = self._programs.use(key)
        if compiled is not None and not self._store.changed and compiled.is_current and compiled.serves(call):
            return compiled
        with self._lock:
            if self._store.changed:
                self._refresh()
            compiled = self._programs.use(key)
            if compiled is not None and not compiled.is_current:
                self._programs.remove(key)
                compiled = None
            elif compiled is not None and not compiled.serves(call):
                compiled = None
            if compiled is not None or key in self._failed or key in self._slower:
                return compiled
            device = device_of(call)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._say("the call is captured into a CUDA graph before it has run once; call the module before that")
                return None
            if torch.get_default_device().type != device.type:
                # Constants would be made there.
                self._say(f"PyTorch's default device is {torch.get_default_device()}, and the inputs are on {device}")
                return None
            form = form_of(call)
            if self._forms_of(call, key)[1]:
                if not wanted and not self._policy.attempts(form):
                    return None
                compiled = self._for_sizes(call, key, device)
                if compiled is not None:
                    return self._keep(compiled, call, key)
            if not wanted and (self._postpones(call, key) or not self._admits(call, key, form)):
                return None
            start = self._seconds()
            try:
                # A capture that calibration has made may serve the call as well.
                calibrated = self._calibrate(call, key, device)
                compiled = self._for_sizes(call, key, device) if calibrated else None
                compiled = compiled or run_after_fork(self._compile, call, key, device)
            except (MaskError, PlanError, DeviceMemoryError, CalibrationError):
                raise
            except FuserError as error:
                self._policy.failed(key, form)
                self._fail(key, error)
                return None
            self._excused.discard(key)
            if compiled.captured.asks_modes and not self._asks_modes:
                self._asks_modes = True
                key = self._key(call)
            self._policy.compiled(key, kin_of(call), self._seconds() - start)
            return self._keep(compiled, call, key)

    def _knowing(self, plain: Compiled, call: FlatCall, key: Key) -> Compiled | None:
        """The program for a call's very masks, when they have come before and it is predicted to be faster."""
        prints = tuple(fingerprint(call.tensors[i]) for i in plain.mask_inputs)
        if None in prints:
            return None
        known: Key = ((*call.key, prints), *key[1:])
        compiled = self._programs.use(known)
        if compiled is not None and not self._store.changed and compiled.is_current:
            return compiled
        with self._lock:
            if self._store.changed or not self._masks.returns(key, known):
                return None
            self._masks.tried(known)
            device = device_of(call)
            target, threads = self._placed(key, device)
            try:
                with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
                    captured = plain.captured if not plain.sizes else self._masks.captured(call.key)
                    if captured is None:
                        captured = run_after_fork(capture, self._model, call)
                        self._masks.keep(call.key, captured)
                    told = knowing(captured, call, plain.mask_inputs)
                    mask = None if self._options.attention is None else self._options.attention.current()
                    if not pays(captured, told, mask, target, self._tuner):
                        return None
                    states = self._states.setdefault(device, States(arena_of(device, self._options.concurrency)))
                    make = functools.partial(
                        compile_call,
                        options=self._options,
                        tuner=self._tuner,
                        states=states,
                        captured=told,
                        quantizer=self._quantizer,
                    )
                    compiled = run_after_fork(make, self._model, call, self._store, target, threads)
            except FuserError as error:
                logger.info("no program for the masks of %s: %s", text_of(call), error)
                return None
            self._programs.add(known, compiled)
            return compiled

    def _keep(self, compiled: Compiled, call: FlatCall, key: Key) -> Compiled:
        """Have a program for the next calls like this."""
        if call.alike is not None and compiled.growing is None and key[0] is call.alike:
            # It serves calls of its very sizes alone.
            self._by_themselves.add(call.alike)
            key = self._key(call)
        if compiled.may_be_slower and self._options.attention is None:
            self._comparisons[key] = Comparison()
        else:
            self._policy.succeeded(form_of(call))
        if any(not gone.sizes for gone in self._programs.add(key, compiled)):
            self._retain()
        return compiled

    def _count_padding(self, form: Form, compiled: Compiled, target: Target, call: FlatCall) -> None:
        """Look how much of a call with a new program is padding that could be left out; not at every one, since that
        takes about as long as binding it."""
        if self._options.padding != "keep" or target.kind != "cpu" or not self._padded.is_due():
            return
        try:
            packing = form.packing(compiled.sizes, target)
            self._padded.add(keys_of(packing, compiled.sizes, form.captured.parameters, call.tensors))
        except FuserError:
            return
        if float(self._padded) >= _MUCH_PADDING and not self._told_of_padding:
            self._told_of_padding = True
            logger.info("%s", self._padding[0])

    def _forms_of(self, call: FlatCall, key: Key) -> tuple[Hashable, list[Form]]:
        """What calls that differ in sizes alone have in common, and what has been captured for all of them."""
        common = form_key(call) if self._options.dynamic else None
        name = None if common is None else (common, key[2])
        return name, self._forms.of(name)

    def _common(self, call: FlatCall, key: Key) -> Hashable | None:
        """What a call shares with those that one capture may serve as well; None where each has one of its own."""
        name = self._forms_of(call, key)[0]
        return None if name is None or self._forms.has_failed(name) else name

    def _postpones(self, call: FlatCall, key: Key) -> bool:
        """Whether a call that no capture holds for runs in the original for now."""
        return bool(call.objects) and self._forms.postpones(self._common(call, key))

    def _for_sizes(self, call: FlatCall, key: Key, device: torch.device, *, capturing: bool = False) -> Compiled | None:
        """The program of a call from what has been captured for all sizes, or, with ``capturing``, from another such
        capture; None where none holds for it, or can be made."""
        target, threads = self._placed(key, device)
        name, forms = self._forms_of(call, key)
        states = self._states.setdefault(device, States(arena_of(device, self._options.concurrency)))

        def compiled(form: Form) -> Compiled | None:
            try:
                found = run_after_fork(form.compile, call, self._store, target, threads, states, self._tuner)
            except FuserError as error:
                self._forms.refused(f"{text_of(call)}: {error}")
                return None
            self._check_masked(found.graph)
            self._count_padding(form, found, target, call)
            return found

        with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
            if not capturing:
                return next((program for form in forms if (program := compiled(form)) is not None), None)
            form = self._forms.capture(
                name, lambda: Form(self._model, call, self._store, self._options, self._quantizer)
            )
            return None if form is None else compiled(form)

    def _settled(self, call: FlatCall, key: Key) -> Compiled | None:
        """The program of a call whose original is not to run in its place. A model that fills a cache in its first call
        gets to do so."""
        compiled = self._compiled(call, key, wanted=True)
        if compiled is None and key in self._excused:
            args, kwargs = call.unflatten(call.tensors)
            with torch.no_grad():
                self._model(*args, **kwargs)
            compiled = self._compiled(call, key, wanted=True)
        return compiled

    def _admits(self, call: FlatCall, key: Key, form: Hashable) -> bool:
        within = self._methods is not None and self._methods.is_running
        common = self._common(call, key)
        return self._policy.admits(
            key if common is None else common,
            form,
            kin_of(call),
            label=text_of(call),
            now=self._programs.tick(),
            oldest=self._programs.oldest,
            at_once=_AT_ONCE_IN_METHODS if within and common is None else AT_ONCE,
        )

    def _calibrate(self, call: FlatCall, key: Key, device: torch.device) -> bool:
        """Decide which layers are quantized, by the inputs that were given for it, or else by a call; False if that was
        decided before."""
        quantizer = self._quantizer
        if quantizer is None or quantizer.settled:
            return False
        target, _ = self._placed(key, device)
        if target.kind != "cpu":
            quantizer.settled = True
            logger.warning("quantize=Int8() has kernels for CPUs alone; the model runs without it")
            return False
        calls = [acceptable(self._model, *given, self._options.target) for given in quantizer.options.arguments()]
        for given, reason in calls or [(call, "")]:
            if given is None:
                raise CalibrationError(f"an input in calibrate= cannot be used: {reason}")
            with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
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
        name, forms = (None, []) if call.objects else self._forms_of(call, key)
        for form in forms:
            with contextlib.suppress(CaptureError):
                return form.exact(call, target), form.captured.parameters
        made = run_after_fork(
            self._forms.capture, name, lambda: Form(self._model, call, self._store, self._options, self._quantizer)
        )
        if made is not None:
            with contextlib.suppress(CaptureError):
                return made.exact(call, target), made.captured.parameters
        captured = run_after_fork(capture, self._model, call)
        attention = None if self._options.attention is None else self._options.attention.current()
        graph = raise_graph(captured, attention, floating(target))
        return with_stored_integers(graph, captured.parameters, target), captured.parameters

    def _compile(self, call: FlatCall, key: Key, device: torch.device) -> Compiled:
        bound = self._for_sizes(call, key, device, capturing=True)
        if bound is not None:
            return bound
        target, threads = self._placed(key, device)
        signature, _, variant = key
        like = next(
            (
                c
                for (known, _, other), c in self._programs.items()
                if (known, other) == (signature, variant) and c.program.device == device
                if c.is_current and not c.sizes
            ),
            None,
        )
        # Tensors made in inference mode cannot be trained or written to later.
        with torch.inference_mode(False), torch.no_grad(), on_device(device), traces.forgotten():
            compiled = compile_call(
                self._model,
                call,
                self._store,
                target,
                threads,
                options=self._options,
                tuner=self._tuner,
                states=self._states.setdefault(device, States(arena_of(device, self._options.concurrency))),
                captured=None if like is None else like.captured,
                quantizer=self._quantizer,
            )
        self._check_masked(compiled.graph)
        return compiled

    def _check_masked(self, graph: OperatorGraph) -> None:
        """Raise MaskError if something in a graph misses the mask that was given for self-attention."""
        if self._options.attention is not None:
            check_restricted(graph)

    def _placed(self, key: Key, device: torch.device) -> tuple[Target, int]:
        """What to compile for, and for how many threads."""
        target = self._target = self._options.target or target_of(device)
        place = key[1]
        threads = place if isinstance(place, int) and target.kind == "cpu" else 1
        if self._tuner is None or self._tuner.target != target:
            self._tuner = tuner_for(self._options.search, target, threads)
        return target, threads

    def _fail(self, key: Key, error: FuserError) -> None:
        self._say(str(error))
        if isinstance(error, StateError) and key not in self._excused:
            # It may have filled a cache, which the next capture finds.
            self._excused.add(key)
            return
        _remember(self._failed, key, str(error))

    def _retain(self) -> None:
        """Keep only what the programs that are left use."""
        self._comparisons = {key: found for key, found in self._comparisons.items() if key in self._programs}
        programs = [c for module in self._sharing() for c in module._followed]
        shared = [use for form in self._forms for use in form.uses]
        self._store.retain(
            [*shared, *((c.assembly.plan.constants, c.graph.constants, c.captured.parameters) for c in programs)]
        )

    def _sharing(self) -> list[OptimizedModule]:
        """The modules whose programs use this store of weights."""
        return [self]

    @property
    def _followed(self) -> list[Compiled]:
        """Everything that has constants made from weights."""
        return [*self._programs.values(), *(found.before for found in self._packed.values())]

    def _refresh(self) -> None:
        """Follow weights that have changed since they were packed."""
        changed = self._store.changes()
        programs = [c for module in self._sharing() for c in module._followed]
        if self._store.restructured or any(
            not _follows(c.captured.parameters, c.graph, c.program.device, changed) for c in programs
        ):
            self.refresh()
            return
        self._packed.clear()
        self._forms.keep(
            lambda form: all(_follows(form.captured.parameters, graph, form.device, changed) for graph in form.graphs)
        )
        self._failed.clear()
        with self._store.refreshing():
            for compiled in programs:
                parameters = compiled.captured.parameters
                compiled.program.set_constants(
                    program_constants(
                        compiled.assembly, compiled.graph, parameters, self._store, device=compiled.program.device
                    )
                )

    def refresh(self) -> None:
        """Forget all programs and packed weights, and compile anew when called.

        For changes that PyTorch keeps no record of: ``tensor.data``, NumPy views, entries of large containers.
        """
        with self._lock:
            self._failed.clear()
            self._slower.clear()
            self._excused.clear()
            self._comparisons.clear()
            self._programs.clear()
            self._packed.clear()
            self._forms.clear()
            self._masks = KnownMasks()
            if self._options.quantize is not None:
                self._quantizer = Quantizer(self._model, self._options.quantize)
            self._policy = CompilationPolicy()
            self._store = WeightStore(self._model)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("the original model runs: %s", reason)

    # ---- looking inside

    @property
    def programs(self) -> Sequence[Compiled]:
        """Everything compiled so far, in order."""
        return self._programs.values()

    @property
    def kernels(self) -> Sequence[KernelRecord]:
        """The kernels of the program compiled last: name, family, operators of the first use, number of calls."""
        return self.programs[-1].assembly.kernels if self._programs else ()

    @property
    def unfused(self) -> Sequence[tuple[str, str]]:
        """(operator, reason) for every operator of the regions of the program compiled last that no kernel runs;
        ``("*", reason)`` when the original model runs. Operators before the first and after the last region (masks
        made from inputs, patch embeddings) are PyTorch's and are not listed; see :attr:`outside`."""
        if not self._programs:
            return tuple(("*", reason) for reason in (*self._failed.values(), *self._slower.values()))
        return self.programs[-1].unfused

    @property
    def outside(self) -> Sequence[tuple[str, str]]:
        """(operator, reason) for the operators outside the regions, which PyTorch runs."""
        return self.programs[-1].outside if self._programs else ()

    @property
    def fallbacks(self) -> Sequence[str]:
        """Why the original model ran instead of a program, each reason once, and which calls wait for a program."""
        return (*sorted(self._said), *self._policy.reasons)

    @property
    def specialized(self) -> Sequence[str]:
        """Why the model was captured again for a call, or for its shape alone, the last few reasons; without one, a new
        shape binds the sizes of what has been captured once."""
        return self._forms.reasons

    def report(self, path: str | Path | None = None) -> str:
        """What was fused, with which kernels, and what was not and why, as text; with ``path`` also as HTML."""
        from fuser.explain.report import report

        return report(self.snapshot(), Path(path) if path is not None else None)

    def save(self, path: str | Path) -> None:
        """Write the compiled programs, weights and kernels to a file for :func:`fuser.load`.

        Raises FuserError when nothing has been compiled.
        """
        from fuser.saved.writer import save

        save(self.saved_calls(), self.saved_forms(), self.snapshot(), Path(path))

    def snapshot(self) -> Snapshot:
        """What has been compiled, for reports."""
        arena = max((compiled.assembly.plan.arena_bytes for compiled in self.programs), default=0)
        store = self._store
        return Snapshot(
            model=type(self._model).__name__,
            target=self._target,
            programs=tuple(self.programs),
            unfused=tuple(self.unfused),
            outside=tuple(self.outside),
            fallbacks=tuple(self.fallbacks),
            specialized=tuple(self.specialized),
            padding=self._padding,
            precision=None if self._quantizer is None else self._quantizer.found,
            memory=Memory(arena, store.made_bytes, store.offloaded_bytes, store.offload_error),
        )

    @property
    def _padding(self) -> tuple[str, ...]:
        """How much of the rows of calls was padding, if any was seen: of all calls with ``padding="skip"``, and why it
        was computed where it had to be, else of some of those that were compiled."""
        share = float(self._padded)
        if self._options.padding == "keep":
            what = f'{share:.0%} of the rows were padding; fuser.optimize(model, padding="skip") leaves them out'
        else:
            what = f"{share:.0%} of the rows were padding"
        return (*((what,) if share else ()), *(f"was computed: {reason}" for reason in self._kept))

    def saved_calls(self) -> list[SavedCall]:
        """All programs with their signatures and constants, which follow the weights as they are now; without those for
        calls with objects, such as caches, which a file cannot tell from others."""
        with self._lock:
            if self._store.changed:
                self._refresh()
            return [
                SavedCall(
                    signature,
                    c,
                    [t.detach() for t in program_constants(c.assembly, c.graph, c.captured.parameters, self._store)],
                )
                for (signature, _, variant), c in self._programs.items()
                if variant[0] == self._store.configuration and not c.captured.known
                if not isinstance(signature[0], Packing) and not has_objects(signature)
            ]

    def saved_forms(self) -> list[SavedForm]:
        """What has been captured for all sizes on CPUs, but of calls with objects."""
        with self._lock:
            if self._store.changed:
                self._refresh()
            return [
                SavedForm(name[0], form, self._store)
                for name, form in self._forms.items()
                if name[1][0] == self._store.configuration and form.device.type == "cpu" and not has_objects(name[0])
            ]

    def restore(self) -> None:
        """Bring the original weights, which lie in files while only packed copies are used, back into memory."""
        with self._lock:
            self._store.restore()

    # ---- being the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__["_model"]
            value = getattr(model, name)
            if isinstance(value, MethodType) and value.__self__ is model:
                return self._bound(name, value)
            return value

    def _bound(self, name: str, method: MethodType) -> Callable[..., Any]:
        """A method of the model that runs programs where it runs the model."""
        if self._methods is None:
            self._methods = BoundMethods(self._model, self, self._say_unserved)
        return self._methods.bind(name, method)

    def _say_unserved(self, name: str) -> None:
        self._check_unmasked(f"the method {name} runs parts of it by itself")
        self._say(f"the method {name} runs parts of the model by itself; only what calls the whole model is compiled")

    def __setattr__(self, name: str, value: Any) -> None:
        # Public names are the model's; our own are ours, even where the model has a member of that name.
        if name in self.__dict__:
            object.__setattr__(self, name, value)
        elif name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name.startswith("_"):
            super().__delattr__(name)
        else:
            delattr(self._model, name)

    def train(self, mode: bool = True) -> OptimizedModule:
        self._model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        result: dict[str, Any] = self._model.state_dict(*args, **kwargs)
        return result

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self._model.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        found: Iterator[tuple[str, nn.Module]] = self._model.named_modules(*args, **kwargs)
        return found

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self._model.named_children()

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        self._model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        # Programs point into memory and compile again.
        make, arguments = self.__reduce__()
        copied: OptimizedModule = make(*copy.deepcopy(arguments, memo))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizedModule, (self._model, self._options)

    def extra_repr(self) -> str:
        return f"programs={len(self._programs)}"


@contextlib.contextmanager
def _as_reason() -> Iterator[None]:
    """What goes wrong when a call without padding is compiled, as the reason why it has to be computed."""
    try:
        yield
    except PackingError:
        raise
    except FuserError as error:
        raise PackingError(str(error)) from error


def _count_fused_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # ``torch._fused_adam_`` and its like write parameters without advancing their versions.
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(p for p in group["params"] if p.grad is not None)


register_optimizer_step_post_hook(_count_fused_step)


def _remember(reasons: MutableMapping[K, V], key: K, reason: V) -> None:
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


def _served(model: nn.Module, options: Options) -> Any:
    for integration in (sentence_transformers, sparse_models):
        if integration.is_served(model):
            return integration.serve(model, options, _served)
    return OptimizedModule(model, options)


def optimize(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    attention: Mask | None = None,
    quantize: Int8 | None = None,
    search: str | int = "cached",
    target: Target | str | torch.device | None = None,
    cuda_graphs: bool = True,
    dynamic: bool | Mapping[str, Collection[int]] = True,
    concurrency: int = 1,
    padding: str = "keep",
) -> OptimizedModule | Any:
    """Make ``model`` run fused kernels.

    Models of sentence-transformers (see :func:`fuser.integrations.sentence_transformers.serve`) and Longformer and LED
    of transformers (see :func:`fuser.integrations.transformers.sparsify`) come back as models of their class, all
    others as an :class:`OptimizedModule`.

    Args:
        model: any ``nn.Module``; left as it is, apart from where its weights lie in memory.
        example_inputs: positional arguments (tuple) or keyword arguments (dict) to compile for now; without them the
            first call compiles.
        attention: a mask that every self-attention is restricted to, beside the masks it has: one of ``fuser.masks``,
            or a ``BlockMask`` of FlexAttention.
        quantize: ``fuser.Int8(...)`` runs linear layers in int8 on CPUs, as many as keep the model's outputs what they
            are to a bound; the report lists them.
        search: ``"cached"`` takes what a search or measurement found from the cache and measures what it lacks; a
            number searches with so many trials first, once for every shape; ``"model"`` trusts the cost model alone.
        target: what to compile for: a target, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"cuda:emulated"``, which runs
            CUDA kernels on the CPU. Default: the device of the inputs, calibrated once.
        dynamic: whether the model is captured for all sizes of its inputs at once, so that new ones only bind numbers
            to names: True for batch and sequence (the first two dimensions, and those of masks that are as long), a
            mapping from names of inputs to dimensions for others, False for a capture of every shape.
        concurrency: how many calls may run at once on a CPU, each in memory of its own; others wait. Each runs on the
            threads that PyTorch has in the thread that calls.
        cuda_graphs: whether programs on a GPU may be CUDA graphs; ``FUSER_CUDA_GRAPHS=0`` forbids them, too.
        padding: ``"keep"`` computes what the model does for positions that a padding mask leaves out, ``"skip"``
            computes the others alone, packed one behind the other, and gives zeros there. Calls whose padding has an
            influence on other outputs, or that cannot be looked through, run as with ``"keep"``; the report says why.
            On CPUs, without gradients. A model with an argument ``attention_mask`` (or ``src_key_padding_mask``) then
            takes nested tensors (batch, lengths, …) with ``layout=torch.jagged``, too, and gives such for (batch,
            sequence, …); PackingError where it cannot. Models of sentence-transformers that pool without padding skip
            it by themselves.

    Raises:
        TypeError: arguments of the wrong type, and models that TorchScript has compiled.
        ValueError: ``padding`` or ``search`` is none of its values, or ``concurrency`` no positive number.
        MaskError: ``attention`` does not fit the model, or the model cannot be compiled with it. Calls raise it, too,
            where they would have to run the original model, which knows nothing of the mask.
        FuserError: ``target`` is a device that this machine does not have, or that fuser has no kernels for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuser.optimize takes an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("fuser.optimize takes models before TorchScript: pass what torch.jit.script or trace was given")
    if type(model).__module__.startswith("torch._dynamo"):
        # What torch.compile returned.
        model = getattr(model, "_orig_mod", model)
    if isinstance(model, OptimizedModule):
        model = model._model
    options = Options.of(
        attention=attention,
        search=search,
        target=target,
        cuda_graphs=cuda_graphs,
        dynamic=dynamic,
        concurrency=concurrency,
        padding=padding,
        quantize=quantize,
    )
    if example_inputs is None:
        args, kwargs = None, {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    else:
        args, kwargs = (example_inputs,), {}
    optimized = _served(model, options)
    if args is None:
        return optimized
    if not isinstance(optimized, OptimizedModule):
        with torch.inference_mode():
            optimized(*args, **kwargs)
        return optimized
    model = optimized._model
    call, reason = acceptable(model, args, kwargs, options.target)
    if call is None:
        optimized._check_unmasked(reason)
        optimized._say(reason)
    else:
        key = optimized._key(call)
        if optimized._settled(call, key) is None:
            optimized._check_unmasked(optimized._failed.get(key, "the report says why"))
    return optimized
