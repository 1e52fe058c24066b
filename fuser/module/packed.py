"""Calls of a model whose padding is not computed, and those with nested tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fuser.frontend.calls import FlatCall
from fuser.ir.errors import CaptureError, FuserError, PackingError
from fuser.module.acceptance import acceptable, device_of
from fuser.module.engine import Engine, Key, Unpadded, making
from fuser.module.forms import Form
from fuser.module.nested import padded
from fuser.module.ragged import run_packed
from fuser.runtime.library import run_after_fork
from fuser.runtime.program import CPU, Program


def without_padding(engine: Engine, call: FlatCall, key: Key) -> Any | None:
    """The result of a call whose padding is not computed; None where there is none, or it has to be."""
    try:
        found = _packing(engine, call, key)
        if found is None:
            return None
        outputs = _run(engine, found, call, key)
    except PackingError as error:
        engine.padding.must_compute(str(error))
        return None
    return None if outputs is None else found.before.output.build(outputs)


def of_nested(engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call with nested tensors. Raises PackingError where padding would have to be computed."""
    given = padded(engine.model, args, kwargs)
    call, reason = acceptable(engine.model, given.args, given.kwargs, engine.options.target)
    if call is None:
        raise PackingError(f"a call with nested tensors needs a program: {reason}")
    key = engine.key(call)
    # The second time it is known which of PyTorch's modes the model asks for.
    found = _packing(engine, call, key) or _packing(engine, call, key := engine.key(call))
    if found is None:
        raise PackingError("the model asks for PyTorch's modes")
    outputs = _run(engine, found, call, key)
    if outputs is None:
        compiled = engine.program(call, key, wanted=True)
        if compiled is None:
            raise PackingError(f"a call with nested tensors needs a program: {engine.failed.get(key)}")
        outputs = compiled.run(call)
    return found.before.output.build(given.outputs(outputs, found.packing.graph.layout.outputs))


def _run(engine: Engine, found: Unpadded, call: FlatCall, key: Key) -> list[Tensor] | None:
    rows, before = functools.partial(_rows, engine, found, key), found.before
    layout = found.packing.graph.layout
    return run_packed(layout, before.sizes, before.program, rows, call.tensors, engine.padding, found.complete)


def _packing(engine: Engine, call: FlatCall, key: Key) -> Unpadded | None:
    """How padding is left out of a call; None where it is not known yet. Raises PackingError where it cannot be."""
    found = engine.packed.use(key)
    if found is None or engine.store.changed or not found.before.is_current:
        device = device_of(call)
        with engine.lock:
            if engine.store.changed:
                engine.follow()
            target, _ = engine.placed(key, device)
            if target.kind != "cpu":
                raise PackingError("rows are packed for programs on CPUs alone")
            if torch.get_default_device() != CPU:
                raise PackingError(f"PyTorch's default device is {torch.get_default_device()}")
            with _as_reason():
                engine.calibrate(call, key, device)
                form = _form(engine, call, key, device)
                if form.captured.asks_modes and not engine.asks_modes:
                    # From now on keys say which modes are on.
                    engine.asks_modes = True
                    return None
                sizes = form.sizes(call)
                packing = form.packing(sizes, target)
                found = Unpadded(form, packing, engine.part(form, packing.before, sizes, key, device))
            engine.packed.add(key, found)
    routes = found.before.routes
    if torch.is_grad_enabled() and (routes.unregistered or routes.sources(call.tensors)):
        raise PackingError("outputs are to have gradients; call the model under torch.inference_mode()")
    return found


def _form(engine: Engine, call: FlatCall, key: Key, device: torch.device) -> Form:
    """A capture for all sizes that holds for a call. Raises PackingError where there is none."""
    name, forms = engine.forms_of(call, key)
    if name is None:
        raise PackingError("the call is captured by itself: inputs are not contiguous, or dynamic=False")
    for form in forms:
        with contextlib.suppress(CaptureError):
            form.sizes(call)
            return form
    with making(device):
        made = run_after_fork(engine.captured_form, name, call)
    if made is None:
        raise PackingError("; ".join(("the model is not captured for all sizes", *engine.forms.reasons)))
    return made


def _rows(engine: Engine, packed: Unpadded, key: Key, sizes: Mapping[str, int]) -> Program:
    """The program that computes so many rows."""
    part = packed.packing.rows
    wanted = tuple((name, sizes[name]) for name in part.binder.names)
    place: Key = (packed.packing, *wanted), *key[1:]
    compiled = engine.programs.use(place)
    if compiled is not None:
        return compiled.program
    with engine.lock, _as_reason():
        compiled = engine.part(packed.form, part, sizes, place, CPU)
        engine.add(place, compiled)
        return compiled.program


@contextlib.contextmanager
def _as_reason() -> Iterator[None]:
    """What goes wrong when a call without padding is compiled, as the reason why it has to be computed."""
    try:
        yield
    except PackingError:
        raise
    except FuserError as error:
        raise PackingError(str(error)) from error
