"""FedProx: the squared distance to the round's start, as in the paper (arXiv 1812.06127, equation 2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from client.training import Recipe, local_sgd
from fedcil.keys import Key
from fedcil.methods.base import Batch, Method, Samples
from fedcil.methods.fedavg import FedAvg
from fedcil.methods.fedprox import FedProx
from fedcil.models.network import Network, snapshot, state_of
from fedcil.tables import TrainingSection
from fedcil.tensors import content_hash


def gradients(small: Any, method: Method, model: Network, start: Network) -> list[torch.Tensor]:
    anchor = tuple(p.detach() for p in start.parameters())
    batch = Batch(small.images(6), small.labels(6, small.first), small.first, anchor)
    model.zero_grad()
    method.loss(model.train(), None, batch, None).backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


@pytest.mark.usefixtures("float64")
def test_the_pull_has_gradient_mu_times_the_distance(small: Any) -> None:
    """On every parameter, batch norm's included: d/dw (mu / 2) ||w - w_g||^2 = mu (w - w_g)."""
    model, start = small.network(3, seed=1), small.network(3, seed=2)
    plain = gradients(small, FedAvg().build(), model, start)
    pulled = gradients(small, FedProx(mu=0.3).build(), model, start)
    for p, anchor, without, with_ in zip(model.parameters(), start.parameters(), plain, pulled, strict=True):
        torch.testing.assert_close(with_ - without, 0.3 * (p - anchor).detach(), rtol=1e-10, atol=1e-12)


def test_at_the_rounds_start_there_is_no_pull(small: Any) -> None:
    """The norm that is not squared would have no gradient here."""
    model = small.network(3)
    plain = gradients(small, FedAvg().build(), model, model)
    pulled = gradients(small, FedProx(mu=0.3).build(), model, model)
    assert all(torch.equal(a, b) for a, b in zip(plain, pulled, strict=True))


def trained(small: Any, method: Method) -> Network:
    model: Network = small.network(3)
    recipe = Recipe(
        method,
        None,
        small.first,
        TrainingSection(epochs=3, batch_size=4),
        lr=0.1,
        augment=lambda stored, index, generator: stored[index],
        anchor=tuple(parameter.detach().clone() for parameter in model.parameters()),
    )
    local_sgd(model, recipe, Samples(small.images(10), small.labels(10, small.first)), Key(0))
    return model


def test_mu_0_is_fedavg_bit_for_bit(small: Any) -> None:
    one, other = trained(small, FedProx(mu=0.0).build()), trained(small, FedAvg().build())
    assert content_hash(state_of(one)) == content_hash(state_of(other))


def test_a_stronger_pull_keeps_the_client_nearer(small: Any) -> None:
    start = snapshot(small.network(3))
    distances = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        model = trained(small, FedProx(mu=mu).build())
        pairs = [(p, start[name]) for name, p in model.named_parameters()]
        distances.append(sum((p - s).square().sum().item() for p, s in pairs))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 2
