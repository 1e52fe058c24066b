"""Sparse models of transformers (Longformer, LED, BigBird, BigBird-Pegasus) with attention that runs through plans.

:func:`sparsify` gives a copy of a model, over the same weights, whose attention computes the same numbers by
:func:`fuser.sparse_attention`. ``fuser.optimize`` does so by itself. Nothing of transformers is imported here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fuser.attention import attend
from fuser.ir.errors import CalibrationError, FuserError, MaskError
from fuser.ir.masks import BigBird, GlobalBlocks, Longformer
from fuser.module.options import Options

_PACKAGE = "transformers.models"
M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class _Before(nn.Module):
        """What comes before a class of transformers has the members of that class."""

        forward: Any

        def __getattr__(self, name: str) -> Any: ...

else:
    _Before = object


def is_served(model: nn.Module) -> bool:
    """Whether a model has attention that :func:`sparsify` replaces."""
    return isinstance(model, _Served) or any(_replacement(module) for module in model.modules())


def sparsify(model: M) -> M:
    """A model like ``model`` whose sparse attention runs through plans, at the cost of what it allows.

    Taken are ``LongformerModel``, ``LEDModel``, ``BigBirdModel`` and ``BigBirdPegasusModel`` (``block_sparse``, as
    encoders), also inside of others, such as their heads. The result has the same classes, weights and state_dict; it
    computes what the model does, at padding as well, up to rounding, with any ``global_attention_mask``. Modules are
    copies over shared parameters and buffers, so ``model`` stays as it is: modes and hooks are the copy's own, and
    short sequences do not switch a BigBird to full attention for good. Calls in training mode, and those that ask for
    attention weights, run as transformers has it.

    Raises TypeError if there is nothing to replace.
    """
    if not any(_replacement(module) for module in model.modules()):
        raise TypeError(f"{type(model).__name__} has no sparse attention of transformers: Longformer, LED or BigBird")
    copied: M = _copied(model, {}, _sparse_class)
    for module in copied.modules():
        if isinstance(module, _BlockSparseModel):
            full = _original(module)
            # Modules for full attention get the weights of the others: their own need no memory, nor random numbers.
            with torch.device("meta"):
                full.eval().set_attention_type("original_full")
            object.__setattr__(module, "_full", full)
    return copied


def serve(model: M, options: Options, optimize: Callable[[nn.Module, Options], Any]) -> Any:
    """What ``optimize`` makes of a sparse model.

    Which tokens are global is known in the middle of a call of Longformer and LED, and decides about sizes. So the
    layers of an encoder become a program, a decoder another, and the model a copy of its class that runs them; a
    BigBird is optimized as a whole.

    Raises MaskError if ``options`` has a mask, and CalibrationError for inputs to calibrate such layers on.
    """
    if isinstance(model, _Served):
        return serve(model._serving[0], options, optimize)
    if options.attention is not None:
        raise MaskError(f"{type(model).__name__} has a sparse attention of its own, which attention= cannot restrict")
    sparse = sparsify(model)
    encoders = [module for module in sparse.modules() if isinstance(module, _WindowedEncoder)]
    if not encoders:
        return optimize(sparse, options)
    if options.linear is not None and options.linear.calibrate is not None:
        raise CalibrationError(
            f"the layers of {type(model).__name__} are calibrated on the first call: leave calibrate= out"
        )
    programs = []
    for encoder in encoders:
        programs.append(optimize(_Stack(encoder._layers), options))
        object.__setattr__(encoder, "_stack", programs[-1])
    for module in _beside(sparse):
        programs.append(optimize(_without_hooks(module), options))
        object.__setattr__(module, "_program", programs[-1])
        module.__class__ = _derived(_Programmed, type(module))
    # A Longformer encoder is a root that has a replacement already.
    sparse.__class__ = _derived(_Served, type(sparse))
    object.__setattr__(sparse, "_serving", (model, options, optimize, programs))
    return sparse


def _beside(module: nn.Module) -> Iterator[nn.Module]:
    """What has layers of its own beside the encoders of a model, such as a decoder."""
    if isinstance(module, _WindowedEncoder):
        return
    lists = (nn.ModuleList, nn.ModuleDict)
    inside = list(module.modules())
    if isinstance(module, lists) or any(isinstance(one, _WindowedEncoder) for one in inside):
        for child in module.children():
            yield from _beside(child)
    elif any(isinstance(one, lists) for one in inside):
        yield module


class _Programmed(_Before):
    """A module beside an encoder, which an optimized copy of it computes."""

    _program: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) if self.training else self._program(*args, **kwargs)


_TOLD = ("programs", "kernels", "unfused", "outside", "fallbacks", "specialized")


class _Served(_Before):
    """A model with optimized encoders and decoders, which has what these tell as attributes."""

    _serving: tuple[nn.Module, Options, Callable[[nn.Module, Options], Any], list[Any]]

    def report(self) -> str:
        """What was fused in the layers of its encoders and in its decoders, and what was not and why."""
        model, _, _, programs = self._serving
        said = f"{type(model).__name__}: attention of encoders runs through plans; embeddings and heads are PyTorch's"
        return "\n\n".join([said, *(program.report() for program in programs)])

    def save(self, path: str | Path) -> None:
        """Raises FuserError: a file of programs has no place for the parts that are PyTorch's."""
        raise FuserError(
            f"{type(self).__name__} runs its embeddings and heads in PyTorch, so a file of programs is not all of it: "
            "write the whole with torch.save, and take its kernels to a machine without a compiler by `fuserc cache "
            "export` and `fuserc cache import`"
        )

    def __getattr__(self, name: str) -> Any:
        if name in _TOLD:
            return tuple(found for program in self._serving[-1] for found in getattr(program, name))
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return serve, self._serving[:3]


