"""What tests of whole models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_grad() -> Iterator[None]:
    """The same random numbers in every test, and no gradients, with which the original would run."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
