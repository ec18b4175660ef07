"""Machines of their own on this one: Linux network namespaces behind a router that can drop."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest


class Network:
    """`node0`, `node1` and `server`, each with its own network, at `address` of each."""

    HOSTS = ("node0", "node1", "server")

    def __init__(self) -> None:
        self._mark = f"dpt{os.getpid()}"
        self.router = f"{self._mark}-router"
        self.names = {host: f"{self._mark}-{host}" for host in self.HOSTS}
        self.address = {host: f"10.77.{i}.2" for i, host in enumerate(self.HOSTS)}

    def make(self) -> None:
        """Raise CalledProcessError where this process may not."""
        for name in (self.router, *self.names.values()):
            _run("ip", "netns", "add", name)
        for i, (host, name) in enumerate(self.names.items()):
            near, far = f"{self._mark}r{i}", f"{self._mark}n{i}"
            _run("ip", "link", "add", near, "netns", self.router, "type", "veth", "peer", far)
            _run("ip", "link", "set", far, "netns", name)
            for space, link, place in ((self.router, near, 1), (name, far, 2)):
                _in(space, "ip", "address", "add", f"10.77.{i}.{place}/24", "dev", link)
                _in(space, "ip", "link", "set", link, "up")
            _in(name, "ip", "link", "set", "lo", "up")
            _in(name, "ip", "route", "add", "default", "via", f"10.77.{i}.1")
            assert self.address[host] == f"10.77.{i}.2"
        _in(self.router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def inside(self, host: str, *command: str) -> list[str]:
        """`command` as it is started on `host`."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self, one: str, other: str) -> None:
        """Drop whatever the two send each other; neither is told."""
        self._rules("add", one, other)

    def mend(self, one: str, other: str) -> None:
        """Let it through again."""
        self._rules("del", one, other)

    def _rules(self, change: str, one: str, other: str) -> None:
        for source, target in ((one, other), (other, one)):
            addresses = ("from", self.address[source], "to", self.address[target])
            _in(self.router, "ip", "rule", change, *addresses, "blackhole")

    def remove(self) -> None:
        """All of it."""
        for name in (self.router, *self.names.values()):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", name)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Three machines; skips where this process may not make any."""
    made = Network()
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"network namespaces cannot be made here: {said.strip()[-200:]}")
        yield made
    finally:
        made.remove()


def _in(space: str, *command: str) -> None:
    _run("ip", "netns", "exec", space, *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
