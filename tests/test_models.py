"""Classifiers: the networks of the papers, their initialisation, their state, and the head that grows."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models import resnet18 as torchvision_resnet18

from fedcil.keys import Key
from fedcil.models import Architecture, make_architecture
from fedcil.models.frozen import fold_norms
from fedcil.models.generator import Generator
from fedcil.models.network import (
    Backbone,
    Network,
    count_parameters,
    drop_counters,
    freeze,
    grow_head,
    initialise,
    load_state,
    set_norm_updates,
    snapshot,
    state_of,
)
from fedcil.models.resnet import Block, Stem, resnet18
from fedcil.tables import ModelSection
from fedcil.tensors import content_hash, count_bytes
from scenarios.benchmarks.stacked import WideTeachers


def on_meta(stem: Stem, rows: int) -> Network:
    with torch.device("meta"):
        return Network(resnet18(3, 64, stem), rows)


@pytest.mark.parametrize(
    ("stem", "rows", "expected"),
    [
        ("3x3", 100, 11_220_132),
        ("3x3", 200, 11_271_432),
        ("7x7", 100, 11_279_112 - 100 * 513),
        ("7x7", 75, 11_253_462 - 75 * 513),
        ("7x7", 50, 11_227_812 - 50 * 513),
    ],
)
def test_resnet18_has_the_papers_number_of_parameters(stem: Stem, rows: int, expected: int) -> None:
    """mfcl section 4; the numbers for SuperImageNet there include a dead second head of rows x (512 + 1)."""
    assert count_parameters(on_meta(stem, rows)) == expected


@pytest.mark.parametrize(("rows", "with_counters"), [(100, 44_919_088), (200, 45_124_288)])
def test_state_is_parameters_and_running_statistics_without_counters(rows: int, with_counters: int) -> None:
    """mfcl section 4 counts the state dict, which has one int64 counter for each of the 20 batch norms."""
    state = state_of(on_meta("3x3", rows))
    assert count_bytes(state) == with_counters - 20 * 8
    assert not any("num_batches_tracked" in name for name in state)


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
def test_resnet18_has_twenty_plain_batch_norms(stem: Stem) -> None:
    norms = [part for part in on_meta(stem, 10).modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert {(norm.eps, norm.momentum, norm.affine) for norm in norms} == {(1e-5, 0.1, True)}


def torchvision_twin(network: Network, stem: Stem) -> nn.Module:
    """torchvision's ResNet-18 with our numbers in it; the CIFAR form has a 3x3 stem and no max-pooling."""
    twin = torchvision_resnet18()
    twin.fc = nn.Identity()
    if stem == "3x3":
        twin.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        twin.maxpool = nn.Identity()
    twin.to(torch.float64)
    ours, theirs = state_of(network.backbone).values(), state_of(twin).values()
    assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in theirs]
    for own, other in zip(ours, theirs, strict=True):
        other.copy_(own)
    return twin


