"""Masks that are known when sizes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from fuser.ir.binding import Late
from fuser.ir.masks.base import Mask
from fuser.ir.size import UndecidedSizeError


@dataclass(frozen=True)
class LateMask(Late, Mask):
    """The mask that ``function`` makes of the bound ``arguments``, one for all heads.

    What asks for its entries before that gets an UndecidedSizeError.
    """

    @property
    def name(self) -> str:
        return str(self)

    def _key(self) -> NoReturn:
        raise UndecidedSizeError(f"the mask {self} is known when its sizes are")

    def _allowed(self, *_: Any) -> NoReturn:
        self._key()
