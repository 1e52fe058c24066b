"""The programs that a module keeps."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ProgramCache(Generic[K, V]):
    """At most ``places`` programs by key; when there are more, those go that have not been used for longest.

    Looking up needs no lock; whoever changes it holds one.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._values: dict[K, V] = {}
        self._used: dict[K, int] = {}
        self._clock = itertools.count()

    def tick(self) -> int:
        """The next reading of the counter that uses are remembered by."""
        return next(self._clock)

    @property
    def oldest(self) -> int | None:
        """When the value that must give way to another was used last; None while there are places."""
        if len(self._values) < self.places:
            return None
        return min((self._used.get(key, -1) for key in list(self._values)), default=None)

    def use(self, key: K) -> V | None:
        """The value of ``key``, which counts as used."""
        value = self._values.get(key)
        if value is not None:
            self._used[key] = next(self._clock)
        return value

    def add(self, key: K, value: V) -> list[V]:
        """Keep ``value``; those that had to go."""
        self._values[key] = value
        self._used[key] = next(self._clock)
        gone = []
        while len(self._values) > self.places:
            gone.append(self.remove(min(list(self._values), key=lambda k: self._used.get(k, -1))))
        return [value for value in gone if value is not None]

    def remove(self, key: K) -> V | None:
        """Forget the value of ``key``, which is returned."""
        value = self._values.pop(key, None)
        # A use in another thread may have come between.
        self._used = {k: used for k, used in list(self._used.items()) if k in self._values}
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self._used.clear()

    def items(self) -> list[tuple[K, V]]:
        """Keys and values in the order of their making."""
        return list(self._values.items())

    def values(self) -> tuple[V, ...]:
        """All values in the order of their making."""
        return tuple(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values
