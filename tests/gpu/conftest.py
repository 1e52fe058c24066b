"""Tests that need an NVIDIA GPU of sm_80 or later and nvcc; elsewhere they are skipped with the reason."""

from __future__ import annotations

import pytest
import torch

from fuser.ir.errors import FuserError
from fuser.ir.target import cuda_target
from fuser.runtime.cuda import architecture, resolve_device
from fuser.runtime.nvcc import find_nvcc


def _missing() -> str:
    """What keeps these tests from running here; empty if nothing."""
    try:
        find_nvcc(cuda_target(architecture(resolve_device(torch.device("cuda")))))
    except FuserError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.fixture(scope="session")
def device() -> torch.device:
    if reason := _missing():
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())
