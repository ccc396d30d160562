"""Convolutions over small maps as matrix products, against torch's own convolution."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from fedcil import cpu
from fedcil.compute import Compute
from fedcil.keys import Key
from fedcil.models import Architecture, small_maps
from fedcil.models.network import initialise, load_state, snapshot, state_of
from fedcil.models.resnet import resnet18
from fedcil.models.small_maps import SmallMapConvolution, convolve_small_maps_by_products


def convolved(images: Tensor, weight: Tensor, stride: int, padding: int, all_passes: bool = True) -> Tensor:
    output: Tensor = SmallMapConvolution.apply(images, weight, stride, padding, all_passes)
    return output


@settings(max_examples=120, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    batch=st.integers(1, 3),
    all_passes=st.booleans(),
)
def test_it_is_the_convolution_and_so_are_its_gradients(
    kernel: int, stride: int, padding: int, height: int, width: int, batch: int, all_passes: bool
) -> None:
    padding = min(padding, kernel - 1)
    height, width = (max(size, kernel - 2 * padding) for size in (height, width))
    draws = torch.Generator().manual_seed(kernel)
    images = torch.randn(batch, 3, height, width, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, kernel, kernel, generator=draws, dtype=torch.float64, requires_grad=True)
    expected, found = (
        F.conv2d(images, weight, stride=stride, padding=padding),
        convolved(images, weight, stride, padding, all_passes),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    of_output = torch.randn(expected.shape, generator=draws, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (images, weight), of_output),
        torch.autograd.grad(expected, (images, weight), of_output),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("all_passes", [True, False])
def test_torch_func_sees_through_them(all_passes: bool) -> None:
    """Gradients of several kernels at once."""
    images, weight = torch.randn(5, 2, 3, 4, 4).double(), torch.randn(5, 6, 3, 3, 3).double()

    def energy(convolve: Any) -> Any:
        return lambda x, w: (convolve(x, w) ** 2).sum()

    ours = vmap(grad(energy(lambda x, w: convolved(x, w, 1, 1, all_passes)), (0, 1)))(images, weight)
    theirs = vmap(grad(energy(lambda x, w: F.conv2d(x, w, padding=1)), (0, 1)))(images, weight)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    one, other = images.clone().requires_grad_(), weight.clone().requires_grad_()
    stacked = vmap(energy(lambda x, w: convolved(x, w, 1, 1, all_passes)))(one, other).sum()
    for found, expected in zip(torch.autograd.grad(stacked, (one, other)), theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_network_is_freed_as_soon_as_nobody_has_it() -> None:
    """Networks come and go with tasks; a cycle would keep 30 MB until the garbage collector looks."""
    layer = nn.Conv2d(512, 512, 3, padding=1)
    convolve_small_maps_by_products(layer, all_passes=True)
    seen = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert seen() is None
    finally:
        gc.enable()


def test_no_images_and_a_single_one_are_torchs_affair(calls: list[tuple[int, ...]]) -> None:
    layer = nn.Conv2d(512, 512, 3, padding=1)
    convolve_small_maps_by_products(layer, all_passes=True)
    with torch.no_grad():
        assert layer(torch.randn(0, 512, 4, 4)).shape == (0, 512, 4, 4)
        assert layer(torch.randn(512, 4, 4)).shape == (512, 4, 4)
    assert calls == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the images that were convolved by products."""
    seen: list[tuple[int, ...]] = []
    original = SmallMapConvolution.apply

    def apply(images: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(images.shape))
        output: Tensor = original(images, *others)
        return output

    monkeypatch.setattr(small_maps.SmallMapConvolution, "apply", apply)
    return seen


INTEL, ZEN_4, ZEN_5 = "GenuineIntel 6", "AuthenticAMD family 25", "AuthenticAMD family 26"


