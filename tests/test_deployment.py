"""Real Flower servers on loopback: who may join, and who is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from fedcil.deploy.control import Control, ControlFailed, wait_healthy
from fedcil.deploy.pki import Pki, make_pki
from fedcil.deploy.processes import (
    Keeper,
    Role,
    flower_environment,
    free_port,
    new_secret,
    superlink,
    supernode,
)
from fedcil.port import StopSignal

pytestmark = [pytest.mark.slow, pytest.mark.engines, pytest.mark.timeout(290)]
LOOPBACK = ("127.0.0.1", "localhost")
T = TypeVar("T")


@dataclass(frozen=True)
class Servers:
    """A SuperLink that asks nodes for keys."""

    folder: Path
    pki: Pki
    control: Control

    def node_says(self, pki: Pki, slot: int, *, change: Callable[[list[str]], list[str]] = lambda words: words) -> str:
        """What a SuperNode says before it gives up or is let in; empty if nothing for a while."""
        secret = new_secret(self.folder / "node.secret")
        words = list(supernode(pki, slot, self.control.address, free_port(), secret, "partition-id=0 num-partitions=1"))
        log = self.folder / f"node-{time.monotonic_ns()}.log"
        keeper = Keeper()
        keeper.start(Role("node", tuple(change(words)), log, flower_environment(self.folder / "node-home")))
        try:
            return wait_for(lambda: said(log, ("Exit Code", "error:", "SSLError", "CERTIFICATE")), 25.0) or ""
        finally:
            keeper.close()

    def online(self) -> list[str]:
        return [node for node, status in self.control.nodes().items() if status == "online"]


def said(log: Path, marks: tuple[str, ...]) -> str | None:
    text = log.read_text() if log.exists() else ""
    return text if any(mark in text for mark in marks) else None


def wait_for(look: Callable[[], T], seconds: float) -> T | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.3)
    return None


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    pki, port = make_pki(folder / "pki", hosts=LOOPBACK, nodes=2), free_port()
    control, keeper = Control(f"127.0.0.1:{port}", pki.ca, folder / "control"), Keeper()
    command = superlink(pki, "127.0.0.1", port, folder / "superlink.db")
    keeper.start(Role("superlink", command, folder / "superlink.log", flower_environment(folder / "home")))
    try:
        wait_healthy(control, StopSignal(), keeper.tend)
        control.register(pki.node_public(0))
        yield Servers(folder, pki, control)
    finally:
        keeper.close()


def test_a_key_may_be_registered_twice(servers: Servers) -> None:
    servers.control.register(servers.pki.node_public(0))
    assert len(servers.control.nodes()) == 1


def test_an_unknown_run_has_no_status(servers: Servers) -> None:
    assert servers.control.status("12345") == "unknown"


def test_a_superlink_that_is_away_is_said_to_be(servers: Servers) -> None:
    with pytest.raises(ControlFailed, match="failed"):
        replace(servers.control, address=f"127.0.0.1:{free_port()}", home=servers.folder / "nowhere").nodes()


def test_a_key_that_nobody_registered_is_refused(servers: Servers) -> None:
    assert "Failed to activate SuperNode" in servers.node_says(servers.pki, 1)
    assert not servers.online()


def test_a_node_without_a_key_is_refused(servers: Servers) -> None:
    def without_key(words: list[str]) -> list[str]:
        place = words.index("--auth-supernode-private-key")
        return words[:place] + words[place + 2 :]

    servers.node_says(servers.pki, 0, change=without_key)
    assert not servers.online()


def test_a_node_without_tls_is_refused(servers: Servers) -> None:
    def without_tls(words: list[str]) -> list[str]:
        place = words.index("--root-certificates")
        return [*words[:place], "--insecure", *words[place + 2 :]]

    servers.node_says(servers.pki, 0, change=without_tls)
    assert not servers.online()


def test_a_superlink_of_another_authority_is_not_trusted(servers: Servers, tmp_path: Path) -> None:
    stranger = make_pki(tmp_path / "pki", hosts=LOOPBACK, nodes=1)
    servers.node_says(stranger, 0)
    assert not servers.online()
    assert not replace(servers.control, ca=stranger.ca).healthy()


def test_the_node_with_the_registered_key_is_let_in_and_says_goodbye(servers: Servers) -> None:
    secret = new_secret(servers.folder / "good.secret")
    words = supernode(servers.pki, 0, servers.control.address, free_port(), secret, "partition-id=0 num-partitions=1")
    keeper = Keeper()
    keeper.start(Role("node", words, servers.folder / "good.log", flower_environment(servers.folder / "good")))
    try:
        assert wait_for(servers.online, 30.0)
    finally:
        keeper.close()
    assert wait_for(lambda: not servers.online(), 30.0)


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    pki, port, keeper = make_pki(tmp_path / "pki", hosts=LOOPBACK, nodes=1), free_port(), Keeper()
    expire(pki)
    command = superlink(pki, "127.0.0.1", port, tmp_path / "superlink.db")
    keeper.start(Role("superlink", command, tmp_path / "superlink.log", flower_environment(tmp_path / "home")))
    try:
        assert wait_for(lambda: said(tmp_path / "superlink.log", ("Uvicorn running",)), 40.0)
        control = Control(f"127.0.0.1:{port}", pki.ca, tmp_path / "control")
        assert not control.healthy()
        with pytest.raises(ControlFailed):
            control.nodes()
    finally:
        keeper.close()


def expire(pki: Pki) -> None:
    """The same names and authority, but a certificate whose time is over."""
    pki.certificate.unlink()
    make_pki(pki.folder, hosts=LOOPBACK, nodes=1, days=-1.0)
