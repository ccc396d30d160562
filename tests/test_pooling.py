"""A ReLU is done after the max-pooling that follows it: held against the same chain as torch does it, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcil.compute import Compute
from fedcil.models import Architecture
from fedcil.models.cnn import CNN
from fedcil.models.network import Backbone, initialise, load_state, snapshot
from fedcil.models.pooling import PoolsFirst, pool_before_relu
from fedcil.models.resnet import resnet18


def kinds(chain: nn.Sequential, images: Tensor) -> list[str]:
    """Which of its layers a chain calls, in turn."""
    seen: list[str] = []

    def calls(layer: nn.Module, name: str) -> None:
        forward = layer.forward

        def noted(images: Tensor) -> Tensor:
            seen.append(name)
            result: Tensor = forward(images)
            return result

        layer.forward = noted

    for layer in chain:
        calls(layer, type(layer).__name__)
    chain(images)
    return seen


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    inplace=st.booleans(),
    few_values=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_the_same_bits(
    kernel: int,
    stride: int,
    padded: bool,
    ceil_mode: bool,
    inplace: bool,
    few_values: bool,
    layout: torch.memory_format,
    seed: int,
) -> None:
    draws = torch.Generator().manual_seed(seed)
    pool = nn.MaxPool2d(kernel, stride, padding=kernel // 2 if padded else 0, ceil_mode=ceil_mode)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace), pool, nn.Conv2d(5, 2, 1), nn.ReLU(inplace))
    initialise(plain, draws)
    images = torch.randn(2, 3, 9, 8, generator=draws)
    if few_values:  # ties in most windows, and windows of zeros
        images = images.sign()
        plain[0].weight.data.sign_()
        plain[0].bias.data.zero_()
    images = images.to(memory_format=layout).requires_grad_()
    hastened = copy.deepcopy(plain)
    pool_before_relu(hastened)
    outputs = [chain(images) for chain in (plain, hastened)]
    assert torch.equal(*outputs)
    gradient = torch.randn(outputs[0].shape, generator=draws)
    of_both = [
        torch.autograd.grad(output, [images, *chain.parameters()], gradient)
        for output, chain in zip(outputs, (plain, hastened), strict=True)
    ]
    for one, other in zip(*of_both, strict=True):
        assert torch.equal(one, other)


def test_the_pooling_goes_first_and_names_stay() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    layers, names = list(chain), list(chain.state_dict())
    pool_before_relu(chain)
    assert list(chain) == layers
    assert list(chain.state_dict()) == names
    assert kinds(chain, torch.zeros(1, 1, 6, 6)) == ["Conv2d", "MaxPool2d", "ReLU", "ReLU", "Flatten"]


def test_what_a_relu_in_place_writes_into_may_be_somebodys() -> None:
    """At the head of a chain it rectifies what the chain was given, and a block may use that again."""
    chain = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))
    pool_before_relu(chain)
    given = -torch.ones(1, 1, 4, 4)
    chain(given)
    assert not given.any()
    aliased = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    pool_before_relu(aliased)
    assert kinds(aliased, -torch.ones(1, 1, 4, 4)) == ["Identity", "ReLU", "MaxPool2d"]
    fresh = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    pool_before_relu(fresh)
    assert kinds(fresh, torch.zeros(1, 1, 4, 4)) == ["BatchNorm2d", "MaxPool2d", "ReLU"]


class OwnReLU(nn.ReLU):
    pass


def watched(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "pair",
    [
        (nn.ReLU(), nn.AvgPool2d(2)),
        (nn.LeakyReLU(), nn.MaxPool2d(2)),
        (OwnReLU(), nn.MaxPool2d(2)),
        (nn.MaxPool2d(2), nn.ReLU()),
        (watched(nn.ReLU()), nn.MaxPool2d(2)),
        (nn.ReLU(), watched(nn.MaxPool2d(2))),
    ],
    ids=lambda pair: " ".join(type(layer).__name__ for layer in pair),
)
def test_whatever_is_something_else_stays_in_its_place(pair: tuple[nn.Module, nn.Module]) -> None:
    chain = nn.Sequential(*pair)
    pool_before_relu(chain)
    assert kinds(chain, torch.zeros(1, 1, 6, 6)) == [type(layer).__name__ for layer in pair]


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "cnn": lambda: CNN(3, 4),
    "resnet18": lambda: resnet18(3, 4, "7x7"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_networks_of_a_run_and_their_teachers_do_so(name: str) -> None:
    architecture = Architecture(BACKBONES[name], (3, 32, 32))
    plain = architecture.start(4, torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    compute = Compute(architecture, torch.device("cpu"), "fp32")
    ours, teacher = compute.network(4), compute.teacher(snapshot(plain))
    load_state(ours, snapshot(plain))
    torch.testing.assert_close(teacher.features(images), plain.eval().features(images))
    plain.train()
    assert torch.equal(ours.features(images), plain.features(images))
    of_both = [torch.autograd.grad(net(images).square().sum(), list(net.parameters())) for net in (ours, plain)]
    for one, other in zip(*of_both, strict=True):
        assert torch.equal(one, other)
    assert any(isinstance(part, PoolsFirst) for part in ours.modules())
    calls = [node.target for node in teacher.backbone.graph.nodes if node.op == "call_module"]
    layers = [type(teacher.backbone.get_submodule(target)) for target in calls]
    pools = [place for place, layer in enumerate(layers) if layer is nn.MaxPool2d]
    assert pools
    assert all(layers[place + 1] is nn.ReLU for place in pools)