@pytest.mark.parametrize(("stem", "size"), [("3x3", 16), ("7x7", 48)])
@pytest.mark.usefixtures("float64")
def test_resnet18_computes_what_torchvisions_does(stem: Stem, size: int) -> None:
    """The same features in train and eval mode, and the same running statistics after a batch."""
    network = make_architecture(ModelSection(name="resnet18", stem=stem), (3, size, size), Key(0)).build(2)
    initialise(network, Key(0).torch())
    twin = torchvision_twin(network, stem)
    images = torch.randn(2, 3, size, size, generator=Key(1).torch())
    with torch.no_grad():
        for train in (True, False):
            network.train(train)
            twin.train(train)
            torch.testing.assert_close(network.features(images), twin(images), rtol=1e-10, atol=1e-10)
    for own, other in zip(state_of(network.backbone).values(), state_of(twin).values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_cnn_is_three_convolutions_with_pooling_after_two(small: Any) -> None:
    network = small.frozen(3)
    x = images = small.images(4)
    layers = list(network.backbone.layers)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for place, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        x = F.conv2d(x, convolution.weight, padding=1)
        mean, scale = norm.running_mean[:, None, None], (norm.running_var + 1e-5).sqrt()[:, None, None]
        x = (x - mean) / scale * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = x.clamp(min=0)
        if place < 2:
            x = F.max_pool2d(x, 2)
    features = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    assert [convolution.out_channels for convolution in convolutions] == [4, 8, 16]
    torch.testing.assert_close(network(images), features @ network.head.weight.T + network.head.bias)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
@pytest.mark.usefixtures("float64")
def test_in_eval_mode_an_image_does_not_see_its_neighbours(small: Any, name: str) -> None:
    network = small.frozen(3, name)
    images = small.images(6)
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
def test_initialisation_draws_from_its_generator_and_nothing_else(small: Any, name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    hashes = []
    for seed in (0, 0, 1):
        network = small.compute(name).network(4)
        for tensor in state_of(network).values():  # whatever was in the memory before
            tensor.fill_(float(len(hashes)))
        initialise(network, Key(seed).torch())
        hashes.append(content_hash(state_of(network)))
    assert hashes[0] == hashes[1] != hashes[2]
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[2], torch.get_rng_state())


def pytorch_default(kind: str) -> nn.Module:
    if kind == "generator":
        return Generator(channels=3, size=8, latent=5, width=4)
    return Network(make_architecture(ModelSection(width=4), (3, 8, 8), Key(0)).backbone(), 4)


@pytest.mark.parametrize("kind", ["cnn", "generator"])
def test_initialisation_is_pytorchs_default(kind: str) -> None:
    """A module that PyTorch fills from the global generator at seed 5 has the bits that ours has at seed 5."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = pytorch_default(kind)
    ours = pytorch_default(kind)
    initialise(ours, torch.Generator().manual_seed(5))
    assert content_hash(state_of(ours)) == content_hash(state_of(expected))


def test_resnet_convolutions_are_normal_with_the_fan_out(small: Any) -> None:
    """N(0, sqrt(2 / (k k out))). Of n draws the deviation is off by sqrt(1 / 2n) of itself, the mean by
    1 / sqrt(n) deviations; five of either are allowed.
    """
    network = make_architecture(ModelSection(name="resnet18", width=16), (3, 32, 32), Key(0)).build(10)
    initialise(network, Key(0).torch())
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            expected = math.sqrt(2 / (part.kernel_size[0] * part.kernel_size[1] * part.out_channels))
            draws = part.weight.detach().flatten()
            assert abs(draws.std().item() / expected - 1) < 5 / math.sqrt(2 * len(draws))
            assert abs(draws.mean().item()) < 5 * expected / math.sqrt(len(draws))
            assert draws.abs().max() > 2 * expected  # a uniform draw of this deviation ends at sqrt(3)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.weight.eq(1).all()
            assert part.bias.eq(0).all()
            assert part.running_mean.eq(0).all()  # type: ignore[union-attr]
            assert part.running_var.eq(1).all()  # type: ignore[union-attr]
    bound = 1 / math.sqrt(network.head.in_features)
    for draws in (network.head.weight, network.head.bias):
        assert draws.abs().max() <= bound


def test_a_grown_head_keeps_old_rows_bit_for_bit(small: Any) -> None:
    network = small.network(3)
    before = snapshot(network)
    grown = grow_head(before, 5, Key(0).at("head").torch())
    assert grown["head.weight"].shape == (5, 16)
    assert grown["head.bias"].shape == (5,)
    assert torch.equal(grown["head.weight"][:3], before["head.weight"])
    assert torch.equal(grown["head.bias"][:3], before["head.bias"])
    assert content_hash(before) == content_hash(state_of(network))
    rest = {name: tensor for name, tensor in grown.items() if not name.startswith("head.")}
    assert content_hash(rest) == content_hash({name: before[name] for name in rest})


@pytest.mark.usefixtures("float64")
def test_a_grown_head_gives_old_classes_the_same_logits(small: Any) -> None:
    network = small.frozen(3)
    grown = small.compute().frozen(grow_head(state_of(network), 5, Key(0).torch()))
    images = small.images(4)
    features = grown.features(images)
    old_rows = F.linear(features, grown.head.weight[:3], grown.head.bias[:3])
    assert torch.equal(old_rows, network(images))
    torch.testing.assert_close(grown(images)[:, :3], network(images), rtol=1e-14, atol=1e-14)


def test_new_rows_are_drawn_like_a_new_linear_layer(small: Any) -> None:
    """mfcl section 1: Linear(d, V) by default initialisation, old rows written over it; from the key alone."""
    before = snapshot(small.network(3))
    state = torch.get_rng_state()
    one, same, other = (grow_head(before, 400, Key(seed).torch())["head.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one[3:], other[3:])
    assert torch.equal(state, torch.get_rng_state())
    bound = 1 / math.sqrt(16)  # uniform in +-1 / sqrt(d): deviation bound / sqrt(3)
    assert one[3:].abs().max() <= bound
    assert one[3:].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_growing_keeps_the_models_own_type(small: Any) -> None:
    before = {name: tensor.double() for name, tensor in snapshot(small.network(3)).items()}
    assert {tensor.dtype for tensor in grow_head(before, 5, Key(0).torch()).values()} == {torch.float64}


def test_state_is_the_modules_own_memory_and_a_snapshot_is_not(small: Any) -> None:
    network = small.network(3)
    live, copy = state_of(network), snapshot(network)
    with torch.no_grad():
        network.head.bias.fill_(7.0)
    assert live["head.bias"].eq(7).all()
    assert not copy["head.bias"].eq(7).any()
    load_state(network, copy)
    assert content_hash(live) == content_hash(copy)


def test_a_state_with_other_names_is_refused(small: Any) -> None:
    network = small.network(3)
    state = snapshot(network)
    state["more"] = state.pop("head.bias")
    with pytest.raises(ValueError, match=r"head\.bias.*more"):
        load_state(network, state)


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_a_state_with_other_shapes_is_refused(small: Any, shape: tuple[int, ...]) -> None:
    """One number must not be spread over a whole tensor."""
    network = small.network(3)
    state = snapshot(network)
    state["head.bias"] = torch.ones(shape)
    with pytest.raises(ValueError, match="shape"):
        load_state(network, state)


def test_two_updates_of_the_running_statistics_are_one_with_a_larger_momentum() -> None:
    """(1 - m) twice is 1 - m', m' = 1 - (1 - m)^2: 0.19 for 0.1."""
    twice, once = nn.BatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    drop_counters(once)
    set_norm_updates(once, 2)
    batch = torch.randn(10, 6, 4, 4, generator=Key(0).torch(), dtype=torch.float64)
    for norm, passes in ((twice, 2), (once, 1)):
        for _ in range(passes):
            norm(batch)
    for name in ("running_mean", "running_var"):
        assert (getattr(twice, name) - getattr(once, name)).abs().max() <= 1e-15


def test_a_frozen_network_is_the_same_network_without_gradients(small: Any) -> None:
    tensors = snapshot(small.network(4))
    frozen = small.compute().frozen(tensors)
    assert content_hash(state_of(frozen)) == content_hash(tensors)
    assert not frozen.training
    assert not any(part.training for part in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def norm_inputs(network: Network, images: Tensor) -> set[torch.dtype]:
    """The types that convolutions hand on to batch norm."""
    seen = set()
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
        for part in network.modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_in_bf16_the_backbone_is_narrow_and_everything_after_it_is_not(small: Any, name: str) -> None:
    network = small.compute(name, "bf16").network(4)
    load_state(network, state_of(small.network(4, name)))
    images = small.images(4)
    assert norm_inputs(network, images) == {torch.bfloat16}
    features, logits = network.features(images), network(images)
    loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    assert {features.dtype, logits.dtype, loss.dtype} == {torch.float32}
    loss.backward()
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert {tensor.dtype for tensor in state_of(network).values()} == {torch.float32}


def test_bf16_is_near_fp32(small: Any) -> None:
    """8 bits of mantissa through three layers: some percent, and not equal."""
    tensors = state_of(small.network(4))
    images = small.images(8)
    exact, narrow = (small.compute("cnn", p).frozen(tensors).features(images) for p in ("fp32", "bf16"))
    assert not torch.equal(exact, narrow)
    torch.testing.assert_close(narrow, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_a_teachers_weights_are_narrowed_once_to_the_same_bits(small: Any, name: str) -> None:
    compute, tensors, images = small.compute(name, "bf16"), snapshot(small.network(4, name)), small.images(5)
    wide_compute = WideTeachers(compute.architecture, compute.device, compute.precision)
    narrowed, wide = compute.teacher(tensors), wide_compute.teacher(tensors)
    for teacher, dtype in ((narrowed, torch.bfloat16), (wide, torch.float32)):
        kernels = [part.weight.dtype for part in teacher.backbone.modules() if isinstance(part, nn.Conv2d)]
        assert kernels
        assert set(kernels) == {dtype}
        assert teacher.head.weight.dtype == torch.float32
    assert torch.equal(narrowed(images), wide(images))


def test_an_architecture_is_a_value_that_builds_new_networks() -> None:
    architecture = make_architecture(ModelSection(width=4), (1, 8, 8), Key(0))
    assert isinstance(architecture, Architecture)
    one, two = architecture.build(3), architecture.build(5)
    assert (one.head.out_features, two.head.out_features) == (3, 5)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}


class Branching(Backbone):
    """Somebody's own backbone, with a branch that depends on its input."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.norm(self.conv(images)) if images.mean() < 9 else self.conv(images)
        return x.mean((2, 3))


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
@pytest.mark.usefixtures("float64")
def test_folded_norms_are_gone_and_change_nothing(small: Any, name: str) -> None:
    network, images = small.frozen(3, name), small.images(6)
    expected = network(images)
    fold_norms(network, images)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for p in network.parameters())


