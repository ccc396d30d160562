"""The whole topology as processes of this machine, on loopback, with TLS and node keys.

SuperLink, the SuperExec of the server app, and a SuperNode with a SuperExec for each node; all are kept running,
watched, and ended in order. Everything they leave is below ``<run folder>/deployment``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedcil.deploy.control import Control, enrol
from fedcil.deploy.health import LOCAL_NAMES, LOOPBACK
from fedcil.deploy.node import Node
from fedcil.deploy.pki import Pki, make_pki
from fedcil.deploy.processes import Keeper, Role, flower_environment, free_port, server_app, superlink
from fedcil.deploy.supervisor import Supervisor
from fedcil.port import StopSignal
from fedcil.record.run import Run


@dataclass(frozen=True, slots=True)
class Topology:
    """Who runs where; all below ``folder``."""

    folder: Path
    port: int
    pki: Pki

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def control(self) -> Control:
        return Control(self.address, self.pki.ca, self.folder / "control")


def deploy_local(
    run: Path,
    nodes: int,
    stop: StopSignal,
    say: Callable[[str], None],
    progress: Callable[[], None],
) -> Run:
    """Take the run in this folder to its end on real servers. Raises what ``Supervisor.run`` raises."""
    folder = (run / "deployment").absolute()
    pki = make_pki(folder / "pki", hosts=LOCAL_NAMES, nodes=nodes)
    topology, keeper = Topology(folder, free_port(), pki), Keeper()
    try:
        start_servers(topology, keeper)
        enrol(topology.control, pki, nodes, stop, keeper.tend)
        for slot in range(nodes):
            start_node(topology, keeper, slot, f"partition-id={slot} num-partitions={nodes}")
        return Supervisor(topology.control, run, 0, say).run(stop, keeper.tend, progress)
    finally:
        keeper.close()


def start_servers(topology: Topology, keeper: Keeper) -> None:
    """SuperLink and server app, each kept running."""
    pki, logs = topology.pki, topology.logs
    environment = flower_environment(topology.folder / "flower")
    link = superlink(pki, LOOPBACK, topology.port, topology.folder / "superlink.db")
    keeper.start(Role("superlink", link, logs / "superlink.log", environment))
    keeper.start(Role("server-app", server_app(pki, topology.address), logs / "server-app.log", environment))


def start_node(topology: Topology, keeper: Keeper, slot: int, share: str) -> None:
    """The node with the key of ``slot``; ``share`` is what it serves (``Node``)."""
    node = Node(slot, topology.folder / "nodes" / f"{slot:04d}", share)
    for role in node.roles(topology.pki, topology.address, free_port(), topology.logs):
        keeper.start(role)
