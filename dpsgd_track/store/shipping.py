"""A launcher's background thread that ships the spool without blocking anything."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import one_line
from dpsgd_track.store.shipper import NotThereYet, Shipper, settle

INTERVAL_S = 1.0
"""Seconds between shipments."""
CLOSE_TIMEOUT_S, AWAY_TIMEOUT_S = 60.0, 5.0
"""Longest wait at the end, in seconds, for a store that accepts records and an unreachable one."""
_LONGEST_PAUSE_S = 5.0
_LONGEST_PASS_S = 15.0
_SILENT_S = 3.0

Tell = Callable[[str], object]


class Shipping:
    """Ships a group while it grows, then the records that dead launchers left."""

    def __init__(
        self,
        shipper: Shipper,
        tracking_uri: str,
        tell: Tell,
        *,
        left: Sequence[Shipper] = (),
        check: Callable[[], Sequence[str]] = tuple,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """
        Args:
            tell: called once each time the store becomes unreachable, and once it is back.
            left: shippers of the groups of launchers that died.
            check: called once all is shipped; returns the records missing from the store. It shares
                the time limit of shipping.
        """
        self._shipper = shipper
        self._uri = tracking_uri
        self._tell = tell
        self._left = list(left)
        self._check = check
        self._problems: Sequence[str] = ()
        self._interval_s = interval_s
        self._trouble = ""
        self._is_away = self._is_told = False
        self._is_complete = False
        self._passing = threading.Lock()
        self._closing, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipping", daemon=True)

    def start(self) -> None:
        """Start shipping, in the background."""
        self._thread.start()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Ship nothing while entered; waits a limited time for the shipment under way."""
        is_quiet = self._passing.acquire(timeout=_LONGEST_PASS_S)
        try:
            yield
        finally:
            if is_quiet:
                self._passing.release()

    def close(
        self,
        timeout_s: float = CLOSE_TIMEOUT_S,
        away_timeout_s: float = AWAY_TIMEOUT_S,
        is_hurried: Callable[[], bool] = lambda: False,
    ) -> str:
        """Ship the rest, for a limited time; no more records may be written to the group.

        Args:
            timeout_s: for a store that accepts records.
            away_timeout_s: for an unreachable one, and if `is_hurried`.
        Returns:
            Why some records are on this machine alone; empty if all arrived.
        """
        self._closing.set()
        start = time.monotonic()
        is_said = False
        while self._thread.is_alive():
            self._thread.join(0.05)
            waited_s = time.monotonic() - start
            if waited_s > _SILENT_S and not is_said and not self._is_away:
                is_said = True
                self._tell(f"tracking: shipping the rest, for at most {timeout_s:g} s.")
            is_short = self._is_away or is_hurried()
            if waited_s > (away_timeout_s if is_short else timeout_s):
                break
        self._stop.set()
        if self._is_complete:
            return ""
        problems = [*self._shipper.refused.values(), *self._problems]
        return self._trouble or next(iter(problems), f"It took longer than {timeout_s:g} s.")

    def should_stop(self) -> bool:
        """True once nobody waits for shipping any more."""
        return self._stop.is_set()

    def _run(self) -> None:
        pause_s = self._interval_s
        while not self._stop.is_set():
            # Records written before the request to end are shipped by the pass after it.
            is_closing = self._closing.wait(pause_s)
            try:
                with self._passing:
                    if self._trouble:
                        self._shipper.is_there()
                        self._is_away = False
                    self._shipper.ship(self._stop.is_set)
                    if is_closing and not self._shipper.refused and not self._stop.is_set():
                        self._problems = self._check()
                        self._is_complete = not self._problems
            except Exception as error:
                self._note(error)
                pause_s = min(2 * max(pause_s, 0.25), _LONGEST_PAUSE_S)
                if is_closing:
                    # The event is set: waiting on it would return at once.
                    self._stop.wait(min(pause_s, 0.5))
                continue
            if self._trouble:
                self._trouble = ""
                if self._is_told:
                    self._is_told = False
                    self._tell(f"tracking: {redact_uri(self._uri)} is back, nothing was lost.")
            pause_s = self._interval_s
            if is_closing:
                return
            with self._passing:
                self._ship_left()

    def _note(self, error: Exception) -> None:
        self._trouble = one_line(error)
        # If only another machine's records are missing, that machine may just be slower.
        self._is_away = not isinstance(error, NotThereYet)
        if self._is_away and not self._is_told and not self._stop.is_set():
            self._is_told = True
            self._tell(
                f"tracking: {redact_uri(self._uri)} takes nothing at the moment: {self._trouble} "
                f"Training goes on, and records are kept in {self._shipper.group.folder}."
            )

    def _ship_left(self) -> None:
        while self._left and not self._closing.is_set():
            shipper = self._left.pop()
            # `dpsgd-track sync` reports its problem; this launch is about another group.
            with contextlib.suppress(Exception):
                if not settle(shipper, count=False, should_stop=self._closing.is_set):
                    self._tell(f"tracking: the store has all of {shipper.group.name} now.")