READY, DONE = threading.Event(), threading.Event()


class Waiting(Backbone):
    """While torch.fx looks at it, another thread is at work."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, fx.Proxy):
            READY.set()
            DONE.wait(20)
        x: Tensor = self.norm(self.conv(images))
        return x.mean((2, 3))


def test_other_threads_train_while_a_teacher_is_traced() -> None:
    """torch.fx changes ``nn.Module.__call__`` for the whole process meanwhile."""
    found: list[object] = []

    def train() -> None:
        READY.wait(20)
        try:
            found.append(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())(torch.ones(2, 3, 8, 8)).shape)
        except Exception as error:
            found.append(error)
        DONE.set()

    network = Network(Waiting(), 2)
    freeze(network)
    thread = threading.Thread(target=train)
    thread.start()
    fold_norms(network, torch.rand(2, 3, 8, 8))
    thread.join()
    assert found == [(2, 4, 6, 6)]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_a_backbone_that_cannot_be_traced_stays_as_it_is() -> None:
    network = Network(Branching(), 2)
    freeze(network)
    backbone = network.backbone
    fold_norms(network, torch.rand(2, 3, 8, 8))
    assert network.backbone is backbone


NARROW = """
import torch
from fedcil.models.resnet import Block
block = Block(4, 8, 2).to(memory_format=torch.channels_last)
for _ in range(400):
    images = torch.randn(4, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = block(images)
    torch.autograd.grad(output, [images, *block.parameters()], torch.randn_like(output))
"""


def test_a_narrow_block_stays_within_its_memory() -> None:
    """In a process of its own, whose C library watches: with a stride in its shortcut an AVX2 CPU ended it."""
    watched = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", NARROW], env=watched, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_narrow_blocks_shortcut_is_the_strided_convolution() -> None:
    block = Block(4, 8, 2).double()
    convolution = block.shortcut[0]
    assert isinstance(convolution, nn.Conv2d)
    seen = []
    convolution.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    images = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    block(images)
    torch.testing.assert_close(seen[0], F.conv2d(images, convolution.weight, stride=2), rtol=0, atol=1e-14)
