"""Flower's stock simulation and its strategy FedAvg, whatever the clients do.

Without torch, which clients that do nothing need not import.
"""

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

CPUS = 2


def reply(message: Message, arrays: ArrayRecord, examples: int) -> Message:
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples})})
    return Message(content=content, reply_to=message)


class Federation:
    """Rounds of Flower's FedAvg over ``asked`` of all ``nodes``, each of which is asked ``turns`` times per round."""

    parameters: tuple[str, ...] = ()
    """Names of those arrays that are no buffers."""

    def __init__(
        self, grid: Grid, nodes: int, asked: int, arrays: ArrayRecord, config: ConfigRecord, turns: int = 1
    ) -> None:
        self.grid, self.arrays, self.config, self.turns = grid, arrays, config, turns
        share = asked / nodes
        self.strategy = FedAvg(fraction_train=share, min_train_nodes=asked, min_available_nodes=nodes)  # waits for all
        self.rounds = 0

    def round(self) -> None:
        self.rounds += 1
        messages = [
            message
            for _ in range(self.turns)
            for message in self.strategy.configure_train(self.rounds, self.arrays, self.config, self.grid)
        ]
        replies = list(self.grid.send_and_receive(messages))
        if len(replies) < len(messages) or any(message.has_error() for message in replies):
            raise RuntimeError("not all clients answered")
        arrays, _ = self.strategy.aggregate_train(self.rounds, replies)
        assert arrays is not None
        self.arrays = arrays

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: self.arrays[name].numpy() for name in self.parameters}


def simulate(server: ServerApp, client: ClientApp, nodes: int) -> None:
    resources = {"init_args": {"num_cpus": CPUS}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, nodes, backend_config=resources)
