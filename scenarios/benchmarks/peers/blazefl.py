"""BlazeFL: its FedAvg server and its trainer of one client after the other.

python -m scenarios.benchmarks.peers.blazefl DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
from torch import nn
from torch.utils.data import DataLoader

from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import BATCH, RATE, Mode, client_sets, model_of


class Models:
    """BlazeFL's ModelSelector."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    def select_model(self, model_name: str) -> nn.Module:
        return model_of(model_name, self.mode)


class Clients:
    """BlazeFL's PartitionedDataset, as far as training asks."""

    def __init__(self, data: Path, mode: Mode) -> None:
        self.sets, self.shuffle = client_sets(data, mode), mode != "exact"

    def get_dataloader(
        self, type_: str, cid: int, batch_size: int, generator: torch.Generator | None
    ) -> DataLoader[Any]:
        assert type_ == "train"
        return DataLoader(self.sets[cid], batch_size, shuffle=self.shuffle, generator=generator)


class BlazeFL:
    def __init__(self, data: Path, net: str, mode: Mode) -> None:
        models, clients = Models(mode), Clients(data, mode)
        count = len(clients.sets)
        self.server = FedAvgBaseServerHandler(models, net, clients, 2**31, count, 1.0, "cpu", BATCH, seed=0)
        self.trainer = FedAvgBaseClientTrainer(models, net, clients, "cpu", count, 1, BATCH, RATE, seed=0)

    def round(self) -> None:
        """What the pipelines of BlazeFL's examples do in a round."""
        self.trainer.local_process(self.server.downlink_package(), self.server.sample_clients())
        for package in self.trainer.uplink_package():
            self.server.load(package)

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: p.detach().numpy() for name, p in self.server.model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(partial(BlazeFL, Path(sys.argv[1])))
