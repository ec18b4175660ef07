#!/usr/bin/env python
"""Measure the GPU kernels beside what the device can do, and write one CSV row for each.

    python benchmarks/kernels.py benchmarks/kernels_gpu.csv

What the device can do is measured first: a product of large bfloat16 matrices by the vendor's
library, and a copy of 2 GiB. Operations and bytes are those that the computation cannot do without:
the half of a symmetric Gram matrix, each input read once and each output written once. Times are
medians of device time, of the functions as the modes call them.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.kernels.clipped_product import clipped_product  # noqa: E402
from dpsgd_track.kernels.embedding_norm import embedding_norm_sq  # noqa: E402
from dpsgd_track.kernels.flash_norm import gradients_and_norms_sq, gram_norm_sq, tiled_norm_sq  # noqa: E402
from dpsgd_track.kernels.normalisation import weight_and_bias_gradients  # noqa: E402
from dpsgd_track.kernels.weighted_sum import norms_sq, weighted_sums  # noqa: E402

KEY = (1, 2, 3, 4)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    run: Callable[[], object]
    operations: float = 0.0
    """Floating-point operations on matrix units; 0 where moving bytes is the work."""
    num_bytes: float = 0.0


def cases(device: torch.device, B: int, T: int, D: int, P: int, V: int) -> Iterator[Case]:
    """All kernels at the sizes of one layer: B samples, T positions, D inputs, P outputs."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    shape = f"B{B}-T{T}-D{D}-P{P}"
    x, dy, factor = random(B, T, D), random(B, T, P), torch.rand(B, device=device)
    product = 2.0 * B * T * D * P
    yield Case("flash norm, tiled", shape, lambda: tiled_norm_sq(x, dy), product)
    gram = float(B * T * (T + 1) * (D + P))
    yield Case("flash norm, Gram", shape, lambda: gram_norm_sq(x, dy), gram)
    yield Case("gradients and norm", shape, lambda: gradients_and_norms_sq(x, dy), product)
    yield Case("clipped product", shape, lambda: clipped_product(x, dy, factor), product)
    kept = [random(B, D, P).mT for _ in range(4)]
    size = 2.0 * 4 * B * D * P
    yield Case("norms of kept gradients", shape, lambda: norms_sq(kept), num_bytes=size)
    summed = size + 4.0 * 4 * D * P
    factors = [factor] * len(kept)
    yield Case("sums of kept gradients", shape, lambda: weighted_sums(kept, factors), 0, summed)
    rows, tokens = random(B, T, D), torch.randint(0, V, (B, T), device=device)
    read = 2.0 * B * T * D
    yield Case("embedding norm", shape, lambda: embedding_norm_sq(tokens, rows), 0, read)
    for name, is_centred in (("RMSNorm", False), ("LayerNorm", True)):

        def gradients(is_centred: bool = is_centred) -> object:
            return weight_and_bias_gradients(x, rows, 1e-5, is_centred=is_centred)

        yield Case(f"{name} gradients", shape, gradients, 0, 2 * read)
    yield _noise(device, 64 * D * P)


def _noise(device: torch.device, num_elements: int) -> Case:
    from dpsgd_track.kernels.gaussian_noise.triton import add_gaussian

    total = torch.zeros(num_elements, device=device)

    def run() -> None:
        add_gaussian([total], [0], [KEY], std=1.0)

    return Case("noise added", f"N{num_elements}", run, num_bytes=8.0 * num_elements)


def ceilings(device: torch.device, time_ms: Callable[[Callable[[], object]], float]) -> tuple:
    """(operations, bytes) a second of a large product and of a large copy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / time_ms(lambda: a @ b) * 1e3
    source = torch.empty(2**31, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return rate, 2 * 2**31 / time_ms(lambda: target.copy_(source)) * 1e3


def rows(
    found: Iterator[Case], time_ms: Callable[[Callable[[], object]], float], peaks: tuple
) -> Iterator[dict[str, object]]:
    """Each case with its time, and the share of the device's ceiling that it reaches."""
    for case in found:
        median = time_ms(case.run)
        work, peak = (case.operations, peaks[0]) if case.operations else (case.num_bytes, peaks[1])
        rate = work / median * 1e3
        yield {
            "kernel": case.kernel,
            "shape": case.shape,
            "dtype": "bfloat16",
            "median_us": f"{median * 1e3:.1f}",
            "rate": f"{rate:.4g}",
            "unit": "FLOP/s" if case.operations else "B/s",
            "ceiling": f"{peak:.4g}",
            "share_of_ceiling": f"{rate / peak:.3f}",
        }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks/kernels.py: expected a CUDA device, found none.\n")
    import triton
    from triton.testing import do_bench

    def time_ms(run: Callable[[], object]) -> float:
        return float(do_bench(run, warmup=20, rep=100, return_mode="median"))

    device = torch.device("cuda")
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dpsgd_track": version("dpsgd-track") if _is_installed() else "checkout",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    peaks = ceilings(device, time_ms)
    measured = [
        row | machine
        for sizes in ((2, 1024, 2048, 2048), (2, 4096, 2048, 2048), (2, 4096, 2048, 8192))
        for row in rows(cases(device, *sizes, V=128256), time_ms, peaks)
    ]
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(measured[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(measured)
    for row in measured:
        print(f"{row['kernel']:26} {row['shape']:24} {row['median_us']:>9} us "
              f"{float(str(row['share_of_ceiling'])):6.0%} of {row['unit']} ceiling")  # fmt: skip
    return 0


def _is_installed() -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version("dpsgd-track")
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
