"""FedLab: its standalone pipeline of a synchronous server and a serial SGD trainer.

python -m scenarios.benchmarks.peers.fedlab DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact

The statistics of batch normalisation are no part of what FedLab averages.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.contrib.dataset.basic_dataset import FedDataset
from fedlab.core.standalone import StandalonePipeline
from torch.utils.data import DataLoader

from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import BATCH, RATE, Mode, client_sets, model_of


class Clients(FedDataset):
    def __init__(self, data: Path, mode: Mode) -> None:
        self.sets, self.shuffle = client_sets(data, mode), mode != "exact"

    def get_dataloader(self, id: int, batch_size: int) -> DataLoader[Any]:
        return DataLoader(self.sets[id], batch_size, shuffle=self.shuffle)


class Pipeline(StandalonePipeline):
    def __init__(self, data: Path, net: str, mode: Mode) -> None:
        model, clients = model_of(net, mode), Clients(data, mode)
        # FedLab's mean has weights of the default type.
        torch.set_default_dtype(torch.float64 if mode == "exact" else torch.float32)
        trainer = SGDSerialClientTrainer(model, len(clients.sets))
        trainer.setup_dataset(clients)
        trainer.setup_optim(epochs=1, batch_size=BATCH, lr=RATE)
        super().__init__(SyncServerHandler(model, global_round=0, sample_ratio=1.0), trainer)

    def round(self) -> None:
        self.handler.global_round += 1
        self.main()

    def evaluate(self) -> None:
        """Not asked for; FedLab's own prints a hint."""

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: p.detach().numpy() for name, p in self.handler.model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(partial(Pipeline, Path(sys.argv[1])))
