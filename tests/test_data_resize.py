"""Images that are shrunk or enlarged on the way in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_files import assert_same, assert_well_formed, load

from fedcil.data.resize import resize
from fedcil.keys import Key

pytestmark = pytest.mark.usefixtures("array_cache")


def test_shrinking_by_hand() -> None:
    """6 -> 4: padded by 1 to 8, then 2 x 2 means. Corner: (0 + 0 + 0 + 10) / 4 = 2.5, rounded up to 3."""
    image = np.full((1, 6, 6, 1), 10, np.uint8)
    small = resize(image, 4)[0, :, :, 0]
    assert small.tolist() == [[3, 5, 5, 3], [5, 10, 10, 5], [5, 10, 10, 5], [3, 5, 5, 3]]


@pytest.mark.parametrize(("side", "size", "padded"), [(28, 8, 32), (28, 16, 32), (32, 16, 32), (7, 4, 8)])
def test_shrinking_against_a_loop(side: int, size: int, padded: int) -> None:
    images = Key(0).at(side).numpy().integers(0, 256, (3, side, side, 2)).astype(np.uint8)
    before = (padded - side) // 2
    canvas = np.zeros((3, padded, padded, 2), np.int64)
    canvas[:, before : before + side, before : before + side] = images
    factor = padded // size
    for y in range(size):
        for x in range(size):
            block = canvas[:, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            expected = np.floor(block.mean((1, 2)) + 0.5)
            np.testing.assert_array_equal(resize(images, size)[:, y, x], expected)


def test_enlarging_keeps_flat_images_and_interpolates_ramps() -> None:
    assert (resize(np.full((2, 4, 4, 3), 77, np.uint8), 10) == 77).all()
    ramp = np.tile(np.array([0, 100], np.uint8)[None, :, None], (1, 2, 1, 1))
    assert resize(ramp, 4)[0, 0, :, 0].tolist() == [0, 25, 75, 100]


def test_image_size_keeps_the_scale_and_changes_the_digest() -> None:
    small, large, full = (load(name="digits", image_size=size) for size in (4, 16, None))
    assert small.test.images.shape == (360, 4, 4, 1)
    assert large.train.images.shape == (1437, 16, 16, 1)
    assert small.mean == large.mean == full.mean
    assert len({small.digest, large.digest, full.digest}) == 3
    assert_same(load(name="digits", image_size=8), full)


def test_large_sets_are_resized_through_the_cache(array_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load(name="digits", image_size=4)
    monkeypatch.setattr("fedcil.data.resize.SMALL", 0)
    mapped = load(name="digits", image_size=4)
    assert_same(mapped, in_memory)
    assert_well_formed(mapped)
    assert [path.name for path in array_cache.glob("digits-4px-*/meta.json")]
