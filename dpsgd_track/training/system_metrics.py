"""Use of a rank's machine, under the names that MLflow's page of system metrics shows."""

from __future__ import annotations

import psutil
import torch

_PREFIX = "system/"
_MIB = 2**20


def system_metrics(device: torch.device) -> dict[str, float]:
    """Processor use since the last call in this process, and memory use now.

    Args:
        device: the rank's; on a GPU its memory is among the metrics.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / _MIB,
        "system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = f"gpu_{device.index or 0}_memory_usage"
        metrics |= {
            f"{gpu}_megabytes": (total - free) / _MIB,
            f"{gpu}_percentage": 100 * (total - free) / total,
        }
    return {f"{_PREFIX}{name}": float(value) for name, value in metrics.items()}