def on_a_cpu_with(monkeypatch: pytest.MonkeyPatch, capability: str, *, bf16: bool, name: str = ZEN_5) -> None:
    """Which convolutions are products is asked of the machine; torch computes them on all."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: ("AVX512_BF16",) if bf16 else ())
    monkeypatch.setattr(cpu, "_named", lambda: name)


@pytest.fixture(autouse=True)
def new_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu_with(monkeypatch, "AVX512", bf16=True)


def resnet(precision: Any) -> Compute:
    return Compute(Architecture(lambda: resnet18(3, 64, "3x3"), (3, 32, 32)), torch.device("cpu"), precision)


@pytest.mark.parametrize(
    ("capability", "bf16", "name", "products"),
    [
        ("AVX512", True, ZEN_5, {"fp32": "none", "bf16": "all"}),
        ("AVX512", True, ZEN_4, {"fp32": "weights", "bf16": "weights"}),
        ("AVX512", False, ZEN_4, {"fp32": "weights", "bf16": "none"}),
        ("AVX512", True, INTEL, {"fp32": "all", "bf16": "none"}),
        ("AVX512", False, ZEN_5, {"fp32": "none", "bf16": "none"}),
        ("AVX512", False, INTEL, {"fp32": "all", "bf16": "none"}),
        ("AVX2", False, ZEN_4, {"fp32": "all", "bf16": "none"}),  # Zen 3, or torch told to do without AVX-512
        ("DEFAULT", False, INTEL, {"fp32": "none", "bf16": "none"}),
    ],
)
def test_products_are_for_what_the_machine_does_faster_by_them(
    capability: str, bf16: bool, name: str, products: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu_with(monkeypatch, capability, bf16=bf16, name=name)
    assert {precision: resnet(precision).products for precision in ("fp32", "bf16")} == products
    assert Compute(resnet("fp32").architecture, torch.device("cuda"), "fp32").products == "none"


@pytest.mark.parametrize(("capability", "precision", "within"), [("AVX512", "bf16", 0.05), ("AVX2", "fp32", 1e-4)])
def test_only_the_last_stage_of_a_resnet18(
    capability: str, precision: str, within: float, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four 3x3 convolutions end on maps of 4 x 4 positions; the 1x1 shortcut there is too small to pay."""
    images, exact = torch.randn(2, 3, 32, 32), resnet("fp32").network(3)
    initialise(exact, Key(0).torch())
    on_a_cpu_with(monkeypatch, capability, bf16=True)
    network = resnet(precision).network(3)
    load_state(network, state_of(exact))
    with torch.no_grad():
        expected = exact.eval()(images)
        assert calls == []
        found = network.eval()(images)
    assert calls == [(2, 256, 8, 8)] + 3 * [(2, 512, 4, 4)]
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_zen_4_only_a_network_that_learns_meets_products(
    precision: str, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products gain in the gradient of the weights alone; all else is torch's convolution, bit by bit."""
    images, plain = torch.randn(2, 3, 32, 32), resnet("fp32").network(3)
    initialise(plain, Key(0).torch())
    on_a_cpu_with(monkeypatch, "AVX512", bf16=True, name=ZEN_4)
    compute = resnet(precision)
    network = compute.network(3)
    load_state(network, state_of(plain))
    with torch.no_grad():
        compute.teacher(snapshot(network))(images)
        compute.frozen(snapshot(network))(images)
        assert calls == []
    found = network.eval()(images)
    assert len(calls) == 4
    if precision == "fp32":
        expected = plain.eval()(images)
        assert torch.equal(found, expected)
        gradients = (
            torch.autograd.grad(each.sum(), list(of.parameters())) for each, of in ((found, network), (expected, plain))
        )
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_teachers_norms_are_folded_and_its_last_stage_is_products(calls: list[tuple[int, ...]]) -> None:
    compute = resnet("bf16")
    network = compute.network(3)
    initialise(network, Key(0).torch())
    teacher, images = compute.teacher(snapshot(network)), torch.randn(2, 3, 32, 32)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in teacher.modules())
    with torch.no_grad():
        found = teacher(images)
        assert len(calls) == 4
        torch.testing.assert_close(found, network.eval()(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(512, 512, 3, padding=1), 5),  # 25 positions
        (nn.Conv2d(128, 128, 3, padding=1), 4),  # few weights
        (nn.Conv2d(1024, 2048, 3, padding=1, groups=2), 2),
        (nn.Conv2d(512, 512, 3, padding=2, dilation=2), 4),
        (nn.Conv2d(512, 512, 3, padding="same"), 4),
        (nn.Conv2d(512, 512, 3, padding=1, padding_mode="circular"), 4),
        (nn.Conv2d(512, 512, (3, 5), padding=(1, 2)), 4),
        (nn.Conv2d(1024, 1024, 1, padding=1), 2),
    ],
)
def test_whatever_is_not_a_large_plain_kernel_on_a_small_map_stays(
    layer: nn.Conv2d, size: int, calls: list[tuple[int, ...]]
) -> None:
    convolve_small_maps_by_products(layer, all_passes=True)
    with torch.no_grad():
        layer(torch.randn(1, layer.in_channels, size, size))
    assert calls == []


def test_bias_and_copies(calls: list[tuple[int, ...]]) -> None:
    """A copy of a layer computes with its own weights, in the type of autocast where that is on."""
    layer = nn.Conv2d(512, 512, 3, padding=1)
    convolve_small_maps_by_products(layer, all_passes=True)
    other = copy.deepcopy(layer)
    images = torch.randn(1, 512, 4, 4)
    with torch.no_grad():
        expected = F.conv2d(images, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-5)
        other.weight.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(other(images)[0, :, 2, 1], layer.bias.bfloat16())
            torch.testing.assert_close(layer(images), expected.bfloat16(), rtol=0.02, atol=0.02)
    assert len(calls) == 3
