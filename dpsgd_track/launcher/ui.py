"""`dpsgd-track ui`: the MLflow UI on the configured store."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dpsgd_track.config import Settings, require
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.processes import Session
from dpsgd_track.program import NAME, command
from dpsgd_track.redaction import redact_uri, redacted
from dpsgd_track.store.client import one_line
from dpsgd_track.store.reader import GroupNotFound, open_client
from dpsgd_track.store.scratch import scratch
from dpsgd_track.store.spooled import spooled_groups
from dpsgd_track.store.sqlite_file import absolute_uri, sqlalchemy_uri, sqlite_path
from dpsgd_track.store.ui_views import group_page, groups_page

HOST = "127.0.0.1"
_POLL_S = 0.2


def open_ui(settings: Settings, port: int, group: str | None = None) -> int:
    """Serve the UI until interrupted; for a tracking server, print its address.

    Args:
        group: the group whose page is named: its name, a run id, or `latest`; None for the newest,
            if there is any.
    Returns:
        The exit code.

    Raises:
        ValueError: the store does not exist yet, or the port is not available.
        GroupNotFound: there is no such group.
    """
    uri = absolute_uri(settings.tracking_uri)
    if uri.startswith("http"):
        _announce(redact_uri(uri).rstrip("/"), _pages(settings, group))
        return 0
    path = sqlite_path(uri)
    unshipped = [group.label for group in spooled_groups(Path(settings.spool_dir))]
    _require_store(settings, path is None or path.is_file(), unshipped)
    _require_free(port)
    pages = _pages(settings, group)
    if unshipped:
        count = f"{len(unshipped)} group{'s' * (len(unshipped) > 1)}"
        print(f"not in the store yet: {count}, which `{command('sync')}` ships")
    with (
        scratch() as folder,
        Interruption(outlives_terminal=False) as interruption,
    ):
        log = Path(folder) / "server.log"
        session = Session(_command(port), _environment(uri), log)
        try:
            return _serve(session, port, log, interruption, pages)
        finally:
            session.end(grace_s=5.0)


def _require_store(settings: Settings, exists: bool, unshipped: Sequence[str]) -> None:
    advice = f"Run `{command('quick')}` first, or check --tracking-uri."
    if unshipped:
        advice = f"Run `{command('sync')}` first, which ships {', '.join(unshipped)} to it."
    where = redact_uri(settings.tracking_uri)
    require(exists, "tracking_uri", where, "an existing file", advice)


def _pages(settings: Settings, group: str | None) -> tuple[str, str]:
    """Paths in the UI to a group's trajectories and to the list of groups; empty without any."""
    try:
        client = open_client(settings.tracking_uri)
        experiment = client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            raise GroupNotFound(f"group={group!r}: expected a group in {settings.experiment}.")
        trajectories = group_page(client, settings, group or "latest")
        return trajectories, groups_page(client, experiment.experiment_id)
    except Exception as error:
        # The UI itself can be opened without them.
        if group is not None:
            raise
        if not isinstance(error, GroupNotFound):
            print(f"The newest group's page: {one_line(error)}", file=sys.stderr)
        return "", ""


def _announce(address: str, pages: tuple[str, str], more: str = "") -> None:
    trajectories, groups = pages
    print(f"MLflow UI: {address}{trajectories}{more}", flush=True)
    if groups:
        print(f"All groups: {address}{groups}", flush=True)


def _serve(
    session: Session, port: int, log: Path, interruption: Interruption, pages: tuple[str, str]
) -> int:
    announced = False
    while not interruption.requested:
        code = session.poll()
        if code is not None:
            print(redacted(log.read_text(errors="replace")[-2000:]), file=sys.stderr)
            print(f"{NAME} ui: the MLflow server ended with exit code {code}.", file=sys.stderr)
            return 1
        if not announced and _answers(port):
            announced = True
            _announce(f"http://{HOST}:{port}", pages, " (Ctrl-C ends it)")
        time.sleep(_POLL_S)
    return 0


def _command(port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
    ]


def _environment(uri: str) -> dict[str, str]:
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        # Through the environment, not the command line: the URI may carry a password.
        "MLFLOW_BACKEND_STORE_URI": sqlalchemy_uri(uri),
        # Job execution starts helper processes that take 2 GB and serve nothing here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _require_free(port: int) -> None:
    require(1 <= port <= 65535, "port", port, "a number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port={port}: expected a free port ({error.strerror}). Choose another --port."
            ) from error


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True
