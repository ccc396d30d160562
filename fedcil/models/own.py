"""A person's own backbone is tried on two images before a run begins, and what is wrong with it is one error."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from fedcil.errors import ScenarioError
from fedcil.models import Architecture
from fedcil.models.network import Network


def refuse_unfit(architecture: Architecture, name: str) -> None:
    """ScenarioError if the backbone that ``model.name`` calls cannot be built, or gives no features (n, ``width``)."""
    if not architecture.own:
        return
    try:
        problem = _problem(architecture)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    if problem:
        raise ScenarioError(
            f"{name!r}: {problem}",
            where="model.name",
            allowed="build(channels, section) -> fedcil.models.network.Backbone, which makes of images "
            f"(n, {', '.join(map(str, architecture.image))}) features (n, width)",
            next="mend it; an example is in docs/extending.md",
        )


def _problem(architecture: Architecture) -> str | None:
    """What is wrong, if anything; raises what the backbone itself raises."""
    network = architecture.build(1)
    if any(isinstance(each, UninitializedParameter) for each in network.parameters()):
        return "a layer does not know its size before it has seen images (torch's Lazy layers)"
    features = _features(network, torch.zeros(2, *architecture.image))
    wanted = (2, network.backbone.width)
    if not isinstance(features, Tensor) or features.shape != wanted:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        return f"for two images it gives {got} and not {wanted}; its width is {network.backbone.width}"
    return None


@torch.no_grad()
def _features(network: Network, images: Tensor) -> object:
    return network.eval().backbone(images)
