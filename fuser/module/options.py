"""How a model is to be compiled, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuser.ir.attention import AttentionSpec
from fuser.ir.errors import FuserError, MaskError
from fuser.ir.masks import Dense, Mask
from fuser.ir.masks.blocks import from_block_mask, is_block_mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.target import Target
from fuser.module.quantizing import LinearQuantization
from fuser.runtime.targets import named_target

PADDING = ("keep", "skip")
"""Whether programs compute rows of padding."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`fuser.optimize`, which says what they mean, and of the backend of ``torch.compile``.

    Raises MaskError for a mask that is none of ``fuser.masks``, TargetError for a ``quantize`` that the target has no
    products for, TypeError and ValueError for other values of the wrong kind.
    """

    attention: Mask | None = None
    search: str | int = "cached"
    target: Target | None = None
    cuda_graphs: bool = True
    dynamic: bool | Mapping[str, Collection[int]] = True
    concurrency: int | None = None
    padding: str = "keep"
    quantize: LinearQuantization | ScoreQuantization | Sequence[LinearQuantization | ScoreQuantization] | None = None

    def __post_init__(self) -> None:
        if is_block_mask(self.attention):
            object.__setattr__(self, "attention", from_block_mask(self.attention))
        if self.attention is not None and not isinstance(self.attention, Mask):
            raise MaskError(f"attention must be one of fuser.masks, not a {type(self.attention).__name__}")
        if not isinstance(self.dynamic, (bool, Mapping)):
            raise TypeError(f"dynamic must be a bool or dimensions by input, not a {type(self.dynamic).__name__}")
        if self.padding not in PADDING:
            raise ValueError(f"padding must be {' or '.join(map(repr, PADDING))}, not {self.padding!r}")
        for how in self._quantize:
            if not isinstance(how, (LinearQuantization, ScoreQuantization)):
                raise TypeError(
                    "quantize must be fuser.Int8(...) or fuser.FP8(...) for linear layers, fuser.Int8Attention(...), "
                    f"fuser.DEQ(...) or fuser.Sanger(...) for attention, or one of each, not a {type(how).__name__}"
                )
            if isinstance(how, ScoreQuantization):
                how.check_calibrated()
        if len(self._quantize) != len({isinstance(how, ScoreQuantization) for how in self._quantize}):
            raise ValueError("quantize takes one specification for linear layers and one for attention")
        if self.linear is not None and isinstance(self.target, Target):
            self.linear.check(self.target)
        if self.concurrency is not None and (type(self.concurrency) is not int or self.concurrency < 1):
            raise ValueError(f"concurrency must be a positive number of calls, not {self.concurrency!r}")

    @property
    def _quantize(self) -> tuple[Any, ...]:
        if self.quantize is None:
            return ()
        return tuple(self.quantize) if isinstance(self.quantize, (tuple, list)) else (self.quantize,)

    @property
    def linear(self) -> LinearQuantization | None:
        """How linear layers are quantized."""
        return next((how for how in self._quantize if isinstance(how, LinearQuantization)), None)

    def attention_now(self) -> AttentionSpec | None:
        """What is done to the model's attention, by the mask as it is now (:meth:`Mask.current`); None for nothing."""
        prediction = next((how for how in self._quantize if isinstance(how, ScoreQuantization)), None)
        if self.attention is None and prediction is None:
            return None
        return AttentionSpec(Dense() if self.attention is None else self.attention.current(), None, prediction)

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Options as users give them, with a target or the name of one.

        Raises MaskError and TargetError as above, and FuserError for options that there are not, and for a target
        that is a device that this machine does not have, or that fuser has no kernels for.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise FuserError(f"fuser has no option {', '.join(unknown)}; it has {', '.join(names)}")
        options = cls(**given)
        if options.target is None or isinstance(options.target, Target):
            return options
        return dataclasses.replace(options, target=named_target(options.target))
