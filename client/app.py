"""The client side as a Flower ClientApp. Nothing is kept in this process that could not be lost: Flower may
start a fresh one for every message.
"""

from __future__ import annotations

import contextlib
import json
import os
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.handle import Round, do_jobs
from client.share import own_clients
from client.states import StateStore
from client.worker import Shared, Worker
from fedcil.allocator import keep_freed_memory
from fedcil.data.places import ROOT_VARIABLE, expanded
from fedcil.dotted import search_working_folder
from fedcil.errors import MessageRefused
from fedcil.experiment import open_experiment
from fedcil.files import write_atomic
from fedcil.hello import Hello, pack_hello
from fedcil.messages import Broadcast, Job, Payload
from fedcil.packets import packet_of, packet_record
from fedcil.scenario_file import load_scenario
from fedcil.wire import pack_answer, place_of, unpack_broadcast, unpack_payload

LIMIT = 2**31  # bytes of one packet from the server
KEPT_PAYLOADS = 4  # on a node's disk
HOME = "FEDCIL_CLIENT_HOME"  # folder for payloads and client states

search_working_folder()
app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Which clients this node serves, and what they have: its own, or some of those that it is offered."""
    asked = message.content["hello"]
    home = client_home(context)
    experiment = open_worker(str(asked["scenario"]), os.environ.get(ROOT_VARIABLE), home).shared.experiment
    data, precision = experiment.data.digest, experiment.compute.precision
    own = own_clients(context.node_config, experiment.scenario.clients.count)
    offer = [int(client) for client in asked["offer"]]
    share = own if own is not None else offer[: int(context.node_config.get("clients", 1))]
    counts = experiment.task_counts()
    nothing = [0] * counts.shape[1]  # the server says that there is no such client
    samples = {client: tuple(counts[client].tolist() if 0 <= client < len(counts) else nothing) for client in share}
    packet = pack_hello(Hello(samples, data, precision, fixed=own is not None))
    return Message(RecordDict({"hello": packet_record(packet)}), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """All jobs of one message, an answer each; or the hash of the payload that this node lacks."""
    home = client_home(context)
    config = message.content["work"]
    header, tensors = unpack_broadcast(packet_of(message.content["broadcast"]), limit=LIMIT)
    payload = None
    if header["payload"] is not None:
        payload = find_payload(message, header["payload"], home)
        if payload is None:
            return Message(RecordDict({"missing": ConfigRecord({"payload": header["payload"]})}), reply_to=message)
    task, phase, round_ = header["place"]
    broadcast = Broadcast(task=task, phase=phase, round=round_, tensors=tensors, payload=payload)
    worker = open_worker(str(config["scenario"]), os.environ.get(ROOT_VARIABLE), home)
    records = {}
    jobs = [Job(client, position, state) for client, position, state in json.loads(str(config["jobs"]))]
    for job, answer in do_jobs(Round.of(broadcast, worker), jobs):
        packet = pack_answer(answer, header["run"], place_of(broadcast))
        records[f"client-{job.client}"] = packet_record(packet)
    return Message(RecordDict(records), reply_to=message)


def client_home(context: Context) -> Path:
    """Where this node keeps payloads and client states: its own setting, the environment's, or a cache folder.

    Raises InputError where that is in the home of nobody.
    """
    given = context.node_config.get("home") or os.environ.get(HOME) or "~/.cache/fedcil/clients"
    return expanded(str(given), f"the node's setting home, or ${HOME}")


@lru_cache(maxsize=1)
def open_worker(scenario: str, data_root: str | None, home: Path) -> Worker:
    """The worker of this process, kept for as long as the process and the scenario last."""
    keep_freed_memory()
    experiment = open_experiment(load_scenario(json.loads(scenario)), Path(data_root) if data_root else None)
    return Worker(Shared(experiment, StateStore(home / "client_states")))


def find_payload(message: Message, name: str, home: Path) -> Payload | None:
    """The payload from the message, which is then kept on disk, or from disk; None if it is nowhere whole."""
    path = home / "payloads" / f"{name}.packet"
    if "payload" in message.content:
        packet = packet_of(message.content["payload"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packet)
        forget_old(path.parent, but=path)
        return unpack_payload(packet, limit=LIMIT)
    try:
        payload = unpack_payload(path.read_bytes(), limit=LIMIT)
    except (OSError, MessageRefused):
        return None  # the server sends it once more
    return payload if payload.hash == name else None


def forget_old(folder: Path, but: Path) -> None:
    """A payload is for one task; whoever needs an old one again is sent it again. Simulated nodes share the folder: one
    that forgets at the same time may be faster, and then there is nothing left to do. ``but`` stays, whatever the
    clock says of it.
    """
    with contextlib.suppress(FileNotFoundError):
        others = sorted((path for path in folder.glob("*.packet") if path != but), key=lambda p: p.stat().st_mtime_ns)
        for path in others[: 1 - KEPT_PAYLOADS]:
            path.unlink()
