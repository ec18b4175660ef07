"""What a group ran with and how it was launched, as the report shows it."""

from __future__ import annotations

from dpsgd_track.record import names
from dpsgd_track.store.reader import Group

_OWN_TAGS = ("mlflow.", "dpsgd.")
_COMMAND = ("command", "dpsgd.command")


def command(group: Group) -> str:
    """The command line that launched the group; empty when it was not recorded."""
    recorded = {**group.params, **group.tags}
    return next((recorded[key] for key in _COMMAND if recorded.get(key)), "")


def environment(group: Group) -> list[tuple[str, str]]:
    """Settings and versions: the group's own, then what all of its mode runs agree on."""
    params = [run.params for run in (*group.runs, *group.points) if run.params]
    shared = {
        key: value
        for key, value in (params[0] if params else {}).items()
        if all(other.get(key) == value for other in params)
    }
    tags = {k: v for k, v in group.tags.items() if not k.startswith(_OWN_TAGS)}
    known = {**shared, **group.params, **tags}
    ranks = ", ".join(f"{count} {status}" for status, count in group.rank_statuses.items())
    if ranks:
        known["rank runs"] = ranks
    if group.superseded:
        known["earlier attempts left out"] = str(group.superseded)
    known.pop(names.NOTE, None)
    return [(key, value) for key, value in known.items() if key not in _COMMAND]
