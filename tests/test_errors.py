"""Errors a person can act on, exit codes a script can act on, and signals that cut nothing in two."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from typing import Any

import pytest
import torch

from fedcil import errors
from fedcil.errors import FedcilError, InputError, ScenarioError, Stopped, asked_to_end, described
from fedcil.port import StopSignal, remaining

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package imports typer, and some versions use what click deprecates
    from fedcil.cli.guard import ECHO_S, OUT_OF_TIME, guarded, stoppable


def kinds() -> list[type[FedcilError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FedcilError)]
    return sorted(found, key=lambda kind: kind.__name__)


def made(kind: type[FedcilError]) -> FedcilError:
    return kind(143) if kind is Stopped else kind("what", where="here", allowed="this", next="do that")  # type: ignore[arg-type]


def test_an_error_of_somebody_s_own_code_is_text_that_can_be_written() -> None:
    assert described(ValueError("gr\udcfc.png")) == "ValueError: gr\\udcfc.png"
    assert described(ValueError("\x1b[31mred\n\tgrün")) == "ValueError: \\x1b[31mred\n\tgrün"
    assert len(described(ValueError("x" * 10**6))) < 500

    class Speechless(Exception):
        def __str__(self) -> str:
            raise TypeError

    assert described(Speechless()) == "Speechless: without words"


def test_an_error_says_what_where_allowed_and_next() -> None:
    error = InputError("no such run", where="runs/x", allowed="a run folder", next="look again")
    assert str(error) == "no such run\n  where: runs/x\n  allowed: a run folder\n  next: look again"
    assert error.as_dict() == {
        "kind": "bad_input",
        "what": "no such run",
        "where": "runs/x",
        "allowed": "a run folder",
        "next": "look again",
    }


def test_what_is_not_known_is_left_out() -> None:
    assert str(InputError("no such run")) == "no such run"
    assert str(InputError("no such run", next="look again")) == "no such run\n  next: look again"
    assert InputError("no such run").as_dict()["where"] == ""


def test_each_kind_has_its_exit_code() -> None:
    """1: the run failed; 2: what was given is wrong; 3: the folder is busy or cannot go on; 4: too few clients."""
    codes = {kind.__name__: kind.exit_code for kind in kinds()}
    assert codes == {
        "DataMissing": 2,
        "FedcilError": 1,
        "FolderBusy": 3,
        "InputError": 2,
        "MessageRefused": 1,
        "NotResumable": 3,
        "RunFailed": 1,
        "ScenarioError": 2,
        "Stopped": 1,
        "TooFewClients": 4,
    }
    assert len({kind.kind for kind in kinds()}) == len(kinds()) - 1  # RunFailed is the plain one


@pytest.mark.parametrize("kind", kinds())
def test_an_error_survives_the_way_from_another_process(kind: type[FedcilError]) -> None:
    """Ray sends exceptions from workers as pickles."""
    error = made(kind)
    error.where = "changed on the way"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.as_dict() == error.as_dict()
        assert again.exit_code == error.exit_code


# At the command line


@guarded
def broken(error: BaseException | None = None, json: bool = False) -> None:
    if error is not None:
        raise error


def ended(error: BaseException, json: bool = False) -> Any:
    with pytest.raises(SystemExit) as caught:
        broken(error=error, json=json)
    return caught.value.code


def test_an_error_is_a_message_on_stderr_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(ScenarioError("seed = '3'", where="x.toml")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: seed = '3'\n  where: x.toml\n")
    assert ended(Stopped(143)) == 143
    assert capsys.readouterr().err.startswith("stopped: the run was stopped\n  next: continue it with")


def test_with_json_the_error_is_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = ScenarioError("seed = '3'", where="x.toml")
    assert ended(error, json=True) == 2
    assert json.loads(capsys.readouterr().out) == {"error": error.as_dict()}


def test_too_little_memory_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    for error in (refused.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert ended(error) == 1
        told = capsys.readouterr().err
        assert "fedcil plan" in told
        assert not {"Traceback", "bug"} & set(told.split())
    assert ended(RuntimeError("oops")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130() -> None:
    assert ended(KeyboardInterrupt()) == 130
    broken()


# Stopping


def test_a_stop_signal_keeps_its_first_exit_code() -> None:
    stop = StopSignal()
    stop.check()
    stop.set(143)
    stop.set(5)
    for _ in range(2):
        with pytest.raises(Stopped) as caught:
            stop.check()
        assert caught.value.exit_code == 143


def test_two_stop_signals_have_nothing_in_common() -> None:
    one, other = StopSignal(), StopSignal()
    one.set(1)
    other.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_a_second_one_ends_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stoppable(None) as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # an echo: `timeout` tells the process, and then its group
        assert stop.exit_code == [128 + number]
        time.sleep(ECHO_S)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert asked_to_end(ended.value)
    assert signal.getsignal(number) is before


def test_what_somebodys_own_code_exits_with_is_no_signals() -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(130)
    assert not asked_to_end(ended.value)
    assert not asked_to_end(KeyboardInterrupt())


def test_a_terminal_that_goes_stops_once() -> None:
    """The kernel says so, and the shell before it ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    try:
        with stoppable(None) as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.exit_code == [129]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_time_limit_stops_and_a_block_that_ends_before_it_is_not_stopped() -> None:
    with stoppable(0.01) as stop:
        assert stop.event.wait(5)
        assert stop.exit_code == [OUT_OF_TIME]
    with stoppable(0.2) as stop:
        pass
    assert not stop.event.wait(0.3)
    assert threading.active_count() < 20


def test_what_is_left_of_a_deadline() -> None:
    now = time.monotonic()
    assert remaining(None, now) is None
    assert remaining(1.0, now - 5) == 0.0
    left = remaining(100.0, now)
    assert left is not None
    assert 90 < left <= 100


def test_an_error_in_a_library_is_placed_where_a_persons_code_called_it() -> None:
    with pytest.raises(ValueError, match="Expecting property name") as caught:
        json.loads("{")
    assert errors.described(caught.value).startswith("JSONDecodeError: Expecting property name")
    assert errors.described(caught.value).split(" (")[-1].startswith("test_errors.py:")
