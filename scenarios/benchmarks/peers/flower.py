"""Flower's stock simulation: its Ray backend with one CPU per client, its strategy FedAvg, the plain loop's training.

python -m scenarios.benchmarks.peers.flower DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact
"""

import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from scenarios.benchmarks.peers.federation import Federation, reply, simulate
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import Mode, client_sets, model_of, train

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
