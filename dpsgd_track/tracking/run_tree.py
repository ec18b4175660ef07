"""The run tree of one group, as the launcher builds it; the launcher alone sets run statuses."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dpsgd_track.config import RegimeConfig, Settings, redact_uri
from dpsgd_track.tracking import names
from dpsgd_track.tracking.client import TrackingError, is_transient, one_line
from dpsgd_track.tracking.store import absolute_uri, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
_PARAMS_PER_BATCH = 100
_ATTEMPTS = 6

Result = TypeVar("Result")


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
    """Group, mode and rank runs of one group.

    Raises (constructor):
        ValueError: the tracking store cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.tracking_uri = absolute_uri(settings.tracking_uri)
        """Where workers find the store; it may carry credentials."""
        self._shown_uri = redact_uri(settings.tracking_uri)
        self._client: MlflowClient
        self._client, self._experiment_id = open_store(settings)
        self._open: dict[str, None] = {}
        self._user = {"mlflow.user": _user_name(), "mlflow.source.name": "launch.py"}
        self.group = ""
        self.group_run_id = ""

    def has_group(self, group: str) -> bool:
        """Whether the experiment already holds a group of this name."""
        query = f"tags.`{names.GROUP}` = '{group}'"
        found = self._ask(
            lambda: self._client.search_runs([self._experiment_id], query, max_results=1)
        )
        return bool(found)

    def start_group(
        self,
        group: str,
        expected: Sequence[Sequence[str]],
        params: Mapping[str, str],
    ) -> str:
        """Create the group run.

        Args:
            expected: (mode, regime, variant, replay) of every mode run set out to do; of one of a
                profile, the point besides.
        Returns:
            Its run id.
        """
        tags = {
            names.GROUP: group,
            names.KIND: names.KIND_GROUP,
            names.EXPECTED_RUNS: json.dumps(expected),
        }
        self.group = group
        self.group_run_id = self._create(group, tags, params)
        return self.group_run_id

    def start_mode(
        self,
        mode: str,
        regime: RegimeConfig,
        num_ranks: int,
        params: Mapping[str, str],
        variant: str = "",
    ) -> tuple[str, tuple[str, ...]]:
        """Create the runs of one mode in one regime.

        Returns:
            The mode run's id, and the id of each rank's run.
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
        parent = {names.PARENT_RUN: self.group_run_id, names.KIND: names.KIND_MODE}
        mode_run = self._create(title, tags | parent, params)
        parent = {names.PARENT_RUN: mode_run, names.KIND: names.KIND_RANK}
        ranks = tuple(
            self._create(f"rank {rank}", tags | parent | {names.RANK: str(rank)}, {})
            for rank in range(num_ranks)
        )
        return mode_run, ranks

    def mark(self, run_id: str, tag: str) -> None:
        """Set a tag of a run to `true`."""
        self._set_tag(run_id, tag, "true")

    def finish(self, run_id: str, status: str, reason: str = "", advice: str = "") -> None:
        """End a run as FINISHED, FAILED or KILLED, with the reason where it did not finish."""
        if reason:
            tag = f"{reason} {advice}".strip()
            note = f"**{status}**: {reason}" + (f"\n\n{advice}" if advice else "")
            for key, value in ((names.REASON, tag), (names.NOTE, note)):
                self._set_tag(run_id, key, value[:MAX_TAG_LENGTH])
        self._ask(lambda: self._client.set_terminated(run_id, status))
        self._open.pop(run_id, None)

    def finish_open(self, status: str, reason: str) -> None:
        """End every run of this tree that is still running, the group run last."""
        for run_id in reversed(list(self._open)):
            self.finish(run_id, status, reason)

    def _create(self, title: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
        run = self._ask(
            lambda: self._client.create_run(
                self._experiment_id, tags={**self._user, **tags}, run_name=title
            )
        )
        run_id = str(run.info.run_id)
        self._open[run_id] = None
        self._log_params(run_id, params)
        return run_id

    def _set_tag(self, run_id: str, key: str, value: str) -> None:
        self._ask(lambda: self._client.set_tag(run_id, key, value))

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(entities), _PARAMS_PER_BATCH):
            batch = entities[start : start + _PARAMS_PER_BATCH]
            self._ask(partial(self._client.log_batch, run_id, params=batch))

    def _ask(self, call: Callable[[], Result]) -> Result:
        """`call()`, tried again while the store is away for a moment."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except Exception as error:
                if attempt == _ATTEMPTS - 1 or not is_transient(error):
                    raise TrackingError(
                        f"tracking_uri={self._shown_uri!r}: expected the tracking store to answer. "
                        f"{one_line(error, self.tracking_uri)}"
                    ) from error
                time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
