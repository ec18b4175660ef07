"""Says whether the modes of a group computed the same thing. Pure NumPy, no torch.

A pairing says what is held against what: `baselines` within one group, `earlier` between two. What
`group` does with the pairs is the same for both, regime by regime:

1. `alignment` puts two trajectories side by side by step, sample index and name;
2. `drift` measures how far apart they are in everything that `observables` lists;
3. `floor` takes the same measure of a baseline and its replay: rounding alone;
4. `excess` tells how far each drift is over what rounding explains;
5. `finite` looks for NaN and infinity in each run by itself;
6. `ladder` finds the first step and stage that is out of bounds;
7. `noise` audits the noise of each run by itself, and what each sample contributes;
8. `consistency` holds each run against itself, and `culprit` names what went wrong first;
9. `verdict` turns all of it into PASS, DRIFT, BUG or INCONCLUSIVE, with a sentence;
10. `judge` runs the above for one run, and `result` is what they add up to.

`waivers` says which drifts are accepted for now.
"""

from dpsgd_track.comparison.group import compare_group, compare_groups
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict

__all__ = ["GroupComparison", "Verdict", "compare_group", "compare_groups"]
