"""The state of PyTorch and of the process while a model is exported, and back."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

from fuser.frontend.calls import FlatCall
from fuser.frontend.symbols import remembered_arithmetic
from fuser.ir.errors import CaptureError
from fuser.runtime.locks import ForkSafeRLock

# torch.export puts stand-ins for the parameters into the live modules, and PyTorch's switches are the process's.
EXPORTING = ForkSafeRLock()
_capturing: int | None = None
_undo = contextlib.ExitStack()
"""What a capture has changed for the whole process, while it runs."""
EXPORTER = "torch.export._trace"
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


def is_capturing() -> bool:
    """Whether this thread is capturing a model."""
    return _capturing == threading.get_ident()


def answer_for_modes(call: FlatCall) -> list[str]:
    """Answer the model's questions for PyTorch's modes with those of the call, until the capture ends; returns the list
    that is to have those it asked.

    What this thread's model reads as a member of ``torch`` is a function that answers so. PyTorch itself gets its own
    function: Dynamo keeps tables by function for the life of the process.
    """
    thread, asked = threading.get_ident(), list[str]()

    def asker(name: str, value: bool) -> property:
        function = getattr(torch, name)

        def answer() -> bool:
            if threading.get_ident() != thread or _is_torch(sys._getframe(1)):
                return bool(function())
            asked.append(name)
            return value

        def read(module: Any) -> Callable[[], bool]:
            return function if threading.get_ident() != thread or _is_torch(sys._getframe(1)) else answer

        return property(read)

    names = ("is_grad_enabled", "is_inference_mode_enabled")
    members = {name: asker(name, value) for name, value in zip(names, call.modes, strict=True)}
    _undo.callback(setattr, torch, "__class__", type(torch))
    torch.__class__ = type("Torch", (type(torch),), members)
    return asked


def _is_torch(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


@contextlib.contextmanager
def refusing_python_random() -> Iterator[None]:
    """Refuse what draws numbers from Python's or NumPy's generators, which a program would not draw again."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    other = numpy.random.get_state(legacy=False) if numpy else None
    yield
    drawn = random.getstate() != state
    random.setstate(state)
    if numpy and str(numpy.random.get_state(legacy=False)) != str(other):
        numpy.random.set_state(other)
        drawn = True
    if drawn:
        raise CaptureError("the model draws random numbers from Python or NumPy, which a program cannot repeat")


def _after_fork() -> None:
    # The thread that captured does not exist in a forked child, so nobody would undo what it has done to the process.
    _undo.close()


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _thread_tracer() -> type:
    """PyTorch's tracer of module calls, restricted to the thread that traces.

    It patches ``nn.Module`` itself, so other threads would be drawn in with whatever module they call.
    """

    class ThreadTracer(proxy_tensor._ModuleStackTracer):  # type: ignore[misc]
        def __init__(self, scope_root: Any) -> None:
            self._thread = threading.get_ident()
            super().__init__(scope_root)
            # Where each operator stands in the model's code: a sixth of a trace, for a note that nobody reads.
            self.record_stack_traces = False

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            return super().call_module(m, forward, args, kwargs)

        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return attr_val
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    return ThreadTracer


@contextlib.contextmanager
def exporting(inference: bool) -> Iterator[None]:
    """The modes in which models are traced: one at a time, without gradients, in inference mode only if the parameters
    were made in it, and quietly, as the reasons for failures are reported."""
    global _capturing
    exporter = importlib.import_module(EXPORTER)
    with EXPORTING, torch.inference_mode(inference), torch.no_grad(), _undo:
        _undo.enter_context(warnings.catch_warnings())
        # torch.export prints what it has of a graph when a trace fails, hundreds of lines.
        _undo.enter_context(mock.patch.object(exporter, "print", lambda *lines, **where: None, create=True))
        _undo.enter_context(mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _given_causality))
        _undo.enter_context(remembered_arithmetic())
        warnings.simplefilter("ignore")
        # Patched by the export itself.
        for name in ("__call__", "__getattr__"):
            _undo.callback(setattr, nn.Module, name, getattr(nn.Module, name))
        if hasattr(proxy_tensor, "_ModuleStackTracer"):
            _undo.enter_context(mock.patch.object(proxy_tensor, "_ModuleStackTracer", _thread_tracer()))
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            # Whether a tensor happens to be contiguous would become a guard on sizes, for a note that nobody reads.
            described = functools.partial(proxy_tensor._extract_tensor_metadata, include_contiguity=False)
            _undo.enter_context(mock.patch.object(proxy_tensor, "_extract_tensor_metadata", described))
        _undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        # nn.TransformerEncoder's fast path is one opaque operator, which hides what is to be fused.
        torch.backends.mha.set_fastpath_enabled(False)
        for loud in map(logging.getLogger, _LOUD):
            _undo.callback(setattr, loud, "disabled", loud.disabled)
            loud.disabled = True
        _undo.callback(_end_of_capture)
        _capturing = threading.get_ident()
        yield


def _end_of_capture() -> None:
    global _capturing
    _capturing = None


def _given_causality(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """For nn.TransformerEncoder and nn.TransformerDecoder, which compare a mask's entries with a causal mask's unless
    they are told: that only finds a hint, and the mask says the same."""
    return is_causal is True
