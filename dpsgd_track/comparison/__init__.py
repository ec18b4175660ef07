"""Decides whether the modes of a group computed the same thing. Pure NumPy, no torch.

A pairing chooses the pairs to compare: `baselines` within one group, `earlier` between two.
`group` treats the pairs of both alike, regime by regime:

1. `alignment` matches two trajectories by step, sample index and name;
2. `drift` measures their distance in every quantity that `observables` lists;
3. `floor` measures a baseline and its replay in the same way: rounding alone;
4. `excess` relates each drift to the limit that rounding explains, `bias` tests means against plain
   autograd in the modes' type, and `resolution` tells the smallest error that the two would find;
5. `finite` looks for NaN and infinity in each run on its own;
6. `ladder` finds the first step and stage that is out of bounds;
7. `noise` audits each run's noise, and the contribution of each sample;
8. `consistency` checks each run's numbers against each other, and `culprit` names the stage that
   went wrong first;
9. `verdict` turns the findings into PASS, DRIFT, BUG or INCONCLUSIVE, with a sentence;
10. `judge` runs the steps above for one run, and `result` combines them.

`waivers` lists the drifts that are accepted for now.
"""

from dpsgd_track.comparison.group import compare_group, compare_groups
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict

__all__ = ["GroupComparison", "Verdict", "compare_group", "compare_groups"]
