"""A person's own backbone is tried on two images before a run begins, and what is wrong with it is one error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from fedcil.dotted import MEND, own_code
from fedcil.errors import ScenarioError
from fedcil.keys import CPU, Key, global_draws, rng_state
from fedcil.models import Architecture
from fedcil.models.network import Network, state_of
from fedcil.tensors import HALF


@dataclass(frozen=True, slots=True)
class Manners:
    """What a run has to know of a backbone.

    ``draws``: in training it draws from torch's generator, as dropout does; ``frozen``: parameters of the network, by
    name, that nobody trains. A shipped one does and has none.
    """

    draws: bool = False
    frozen: frozenset[str] = frozenset()


def try_out(architecture: Architecture, name: str) -> Manners:
    """ScenarioError if the backbone that ``model.name`` calls cannot be built, or gives no features (n, ``width``)."""
    if not architecture.own:
        return Manners()
    contract = (
        "build(channels, section) -> fedcil.models.network.Backbone, which makes of images "
        f"(n, {', '.join(map(str, architecture.image))}) features (n, width)"
    )
    with own_code(repr(name), "model.name", allowed=contract):
        network = architecture.build(1)
        problem = _problem(network, architecture.image)
        if problem:
            raise ScenarioError(f"{name!r}: {problem}", where="model.name", allowed=contract, next=MEND)
        frozen = frozenset(key for key, each in network.named_parameters() if not each.requires_grad)
        return Manners(_draws(network.train(), architecture.image), frozen)


def _problem(network: Network, image: tuple[int, ...]) -> str | None:
    """What is wrong, if anything; raises what the backbone itself raises."""
    if any(isinstance(each, UninitializedParameter) for each in network.parameters()):
        return "a layer does not know its size before it has seen images (torch's Lazy layers)"
    if unfit := _not_to_be_averaged(network):
        return unfit
    if network.backbone.width < 1:
        return f"its width is {network.backbone.width}, not at least 1"
    features = _features(network.eval(), image)
    wanted = (2, network.backbone.width)
    if not isinstance(features, Tensor) or features.shape != wanted:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        return f"for two images it gives {got} and not {wanted}; its width is {network.backbone.width}"
    return None


def _not_to_be_averaged(network: Network) -> str | None:
    """What is wrong with the numbers that clients would send, if anything."""
    if strange := [name for name, each in network.named_parameters() if not each.is_floating_point()]:
        return f"{strange[0]} is not of real numbers, which are all that can be averaged"
    for name, each in state_of(network).items():
        if not each.isfinite().all():
            return f"{name} would be sent and is not finite (a buffer that is not: persistent=False)"
        if each.dtype in HALF:
            return f"{name} would be sent and summed in half precision; make it float32 (training.precision = 'bf16')"
    return None


@torch.no_grad()
def _features(network: Network, image: tuple[int, ...]) -> object:
    return network.backbone(torch.zeros(2, *image))


def _draws(network: Network, image: tuple[int, ...]) -> bool:
    with global_draws(Key(0)):
        before = rng_state(CPU)
        _features(network, image)
        return not torch.equal(before, rng_state(CPU))
