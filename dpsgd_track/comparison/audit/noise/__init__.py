"""Audits the noise that a mode adds: its size, its distribution, and that it repeats nowhere.

1. `check` says what a check is, and how often all of an audit together may raise a false alarm;
2. `gaussian` knows how far estimates from normal numbers lie from what they estimate;
3. `samples` are elements of the noise; `std`, `shape`, `tails`, `equality` and `correlation` check
   them;
4. `sketches` checks what can be known from projections alone;
5. `sensitivity` checks that no sample contributes more than C, which the noise is calibrated to;
6. `audit` runs all that a run has records for, and turns failed checks into findings.
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
