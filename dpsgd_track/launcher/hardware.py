"""GPUs and cores of this machine, counted without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path


def count_gpus() -> int:
    """Number of GPUs visible to ranks."""
    if torch_is_cpu_only():
        return 0
    present = present_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # As in CUDA, devices after the first invalid index do not exist.
    count = 0
    for device in (part.strip() for part in visible.split(",")):
        if not device or device.startswith("-") or (device.isdigit() and int(device) >= present):
            break
        count += 1
    return min(count, present)


def num_cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def torch_is_cpu_only() -> bool:
    """True if the installed torch is built without CUDA, according to its version."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def present_gpus() -> int:
    """Number of GPUs of this machine or container, visible to ranks or not."""
    # In a container nvidia-smi sees the container's GPUs, /proc may list the host's.
    if shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run(
                ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            listed = ""
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
