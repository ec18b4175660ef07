import json
import math
from dataclasses import replace

import numpy as np

from dpsgd_track.launcher.output import write_output
from tests.support.fake_worker import trajectory

KEYS = [
    "loss_values",
    "final_loss",
    "grad_norms",
    "avg_grad_norm",
    "layer_norms_history",
    "avg_time_ms",
    "peak_memory_mb",
    "peak_memory_gb",
]
"""What scripts rely on."""


def test_output_is_strict_json_even_of_nan(tmp_path):
    broken = replace(trajectory(2), loss=np.array([1.0, math.nan]))
    write_output(broken, tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(constant)

    result = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert result["loss_values"] == [1.0, None]
    assert result["final_loss"] is None
    assert list(result) == KEYS
