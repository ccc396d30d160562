"""MFCL's generators: sizes, structure and what they give (mfcl section 4)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcil.keys import Key
from fedcil.models.generator import Generator, default_upsamplings
from fedcil.models.network import count_parameters, initialise, state_of


def on_meta(size: int, latent: int, width: int) -> Generator:
    with torch.device("meta"):
        return Generator(channels=3, size=size, latent=latent, width=width)


@pytest.mark.parametrize(
    ("size", "width", "latent", "expected"),
    [
        (32, 128, 200, 1_870_339),
        (32, 128, 400, 3_508_739),
        (32, 128, 1000, 8_423_939),
        (64, 128, 200, 2_018_179),
        (64, 128, 400, 3_656_579),
        (64, 128, 1000, 8_571_779),
        (224, 64, 200, 817_475),
        (224, 64, 400, 1_444_675),
        (224, 64, 1000, 3_326_275),
        (224, 128, 200, 2_003_587),
        (224, 128, 400, 3_257_987),
        (224, 128, 1000, 7_021_187),
        (32, 32, 1000, 2_064_515),
    ],
)
def test_generators_have_the_authors_number_of_parameters(size: int, width: int, latent: int, expected: int) -> None:
    """mfcl section 4, among them by hand for 32 pixels and z = 1000: 1001 8192 + 256 + (9 128 128 + 128)
    + 256 + (9 128 64 + 64) + 128 + (9 64 3 + 3).
    """
    assert count_parameters(on_meta(size, latent, width)) == expected


@pytest.mark.parametrize(("size", "width", "scalars"), [(32, 128, 646), (64, 128, 902), (224, 64, 774)])
def test_generators_have_the_authors_buffers_but_counters(size: int, width: int, scalars: int) -> None:
    assert sum(buffer.numel() for buffer in on_meta(size, 10, width).buffers()) == scalars


@pytest.mark.parametrize(
    ("size", "ups", "start"), [(28, 2, 7), (32, 2, 8), (64, 3, 8), (96, 4, 6), (224, 5, 7), (8, 2, 2), (100, 2, 25)]
)
def test_images_start_small_and_are_doubled(size: int, ups: int, start: int) -> None:
    """Or at what halving leads to: a quarter of 100 is odd."""
    assert default_upsamplings(size) == ups
    assert on_meta(size, 2, 4).start == start == size / 2**ups


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="3 up-samplings do not lead to 28 pixels"):
        Generator(channels=3, size=28, latent=2, width=4, upsamplings=3)


def test_without_upsampling_there_are_no_blocks(small: Any) -> None:
    generator = Generator(channels=3, size=8, latent=2, width=4, upsamplings=0)
    assert generator.start == 8
    assert generator(torch.zeros(2, 2)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3), (224, 3)])
def test_one_image_for_each_latent(size: int, channels: int) -> None:
    generator = Generator(channels=channels, size=size, latent=3, width=4)
    assert generator(torch.zeros(2, 3)).shape == (2, channels, size, size)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_batch_norms_are_the_authors(size: int) -> None:
    """0.8 in the blocks is eps, not momentum; the first has the usual 1e-5; the last has no parameters."""
    norms = [part for part in on_meta(size, 2, 4).modules() if isinstance(part, nn.BatchNorm2d)]
    ups = default_upsamplings(size)
    assert [norm.eps for norm in norms] == [1e-5, *[0.8] * ups, 1e-5]
    assert [norm.affine for norm in norms] == [True] * (ups + 1) + [False]
    assert {norm.momentum for norm in norms} == {0.1}


def normalised(x: Tensor, norm: nn.BatchNorm2d, eps: float) -> Tensor:
    """Batch norm by hand, with the batch's statistics in train mode."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    assert mean is not None
    assert var is not None
    x = (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None] if norm.affine else x


def by_hand(generator: Generator, latents: Tensor) -> Tensor:
    """The scheme of section 4 in words of its own, for 8 pixels: two up-samplings from 2 pixels."""
    x = latents @ generator.project.weight.T + generator.project.bias
    x = normalised(x.reshape(len(latents), -1, 2, 2), generator.norm, 1e-5)
    for _, convolution, norm, _ in generator.blocks:  # type: ignore[misc]
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = normalised(x, norm, 0.8)
        x = torch.where(x > 0, x, 0.2 * x)
    x = nn.functional.conv2d(x, generator.tail.weight, generator.tail.bias, padding=1)
    return normalised(x.tanh(), generator.whiten, 1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.usefixtures("float64")
def test_the_generator_is_the_scheme_of_the_paper(small: Any, train: bool) -> None:
    generator = small.generator(latent=5, width=8)
    generator.train(train)
    latents = torch.randn(6, 5, generator=Key(0).torch())
    with torch.no_grad():
        expected = by_hand(generator, latents)
        torch.testing.assert_close(generator(latents), expected, rtol=1e-11, atol=1e-11)


def test_only_small_images_halve_the_channels_in_the_last_block() -> None:
    def widths(size: int) -> list[int]:
        return [block[1].out_channels for block in on_meta(size, 2, 16).blocks]  # type: ignore[index,misc]

    assert widths(32) == [16, 8]
    assert widths(64) == [16, 16, 8]
    assert widths(224) == [16] * 5


@pytest.mark.usefixtures("float64")
def test_in_eval_mode_an_image_does_not_depend_on_the_rest_of_the_batch(small: Any) -> None:
    generator = small.generator()
    latents = torch.randn(8, 5, generator=Key(0).torch())
    alone, among = generator(latents[3:4]), generator(latents)[3:4]
    torch.testing.assert_close(alone, among, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_in_train_mode_channels_are_normalised_like_images() -> None:
    """Mean 0; variance v / (v + 1e-5) for the variance v of what tanh gave."""
    generator = Generator(channels=3, size=8, latent=5, width=8)
    initialise(generator, Key(0).torch())
    images = generator(torch.randn(64, 5, generator=Key(1).torch()))
    assert images.mean((0, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(images.var((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-2)
    assert images.abs().max() > 1  # values are not limited to what tanh gives


def test_in_bf16_images_are_float32(small: Any) -> None:
    generator = Generator(channels=3, size=8, latent=5, width=4, precision=torch.bfloat16)
    exact = Generator(channels=3, size=8, latent=5, width=4)
    for part in (generator, exact):
        initialise(part, Key(0).torch())
        part.eval()
    latents = torch.randn(4, 5, generator=Key(1).torch())
    narrow, wide = generator(latents), exact(latents)
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0.1)
    assert {tensor.dtype for tensor in state_of(generator).values()} == {torch.float32}


def test_in_bf16_bright_pixels_keep_their_differences() -> None:
    """tanh(4) and tanh(5) are both 1 in bfloat16."""
    generator = Generator(channels=2, size=8, latent=5, width=4, precision=torch.bfloat16).eval()
    with torch.no_grad():
        generator.tail.weight.zero_()
        generator.tail.bias.copy_(torch.tensor([4.0, 5.0]))
    four, five = generator(torch.zeros(1, 5))[0]
    torch.testing.assert_close(five - four, torch.full((8, 8), math.tanh(5) - math.tanh(4)), rtol=1e-3, atol=0)
