"""Real Flower servers on loopback: who may join, who is refused, and what a run on them gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from fedcil import load
from fedcil.deploy.control import Control, ControlFailed, wait_healthy
from fedcil.deploy.health import LOCAL_NAMES, healthy
from fedcil.deploy.pki import Pki, make_pki, new_secret
from fedcil.deploy.processes import (
    Keeper,
    Role,
    flower_environment,
    free_port,
    superlink,
    supernode,
)
from fedcil.port import StopSignal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]
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


@pytest.fixture(scope="module", autouse=True)
def proxies() -> Iterator[None]:
    """As on a campus, and nobody answers: what is on this machine must be reached without them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    pki, port = make_pki(folder / "pki", hosts=LOCAL_NAMES, nodes=2), free_port()
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

    assert "SuperNode authentication is enabled" in servers.node_says(servers.pki, 0, change=without_key)
    assert not servers.online()


def test_a_node_without_tls_is_refused(servers: Servers) -> None:
    def without_tls(words: list[str]) -> list[str]:
        place = words.index("--root-certificates")
        return [*words[:place], "--insecure", *words[place + 2 :]]

    assert "TLS is not enabled" in servers.node_says(servers.pki, 0, change=without_tls)
    assert not healthy(f"http://{servers.control.address}/health")  # nor does the SuperLink talk to anybody without
    assert healthy(f"https://{servers.control.address}/health", servers.pki.ca)
    assert not servers.online()


def test_a_superlink_of_another_authority_is_not_trusted(servers: Servers, tmp_path: Path) -> None:
    stranger = make_pki(tmp_path / "pki", hosts=LOCAL_NAMES, nodes=1)
    assert "CERTIFICATE_VERIFY_FAILED" in servers.node_says(stranger, 0)
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
    pki, port, keeper = make_pki(tmp_path / "pki", hosts=LOCAL_NAMES, nodes=1), free_port(), Keeper()
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
    make_pki(pki.folder, hosts=LOCAL_NAMES, nodes=1, days=-1.0)


SMALL = ["data.classes=4", "stream.tasks=2", "training.rounds=2", "training.epochs=2"]


def fedcil(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedcil", *words, "--output", str(folder), "--no-figures", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def metrics(folder: Path) -> list[dict[str, object]]:
    (path,) = folder.iterdir()
    return load(path).results


def test_deploy_local_gives_the_metrics_of_the_simulation_and_leaves_nothing(
    nothing_left: Callable[[float], None], tmp_path: Path
) -> None:
    sets = [word for text in SMALL for word in ("--set", text)]
    done = fedcil("deploy", "local", "deploy_digits", "--nodes", "3", *sets, folder=tmp_path / "servers")
    assert done.returncode == 0, done.stderr
    nothing_left(1.0)
    for engine in ("inline", "ray"):
        assert fedcil("run", "deploy_digits", "--engine", engine, *sets, folder=tmp_path / engine).returncode == 0
        assert metrics(tmp_path / "servers") == metrics(tmp_path / engine)
    said = json.loads(done.stdout)
    assert said["method"] == "mfcl"
    assert stat.S_IMODE(next((tmp_path / "servers").glob("*/deployment/pki/server/server.key")).stat().st_mode) == 0o600


def test_ctrl_c_leaves_no_process_and_the_run_goes_on_anywhere(
    nothing_left: Callable[[float], None], tmp_path: Path
) -> None:
    """Stopped on real servers; finished in simulation, and on other servers with another number of nodes."""
    sets = [word for text in SMALL for word in ("--set", text)]
    words = ["deploy", "local", "deploy_digits", "--nodes", "2", *sets, "--output", str(tmp_path / "a"), "--no-figures"]
    process = subprocess.Popen([sys.executable, "-m", "fedcil", *words], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: any(path.stat().st_size for path in (tmp_path / "a").glob("*/metrics.jsonl")), 150.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors
    nothing_left(1.0)
    (run,) = (tmp_path / "a").iterdir()
    shutil.copytree(run, tmp_path / "b" / run.name)
    for more in (["deploy", "local", str(run), "--nodes", "3"], ["resume", str(tmp_path / "b" / run.name)]):
        done = subprocess.run([sys.executable, "-m", "fedcil", *more, "--no-figures"], check=False, timeout=200)
        assert done.returncode == 0
    assert fedcil("run", "deploy_digits", *sets, folder=tmp_path / "c").returncode == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") == metrics(tmp_path / "c")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["digits_mfcl"], 2, "server.deadline_s"),
        (["no_such_scenario"], 2, "no scenario"),
        (["deploy_digits", "--set", "data.name=tiny_imagenet", "--set", "data.classes=4"], 2, "tiny_imagenet"),
    ],
)
def test_what_cannot_be_deployed_is_said_before_anything_starts(
    tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    done = fedcil("deploy", "local", *words, folder=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_through_the_gate_a_node_is_let_in_and_nobody_controls(servers: Servers, tmp_path: Path) -> None:
    """The shipped configuration of nginx, with the addresses of this machine."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    text = (Path(__file__).parent.parent / "deploy" / "gate.conf").read_text()
    for old, new in {
        "$superlink superlink:8000": f"$superlink {servers.control.address}",
        "proxy_ssl_name superlink": "proxy_ssl_name localhost",
        "listen 8000": f"listen 127.0.0.1:{port}",
        "/tmp/": f"{tmp_path}/",
        " /pki/": f" {servers.pki.folder}/",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "gate.conf").write_text(text)
    gate, keeper = f"127.0.0.1:{port}", Keeper()
    words = supernode(servers.pki, 0, gate, free_port(), new_secret(tmp_path / "secret"), "partition-id=0")
    command = (nginx, "-c", str(tmp_path / "gate.conf"), "-g", "daemon off;")
    keeper.start(Role("gate", command, tmp_path / "gate.log", dict(os.environ)))
    keeper.start(Role("node", words, tmp_path / "node.log", flower_environment(tmp_path / "home")))
    try:
        assert wait_for(servers.online, 40.0), (tmp_path / "node.log").read_text()
        with pytest.raises(ControlFailed):
            replace(servers.control, address=gate, home=tmp_path / "control").nodes()
        assert servers.control.nodes()
    finally:
        keeper.close()
    assert wait_for(lambda: not servers.online(), 30.0)
