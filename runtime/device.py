"""This machine's CPU as a target: what it is, with the rates that the cost model needs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os

from fuser.ir.errors import CacheError, FuserError
from fuser.ir.target import VECTOR_BYTES, Isa, Target
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.calibration import Rates, calibrate, calibration_key, parse_rates
from fuser.runtime.cpuinfo import cache_sizes, cpu_name, detect_isa, features, has_isa, usable_cores

# One FMA a cycle at 2.5 GHz; the cost model needs only the right order of magnitude.
_ASSUMED_CLOCK = 2.5e9
_ASSUMED_BANDWIDTH = 10e9
_ASSUMED_LAUNCH = 5e-6
_SLOWEST_LAUNCH = 2e-5

logger = logging.getLogger("fuser")


def cpu_target(isa: Isa | None = None, *, cache: KernelCache | None = None, recalibrate: bool = False) -> Target:
    """This machine's CPU as a target, with rates that are measured once and then remembered in the cache.

    ``isa`` (default: ``$FUSER_ISA`` if set, else the best that there is) may name a lower instruction set than the
    CPU's. Without a compiler the rates are conservative guesses. Raises :class:`FuserError` for an instruction set
    that the CPU lacks.
    """
    chosen = _choose(isa)
    cache = default_cache() if cache is None else cache
    if recalibrate:
        _cached_target.cache_clear()
        return _measured_target(chosen, cache, True)
    return _cached_target(chosen, cache, os.getpid())


def _choose(isa: Isa | None) -> Isa:
    if isa is None:
        name = os.environ.get("FUSER_ISA", "").strip().lower()
        if not name:
            return detect_isa()
        try:
            isa = Isa(name)
        except ValueError:
            names = ", ".join(known.value for known in Isa)
            raise FuserError(f"FUSER_ISA is {name!r}; it can be one of {names}") from None
    if not has_isa(isa):
        raise FuserError(
            f"this CPU ({cpu_name()}) does not have the instruction set {isa.value}; its best is {detect_isa().value}"
        )
    return isa


@functools.lru_cache(maxsize=16)
def _cached_target(isa: Isa, cache: KernelCache, process: int) -> Target:
    # The process is part of the key since a forked child may have other cores to run on.
    return _measured_target(isa, cache, False)


def _measured_target(isa: Isa, cache: KernelCache, recalibrate: bool) -> Target:
    assumed = Rates(2 * (VECTOR_BYTES[isa] // 4) * _ASSUMED_CLOCK, _ASSUMED_BANDWIDTH, _ASSUMED_LAUNCH)
    target = Target(
        kind="cpu",
        arch=isa.value,
        features=features(isa),
        cores=usable_cores(),
        cache_bytes=cache_sizes(),
        **dataclasses.asdict(assumed),
    )
    key = calibration_key(target)
    rates = None if recalibrate else parse_rates(cache.read_record("calibration", key))
    if rates is None:
        try:
            rates = calibrate(target, cache)
        except FuserError as error:
            logger.warning("cannot measure this CPU, so the cost model assumes typical rates: %s", error)
            return target
        try:
            cache.write_record("calibration", key, dataclasses.asdict(rates))
        except CacheError as error:
            logger.warning("the measured rates of this CPU are not remembered: %s", error)
    # More is the delay of a machine busy with something else, by which nothing should be decided.
    launch = min(rates.launch_seconds, _SLOWEST_LAUNCH)
    return dataclasses.replace(target, **{**dataclasses.asdict(rates), "launch_seconds": launch})
