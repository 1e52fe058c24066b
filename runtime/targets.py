"""Targets of devices, and what PyTorch's settings make of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator

import torch

from fuser.ir.errors import DeviceMemoryError, FuserError
from fuser.ir.target import EMULATED, TF32, Target, emulated_target
from fuser.runtime.cpuinfo import cgroup_quota
from fuser.runtime.cuda import gpu_target
from fuser.runtime.device import cpu_target

_AT_FIRST = torch.get_num_threads()


def threads_now() -> int:
    """The team size of kernels: PyTorch's number of threads. Where nobody has chosen that, no more than the container
    may keep busy, of which PyTorch knows nothing: a team that waits for its turn is slower than a smaller one."""
    threads = torch.get_num_threads()
    return threads if threads != _AT_FIRST else _threads_at_first()


@functools.cache
def _threads_at_first() -> int:
    quota = None if "OMP_NUM_THREADS" in os.environ else cgroup_quota()
    return _AT_FIRST if quota is None else min(_AT_FIRST, max(1, math.ceil(quota)))


def target_of(device: torch.device) -> Target:
    """The target of programs on tensors of ``device``, calibrated once.

    Raises FuserError for a device that is not there, or that there are no kernels for.
    """
    if device.type == "cpu":
        return cpu_target()
    if device.type == "cuda":
        return with_tf32(gpu_target(device))
    raise FuserError(f"fuser has kernels for CPUs and NVIDIA GPUs, not for devices of type {device.type!r}")


def with_tf32(target: Target) -> Target:
    """``target`` with the feature ``"tf32"`` where PyTorch's settings allow TF32 in products on CUDA."""
    matmul = torch.backends.cuda.matmul
    # The older setting cannot be read once a program has used the newer one.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return dataclasses.replace(target, features=target.features | {TF32}) if allowed else target


def named_target(name: str | torch.device) -> Target:
    """The target ``"cpu"``, ``"cuda"``, ``"cuda:1"`` … or ``"cuda:emulated"``.

    Raises FuserError for a name that is none of these, or a device that this machine does not have.
    """
    if name == f"cuda:{EMULATED}":
        return with_tf32(emulated_target())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FuserError(
            f"there is no target {name!r}; it can be 'cpu', 'cuda', 'cuda:1' … or 'cuda:{EMULATED}'"
        ) from error
    return target_of(device)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one. Raises DeviceMemoryError when its memory is full."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{device} has not enough free memory for the model's packed weights beside the weights themselves; "
                f"free some ({error})"
            ) from error
