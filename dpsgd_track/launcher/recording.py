"""The records of a group: its name, its folder, its spool, and the store they are shipped to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dpsgd_track.config import Settings, require
from dpsgd_track.launcher.placement import Placement
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import Suite
from dpsgd_track.record.run import Status
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.opening import has_group, open_store, unusable
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import NotThereYet, Shipper, settle
from dpsgd_track.store.shipping import Shipping
from dpsgd_track.store.spool import CONTROL, SpoolDamaged, SpoolWriter
from dpsgd_track.store.spooled import (
    Busy,
    SpooledGroup,
    check_room,
    claim,
    join,
    leave,
    part_of,
    spooled_groups,
)
from dpsgd_track.store.sqlite_file import absolute_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Recording:
    """Records of a group, from its first run to the end of shipping."""

    def __init__(
        self,
        settings: Settings,
        group: str,
        spooled: SpooledGroup,
        store: tuple[MlflowClient, str] | None,
        *,
        is_new: bool = True,
    ) -> None:
        """
        Args:
            spooled: the group's folder in the spool.
            store: client and id of the experiment; None to ship nothing.
            is_new: the folder was created for this launch, and is removed if it cannot start.

        Raises:
            Busy: another process is at work on the group.
        """
        self._is_new = is_new
        self._settings = settings
        self.group = group
        self.folder = Path(settings.results_dir) / group
        """The group's results folder, for files other than records."""
        self.spool = spooled.folder
        self._spooled = spooled
        self._store = store
        self._held: list[IO[bytes]] = [spooled.hold()]
        self._writer = SpoolWriter(spooled.folder, f"launcher{CONTROL}")
        self.tree = RunTree(self._writer, settings.experiment, group)
        self._shipper: Shipper | None = None
        self._shipping: Shipping | None = None
        self.left_behind = ""
        """Once closed: why some records are on this machine alone; empty if the store has all."""

    def start(self, tell: Callable[[str], object]) -> None:
        """Ship the existing records, and go on shipping in the background.

        Raises:
            StoreError: the store accepts nothing; nothing is left of the group.
        """
        left = self._left_by_the_dead(tell)
        if self._store is None:
            return
        uri = absolute_uri(self._settings.tracking_uri)
        self._shipper = self._shipper_of(self._spooled, self._store[1])
        try:
            # The group's own run shows whether the store can be written to.
            with contextlib.suppress(NotThereYet):
                self._shipper.ship()
            if self.tree.group_run and self.tree.group_run not in self._shipper.run_ids:
                raise TrackingError(next(iter(self._shipper.refused.values())))
        except Exception as error:
            problem = unusable(self._settings, error)
            self._forget(str(problem))
            raise problem from error
        self._shipping = Shipping(self._shipper, uri, tell, left=left, check=self._check)
        self._shipping.start()

    def join(self, runs: Iterable[str]) -> None:
        """Take part in runs that node 0 keeps."""
        join(self._writer, self._settings.experiment, runs)

    def leave(self, runs: Iterable[str]) -> None:
        """End this machine's part in those runs."""
        leave(self._writer, runs)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Ship nothing while entered, so that nothing disturbs timed runs."""
        return self._shipping.quiet() if self._shipping else contextlib.nullcontext()

    def close(self, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Ship the rest, for a limited time, and check that it arrived.

        Args:
            is_hurried: True once the user is waiting for the end.
        """
        try:
            self._writer.close()
        finally:
            self._ship_rest(is_hurried)
            self._release()

    def _ship_rest(self, is_hurried: Callable[[], bool]) -> None:
        if self._store is None:
            self.left_behind = f"{self.group} was launched with --offline: no store has it."
        elif self._shipping is not None:
            reason = self._shipping.close(is_hurried=is_hurried)
            self.left_behind = reason and f"the store does not have all of {self.group}. {reason}"

    def _check(self) -> list[str]:
        """Records missing from the store; the spool is removed if there are none."""
        assert self._shipper is not None
        assert self._shipping is not None
        # Over HTTP each metric's values cost a request; only `dpsgd-track sync` compares them.
        is_database = not self._settings.tracking_uri.startswith("http")
        should_stop = self._shipping.should_stop
        return settle(self._shipper, count=is_database, should_stop=should_stop)

    def _left_by_the_dead(self, tell: Callable[[str], object]) -> list[Shipper]:
        """Close the runs of launchers that died; returns shippers for those of this store."""
        left = []
        target = redact_uri(absolute_uri(self._settings.tracking_uri))
        for group in spooled_groups(self._spooled.folder.parent):
            try:
                lock = group.hold()
                self._held.append(lock)
                if closed := group.close_left_open():
                    tell(f"group {group.label}: closed {closed} runs, as its launcher died.")
                shipped = group.state().get(target)
                if self._store is not None and shipped:
                    # It stays in its own experiment.
                    left.append(self._shipper_of(group, shipped["experiment_id"]))
            except (Busy, OSError):
                continue
            except (SpoolDamaged, TrackingError) as error:
                # This launch is about another group.
                tell(f"group {group.name}: {error}")
        return left

    def _shipper_of(self, group: SpooledGroup, experiment_id: str) -> Shipper:
        assert self._store is not None
        uri = absolute_uri(self._settings.tracking_uri)
        return Shipper(group, self._store[0], uri, experiment_id)

    def _forget(self, reason: str) -> None:
        if not self._is_new:
            failure = Failure(kind=FailureKind.TRACKING, message=reason)
            self.tree.finish_open(Status.KILLED, failure)
        self._writer.close()
        if self._is_new:
            self._spooled.remove()
            # It is not empty if the group is resumed.
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        self._release()

    def _release(self) -> None:
        while self._held:
            self._held.pop().close()


