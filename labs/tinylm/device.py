"""Where a model runs, and what that machine is."""

from __future__ import annotations

import os
import platform

import torch


def default_device() -> torch.device:
    """CUDA where present, else the CPU; the environment variable TINYLM_DEVICE overrides."""
    return torch.device(os.environ.get("TINYLM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe() -> dict[str, str | int]:
    """The machine and the versions that decide a result's last digits, for cards and records."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }
