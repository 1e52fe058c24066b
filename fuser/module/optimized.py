"""`OptimizedModule`: the user's model, faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fuser.codegen.assemble import KernelRecord
from fuser.frontend.calls import FlatCall
from fuser.frontend.capture import prepare
from fuser.frontend.exporting import is_capturing
from fuser.integrations import sentence_transformers, sparse_models
from fuser.ir.errors import ResultError
from fuser.ir.masks import Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.target import Target
from fuser.module.acceptance import acceptable, unwritable
from fuser.module.compiler import Compiled
from fuser.module.engine import UNMASKED, Engine, Key
from fuser.module.methods import BoundMethods
from fuser.module.nested import is_nested
from fuser.module.options import Options
from fuser.module.packed import of_nested, without_padding
from fuser.module.policy import AT_ONCE, Comparison
from fuser.module.quantizing import LinearQuantization
from fuser.module.recompute import Originals, Recorded, is_recomputing, run_recorded
from fuser.module.snapshot import Memory, Snapshot

_AT_ONCE_IN_METHODS = 1
"""Calls that compile when first met in a method of the model, of those that each need a capture of their own: a loop
over tokens makes one for every length."""


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

    Any thread may call it, also while another compiles; calls run at once as far as ``concurrency`` says. After a fork,
    a child may call it and compile; what runs in the original model hangs or not as it would without fuser.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, options: Options, engine: Engine | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        prepare()
        self._options = options
        self._engine = engine or Engine(model, options)
        self._methods: BoundMethods | None = None
        self._originals = Originals(model, "" if options.attention is None else UNMASKED)
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
            self._engine.check_unmasked("a capture of what it is a part of looks into it")
            return self._model(*args, **kwargs)
        if self._options.padding == "skip" and is_nested(args, kwargs):
            return of_nested(self._engine, args, kwargs)
        call, reason = acceptable(self._model, args, kwargs, self._options.target)
        if call is None:
            return self._replaced(reason, args, kwargs)
        store, key = self._engine.store, self._engine.key(call)
        if self._options.padding == "skip" and not call.objects:
            packed = without_padding(self._engine, call, key)
            if packed is not None:
                return packed
        if self._options.attention is None:
            within = self._methods is not None and self._methods.is_running
            compiled = self._engine.program(call, key, at_once=_AT_ONCE_IN_METHODS if within else AT_ONCE)
        else:
            compiled = self._engine.settled(call, key)
        if self._engine.store is not store:
            # The model has other parts by now, and its configuration another number.
            key = self._engine.key(call)
        if compiled is not None and torch.is_grad_enabled() and compiled.routes.unregistered:
            return self._replaced("a tensor that is no parameter of a module requires grad", args, kwargs)
        if compiled is not None and compiled.updated:
            if torch.is_grad_enabled() and compiled.routes.sources(call.tensors):
                return self._replaced("the model writes to an input, and has gradients", args, kwargs)
            if reason := unwritable(call.tensors, compiled.updated):
                return self._replaced(reason, args, kwargs)
        if compiled is None:
            self._engine.check_unmasked(self._engine.failed.get(key, "the report says why"))
            start = self._engine.clock()
            result = self._original(args, kwargs)
            seconds = self._engine.clock() - start
            common = self._engine.common(call, key)
            self._engine.policy.ran_original(key if common is None else common, seconds)
            return result
        comparisons = self._engine.comparisons
        comparison = comparisons.get(key) if comparisons else None
        try:
            if comparison is not None:
                return self._compare(comparison, compiled, key, call, args, kwargs)
            if compiled.mask_inputs and self._engine.masks.looks_at(key):
                compiled = self._engine.knowing(compiled, call, key) or compiled
            return compiled.built(call, self._run(compiled, call, key))
        except ResultError as error:
            # Raised before anything is written to an input.
            self._engine.give_up(key, error)
            return self._replaced(str(error), args, kwargs)

    def _run(self, compiled: Compiled, call: FlatCall, key: Key) -> list[Tensor]:
        """The results of a program, with gradients where PyTorch would record them."""
        program, routes = compiled.program, compiled.routes
        sources = routes.sources(call.tensors) if torch.is_grad_enabled() else ()
        if not sources:
            return compiled.run(call)
        now = (self._engine.store.generation, key[2][0])
        plan = Recorded(routes, compiled.output, program.plan.aliases, self._originals, self._state, now)
        return run_recorded(compiled.run, call, sources, plan)

    def _state(self) -> object | None:
        """A value that stays equal while the model computes what the programs do; None once it does not."""
        store = self._engine.store
        return None if store.changed else (store.generation, store.configuration)

    def _original(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._model(*args, **kwargs)

    def _replaced(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of the original model, which runs because of ``reason``."""
        self._engine.check_unmasked(reason)
        self._engine.say(reason)
        return self._original(args, kwargs)

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
        start = self._engine.clock()
        if original:
            result = self._original(args, kwargs)
        else:
            result = compiled.built(call, self._run(compiled, call, key))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        comparison.add(self._engine.clock() - start, original=original)
        if comparison.is_complete:
            with self._engine.lock:
                if self._engine.comparisons.pop(key, None) is comparison:
                    self._engine.decide(comparison, compiled, key, call)
        return result

    def refresh(self) -> None:
        """Forget all programs and packed weights, and compile anew when called.

        For changes that PyTorch keeps no record of: ``tensor.data``, NumPy views, entries of large containers.
        """
        self._engine.refresh()

    # ---- looking inside

    @property
    def programs(self) -> Sequence[Compiled]:
        """Everything compiled so far, in order."""
        return self._engine.programs.values()

    @property
    def kernels(self) -> Sequence[KernelRecord]:
        """The kernels of the program compiled last: name, family, operators of the first use, number of calls."""
        return self.programs[-1].assembly.kernels if self._engine.programs else ()

    @property
    def unfused(self) -> Sequence[tuple[str, str]]:
        """(operator, reason) for every operator of the regions of the program compiled last that no kernel runs;
        ``("*", reason)`` when the original model runs. Operators before the first and after the last region (masks
        made from inputs, patch embeddings) are PyTorch's and are not listed; see :attr:`outside`."""
        if not self._engine.programs:
            return tuple(("*", reason) for reason in (*self._engine.failed.values(), *self._engine.slower.values()))
        return self.programs[-1].unfused

    @property
    def outside(self) -> Sequence[tuple[str, str]]:
        """(operator, reason) for the operators outside the regions, which PyTorch runs."""
        return self.programs[-1].outside if self._engine.programs else ()

    @property
    def fallbacks(self) -> Sequence[str]:
        """Why the original model ran instead of a program, each reason once, and which calls wait for a program."""
        return (*sorted(self._engine.said), *self._engine.policy.reasons)

    @property
    def specialized(self) -> Sequence[str]:
        """Why the model was captured again for a call, or for its shape alone, the last few reasons; without one, a new
        shape binds the sizes of what has been captured once."""
        return self._engine.forms.reasons

    def report(self, path: str | Path | None = None) -> str:
        """What was fused, with which kernels, and what was not and why, as text; with ``path`` also as HTML."""
        from fuser.explain.report import report

        return report(self.snapshot(), Path(path) if path is not None else None)

    def save(self, path: str | Path) -> None:
        """Write the compiled programs, weights and kernels to a file for :func:`fuser.load`.

        Programs of calls with objects, such as key-value caches, are left out, with a word in the log: which of an
        object's numbers count, and how a call changes it, is known to the process that has captured the model alone.

        Raises FuserError when nothing has been compiled that can be saved.
        """
        from fuser.saved.writer import save

        save(self._engine.saved_calls(), self._engine.saved_forms(), self.snapshot(), Path(path))

    def snapshot(self) -> Snapshot:
        """What has been compiled, for reports."""
        arena = max((compiled.assembly.plan.arena_bytes for compiled in self.programs), default=0)
        store = self._engine.store
        return Snapshot(
            model=type(self._model).__name__,
            target=self._engine.target,
            programs=tuple(self.programs),
            unfused=tuple(self.unfused),
            outside=tuple(self.outside),
            fallbacks=tuple(self.fallbacks),
            specialized=tuple(self.specialized),
            padding=self._engine.padding.lines,
            precision=None if self._engine.quantizer is None else self._engine.quantizer.found,
            memory=Memory(arena, store.made_bytes, store.offloaded_bytes, store.offload_error),
        )

    def restore(self) -> None:
        """Bring the original weights, which lie in files while only packed copies are used, back into memory."""
        with self._engine.lock:
            self._engine.store.restore()

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
        self._engine.check_unmasked(f"the method {name} runs parts of it by itself")
        self._engine.say(
            f"the method {name} runs parts of the model by itself; only what calls the whole model is compiled"
        )

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
        return f"programs={len(self._engine.programs)}"


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
    quantize: LinearQuantization | ScoreQuantization | Sequence[LinearQuantization | ScoreQuantization] | None = None,
    search: str | int = "cached",
    target: Target | str | torch.device | None = None,
    cuda_graphs: bool = True,
    dynamic: bool | Mapping[str, Collection[int]] = True,
    concurrency: int | None = None,
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
        quantize: ``fuser.Int8(...)`` runs linear layers in int8, ``fuser.FP8(...)`` in fp8, as many as keep the model's
            outputs what they are to a bound; the report lists them. ``fuser.Int8Attention(...)`` computes attention in
            8 bits where that is faster; ``fuser.DEQ(...)`` and ``fuser.Sanger(...)`` compute all of it as their
            ``reference`` does, scores in full only where a prediction by few bits says that they matter. A sequence has
            one for layers and one for attention.
        search: ``"cached"`` takes what a search or measurement found from the cache and measures what it lacks; a
            number searches with so many trials first, once for every shape; ``"model"`` trusts the cost model alone.
        target: what to compile for: a target, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"cuda:emulated"``, which runs
            CUDA kernels on the CPU. Default: the device of the inputs, calibrated once.
        dynamic: whether the model is captured for all sizes of its inputs at once, so that new ones only bind numbers
            to names: True for batch and sequence (the first two dimensions, and those of masks that are as long), a
            mapping from names of inputs to dimensions for others, False for a capture of every shape.
        concurrency: how many calls from several threads may run at once on a CPU, each in memory of its own; others
            wait. They share the cores: one alone runs on the threads that PyTorch has in the thread that calls, n at
            once on an n-th of the cores each. Default: as many as there are cores, but at most four.
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
        TargetError: ``quantize=fuser.FP8(...)`` for a target without products of fp8. Calls raise it, too, for inputs
            on such a device.
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
        optimized._engine.check_unmasked(reason)
        optimized._engine.say(reason)
    else:
        key = optimized._engine.key(call)
        if optimized._engine.settled(call, key) is None:
            optimized._engine.check_unmasked(optimized._engine.failed.get(key, "the report says why"))
    return optimized