# ---- Longformer and LED


class _Rows(NamedTuple):
    """What layers know about the rows of a stack."""

    first: int
    """The number of rows of global tokens."""
    keys: Tensor | None
    """(batch, 1, 1, rows) bool: what may be attended to; None for all."""
    bias: Tensor | None
    """The same as numbers to add."""
    kept: Tensor | None
    """(batch, rows, 1): one for rows that keep their attention, others get zeros."""


class _Windowed(_Before):
    """Self-attention within a window, and of global tokens with all.

    In a *stack* of such layers the global tokens of each sample lie once more in front of all, as its first rows, and
    are read nowhere else.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        is_index_masked: Any = None,
        is_index_global_attn: Any = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        if isinstance(attention_mask, _Rows):
            return (self._attended(hidden_states, attention_mask),)
        masks = (attention_mask, is_index_masked, is_index_global_attn, is_global_attn)
        if output_attentions or self.training or not hidden_states.numel():
            result: tuple[Any, ...] = super().forward(hidden_states, *masks, output_attentions)
            return result
        return (_in_rows(_alone(self._attended), hidden_states, is_index_masked, is_index_global_attn),)

    def _attended(self, x: Tensor, rows: _Rows) -> Tensor:
        """(batch, rows, width) to the same."""
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        mask = Longformer(self.one_sided_attn_window_size, rows.first)
        local = attend(q[:, :, rows.first :], k, v, mask, rows.keys, offset=rows.first)
        out = local.transpose(1, 2).flatten(2)
        if rows.first:
            out = torch.cat([self._globally(x, rows), out], 1)
        return out if rows.kept is None else out * rows.kept

    def _globally(self, x: Tensor, rows: _Rows) -> Tensor:
        first = rows.first
        q = self._heads(self.query_global(x[:, :first]))
        if 2 * first > self.head_dim or {type(self.key_global), type(self.value_global)} != {nn.Linear}:
            k, v = (self._heads(project(x)) for project in (self.key_global, self.value_global))
            return attend(q, k, v, None, rows.keys).transpose(1, 2).flatten(2)
        # q · (W x) = (Wᵀ q) · x, and p · (W x + b) = W (p · x) + b: few queries need no keys and values of all rows. A
        # bias of keys is the same for all that a query sees.
        batch, heads = q.shape[:2]
        w_k, w_v = (m.weight.view(heads, self.head_dim, -1) for m in (self.key_global, self.value_global))
        scores = (q @ w_k).reshape(batch, heads * first, -1) @ x.transpose(1, 2) / math.sqrt(self.head_dim)
        if rows.bias is not None:
            scores = scores + rows.bias
        mean = scores.softmax(-1) @ x
        out = (mean.view(batch, heads, first, -1) @ w_v.transpose(1, 2)).transpose(1, 2).flatten(2)
        result: Tensor = out if self.value_global.bias is None else out + self.value_global.bias
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


class _Stack(nn.Module):
    """Layers one behind the other, whose attention reads nothing but the rows of a stack."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self.training = layers.training

    def forward(
        self, x: Tensor, seen: Tensor | None, first: Tensor | None, used: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, width), and (batch, globals, width) of global tokens, to the same; (batch, tokens) and
        (batch, globals) bool say which of them may be attended to."""

        def run(x: Tensor, rows: _Rows) -> Tensor:
            for layer in self.layers:
                x = layer(x, attention_mask=rows)[0]
            return x

        return _alone(run)(x, seen, first, used)


def _alone(run: Callable[[Tensor, _Rows], Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function of the rows of a stack as one of tokens and of global tokens."""

    def of_parts(
        x: Tensor, seen: Tensor | None, first: Tensor | None, used: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if first is not None and seen is not None and used is not None:
            for states, mask in ((first, used), (x, seen)):
                torch._check(states.shape[1] == mask.shape[1])  # type: ignore[no-untyped-call]
            x, seen = torch.cat([first, x], 1), torch.cat([used, seen], 1)
        if seen is None:
            return run(x, _Rows(0, None, None, None)), None
        bias = x.new_zeros(()).masked_fill(~seen[:, None], torch.finfo(x.dtype).min)
        count = 0 if first is None else first.shape[1]
        out = run(x, _Rows(count, seen[:, None, None], bias, seen[..., None].to(x.dtype)))
        return out[:, count:], out[:, :count] if count else None

    return of_parts


def _in_rows(run: Callable[..., tuple[Tensor, Tensor | None]], x: Tensor, masked: Tensor, is_global: Tensor) -> Tensor:
    """What a function of tokens and of global tokens gives for all tokens (batch, tokens, width), of which some are
    masked and some are global, both (batch, tokens) bool."""
    count = is_global.sum(1)
    most = int(count.max())
    if not most:
        return run(x, ~masked if bool(masked.any()) else None, None, None)[0]
    # Programs hold for a number of rows of global tokens: few numbers, few programs.
    number = min(1 << (most - 1).bit_length(), x.shape[1])
    places = is_global.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :number]
    used = torch.arange(number, device=x.device) < count[:, None]
    first = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    out, first_out = run(x, ~(masked | is_global), first, used)
    assert first_out is not None
    return out.masked_scatter(is_global[..., None], first_out[used])


