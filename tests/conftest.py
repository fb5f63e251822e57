"""Every test starts from the same state of Pyro and torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Empty parameter store, fixed seed, validation on, default precision."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shared() -> Path:
    """The folder of public tables and references beside the project; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder of reference data is not at {SHARED}")
    return SHARED
