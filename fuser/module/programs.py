"""The programs that a module keeps."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Place(Generic[V]):
    value: V
    used: int


class ProgramCache(Generic[K, V]):
    """At most ``places`` programs by key; when there are more, those go that have not been used for longest.

    Looking up needs no lock; whoever changes it holds one.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._taken: dict[K, _Place[V]] = {}
        self._clock = itertools.count()

    def tick(self) -> int:
        """The next reading of the counter that uses are remembered by."""
        return next(self._clock)

    @property
    def oldest(self) -> int | None:
        """When the value that must give way to another was used last; None while there are places."""
        if len(self._taken) < self.places:
            return None
        return min((place.used for place in list(self._taken.values())), default=None)

    def use(self, key: K) -> V | None:
        """The value of ``key``, which counts as used."""
        place = self._taken.get(key)
        if place is None:
            return None
        place.used = next(self._clock)
        return place.value

    def add(self, key: K, value: V) -> list[V]:
        """Keep ``value``; those that had to go."""
        self._taken[key] = _Place(value, next(self._clock))
        gone = []
        while len(self._taken) > self.places:
            gone.append(self.remove(min(list(self._taken.items()), key=lambda item: item[1].used)[0]))
        return [value for value in gone if value is not None]

    def remove(self, key: K) -> V | None:
        """Forget the value of ``key``, which is returned."""
        place = self._taken.pop(key, None)
        return None if place is None else place.value

    def clear(self) -> None:
        """Forget all values."""
        self._taken.clear()

    def items(self) -> list[tuple[K, V]]:
        """Keys and values in the order of their making."""
        return [(key, place.value) for key, place in list(self._taken.items())]

    def values(self) -> tuple[V, ...]:
        """All values in the order of their making."""
        return tuple([place.value for place in list(self._taken.values())])

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, key: K) -> bool:
        return key in self._taken
