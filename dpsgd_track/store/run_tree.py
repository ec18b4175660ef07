"""The run tree of one group, as the launcher builds it; the launcher alone sets run statuses.

It is written to the group's spool, so that no store can hold up what the launcher does.
"""

from __future__ import annotations

import getpass
import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpsgd_track.config import RegimeConfig
from dpsgd_track.record import names
from dpsgd_track.store.spool import SpoolWriter

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
"""What MLflow's stores accept at least."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys, values as text: `{"a": {"b": 1}}` -> `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            flat[f"{prefix}{key}"] = text
    return flat


class RunTree:
    """Group, mode and rank runs of one group. A run is known by its key in the spool."""

    def __init__(self, writer: SpoolWriter, experiment: str, group: str) -> None:
        """
        Args:
            writer: of the group's control file.
            experiment: name of the experiment that the runs belong to.
        """
        self._writer = writer
        self._experiment = experiment
        self._open: dict[str, None] = {}
        self._user = {"mlflow.user": _user_name(), "mlflow.source.name": "launch.py"}
        self.group = group
        self.group_run = ""

    def start_group(self, expected: Sequence[Sequence[str]], params: Mapping[str, str]) -> str:
        """Create the group run.

        Args:
            expected: (mode, regime, variant, replay) of every mode run set out to do; of one of a
                profile, the point besides.
        Returns:
            Its key.
        """
        tags = {
            names.GROUP: self.group,
            names.KIND: names.KIND_GROUP,
            **_in_parts(names.EXPECTED_RUNS, json.dumps(expected)),
        }
        self.group_run = self._create(self.group, tags, params)
        return self.group_run

    def resume_group(
        self,
        run: str,
        start_ms: int,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        *,
        is_elsewhere: bool,
    ) -> None:
        """Take up a group run that ended.

        Args:
            is_elsewhere: the rest of the group is in the store, and not in this spool.
        """
        self._add_run(run, self.group, tags, params, time_ms=start_ms, is_resumed=is_elsewhere)
        self._writer.add("reopen", run)
        # Why it ended before is no longer so.
        self._writer.set_tags(run, {names.REASON: "", names.NOTE: ""})
        self.group_run = run

    def start_mode(
        self,
        mode: str,
        regime: RegimeConfig,
        num_ranks: int,
        params: Mapping[str, str],
        variant: str = "",
        logged: Collection[int] | None = None,
    ) -> tuple[str, tuple[str, ...]]:
        """Create the runs of one mode in one regime.

        Args:
            logged: ranks that have a run of their own; None for all.
        Returns:
            The mode run's key, and the key of each rank's run; empty for one that has none.
        """
        replay = regime.replay
        tags = {
            names.GROUP: self.group,
            names.MODE: mode,
            names.REGIME: regime.name,
            names.VARIANT: variant,
            names.REPLAY: replay,
            names.NOISE_MATCHED: str(regime.noise_matched).lower(),
        }
        if regime.point:
            tags[names.POINT] = regime.point
        label = f"{mode}@{variant}" if variant else mode
        which = replay or regime.point
        title = f"{label}/{regime.name}" + (f" ({which})" if which else "")
        parent = {names.PARENT_RUN: self.group_run, names.KIND: names.KIND_MODE}
        mode_run = self._create(title, tags | parent, params)
        parent = {names.PARENT_RUN: mode_run, names.KIND: names.KIND_RANK}
        ranks = tuple(
            self._create(f"rank {rank}", tags | parent | {names.RANK: str(rank)}, {})
            if logged is None or rank in logged
            else ""
            for rank in range(num_ranks)
        )
        return mode_run, ranks

    def mark(self, run: str, tag: str) -> None:
        """Set a tag of a run to `true`."""
        self._writer.set_tags(run, {tag: "true"})

    def finish(self, run: str, status: str, reason: str = "", advice: str = "") -> None:
        """End a run as FINISHED, FAILED or KILLED, with the reason where it did not finish."""
        if reason:
            tag = f"{reason} {advice}".strip()
            note = f"**{status}**: {reason}" + (f"\n\n{advice}" if advice else "")
            said = {names.REASON: tag[:MAX_TAG_LENGTH], names.NOTE: note[:MAX_TAG_LENGTH]}
            self._writer.set_tags(run, said)
        self._writer.add("end", run, status=status)
        self._open.pop(run, None)

    def finish_open(self, status: str, reason: str) -> None:
        """End every run of this tree that is still running, the group run last."""
        for run in reversed(list(self._open)):
            self.finish(run, status, reason)

    def _create(self, title: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
        run = uuid.uuid4().hex
        self._add_run(run, title, {**self._user, **tags}, params)
        return run

    def _add_run(
        self,
        run: str,
        title: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        **more: object,
    ) -> None:
        self._writer.add(
            "run",
            run,
            experiment=self._experiment,
            title=title,
            tags=dict(tags),
            params={key: value[:MAX_PARAM_LENGTH] for key, value in params.items()},
            **more,
        )
        self._open[run] = None


def _in_parts(tag: str, text: str) -> dict[str, str]:
    """`text` as tags that a database has room for: `tag`, `tag.2`, `tag.3` and so on."""
    starts = range(0, len(text), MAX_TAG_LENGTH)
    parts = [text[start : start + MAX_TAG_LENGTH] for start in starts]
    return {f"{tag}.{number}" if number > 1 else tag: p for number, p in enumerate(parts, 1)}


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
