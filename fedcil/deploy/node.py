"""A node: a SuperNode and the SuperExec that starts its client apps, under one identity.

Replicas of a container are configured alike, so a node takes its identity when it starts: the first slot whose
lock is free. A slot is a key and a home folder; the system frees the lock when the process dies, however it dies,
so the next one to come is the same node with the same clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fedcil.deploy.pki import Pki, new_secret
from fedcil.deploy.processes import Keeper, Role, client_app, flower_environment, supernode
from fedcil.errors import InputError
from fedcil.port import StopSignal

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its key (by slot), where it keeps things, and which clients it serves.

    ``share`` is Flower's node config: ``partition-id=0 num-partitions=3``, ``client-ids="0-9,12"``, or
    ``clients=2`` for the next two that nobody serves.
    """

    slot: int
    home: Path
    share: str

    def roles(self, pki: Pki, address: str, port: int, logs: Path | None = None) -> Iterable[Role]:
        """The two processes; ``port`` is for them to talk to each other on loopback."""
        environment = flower_environment(self.home / "flower")
        secret = new_secret(self.home / "superexec.secret")
        config = f'{self.share} home="{self.home.absolute()}"'
        for name, command in (
            (f"node-{self.slot}", supernode(pki, self.slot, address, port, secret, config)),
            (f"node-{self.slot}-app", client_app(port, secret)),
        ):
            yield Role(name, command, logs / f"{name}.log" if logs else None, environment)


def take_slot(homes: Path, slots: int) -> tuple[int, FileLock]:
    """The first free slot and its lock, to be held for as long as the node lives. InputError if none is free."""
    homes.mkdir(parents=True, exist_ok=True)
    for slot in range(slots):
        lock = FileLock(homes / f"{slot:04d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        return slot, lock
    raise InputError(
        f"all {slots} slots for nodes are taken",
        where=str(homes),
        next="make keys for more nodes: `fedcil deploy pki --nodes N`, and register them",
    )


def serve(pki: Pki, address: str, homes: Path, slots: int, port: int, share: str, stop: StopSignal) -> None:
    """Be a node until ``stop``."""
    slot, lock = take_slot(homes, slots)
    node, keeper = Node(slot, homes / f"{slot:04d}", share), Keeper()
    try:
        for role in node.roles(pki, address, port):
            keeper.start(role)
        while not stop.event.is_set():
            keeper.tend()
            time.sleep(POLL_S)
    finally:
        keeper.close()
        lock.release()
