"""pfl-research: its simulated backend without privacy and its FederatedAveraging.

python -m scenarios.benchmarks.peers.pfl DATA.npz, then begin lenet|cnn4|resnet18 pictures|tensors|exact

Tensors are pfl's own data set in memory, which does not shuffle. The statistics of batch normalisation are no part of
what pfl averages.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset, PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.plain import BATCH, RATE, Mode, client_sets, model_of


class Pfl:
    def __init__(self, data: Path, net: str, mode: Mode) -> None:
        network, clients = model_of(net, mode), client_sets(data, mode)
        network.loss = lambda images, labels: cross_entropy(network.train()(images), labels)
        network.metrics = lambda *_: {}
        self.model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
        if mode == "exact":
            self.model._model_diff = self.model.get_parameters()  # in float64; pfl's own differences are float32
        users = [
            PyTorchTensorDataset(samples.tensors)
            if isinstance(samples, TensorDataset)
            else PyTorchDataDataset(samples, shuffle=True)
            for samples in clients
        ]
        sampler = get_user_sampler("minimize_reuse", list(range(len(users))))
        federated = FederatedDataset(users.__getitem__, sampler)
        self.backend, self.algorithm = SimulatedBackend(federated, federated), FederatedAveraging()
        self.local = NNTrainHyperParams(BATCH, local_num_epochs=1, local_learning_rate=RATE)
        self.federation = NNAlgorithmParams(
            central_num_iterations=0, evaluation_frequency=2**31, train_cohort_size=len(users), val_cohort_size=0
        )

    def round(self) -> None:
        """One iteration more than the algorithm has behind it."""
        rounds = self.federation.central_num_iterations + 1
        self.federation = replace(self.federation, central_num_iterations=rounds)
        self.algorithm.run(self.federation, self.backend, self.model, self.local, send_metrics_to_platform=False)

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: p.detach().numpy() for name, p in self.model.pytorch_model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(partial(Pfl, Path(sys.argv[1])))