class _Whole(nn.Module):
    """A stack in the place of an encoder's first layer."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, hidden_states: Tensor, **masks: Any) -> tuple[Tensor]:
        return (_in_rows(self.stack, hidden_states, masks["is_index_masked"], masks["is_index_global_attn"]),)


class _WindowedEncoder(_Before):
    """An encoder of which all layers are one stack, if :func:`serve` has given it one."""

    _stack: nn.Module | None = None

    @property
    def _layers(self) -> Any:
        return self._modules[self._name]

    @property
    def _name(self) -> str:
        return "layer" if "layer" in self._modules else "layers"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        tokens = next(t for t in given.values() if isinstance(t, Tensor))
        chunked = any(getattr(layer, "chunk_size_feed_forward", 0) for layer in self._layers)
        if self._stack is None or self.training or chunked or _asked(self, given) or not tokens.numel():
            return super().forward(*args, **kwargs)
        padding = given.get("padding_len", 0)
        if padding:
            # A window's multiple is nothing that plans ask for.
            states, mask = (given[name][:, :-padding] for name in ("hidden_states", "attention_mask"))
            given = {**given, "hidden_states": states, "attention_mask": mask, "padding_len": 0}
        more = given.pop("kwargs", {})
        layers = nn.ModuleList([_Whole(self._stack)])
        return _seen_as(_derived(_Unpadded, _transformers_class(self)), self, **{self._name: layers})(**given, **more)


class _Unpadded(_Before):
    """An LED encoder without padding to a multiple of the window."""

    def _pad_to_window_size(self, **given: Any) -> tuple[Any, ...]:
        return 0, *(value for name, value in given.items() if name != "pad_token_id")


# ---- BigBird


class _BlockSparse(_Before):
    """Attention of blocks with those beside them, and of the first and last one with all, in eval mode.

    There all random blocks are the first block, which thereby counts so many times more, except for the first and last
    queries. The last block may be a part of one.
    """

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.training or to_mask is None:
            masks = (band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask)
            result: tuple[Tensor, Tensor] = super().forward(hidden_states, *masks, **kwargs)
            return result
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        size, length = self.block_size, hidden_states.shape[1]
        seen = to_mask != 0
        places = torch.arange(length, device=q.device)
        counted = (places < size).to(q.dtype) * math.log1p(self.num_random_blocks)
        mask = BigBird(size, 3, 0, 0) | GlobalBlocks(size, 1, 1)
        out = attend(q, k, v, mask, torch.where(seen, counted, -math.inf)).transpose(1, 2)
        # The last rows of a part of a block are there several times.
        last = torch.minimum(places[-1:] // size * size + places[:size], places[-1:])
        ends = torch.cat([places[:size], last])
        out = out.index_copy(1, ends, attend(q.index_select(2, ends), k, v, None, seen).transpose(1, 2))
        return out.flatten(2) * seen[:, 0, 0, :, None].to(q.dtype), None


class _BlockSparseMasks(_Before):
    """A model of layers that need no masks of pairs."""

    @staticmethod
    def create_masks_for_block_sparse_attn(attention_mask: Tensor, block_size: int) -> tuple[Any, ...]:
        return None, None, None, attention_mask[:, None, None, :]


class _BlockSparseModel(_BlockSparseMasks):
    """A model that chooses for every call between sparse and full attention."""

    _full: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        asked = _asked(self, {**given, **given.get("kwargs", {})})
        if self.training or "output_attentions" in asked:
            return _original(self)(*args, **kwargs)
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is None or tokens.shape[1] <= (5 + 2 * self.config.num_random_blocks) * self.config.block_size:
            return self._full(*args, **kwargs)
        if asked and tokens.shape[1] % self.config.block_size:
            # States of layers have the rows of padding to whole blocks.
            return _seen_as(_derived(_BlockSparseMasks, _transformers_class(self)), self)(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _pad_to_block_size(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return 0, *args, *(value for name, value in kwargs.items() if name != "pad_token_id")


# ---- copies of models

_REPLACEMENTS: Mapping[str, tuple[str, type]] = {
    "LongformerSelfAttention": ("longformer", _Windowed),
    "LongformerEncoder": ("longformer", _WindowedEncoder),
    "LEDEncoderSelfAttention": ("led", _Windowed),
    "LEDEncoder": ("led", _WindowedEncoder),
    "BigBirdBlockSparseAttention": ("big_bird", _BlockSparse),
    "BigBirdModel": ("big_bird", _BlockSparseModel),
    "BigBirdPegasusBlockSparseAttention": ("bigbird_pegasus", _BlockSparse),
    "BigBirdPegasusEncoder": ("bigbird_pegasus", _BlockSparseModel),
}
"""What comes before a class of transformers, by its name, with the model that it is of."""


def _replacement(module: nn.Module) -> type | None:
    """What comes before the class of a module, if anything."""
    cls = type(module)
    model, before = _REPLACEMENTS.get(cls.__name__, ("", None))
    if before is None or issubclass(cls, before) or cls.__module__ != f"{_PACKAGE}.{model}.modeling_{model}":
        return None
    if before is _BlockSparseModel and (
        vars(module)["attention_type"] != "block_sparse" or vars(module)["config"].is_decoder
    ):
        return None
    # An object with a forward of its own, as other libraries make them, would run that of the original.
    return None if "forward" in vars(module) else before


def _sparse_class(module: nn.Module) -> type:
    before = _replacement(module)
    return type(module) if before is None else _derived(before, type(module))


def _transformers_class(module: nn.Module) -> type:
    ours = (_Served, _Programmed, _BlockSparseMasks, *(before for _, before in _REPLACEMENTS.values()))
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, ours))


def _derived(before: type, cls: type) -> Any:
    """A class like ``cls`` with members of another before its own. It has the name, by which transformers knows it."""
    return _cached(before, cls)


@functools.cache
def _cached(before: Any, cls: Any) -> Any:
    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (before, cls), members)


def _original(model: nn.Module) -> Any:
    """A sparsified model as transformers has it, which may change itself."""
    return _copied(model, {}, _transformers_class)


def _copied(module: nn.Module, made: dict[nn.Module, nn.Module], class_of: Callable[[nn.Module], type]) -> Any:
    """A copy of modules, each with another class, over the same dictionaries of parameters and buffers."""
    if module not in made:
        copied: Any = object.__new__(class_of(module))
        made[module] = copied
        state = {
            name: value if name in ("_parameters", "_buffers") or not isinstance(value, dict) else value.copy()
            for name, value in vars(module).items()
        }
        object.__setattr__(copied, "__dict__", state)
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else _copied(child, made, class_of)
    return made[module]


def _without_hooks(module: nn.Module) -> Any:
    """A copy whose own hooks do not run: those of ``module`` do when it is called."""
    copied = _copied(module, {}, type)
    for name, value in vars(copied).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            value.clear()
    return copied


def _seen_as(cls: type, module: nn.Module, **modules: nn.Module) -> Any:
    """A module as an object of another class, with some of its modules replaced."""
    view: Any = object.__new__(cls)
    state = vars(module)
    object.__setattr__(view, "__dict__", {**state, "_modules": {**module._modules, **modules}} if modules else state)
    return view


def _asked(model: Any, given: Mapping[str, Any]) -> list[str]:
    """What a call of a model returns beside its results, by its arguments or else by the configuration."""
    names = ("output_attentions", "output_hidden_states")
    return [name for name in names if _or(given.get(name), getattr(model.config, name, False))]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
