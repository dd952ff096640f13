"""Where tests that depend on the device run: on the CPU always, on a GPU where there is one.

``tests/run_gpu.sh`` runs what is marked ``gpu`` on a machine that has torch and little else.
"""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

HARNESS = Path(__file__).parents[1] / "benchmarks" / "harness.py"
GPUS = torch.cuda.device_count()


def on_gpu(*values, count=1):
    """Parameters of a test that is skipped where there are fewer than ``count`` GPUs."""
    reason = "needs a CUDA device" if count == 1 else f"needs {count} CUDA devices, found {GPUS}"
    skip = pytest.mark.skipif(count > GPUS, reason=reason)
    return pytest.param(*values, marks=[pytest.mark.gpu, skip])


DEVICES = ["cpu", on_gpu("cuda")]


def lightning_name(device):
    return {"cpu": "cpu", "cuda": "gpu"}[device]


def additional_memory(function, device):
    """Bytes of tensors that a call holds at most beyond what is there, by the benchmarks' harness.

    On the CPU by torch's profiler, on the GPU by its allocator.
    """
    spec = importlib.util.spec_from_file_location("benchmark_harness", HARNESS)
    harness = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    if device == "cuda":
        return harness.additional_memory(function)
    with patch.object(torch.cuda, "is_available", lambda: False):
        return harness.additional_memory(function)
