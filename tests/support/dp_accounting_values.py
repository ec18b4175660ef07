"""What Google's dp-accounting says of histories, kept because the suite does not install it.

Its 0.6.0 asks for attrs < 24, which `constraints.txt` is two major versions past. To compute
`dp_accounting_values.json` again, in an environment that has it (`pip install dp-accounting`):

    PYTHONPATH=. python tests/support/dp_accounting_values.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")

History = tuple[tuple[float, float, int], ...]

DELTAS = (1e-8, 1e-5, 1e-2)
HISTORIES: tuple[History, ...] = (
    # What is usual.
    ((1.0, 0.01, 1000),),
    ((4.0, 0.1, 500),),
    ((0.7, 1.0, 10),),
    # Another sigma, another sample rate, or both, after a resume.
    ((0.6, 0.1, 50), (4.0, 0.1, 1)),
    ((4.0, 0.1, 1), (0.6, 0.1, 50)),
    ((1.0, 0.01, 64), (2.0, 0.02, 32)),
    ((1.0, 0.01, 300), (1.0, 0.05, 30)),
    ((4.0, 0.1, 500), (0.8, 0.05, 20), (4.0, 0.1, 100)),
    ((1.2, 0.02, 300), (0.9, 0.02, 100), (0.7, 0.005, 300)),
    ((3.0, 0.1, 20), (1.5, 0.01, 200)),
    # Steps that are not sampled, among those that are.
    ((2.0, 1.0, 5), (1.0, 0.01, 300)),
    ((1.0, 0.999, 3), (1.0, 1.0, 3)),
    ((1.0, 0.9, 2), (8.0, 1.0, 4), (2.0, 1.0, 1)),
    # One stage back and forth.
    tuple((sigma, 0.02, 10) for _ in range(20) for sigma in (1.0, 2.0)),
    # Edges: little noise, much noise, tiny and large sample rates.
    ((0.3, 0.01, 10), (3.0, 0.9, 2)),
    ((0.5, 0.001, 500), (0.7, 0.3, 3)),
    ((500.0, 0.2, 100), (20.0, 0.2, 50)),
    ((100.0, 1.0, 1),),
    ((1.0, 1e-6, 10_000), (1.0, 1e-4, 1000)),
    ((1e8, 0.1, 1000), (1.0, 0.01, 100)),
    # Every stage another.
    tuple((1.0 + 0.1 * k, 0.01 + 0.002 * k, 20) for k in range(5)),
)
# Loops in which the sample rate is 4 of 4, 8, 16, 40 or 100 samples: up to three stages.
GRID: tuple[tuple[History, float], ...] = tuple(
    (
        tuple(
            (
                (0.6, 1.0, 1.7, 3.0)[(k + s) % 4],
                (0.5, 0.1, 0.04, 0.25, 1.0)[(k + 2 * s) % 5],
                2 + (3 * k + s) % 9,
            )
            for s in range(1 + k % 3)
        ),
        (1e-6, 1e-5, 1e-3)[(k // 3) % 3],
    )
    for k in range(50)
)
"""(history, delta)"""
WHOLE_ORDERS = (*range(2, 11), *range(12, 64))
"""Those that Opacus has too. dp-accounting bounds fractional orders loosely: it adds the sizes of
terms whose signs alternate."""
ORDERS_KEPT = (2, 8, 32, 63)


def accountants_of(history: History) -> tuple[Any, Any]:
    """dp-accounting's RDP accountant at `WHOLE_ORDERS`, and its PLD accountant."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    rdp, pld = RdpAccountant(orders=WHOLE_ORDERS), PLDAccountant()
    for sigma, q, steps in history:
        step = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma))
        rdp.compose(step, steps)
        pld.compose(step, steps)
    return rdp, pld


def main() -> None:
    """Write `PATH`."""
    values = []
    for history in HISTORIES:
        rdp, pld = accountants_of(history)
        values.append(
            {
                "history": history,
                "rdp_at_order": {
                    order: rdp.rdp[WHOLE_ORDERS.index(order)] for order in ORDERS_KEPT
                },
                "rdp": [rdp.get_epsilon(delta) for delta in DELTAS],
                "pld": [pld.get_epsilon(delta) for delta in DELTAS],
            }
        )
    stored = {
        "dp_accounting": version("dp-accounting"),
        "deltas": DELTAS,
        "values": values,
        "grid_pld": [accountants_of(h)[1].get_epsilon(delta) for h, delta in GRID],
    }
    PATH.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
