"""Audits a mode's noise: its size, its distribution, and that it never repeats.

1. `check` defines a check, and the false alarm rate of an audit as a whole;
2. `gaussian` gives confidence bounds for estimates from normal numbers;
3. `samples` are elements of the noise; `std`, `shape`, `tails`, `equality` and `correlation` check
   them;
4. `sketches` makes the checks that need projections only;
5. `sensitivity` checks that no sample contributes more than C, to which the noise is calibrated;
6. `draws` makes the checks of a million elements by their sums alone;
7. `audit` runs all checks that a run has records for, and turns failed ones into findings.
"""

from dpsgd_track.comparison.audit.noise.audit import audit, audits_of, judge_noise, passed_noise
from dpsgd_track.comparison.audit.noise.check import NoiseAudit, NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.sensitivity import sensitivity

__all__ = [
    "NoiseAudit",
    "NoiseCheck",
    "Place",
    "audit",
    "audits_of",
    "judge_noise",
    "passed_noise",
    "sensitivity",
]
