"""The program behind workers that are processes: it opens the scenario once and forks a worker for each channel.

It computes with one thread until it forks, which the process of a run cannot promise: a fork has none of the others,
and would wait for them. All of it ends when the run does, however that ends: its input ends then.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from client.handle import handle
from client.states import StateStore
from client.worker import Shared, Worker
from fedcil.allocator import keep_freed_memory
from fedcil.engines.channel import Channel
from fedcil.engines.fork_messages import Answering
from fedcil.engines.signals import ignored_by_this_process_alone
from fedcil.experiment import open_experiment
from fedcil.fold import Misfit
from fedcil.record.identity import worker_identity
from fedcil.scenario_file import load_scenario


def main() -> None:
    """The first line of the input says what to do; each worker says on its channel who it is, or what went wrong."""
    keep_freed_memory()
    torch.set_num_threads(1)
    orders = json.loads(sys.stdin.readline())
    channels = [Channel(socket.socket(fileno=end), *memory) for end, *memory in orders["channels"]]
    try:
        shared = open_shared(orders)
    except Exception as error:
        with contextlib.suppress(OSError):  # the run may have ended meanwhile
            for channel in channels:
                channel.send({"problem": f"{type(error).__name__}: {error}"})
        return
    hello = {"identity": worker_identity(shared.experiment)}
    gc.freeze()  # or each worker's first collection would copy what they share
    workers = [fork(channels, number, hello, shared) for number in range(len(channels))]
    for channel in channels:
        channel.close()
    sys.stdin.read()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def open_shared(orders: dict[str, Any]) -> Shared:
    root = Path(orders["data_root"]) if orders["data_root"] else None
    return Shared(open_experiment(load_scenario(orders["scenario"]), root), StateStore(Path(orders["states"])))


def fork(channels: list[Channel], number: int, hello: dict[str, Any], shared: Shared) -> int:
    """The process id of a new worker, which never returns. Nobody else keeps its channel: the run sees when it dies."""
    process = os.fork()
    if process:
        return process
    channel = channels.pop(number)
    for other in channels:
        other.close()
    ignored_by_this_process_alone()
    try:
        channel.send(hello)
        serve(Answering(channel), Worker(shared))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the run has ended
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def serve(channel: Answering, worker: Worker) -> None:
    while True:
        request = channel.receive()
        try:
            reply = handle(request, worker)
        except Misfit as misfit:
            channel.send_misfit(misfit)
            continue
        finally:
            sys.stdout.flush()  # of a method that prints: this process will be killed
        channel.send(reply)
