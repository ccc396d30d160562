"""The parts of a deployment that need no server: keys, slots, supervision, what processes are called with."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

import fedcil
from client.share import own_clients
from fedcil.cli.deploy import conclude
from fedcil.cli.run_folders import run_folder
from fedcil.deploy import supervisor as supervision
from fedcil.deploy.control import UNKNOWN, ControlFailed
from fedcil.deploy.node import take_slot
from fedcil.deploy.pki import make_pki
from fedcil.deploy.processes import Keeper, Role, end, flower_environment, start
from fedcil.deploy.supervisor import Supervisor
from fedcil.errors import FedcilError, InputError, NotResumable, RunFailed, ScenarioError, TooFewClients
from fedcil.port import StopSignal
from fedcil.record.folder import PROBLEM
from fedcil.record.run import Run
from fedcil.record.tail import Tail

HOSTS = ("superlink", "127.0.0.1")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_keys_are_made_once(tmp_path: Path) -> None:
    make_pki(tmp_path, hosts=HOSTS, nodes=2)
    before = contents(tmp_path)
    make_pki(tmp_path, hosts=HOSTS, nodes=2)
    assert contents(tmp_path) == before


def test_more_nodes_get_keys_and_the_others_keep_theirs(tmp_path: Path) -> None:
    before = contents(make_pki(tmp_path, hosts=HOSTS, nodes=1).folder)
    pki = make_pki(tmp_path, hosts=HOSTS, nodes=3)
    assert before.items() <= contents(tmp_path).items()
    public = serialization.load_ssh_public_key(pki.node_public(2).read_bytes())
    private = serialization.load_ssh_private_key(pki.node_key(2).read_bytes(), None)
    assert private.public_key().public_numbers() == public.public_numbers()  # type: ignore[union-attr]


def test_a_node_key_that_was_lost_gets_a_new_pair(tmp_path: Path) -> None:
    pki = make_pki(tmp_path, hosts=HOSTS, nodes=2)
    other, lost = pki.node_public(0).read_bytes(), pki.node_public(1).read_bytes()
    pki.node_key(1).unlink()
    make_pki(tmp_path, hosts=HOSTS, nodes=2)
    private = serialization.load_ssh_private_key(pki.node_key(1).read_bytes(), None)
    half = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert pki.node_public(1).read_bytes() == half != lost
    assert pki.node_public(0).read_bytes() == other


@pytest.mark.parametrize("name", ["nodes/0000/key", "public/ca.pem", "authority/ca.key", "server/server.pem"])
def test_a_damaged_key_is_named(tmp_path: Path, name: str) -> None:
    make_pki(tmp_path, hosts=HOSTS, nodes=1)
    (tmp_path / name).write_bytes(b"half a key")
    with pytest.raises(InputError, match="no key or certificate") as error:
        make_pki(tmp_path, hosts=HOSTS, nodes=1)
    assert error.value.where == str(tmp_path / name)


@pytest.mark.parametrize("days", [1e9, 1e6, float("inf"), float("nan")])
def test_a_certificate_that_would_hold_for_ever_is_refused(tmp_path: Path, days: float) -> None:
    with pytest.raises(InputError, match="cannot hold for") as error:
        make_pki(tmp_path, hosts=HOSTS, nodes=0, days=days)
    assert error.value.where == "--days"
    make_pki(tmp_path, hosts=HOSTS, nodes=0, days=36_500.0)


@pytest.mark.parametrize("host", ["m\u00fcnchen.de", "", "two words", "superlink:9092"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="is no name or address") as error:
        make_pki(tmp_path, hosts=["*.good-1.example", "::1", host], nodes=0)
    assert error.value.where == "--host"
    assert not list(tmp_path.iterdir())


def test_the_certificate_is_of_the_authority_and_for_the_hosts(tmp_path: Path) -> None:
    pki = make_pki(tmp_path, hosts=HOSTS, nodes=0)
    certificate = x509.load_pem_x509_certificate(pki.certificate.read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(pki.ca.read_bytes()))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.parametrize("change", [{"hosts": ("elsewhere",)}, {"days": 1.0}])
def test_a_certificate_is_made_anew_for_other_hosts_or_before_it_expires(
    tmp_path: Path, change: dict[str, object]
) -> None:
    pki = make_pki(tmp_path, hosts=HOSTS, nodes=0, days=-1.0 if "days" in change else 365.0)
    before, authority = pki.certificate.read_bytes(), pki.ca.read_bytes()
    make_pki(tmp_path, **{"hosts": HOSTS, "nodes": 0, "days": 365.0, **change})
    assert pki.certificate.read_bytes() != before
    assert (pki.ca.read_bytes() == authority) == ("hosts" in change)


def test_private_halves_are_private(tmp_path: Path) -> None:
    pki = make_pki(tmp_path, hosts=HOSTS, nodes=1)
    for path in (pki.ca_key, pki.server_key, pki.secret, pki.node_key(0)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_keys_that_cannot_be_written_are_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "authority").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="cannot be written"):
        make_pki(tmp_path, hosts=HOSTS, nodes=1)


def test_a_slot_is_taken_once_and_free_again_when_its_lock_goes(tmp_path: Path) -> None:
    (first, lock), (second, _other) = take_slot(tmp_path, 2), take_slot(tmp_path, 2)
    assert (first, second) == (0, 1)
    with pytest.raises(InputError, match="all 2 slots"):
        take_slot(tmp_path, 2)
    lock.release()
    assert take_slot(tmp_path, 2)[0] == 0


@pytest.mark.parametrize(
    ("config", "clients"),
    [
        ({"client-ids": "0-2,7"}, [0, 1, 2, 7]),
        ({"partition-id": 1, "num-partitions": 4}, [1, 5, 9]),
        ({"clients": 3}, None),
    ],
)
def test_which_clients_are_a_nodes_own(config: dict[str, object], clients: list[int] | None) -> None:
    assert own_clients(config, 10) == clients


def test_a_span_of_clients_that_runs_backwards_is_no_empty_one() -> None:
    with pytest.raises(ValueError, match="'9-0' runs backwards"):
        own_clients({"client-ids": "0-2,9-0"}, 10)


def sleeper(folder: Path, seconds: float) -> Role:
    return Role(
        "sleeper", (sys.executable, "-c", f"import time; time.sleep({seconds})"), folder / "log", dict(os.environ)
    )


def test_a_process_that_ends_is_started_again_after_a_pause(tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.start(sleeper(tmp_path, 100))
    try:
        (first,) = psutil.Process().children()
        first.kill()
        first.wait()
        until = time.monotonic() + 10
        while not (now := psutil.Process().children()) and time.monotonic() < until:
            keeper.tend()
            time.sleep(0.05)
        assert now
        assert now[0].pid != first.pid
    finally:
        keeper.close()
    assert not keeper.children


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    child = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    code = f"import subprocess, sys, time; subprocess.Popen({child}); time.sleep(99)"
    process = start(Role("parent", (sys.executable, "-c", code), tmp_path / "log", dict(os.environ)))
    until = time.monotonic() + 10
    while not (children := psutil.Process(process.pid).children()) and time.monotonic() < until:
        time.sleep(0.05)
    end(process)
    assert children
    assert not psutil.pid_exists(process.pid)
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_own_modules_are_found_by_servers_and_nodes_where_the_command_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: a folder of theirs that is called client or server must not stand in for fedcil's."""
    (tmp_path / "beside_me.py").write_text("here = True\n")
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "app.py").write_text("raise RuntimeError('another client')\n")
    monkeypatch.chdir(tmp_path)
    code = "import server.app, client.app, beside_me"
    environment = flower_environment(tmp_path / "home") | {"PYTHONPATH": str(Path(fedcil.__file__).parent.parent)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POLL_S": 0.001, "LOOK_S": 0.0, "QUIET_S": 0.0}.items():
        monkeypatch.setattr(supervision, name, value)


class Fake:
    """A SuperLink by script: each look takes the next (healthy, status) and may do something to the run folder."""

    def __init__(self, folder: Path, script: list[tuple[bool, str]]) -> None:
        self.folder, self.script, self.done = folder, script, list[str]()

    def healthy(self) -> bool:
        healthy = self.script[0][0] if self.script else True
        if not healthy:
            self.script.pop(0)
        return healthy

    def status(self, run: str) -> str:
        if not self.script:
            (self.folder / "summary.json").write_text('{"rounds": 1}')
            return "finished:completed"
        status = self.script.pop(0)[1]
        if status == "raises":
            raise ControlFailed("no")
        return status

    def submit(self, config: object) -> str:
        self.done.append("submit")
        return str(len(self.done))

    def stop(self, run: str) -> None:
        self.done.append(f"stop {run}")


def supervise(folder: Path, script: list[tuple[bool, str]]) -> Fake:
    fake = Fake(folder, script)
    Supervisor(fake, folder, 0, lambda _: None).run(StopSignal(), lambda: None, lambda: None)
    return fake


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("script", "done"),
    [
        ([], ["submit"]),
        ([(True, "running"), (True, "finished:failed")], ["submit", "submit"]),
        ([(True, "running"), (False, ""), (True, "running")], ["submit", "stop 1", "submit"]),
        ([(True, "running"), (True, "raises"), (True, "running")], ["submit", "stop 1", "submit"]),
        ([(False, ""), (False, "")], ["submit"]),
        ([(True, UNKNOWN)], ["submit", "submit"]),
    ],
    ids=["undisturbed", "server app died", "superlink away", "control away", "late superlink", "state lost"],
)
def test_a_run_that_was_cut_off_is_submitted_again(
    tmp_path: Path, script: list[tuple[bool, str]], done: list[str]
) -> None:
    assert supervise(tmp_path, script).done == done


