"""How a worker writes to MLflow without waiting for it: a queue, and a thread that ships it."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpsgd_track.config import redact_uri
from dpsgd_track.tracking.client import TrackingError, connect, is_transient, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
_LONGEST_PAUSE_S = 2.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Metrics:
    run_id: str
    step: int
    time_ms: int
    values: dict[str, float]


@dataclass(frozen=True)
class _Params:
    run_id: str
    values: dict[str, str]


@dataclass(frozen=True)
class _File:
    run_id: str
    path: Path


_Item = _Metrics | _Params | _File


@dataclass
class _Losses:
    """What could not be written, and the first reason why."""

    counts: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    def add(self, what: str, count: int, reason: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + count
        self.reason = self.reason or reason

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items())


class BatchWriter:
    """Ships metrics, params and files from a background thread, in order for each run.

    Transient failures (a locked database, a server that is away) are tried again until `close`
    runs out of time; anything that stayed unwritten makes `close` raise. With an empty
    `tracking_uri` nothing is tracked: no thread, no import of mlflow.
    """

    def __init__(self, tracking_uri: str, *, flush_interval_s: float = 1.0) -> None:
        """
        Args:
            tracking_uri: MLflow store; redacted credentials are taken from the environment.
            flush_interval_s: how long values are gathered before they are shipped.
        """
        self._uri = tracking_uri
        self._flush_interval_s = flush_interval_s
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._settled = threading.Event()
        self._deadline = math.inf
        self._losses = _Losses()
        self._thread: threading.Thread | None = None
        if tracking_uri:
            self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
            self._thread.start()

    def log_metrics(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Enqueue one step's values, stamped with the time of this call. Never blocks."""
        self._put(_Metrics(run_id, step, time.time_ns() // 1_000_000, dict(metrics)))

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Enqueue params. Never blocks."""
        self._put(_Params(run_id, dict(params)))

    def upload(self, run_id: str, path: Path) -> None:
        """Enqueue a file to become an artifact; it must stay in place until `close`."""
        self._put(_File(run_id, path))

    def settle(self, timeout_s: float = 10.0) -> None:
        """Wait until nothing is left to ship, or for `timeout_s` seconds: nothing then runs beside
        what the caller does next."""
        if self._thread is not None:
            self._settled.clear()
            self._settled.wait(timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """Ship what is left, for at most `timeout_s` seconds. Closing twice does nothing.

        Raises:
            TrackingError: something could not be written.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        thread.join(timeout_s + 1.0)
        if not thread.is_alive() and not self._losses.counts:
            return
        lost = str(self._losses) or "some values"
        reason = self._losses.reason or f"It did not answer within {timeout_s:g} s."
        raise TrackingError(
            f"tracking_uri={redact_uri(self._uri)!r}: expected everything to be written, but "
            f"{lost} could not be. {reason}"
        )

    def _put(self, item: _Item) -> None:
        if self._uri:
            assert self._thread is not None, "the writer is closed"
            self._queue.put(item)

    def _run(self) -> None:
        try:
            client = self._persist(lambda: connect(self._uri))
        except Exception as error:
            self._closing.wait()
            for item in self._drain():
                self._lose(item, one_line(error, self._uri))
            return
        closing = False
        while not closing:
            closing = self._closing.wait(self._flush_interval_s)
            self._ship(client, self._drain())
            if self._queue.empty():
                self._settled.set()

    def _drain(self) -> list[_Item]:
        items: list[_Item] = []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                return items

    def _ship(self, client: MlflowClient, items: Iterable[_Item]) -> None:
        pending: dict[str, list[_Metrics]] = {}
        for item in items:
            if isinstance(item, _Metrics):
                pending.setdefault(item.run_id, []).append(item)
                continue
            # Earlier values of the same run first: order holds for each run.
            self._ship_metrics(client, item.run_id, pending.pop(item.run_id, []))
            if isinstance(item, _Params):
                self._ship_params(client, item)
            else:
                self._attempt(item, partial(client.log_artifact, item.run_id, str(item.path)))
        for run_id, metrics in pending.items():
            self._ship_metrics(client, run_id, metrics)

    def _ship_metrics(self, client: MlflowClient, run_id: str, items: list[_Metrics]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), item.time_ms, item.step)
            for item in items
            for key, value in item.values.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            batch = metrics[start : start + MAX_METRICS_PER_BATCH]
            self._attempt(batch, partial(client.log_batch, run_id, metrics=batch))

    def _ship_params(self, client: MlflowClient, item: _Params) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:6000]) for key, value in item.values.items()]
        for start in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[start : start + MAX_PARAMS_PER_BATCH]
            self._attempt(item, partial(client.log_batch, item.run_id, params=batch))

    def _attempt(self, what: _Item | list[Any], call: Callable[[], object]) -> None:
        try:
            self._persist(call)
        except Exception as error:
            self._lose(what, one_line(error, self._uri))

    def _persist(self, call: Callable[[], Result]) -> Result:
        """`call()`, tried again until it succeeds, fails for good, or time is up."""
        pause_s = 0.1
        while True:
            try:
                return call()
            except Exception as error:
                left_s = self._deadline - time.monotonic()
                if not is_transient(error) or left_s <= 0:
                    raise
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _lose(self, what: _Item | list[Any], reason: str) -> None:
        match what:
            case _File():
                self._losses.add(f"file(s) ({what.path.name})", 1, reason)
            case _Params() | _Metrics():
                kind = "params" if isinstance(what, _Params) else "metrics"
                self._losses.add(kind, len(what.values), reason)
            case _:
                self._losses.add("metrics", len(what), reason)