def open_group(suite: Suite, place: Placement) -> Recording:
    """Open the store and claim a name for the group.

    Raises:
        ValueError: the store or a folder cannot be used, or the name is taken.
    """
    settings = place.settings
    results, spool = Path(settings.results_dir), Path(settings.spool_dir)
    if place.group is not None:
        is_new = not (results / place.group).exists() and not (spool / place.group).exists()
        _require_new(is_new, place.group)
    store = None if place.is_offline else open_store(settings)

    def claimed(name: str) -> SpooledGroup | None:
        if store is not None and has_group(*store, name):
            return None
        spooled = claim(spool, name)
        is_claimed = False
        try:
            is_claimed = spooled is not None and _claim(results, name)
        finally:
            if spooled is not None and not is_claimed:
                spooled.folder.rmdir()
        return spooled if is_claimed else None

    name = base = place.group or f"{suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while (spooled := claimed(name)) is None:
        _require_new(place.group is None, name)
        number += 1
        name = f"{base}-{number}"
    return Recording(settings, name, spooled, store)


def check_folders(settings: Settings) -> None:
    """Raise ValueError if the folders that a group needs are not writable."""
    for name in ("results_dir", "spool_dir"):
        folder = Path(getattr(settings, name))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_room(folder)
        except OSError as error:
            raise ValueError(
                f"{name}={str(folder)!r}: expected a folder with room to write to. "
                f"{error.strerror}."
            ) from error


def open_part(settings: Settings, group: str, node_rank: int, *, is_offline: bool) -> Recording:
    """Open the store for the records that this machine adds to a group of node 0.

    Raises:
        ValueError: the store or a folder cannot be used, or somebody is at work there.
    """
    place = part_of(group, node_rank)
    allowed = f"nobody at work on {Path(settings.spool_dir, place)}"
    return take_up(settings, group, place, allowed, is_offline=is_offline)[0]


def take_up(
    settings: Settings, group: str, place: str, allowed: str, *, is_offline: bool
) -> tuple[Recording, bool]:
    """Open the store, and continue in a folder of the spool, created if missing.

    Args:
        place: the folder's name.
        allowed: the group expected, for the error message.
    Returns:
        The recording, and whether the folder is new.

    Raises:
        ValueError: the store or a folder cannot be used, or somebody is at work there.
    """
    store = None if is_offline else open_store(settings)
    spool = Path(settings.spool_dir)
    spooled = claim(spool, place)
    is_new = spooled is not None
    try:
        if spooled is None:
            # Records that an earlier launch left there are shipped with the rest.
            spooled = SpooledGroup(spool / place)
            with spooled.hold():
                spooled.close_left_open()
        recording = Recording(settings, group, spooled, store, is_new=is_new)
    except Busy as error:
        advice = "Its launcher, or a sync, is at work: wait for it to end."
        raise ValueError(f"group={group!r}: expected {allowed}. {advice}") from error
    recording.folder.mkdir(parents=True, exist_ok=True)
    return recording, is_new


def _require_new(is_new: bool, group: str) -> None:
    require(is_new, "group", group, "a name not used before", "Choose another, or leave it out.")


def _claim(results: Path, group: str) -> bool:
    """Create the group's folder; False where another launcher was first."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        try:
            (results / group).mkdir()
        except FileExistsError:
            return False
        check_room(results / group)
    except OSError as error:
        raise ValueError(
            f"results_dir={str(results)!r}: expected a folder that can be written to. {error}"
        ) from error
    return True