@pytest.mark.usefixtures("quick")
def test_another_supervisor_takes_over_what_the_last_one_submitted(tmp_path: Path) -> None:
    (tmp_path / "submission.json").write_text('{"run": "77"}')
    assert supervise(tmp_path, [(True, "running")]).done == []


def test_a_supervisor_that_died_as_it_drew_is_followed_by_one_that_draws(tmp_path: Path) -> None:
    """And not by one that makes the run again."""
    sets = (*TINY, "server.deadline_s=60")
    run = fedcil.run("digits_fedavg", overrides=sets, output=tmp_path, figures=False)
    (run.path / "submission.json").write_text('{"run": "77"}')
    assert run_folder("digits_fedavg", sets, tmp_path, None) == run.path

    def work(stop: StopSignal, progress: Callable[[], None]) -> Run:
        raise AssertionError("servers are started for a run that is finished")

    conclude(run.path, work, "fedcil deploy local", None, None, figures=True, json=True)
    assert (run.path / "figures" / "accuracy.png").exists()
    assert run_folder("digits_fedavg", sets, tmp_path, None) != run.path  # the next one is another run


@pytest.mark.usefixtures("quick")
def test_an_error_of_the_run_itself_ends_it(tmp_path: Path) -> None:
    error = TooFewClients("nobody came", where="here", next="bring them")

    class Broken(Fake):
        def submit(self, config: object) -> str:
            (tmp_path / PROBLEM).write_text(json.dumps(error.as_dict() | {"exit_code": error.exit_code}))
            return super().submit(config)

    fake = Broken(tmp_path, [(True, "running"), (True, "finished:failed")])
    with pytest.raises(FedcilError, match="nobody came") as caught:
        Supervisor(fake, tmp_path, 0, lambda _: None).run(StopSignal(), lambda: None, lambda: None)
    assert (caught.value.kind, caught.value.exit_code) == (error.kind, error.exit_code)
    assert fake.done == ["submit"]


