"""Augmentation: the batched gather against one image at a time, and what it may not touch."""

from __future__ import annotations

import random
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcil.data.augment import AUGMENT, DEGREES, PAD, make_batch
from fedcil.keys import Key
from fedcil.tables import DataSection

KEY = Key(1)
MODES = ("none", "flip", "crop_flip", "rotate_flip")


def bank_of(count: int, height: int, width: int, channels: int) -> Tensor:
    pixels = Key(0).at("bank", count, channels).numpy().integers(1, 256, (count, height, width, channels))
    return torch.from_numpy(pixels.astype(np.uint8))


def scales(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.3, 0.6, channels), torch.linspace(0.2, 0.3, channels)


def batch(bank: Tensor, index: Tensor, mode: str, key: Key = KEY) -> Tensor:
    return make_batch(bank, index, mode, key.torch(), *scales(bank.shape[3]))


def pixels(out: Tensor) -> Tensor:
    """Undo the normalisation: (n, h, w, c) of whole numbers."""
    mean, std = scales(out.shape[1])
    exact = (out.permute(0, 2, 3, 1) * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().byte()


def normalised(images: Tensor) -> Tensor:
    mean, std = scales(images.shape[3])
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("shape", [(5, 8, 8, 1), (5, 6, 9, 3)])
def test_none_is_the_normalised_images(shape: tuple[int, int, int, int]) -> None:
    bank, index = bank_of(*shape), torch.tensor([3, 0, 3])
    torch.testing.assert_close(batch(bank, index, "none"), normalised(bank[index]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_form_of_the_batch(mode: str, channels: int) -> None:
    out = batch(bank_of(6, 8, 10, channels), torch.arange(6), mode)
    assert out.shape == (6, channels, 8, 10)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("mode", MODES)
def test_no_images(mode: str) -> None:
    assert batch(bank_of(3, 8, 8, 3), torch.empty(0, dtype=torch.int64), mode).shape == (0, 3, 8, 8)


def test_flip_is_per_image_and_about_half() -> None:
    bank = bank_of(1, 4, 5, 3)
    out = pixels(batch(bank, torch.zeros(400, dtype=torch.int64), "flip"))
    flipped = (out == bank.flip(2)).all(dim=(1, 2, 3))
    assert (flipped | (out == bank).all(dim=(1, 2, 3))).all()
    assert 150 < flipped.sum() < 250


def crop_by_hand(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    """Zero-pad, slice, mirror: one image (h, w, c) at a time."""
    height, width, channels = image.shape
    padded = torch.zeros(height + 2 * PAD, width + 2 * PAD, channels, dtype=torch.uint8)
    padded[PAD : PAD + height, PAD : PAD + width] = image
    crop = padded[top : top + height, left : left + width]
    return crop.flip(1) if flip else crop


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(4, 12),
    width=st.integers(4, 12),
    channels=st.sampled_from([1, 3]),
)
def test_crop_flip_equals_a_loop_over_images(seed: int, height: int, width: int, channels: int) -> None:
    """The loop draws as the batch does: corners (2, n, 1), then flips (n, 1)."""
    bank, index = bank_of(7, height, width, channels), torch.tensor([6, 1, 1, 4, 0])
    generator = Key(seed).torch()
    tops, lefts = torch.randint(0, 2 * PAD + 1, (2, 5, 1), generator=generator).flatten(1).tolist()
    flips = (torch.rand(5, 1, generator=generator) < 0.5).flatten().tolist()
    by_hand = [crop_by_hand(bank[i], *place) for i, *place in zip(index, tops, lefts, flips, strict=True)]
    assert torch.equal(pixels(batch(bank, index, "crop_flip", Key(seed))), torch.stack(by_hand))


def test_crop_reaches_every_corner_and_pads_with_black() -> None:
    """By up to 4 pixels either way, the crop of the field: 9 x 9 places."""
    bank = torch.full((1, 8, 8, 1), 255, dtype=torch.uint8)
    out = pixels(batch(bank, torch.zeros(2000, dtype=torch.int64), "crop_flip")).squeeze(-1)
    assert set(out.unique().tolist()) == {0, 255}
    rows, columns = (out == 255).any(2).sum(1), (out == 255).any(1).sum(1)
    assert rows.min() == columns.min() == 8 - 4
    assert rows.max() == columns.max() == 8
    assert len({tuple(mask.flatten().tolist()) for mask in out == 255}) == 9**2


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (9, 12, 1)])
def test_rotate_flip_equals_torchvision_image_by_image(height: int, width: int, channels: int) -> None:
    rotate = pytest.importorskip("torchvision.transforms.functional").rotate
    bank, index = bank_of(30, height, width, channels), torch.arange(30)
    generator = Key(1).torch()
    angles = ((torch.rand(30, 1, 1, generator=generator) * 2 - 1) * DEGREES).flatten().tolist()
    flips = (torch.rand(30, 1, generator=generator) < 0.5).flatten().tolist()
    out = pixels(batch(bank, index, "rotate_flip"))
    for image, angle, flip, got in zip(bank, angles, flips, out, strict=True):
        turned = rotate(image.permute(2, 0, 1), angle).permute(1, 2, 0)
        assert torch.equal(got, turned.flip(1) if flip else turned)


def test_rotation_stays_within_its_range() -> None:
    """A point on the right-hand edge moves up and down by at most sin(20 degrees) of the way."""
    bank = torch.zeros(1, 41, 41, 1, dtype=torch.uint8)
    bank[0, 20, 40] = 255
    out = pixels(batch(bank, torch.zeros(500, dtype=torch.int64), "rotate_flip")).squeeze(-1)
    rows = out.nonzero()[:, 1] - 20
    assert rows.abs().max() <= 7  # 20 * sin(20 degrees) = 6.84
    assert rows.min() < -5
    assert rows.max() > 5


@pytest.mark.parametrize("mode", MODES)
def test_same_generator_same_batch_and_no_global_generator(mode: str) -> None:
    bank, index = bank_of(20, 8, 8, 3), torch.arange(20)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = batch(bank, index, mode)
    assert torch.equal(first, batch(bank, index, mode))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    if mode != "none":
        assert not torch.equal(first, batch(bank, index, mode, Key(2)))


@pytest.mark.parametrize("mode", MODES)
def test_bank_and_arguments_stay_as_they_are(mode: str) -> None:
    bank, index = bank_of(4, 8, 8, 3), torch.arange(4)
    mean, std = scales(3)
    copies = [part.clone() for part in (bank, index, mean, std)]
    make_batch(bank, index, mode, Key(1).torch(), mean, std).zero_()
    assert all(torch.equal(*pair) for pair in zip((bank, index, mean, std), copies, strict=True))


def test_a_scenario_can_ask_for_every_mode_and_no_other() -> None:
    assert get_args(DataSection.model_fields["augment"].annotation) == tuple(AUGMENT) == MODES


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "flip", "crop_flip"])
def test_gpu_makes_the_same_batch(mode: str) -> None:
    """Not for rotations: sines may differ in the last bit, and a pixel on a border then falls either way."""
    bank, index = bank_of(20, 8, 8, 3), torch.arange(20)
    out = batch(bank.cuda(), index, mode)
    assert out.is_cuda
    assert torch.equal(pixels(out.cpu()), pixels(batch(bank, index, mode)))
