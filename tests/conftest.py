"""Shared by all tests: no network, quiet transformers, two threads, or one in each of several processes."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads give their core away: others may run beside the tests
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are tested on the CPU, before triton is first imported

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from headwise import scan
from headwise.models.subject import Subject, open_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny() -> Subject:
    return open_model("tiny")


@pytest.fixture(scope="session")
def tiny_gqa() -> Subject:
    return open_model("tiny-gqa")


@pytest.fixture(scope="session")
def scanned(tiny, tmp_path_factory):
    """(folder, Scan): the main job on the embedded model, as `make scan` runs it; made once for all tests."""
    out = tmp_path_factory.mktemp("scan")
    return out, scan(tiny, out, show_progress=False)


@pytest.fixture(scope="session")
def exact() -> Subject:
    """The embedded model in float64."""
    return open_model("tiny", dtype="float64")


class Largest(TorchDispatchMode):
    """Notes the most bytes that any one tensor takes within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.size = max(self.size, item.untyped_storage().nbytes())
        return result


@pytest.fixture
def largest() -> Largest:
    return Largest()
