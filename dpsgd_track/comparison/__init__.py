"""Says whether the modes of a group computed the same thing. Pure NumPy, no torch.

The flow of `compare_group`, regime by regime:

1. `alignment` puts two trajectories side by side by step, sample index and name;
2. `drift` measures how far apart they are in everything that `observables` lists;
3. `floor` takes the same measure of a baseline and its replay: rounding alone;
4. `finite` looks for NaN and infinity in each run by itself;
5. `ladder` finds the first step and stage that is out of bounds;
6. `noise` audits the noise of each run by itself, and what each sample contributes;
7. `consistency` holds each run against itself, `blame` names what the ladder shows;
8. `verdict` turns all of it into PASS, DRIFT, BUG or INCONCLUSIVE, with a sentence;
9. `group` runs the above over all runs and gathers the `result`; `groups` does so for two groups.

`waivers` says which drifts are accepted for now.
"""

from dpsgd_track.comparison.group import compare_group
from dpsgd_track.comparison.groups import compare_groups
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict

__all__ = ["GroupComparison", "Verdict", "compare_group", "compare_groups"]