@pytest.mark.usefixtures("quick")
def test_a_server_that_dies_again_and_again_is_not_started_for_ever(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="without finishing a round"):
        supervise(tmp_path, [(True, "finished:failed")] * 50)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("before", [0, 1])
def test_what_flower_refuses_is_said_once_and_is_no_attempt(tmp_path: Path, before: int) -> None:
    class Refusing(Fake):
        refusals = 9

        def submit(self, config: object) -> str:
            if len(self.done) >= before and self.refusals:
                self.refusals -= 1
                raise ControlFailed("no such federation")
            return super().submit(config)

    said: list[str] = []
    fake = Refusing(tmp_path, [(True, "finished:failed")] * before)
    Supervisor(fake, tmp_path, 0, said.append).run(StopSignal(), lambda: None, lambda: None)
    assert fake.done == ["submit"] * (before + 1)
    assert said[before:] == ["the run cannot be submitted (no such federation); trying again"]


def test_a_tail_reads_whole_new_lines_and_follows_a_file_that_was_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(tail.read()) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n')
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\n{"a": 3}\n')
    assert list(tail.read()) == [{"a": 3}]
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\n{"a": 44444444}\n{"a": 5}\n')  # cut back and longer again between two looks
    assert list(tail.read()) == [{"a": 5}]


