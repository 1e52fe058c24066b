"""How a model is to be compiled, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fuser.ir.errors import FuserError, MaskError
from fuser.ir.masks import Mask
from fuser.ir.masks.blocks import from_block_mask, is_block_mask
from fuser.ir.target import Target
from fuser.module.quantizing import Int8
from fuser.runtime.targets import named_target

PADDING = ("keep", "skip")
"""Whether programs compute rows of padding."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`fuser.optimize`, which says what they mean, and of the backend of ``torch.compile``.

    Raises MaskError for a mask that is none of ``fuser.masks``, TypeError and ValueError for other values of the wrong
    kind.
    """

    attention: Mask | None = None
    search: str | int = "cached"
    target: Target | None = None
    cuda_graphs: bool = True
    dynamic: bool | Mapping[str, Collection[int]] = True
    concurrency: int = 1
    padding: str = "keep"
    quantize: Int8 | None = None

    def __post_init__(self) -> None:
        if is_block_mask(self.attention):
            object.__setattr__(self, "attention", from_block_mask(self.attention))
        if self.attention is not None and not isinstance(self.attention, Mask):
            raise MaskError(f"attention must be one of fuser.masks, not a {type(self.attention).__name__}")
        if not isinstance(self.dynamic, (bool, Mapping)):
            raise TypeError(f"dynamic must be a bool or dimensions by input, not a {type(self.dynamic).__name__}")
        if self.padding not in PADDING:
            raise ValueError(f"padding must be {' or '.join(map(repr, PADDING))}, not {self.padding!r}")
        if self.quantize is not None and not isinstance(self.quantize, Int8):
            raise TypeError(f"quantize must be fuser.Int8(...), not a {type(self.quantize).__name__}")
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise ValueError(f"concurrency must be a positive number of calls, not {self.concurrency!r}")

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Options as users give them, with a target or the name of one.

        Raises MaskError as above, and FuserError for options that there are not, and for a target that is a device
        that this machine does not have, or that fuser has no kernels for.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise FuserError(f"fuser has no option {', '.join(unknown)}; it has {', '.join(names)}")
        options = cls(**given)
        if options.target is None or isinstance(options.target, Target):
            return options
        return dataclasses.replace(options, target=named_target(options.target))
