"""Flower's stock simulation: its Ray backend with one CPU per client, its strategy FedAvg, the plain loop's training.

python -m scenarios.benchmarks.peers.flower DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import Mode, client_sets, model_of, train

CPUS = 2

app = ClientApp()
data_sets = lru_cache(client_sets)  # once per Ray actor, not per message
local_model = lru_cache(model_of)


@app.train()
def train_client(message: Message, context: Context) -> Message:
    data, net, mode = (message.content["config"][name] for name in ("data", "net", "mode"))
    torch.set_num_threads(1)
    model, samples = local_model(net, mode), data_sets(Path(data), mode)[context.node_config["partition-id"]]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, samples, mode)
    return reply(message, ArrayRecord(model.state_dict()), len(samples))


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


def main() -> None:
    data = sys.argv[1]
    server, clients = ServerApp(), len(np.load(data)["labels"])

    @server.main()
    def obey(grid: Grid, _: Context) -> None:
        def begin(net: str, mode: Mode) -> Federation:
            model, config = model_of(net, mode), ConfigRecord({"data": data, "net": net, "mode": mode})
            federation = Federation(grid, clients, clients, ArrayRecord(model.state_dict()), config)
            federation.parameters = tuple(name for name, _ in model.named_parameters())
            return federation

        answer(begin)

    simulate(server, app, clients)


if __name__ == "__main__":
    from scenarios.benchmarks.peers import flower  # by its name, so that Ray's workers find its functions and caches

    flower.main()