def test_a_tail_that_begins_behind_half_a_line_waits_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    tail = Tail(path)
    assert list(tail.read()) == list(tail.read()) == []
    path.write_text('{"a": 1}\n')  # what a resume does first
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\n{"a": 22}\n')
    assert list(tail.read()) == [{"a": 22}]


TINY = ("clients.count=3", "clients.per_round=3", "training={rounds=2, epochs=1}", "stream.tasks=2", "data.classes=4")
KEEPING = (*TINY, "method={name='feder', memory=20}")


@pytest.mark.parametrize(
    ("sets", "kind", "words"),
    [
        (TINY, ScenarioError, "a round needs a deadline"),
        ((*KEEPING, "server.deadline_s=60"), NotResumable, "what this run's clients keep lies in its folder"),
    ],
)
def test_a_simulated_run_that_servers_cannot_go_on_with_is_refused(
    sets: tuple[str, ...], kind: type[FedcilError], words: str, stopped_run: Any, tmp_path: Path
) -> None:
    folder = stopped_run("digits_fedavg", 4, tmp_path, sets)
    with pytest.raises(kind, match=words):
        run_folder(str(folder), (), tmp_path, 3)


def test_a_simulated_run_that_servers_can_go_on_with(stopped_run: Any, tmp_path: Path) -> None:
    folder = stopped_run("digits_fedavg", 2, tmp_path, (*TINY, "server.deadline_s=60"))
    assert run_folder(str(folder), (), tmp_path, 3) == folder
    with pytest.raises(InputError, match="keeps its scenario"):
        run_folder(str(folder), ("seed=1",), tmp_path, 3)


def test_more_nodes_than_clients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="4 nodes for 3 clients"):
        run_folder("digits_fedavg", (*TINY, "server.deadline_s=60"), tmp_path / "runs", 4)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", ["device='cuda'", "training.precision='tf32'"])
def test_a_supervisor_needs_no_gpu(words: str, tmp_path: Path) -> None:
    """Server app and nodes compute elsewhere."""
    sets = (*TINY, "server.deadline_s=60", words)
    assert run_folder("digits_fedavg", sets, tmp_path, None).is_dir()
    with pytest.raises(ScenarioError, match="GPU"):
        run_folder("digits_fedavg", sets, tmp_path, 3)


def test_a_run_whose_clients_keep_something_elsewhere_is_not_resumed_here(stopped_run: Any, tmp_path: Path) -> None:
    folder = stopped_run("digits_fedavg", 4, tmp_path, KEEPING)
    (folder / "client_states").rename(tmp_path / "a node's")
    with pytest.raises(NotResumable, match="lies with the nodes"):
        fedcil.resume(folder, figures=False)
    (tmp_path / "a node's").rename(folder / "client_states")
    assert fedcil.resume(folder, figures=False).finished
