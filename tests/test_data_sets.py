"""Data sets: what comes out of each loader, the choice of images, the cache, errors for what is missing."""

from __future__ import annotations

import builtins
import gzip
import importlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcil.data import (
    Dataset,
    Split,
    cifar,
    default_root,
    digest_of,
    digits,
    download,
    load_dataset,
    super_imagenet,
)
from fedcil.data import cache as cache_module
from fedcil.data.cache import Blocks, Recipe, cached, fingerprint
from fedcil.data.mnist import read_idx
from fedcil.data.pickles import read_pickle
from fedcil.data.resize import resize
from fedcil.data.select import select
from fedcil.data.store import Images
from fedcil.errors import DataMissing, InputError, ScenarioError
from fedcil.keys import Key
from fedcil.scenario import DataSection

RealData = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own array cache, and no way to the network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDCIL_CACHE", str(folder))
    monkeypatch.delenv("FEDCIL_DATA_ROOT", raising=False)

    def no_network(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(download, "refuse_silence", no_network)
    return folder


def load(seed: int = 0, root: Path | None = None, **options: Any) -> Dataset:
    return load_dataset(DataSection(**options), seed, root=root)


def assert_same(one: Dataset, other: Dataset) -> None:
    assert one.digest == other.digest
    for split, twin in ((one.train, other.train), (one.test, other.test)):
        np.testing.assert_array_equal(split.images, twin.images)
        np.testing.assert_array_equal(split.labels, twin.labels)


def assert_well_formed(data: Dataset) -> None:
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.images.ndim == 4
        assert split.images.flags.c_contiguous
        assert split.images.flags.writeable  # torch.from_numpy would warn
        assert split.labels.dtype == np.int64
        assert split.labels.shape == split.images.shape[:1]
        assert set(np.unique(split.labels)) <= set(range(len(data.class_names)))
    assert len(data.mean) == len(data.std) == data.train.images.shape[3]


def rows(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


# --- sets that come with the program ---------------------------------------------------------------


def test_digits() -> None:
    data = load(name="digits")
    assert_well_formed(data)
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.max() == 240
    assert data.mean[0] == pytest.approx(data.train.images.mean() / 255)
    share = np.bincount(data.test.labels) / (np.bincount(data.test.labels) + np.bincount(data.train.labels))
    assert np.abs(share - 0.2).max() < 0.005


def test_digits_are_all_of_the_bundled_ones() -> None:
    """Counts by class as scikit-learn's documentation of the set has them."""
    data = load(name="digits")
    counts = np.bincount(np.concatenate([data.train.labels, data.test.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_do_not_import_scikit_learn_or_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real_import = builtins.__import__

    def watched(name: str, *rest: Any, **named: Any) -> Any:
        imported.append(name.partition(".")[0])
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", watched)
    load_dataset(DataSection(), 0)
    importlib.reload(digits)
    assert "numpy" in imported
    assert not {"sklearn", "torchvision"} & set(imported)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcil.data.digits.find_spec", lambda name: None)
    with pytest.raises(DataMissing, match="scikit-learn"):
        load(name="digits")


def test_synthetic_defaults_and_options() -> None:
    data = load(name="synthetic")
    assert_well_formed(data)
    assert data.train.images.shape == (1000, 8, 8, 1)
    assert data.test.images.shape == (200, 8, 8, 1)
    small = load(name="synthetic", classes=3, samples_per_class=7, test_per_class=2, image_size=12)
    assert small.train.images.shape == (21, 12, 12, 1)
    assert np.bincount(small.test.labels).tolist() == [2, 2, 2]
    assert_same(data, load(seed=9, name="synthetic"))


def test_synthetic_is_drawn_in_pieces_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(name="synthetic")
    monkeypatch.setattr("fedcil.data.synthetic.PIECE", 7)
    assert_same(whole, load(name="synthetic"))


def test_synthetic_separation_is_the_distance_of_centres_in_deviations() -> None:
    """With 3,000 images a mean is off by 1 / sqrt(3000) of a deviation per pixel; 64 pixels make 0.15."""
    data = load(name="synthetic", classes=4, samples_per_class=3000, separation=3.0)
    means = [data.train.images[data.train.labels == label].mean(0) / 32 for label in range(4)]
    for one in range(4):
        for other in range(one):
            assert np.linalg.norm(means[one] - means[other]) == pytest.approx(3.0, abs=0.3)


def test_synthetic_with_more_classes_than_pixels_and_a_hold_out() -> None:
    data = load(name="synthetic", classes=30, image_size=5, samples_per_class=10, validation=0.2)
    assert np.bincount(data.train.labels).tolist() == [8] * 30
    assert np.bincount(data.test.labels).tolist() == [2] * 30


# --- which images ----------------------------------------------------------------------------------


def test_first_classes() -> None:
    data, full = load(name="digits", classes=3), load(name="digits")
    keep = full.train.labels < 3
    np.testing.assert_array_equal(data.train.images, full.train.images[keep])
    assert data.class_names == ("0", "1", "2")
    assert data.test.labels.max() == 2
    assert data.digest != full.digest


def test_too_many_classes() -> None:
    with pytest.raises(ScenarioError, match="digits has 10 classes") as error:
        load(name="digits", classes=11)
    assert error.value.allowed == "1 to 10"


def test_validation_is_disjoint_fixed_and_stratified() -> None:
    data, full = load(seed=1, name="digits", validation=0.1), load(name="digits")
    assert_same(data, load(seed=2, name="digits", validation=0.1))
    assert len(data.train.labels) + len(data.test.labels) == len(full.train.labels)
    assert rows(data.train) | rows(data.test) == rows(full.train)
    # digits has a few equal images; apart from those the three sets share nothing.
    assert len(rows(data.train) & rows(data.test)) <= len(full.train.labels) - len(rows(full.train))
    assert not rows(data.test) & rows(full.test)
    expected = [round(0.1 * count) for count in np.bincount(full.train.labels)]
    assert np.bincount(data.test.labels).tolist() == expected


def test_validation_holds_out_the_same_images_for_fewer_classes() -> None:
    few, all_ = load(name="digits", validation=0.1, classes=4), load(name="digits", validation=0.1)
    np.testing.assert_array_equal(few.test.images, all_.test.images[all_.test.labels < 4])


def test_validation_takes_at_least_one_and_never_all() -> None:
    data = load(name="synthetic", samples_per_class=4, validation=0.01)
    assert np.bincount(data.test.labels).tolist() == [1] * 10
    with pytest.raises(ScenarioError, match=r"no training image of class 0 \(blob 0\)"):
        load(name="synthetic", samples_per_class=1, validation=0.5)


def test_samples_per_class_are_drawn_by_the_seed_and_nest() -> None:
    one, other = (load(seed=seed, name="digits", samples_per_class=20) for seed in (1, 2))
    assert np.bincount(one.train.labels).tolist() == [20] * 10
    assert one.digest != other.digest
    assert rows(one.train) != rows(other.train)
    np.testing.assert_array_equal(one.test.images, other.test.images)
    assert_same(one, load(seed=1, name="digits", samples_per_class=20))
    assert rows(load(seed=1, name="digits", samples_per_class=5).train) < rows(one.train)


def test_samples_come_from_what_validation_left() -> None:
    data = load(seed=3, name="digits", samples_per_class=100, validation=0.2)
    held = load(name="digits", validation=0.2)
    np.testing.assert_array_equal(data.test.images, held.test.images)
    assert rows(data.train) <= rows(held.train)


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_part_of_a_set_is_read_where_the_set_lies(kind: str) -> None:
    """Nothing is copied, so that processes share one memory-mapped file; a GPU gets the part alone."""
    full = load(name="digits")
    part = select(full, classes=4, validation=0.2, per_class=30, seed=5)
    assert np.shares_memory(part.train.stored, full.train.stored)
    assert np.shares_memory(part.test.stored, full.train.stored)
    assert part.train.nbytes == part.train.images.nbytes == 120 * 64
    images = Images(part.train, torch.device(kind)).take(torch.tensor([7, 0, 119], device=kind))
    assert images.shape == (3, 8, 8, 1)
    if kind == "cpu":
        np.testing.assert_array_equal(images.numpy(), part.train.images[[7, 0, 119]])


def test_too_many_samples_name_the_class() -> None:
    with pytest.raises(ScenarioError, match=r"class 0 \(0\) of digits has \d+ training images"):
        load(name="digits", samples_per_class=5000)


# --- sizes -----------------------------------------------------------------------------------------


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


def test_large_sets_are_resized_through_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load(name="digits", image_size=4)
    monkeypatch.setattr("fedcil.data.resize.SMALL", 0)
    mapped = load(name="digits", image_size=4)
    assert_same(mapped, in_memory)
    assert_well_formed(mapped)
    assert [path.name for path in cache.glob("digits-4px-*/meta.json")]


# --- a person's own set ----------------------------------------------------------------------------


def own_set(**changes: Any) -> Dataset:
    split = Split(np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1), np.array([0, 1, 2] * 2, np.int64))
    fields: dict[str, Any] = {
        "name": "own",
        "train": split,
        "test": split,
        "mean": (0.5,),
        "std": (0.5,),
        "class_names": ("a", "b", "c"),
        "digest": digest_of(split, split),
    }
    return Dataset(**{**fields, **changes})


GIVEN: object = None


def given(section: DataSection, root: Path) -> object:
    return GIVEN


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this module importable under its name, and let ``given`` return a value."""
    monkeypatch.setitem(sys.modules, "own_data_set", sys.modules[__name__])

    def set_given(value: object, **options: Any) -> Dataset:
        monkeypatch.setattr(sys.modules["own_data_set"], "GIVEN", value)
        return load(name="own_data_set:given", **options)

    return set_given


def test_own_set(give: Any) -> None:
    assert_same(give(own_set()), own_set())
    assert give(own_set(digest="")).digest == own_set().digest


def test_nothing_chosen_copies_nothing(give: Any) -> None:
    data = own_set()
    full = give(data, classes=3)
    assert full.train.images is data.train.images
    assert full.digest == data.digest
    assert give(data, classes=2).digest != data.digest


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "data.md"
    example = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mysets.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    data = load(name="mysets:stripes", samples_per_class=10)
    assert_well_formed(data)
    assert np.bincount(data.train.labels).tolist() == [10, 10]
    assert data.digest


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (7, "it is a int, not a Dataset"),
        (own_set(class_names=("a", "b")), "labels are 0 to 2, but there are 2 class names"),
        (own_set(mean=(0.5, 0.5)), "mean is"),
        (own_set(std=(0.0,)), "not above 0"),
        (own_set(train=Split(np.zeros((6, 4, 4)), np.zeros(6, np.int64))), "train images are float64"),
        (
            own_set(test=Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64))),
            "test labels are int64",
        ),
        (own_set(test=Split(np.zeros((2, 5, 4, 1), np.uint8), np.zeros(2, np.int64))), "in train and"),
        (own_set(test=Split(np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int64))), "test has no images"),
        (own_set(train=None), "train is a NoneType"),
    ],
)
def test_own_set_that_does_not_fit(give: Any, value: object, problem: str) -> None:
    with pytest.raises(ScenarioError, match=problem):
        give(value)


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json:__name__", ":f"])
def test_own_set_that_is_not_there(name: str) -> None:
    with pytest.raises(ScenarioError, match=r"cannot be imported|has no|is not a function"):
        load(name=name)


# --- trees of images -------------------------------------------------------------------------------


def save_image(path: Path, grey: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = grey if mode == "L" else (grey, grey // 2, 255 - grey)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three classes that are not in alphabetical order, two training and one validation image each."""
    folder = tmp_path / "data" / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for label, wnid in enumerate(wnids):
        for number in range(2):
            save_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 40 * label + number)
        save_image(folder / "val" / "images" / f"val_{label}.JPEG", 40 * label + 10, mode="L" if label else "RGB")
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    lines = [f"val_{label}.JPEG\t{wnid}\t0\t0\t1\t1" for label, wnid in enumerate(wnids)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn03\ttench\n")
    return tmp_path / "data"


def test_progress_is_shown_where_asked_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedcil.data.progress.SECONDS_BETWEEN", -1)
    load(name="tiny_imagenet", root=tiny / "tiny-imagenet-200")
    assert capsys.readouterr().err == ""
    load_dataset(DataSection(name="tiny_imagenet"), 0, root=tiny, show_progress=True)
    assert capsys.readouterr().err == ""  # it is in the cache by now
    monkeypatch.setenv("FEDCIL_CACHE", str(tiny / "other"))
    load_dataset(DataSection(name="tiny_imagenet"), 0, root=tiny, show_progress=True)
    assert "tiny_imagenet: 6 of 6 images decoded" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet(tiny: Path, inside: bool) -> None:
    data = load(name="tiny_imagenet", root=tiny if inside else tiny / "tiny-imagenet-200")
    assert_well_formed(data)
    assert data.train.images.shape == (6, 64, 64, 3)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.class_names == ("tench", "goldfish", "n02")
    assert data.mean == (0.485, 0.456, 0.406)
    assert np.abs(data.train.images[:, 5, 5, 0].astype(int) - [0, 1, 40, 41, 80, 81]).max() <= 2
    assert "validation split" in data.notes[0]


def test_tiny_imagenet_incomplete(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200/val/val_annotations.txt").unlink()
    with pytest.raises(DataMissing, match="tiny_imagenet") as error:
        load(name="tiny_imagenet", root=tiny)
    assert "val_annotations.txt" in error.value.where


def test_tiny_imagenet_with_a_strange_annotation(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn03\nval_1.JPEG\tn99\n")
    with pytest.raises(InputError, match="line 2 names no class"):
        load(name="tiny_imagenet", root=tiny)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("val", 1)):
        for label, kind in enumerate(("cat", "dog")):
            for number in range(count):
                suffix = "png" if number else "JPG"
                save_image(root / split / kind / f"{number}.{suffix}", 100 * label + number, size=(30, 20))
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / "readme.txt").write_text("no image")
    return root


def test_folder(tree: Path) -> None:
    data = load(name="folder", root=tree)
    assert_well_formed(data)
    assert data.train.images.shape == (6, 20, 30, 3)
    assert data.test.images.shape == (2, 20, 30, 3)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[[1, 2, 4], 3, 3, 0].tolist() == [1, 2, 101]
    assert data.mean == data.std == (0.5, 0.5, 0.5)


def test_folder_cuts_out_the_middle(tree: Path) -> None:
    """40 x 20 pixels, the right half white: scaled to 20 x 10, columns 5 to 14 remain."""
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    for path in (tree / "train/cat").glob("*.*"):
        path.unlink()
    image.save(tree / "train/cat/0.png")
    pixels = load(name="folder", root=tree, image_size=10).train.images[0, :, :, 0]
    assert pixels.shape == (10, 10)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 6:] == 255).all()


def test_folder_of_different_sizes_needs_image_size(tree: Path) -> None:
    save_image(tree / "train/dog/9.png", 9, size=(31, 20))
    with pytest.raises(ScenarioError, match="different sizes") as error:
        load(name="folder", root=tree)
    assert error.value.where == "data.image_size"
    assert load(name="folder", root=tree, image_size=8).train.images.shape == (7, 8, 8, 3)


def test_folder_that_changed_is_read_again(tree: Path) -> None:
    before = load(name="folder", root=tree)
    save_image(tree / "train/cat/1.png", 200, size=(30, 20))
    after = load(name="folder", root=tree)
    assert after.train.images[1, 0, 0, 0] == 200
    assert before.digest != after.digest


def test_folder_errors(tree: Path) -> None:
    with pytest.raises(DataMissing, match="folder"):
        load(name="folder", root=tree / "train")
    (tree / "train/dog/1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        load(name="folder", root=tree, image_size=8)
    assert error.value.where.endswith("dog/1.png")
    save_image(tree / "val/cow/1.png", 1)
    with pytest.raises(InputError, match="without training images: cow"):
        load(name="folder", root=tree)
    (tree / "train/emu").mkdir()
    with pytest.raises(InputError, match="without images: emu"):
        load(name="folder", root=tree)


MAPPING = {
    10: ["big", {"n3": "c", "n4": "d"}, {"n5": "e", "n6": "f"}],
    2: ["pair", {"n1": "a", "n2": "b"}],
    5: ["single", {"n7": "g"}],
}


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "data" / "imagenet"
    for number in range(1, 8):
        for split, count in (("train", 3), ("val", 2)):
            for image in range(count):
                save_image(root / split / f"n{number}" / f"{image}.JPEG", 30 * number + image, size=(40, 32))
    return tmp_path / "data"


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(MAPPING))
    return path


def load_super(root: Path, mapping: Path, **options: Any) -> Dataset:
    return load(name="super_imagenet", root=root, mapping=str(mapping), image_size=28, **options)


def test_super_imagenet_reports_shortfalls(imagenet: Path, mapping: Path) -> None:
    data = load_super(imagenet, mapping)
    assert_well_formed(data)
    assert data.class_names == ("pair", "big")
    assert data.train.images.shape == (18, 28, 28, 3)
    assert np.bincount(data.test.labels).tolist() == [4, 8]
    assert data.notes[0] == "train: super-class 'pair' has 6 of 2500 images"
    assert data.notes[3] == "val: super-class 'big' has 8 of 100 images"
    assert load_super(imagenet, mapping).notes == data.notes  # the second time from the cache


def test_super_imagenet_takes_the_first_of_a_fixed_shuffle(
    imagenet: Path, mapping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = load_super(imagenet, mapping, version="m")
    monkeypatch.setitem(super_imagenet.VERSIONS, "m", super_imagenet.Version(4, 5, 3))
    data = load_super(imagenet, mapping, version="m")
    assert data.class_names == ("big",)
    assert not data.notes
    np.testing.assert_array_equal(data.train.images, everything.train.images[:5])
    np.testing.assert_array_equal(data.test.images, everything.test.images[:3])
    reds = everything.train.images[:, 9, 9, 0].tolist()
    assert reds != sorted(reds)


def test_super_imagenet_yaml_equals_json(imagenet: Path, mapping: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "mapping.yaml"
    path.write_text(yaml.safe_dump(MAPPING))
    assert_same(load_super(imagenet, path), load_super(imagenet, mapping))


def test_super_imagenet_without_yaml(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(super_imagenet, "find_spec", lambda name: None)
    (tmp_path / "m.yaml").write_text("0: [a, {n1: x, n2: y}]")
    with pytest.raises(InputError, match="as JSON"):
        load_super(imagenet, tmp_path / "m.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "mapping cannot be used"),
        ("[]", "no table"),
        ('{"x": ["a", {"n1": "b"}]}', "'x' is not an index"),
        ('{"0": "a"}', "entry 0 is not"),
        ('{"0": ["a"]}', "entry 0 is not"),
        ('{"0": ["a", {"n1": "x"}], "1": ["b", {"n1": "x"}]}', "n1 is in both 'a' and 'b'"),
        ('{"0": ["a", {"n1": "x"}]}', "no super-class has 2 members"),
    ],
)
def test_super_imagenet_bad_mapping(imagenet: Path, tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        load_super(imagenet, path)


def test_super_imagenet_missing_parts(imagenet: Path, mapping: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_super(imagenet, tmp_path / "nowhere.json")
    with pytest.raises(ScenarioError, match="needs a mapping"):
        load(name="super_imagenet", root=imagenet)
    (imagenet / "imagenet/val/n4").rename(imagenet / "elsewhere")
    with pytest.raises(DataMissing, match="1 class folders") as error:
        load_super(imagenet, mapping)
    assert error.value.where.endswith("val/n4")
    with pytest.raises(DataMissing):
        load_super(tmp_path, mapping)


# --- published archives, made by hand --------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(root: Path, suffix: str = "") -> np.ndarray:
    images = Key(0).at("mnist").numpy().integers(0, 256, (20, 28, 28)).astype(np.uint8)
    for prefix, part in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        write_idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte{suffix}", images[part])
        write_idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte{suffix}", np.arange(20, dtype=np.uint8)[part] % 10)
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files(tmp_path: Path, suffix: str) -> None:
    images = write_mnist(tmp_path, suffix)
    data = load(name="mnist", root=tmp_path)
    assert_well_formed(data)
    np.testing.assert_array_equal(data.train.images[..., 0], images[:15])
    np.testing.assert_array_equal(data.test.images[..., 0], images[15:])
    assert data.test.labels.tolist() == [5, 6, 7, 8, 9]


def test_damaged_idx_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="its header promises"):
        read_idx(path)
    path.write_bytes(b"no idx file at all")
    with pytest.raises(InputError, match="does not begin"):
        load(name="mnist", root=tmp_path)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(b"abc")[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(packed)


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive of the official form; its checksums are taken as the official ones."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 8), ("test", 4)):
        pixels = Key(0).at(name).numpy().integers(0, 256, (count, 3072)).astype(np.uint8)
        fine = [label % 4 for label in range(count)]
        table = {"data": pixels, "fine_labels": fine, "coarse_labels": [label // 2 for label in fine]}
        (folder / name).write_bytes(pickle.dumps(table, protocol=3))
    names = {"fine_label_names": ["a", "b", "c", "d"], "coarse_label_names": ["ab", "cd"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    monkeypatch.setattr(cifar, "_check", lambda path, md5: None)
    return tmp_path / "data"


def test_cifar_fine_and_coarse(cifar_root: Path) -> None:
    fine = load(name="cifar100", root=cifar_root)
    assert_well_formed(fine)
    table = pickle.loads((cifar_root / "cifar-100-python/train").read_bytes())
    assert fine.train.images[3, 5, 7].tolist() == [table["data"][3, c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert fine.class_names == ("a", "b", "c", "d")
    coarse = load(name="cifar100_coarse", root=cifar_root)
    assert coarse.train.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert coarse.class_names == ("ab", "cd")
    np.testing.assert_array_equal(coarse.train.images, fine.train.images)
    assert coarse.digest != fine.digest


def test_cifar_checksum(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FEDCIL_CACHE", str(cifar_root / "cache"))
    with pytest.raises(InputError, match="not the official file") as error:
        load(name="cifar100", root=cifar_root)
    assert error.value.where.endswith("train")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [{"data": Harmful()}, Harmful(), {"data": np.zeros}])
def test_pickles_that_name_anything_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="asks for"):
        read_pickle(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2], protocol=2), pickle.dumps({"a": 1})[:-2]])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a CIFAR file"):
        read_pickle(tmp_path / "train")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "cifar100_coarse"])
def test_missing_sets_say_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataMissing, match=f"{name}.*no network") as error:
        load(name=name, root=tmp_path / "empty")
    assert str(tmp_path / "empty") in error.value.where
    assert not (tmp_path / "empty").exists(), "it may be misspelt"
    for word in ("--data-root", "data.root", "FEDCIL_DATA_ROOT"):
        assert word in error.value.next
    assert "data root that holds" in error.value.allowed


def test_download_brings_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def bring(torchvision_name: str, root: Path) -> None:
        asked.append(torchvision_name)
        write_mnist(root)

    monkeypatch.setattr(download, "refuse_silence", lambda _: None)
    monkeypatch.setattr(download, "download", bring)
    for _ in range(2):
        assert len(load(name="mnist", root=tmp_path / "new").train.labels) == 15
    assert asked == ["MNIST"]


def test_root_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, named = DataSection(), DataSection(root="/named")
    assert default_root(bare, None) == Path.home() / ".cache/fedcil/data"
    monkeypatch.setenv("FEDCIL_DATA_ROOT", "/environment")
    assert default_root(bare, None) == Path("/environment")
    assert default_root(named, None) == Path("/named")
    assert default_root(named, tmp_path) == tmp_path


# --- the cache -------------------------------------------------------------------------------------


def recipe(value: int = 1) -> Recipe:
    images = np.full((5, 4, 4, 3), value, np.uint8)
    labels = np.arange(5, dtype=np.int64)
    return Recipe(
        name="made",
        train=Blocks((5, 4, 4, 3), labels, [images[:2], images[2:]]),
        test=Blocks((5, 4, 4, 3), labels, iter([images])),
        mean=(0.1, 0.2, 1 / 3),
        std=(0.4, 0.5, 0.6),
        class_names=tuple("abcde"),
        notes=("a note",),
    )


def never() -> Recipe:
    raise AssertionError("it was in the cache")


def test_cache_gives_back_what_was_written(cache: Path) -> None:
    first, second = cached("made", "x", recipe), cached("made", "x", never)
    assert_same(first, second)
    assert_well_formed(second)
    assert second.digest == digest_of(second.train, second.test)
    assert (second.mean, second.notes, second.class_names) == (recipe().mean, ("a note",), tuple("abcde"))
    assert sorted(path.name for path in cache.iterdir()) == ["made-v1-x", "made-v1-x.lock"]
    assert cached("made", "y", lambda: recipe(2)).digest != first.digest


def test_mapped_arrays_go_to_torch_without_warning_or_writing_through() -> None:
    data = cached("made", "x", recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = torch.from_numpy(data.train.images)
    bank.zero_()
    assert cached("made", "x", never).train.images.min() == 1


def cut_short(entry: Path) -> None:
    path = entry / "train-images.npy"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(entry: Path) -> None:
    path = entry / "test-images.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def lose_labels(entry: Path) -> None:
    (entry / "test-labels.npy").unlink()


def lose_meta(entry: Path) -> None:
    (entry / "meta.json").unlink()


def break_meta(entry: Path) -> None:
    (entry / "meta.json").write_text('{"name": "made"')


def empty_meta(entry: Path) -> None:
    (entry / "meta.json").write_text("{}")


def swap_type(entry: Path) -> None:
    np.save(entry / "train-images.npy", np.zeros((5, 4, 4, 3)))


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_labels, lose_meta, break_meta, empty_meta, swap_type])
def test_damaged_entries_are_built_again(cache: Path, damage: Any) -> None:
    first = cached("made", "x", recipe)
    images = first.train.images.copy()
    damage(cache / "made-v1-x")
    built: list[int] = []
    again = cached("made", "x", lambda: (built.append(1), recipe())[1])
    assert built == [1]
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.train.images, images)
    cached("made", "x", never)


def test_copied_entry_is_checked_and_kept(cache: Path) -> None:
    """Copying changes the times of the files: they are read in full once, and found to be right."""
    cached("made", "x", recipe)
    for path in (cache / "made-v1-x").glob("*.npy"):
        os.utime(path, (1, 1))
    cached("made", "x", never)


def test_what_a_killed_writer_left_is_swept(cache: Path) -> None:
    left = cache / ".made-v1-x.partial"
    left.mkdir(parents=True)
    (left / "train-images.npy").write_bytes(b"half")
    cached("made", "x", recipe)
    assert not left.exists()


def test_failure_while_writing_leaves_nothing(cache: Path) -> None:
    def broken() -> Any:
        yield np.zeros((2, 4, 4, 3), np.uint8)
        raise InputError("a bad image")

    bad = replace(recipe(), train=Blocks((5, 4, 4, 3), np.arange(5), broken()))
    with pytest.raises(InputError, match="a bad image"):
        cached("made", "x", lambda: bad)
    assert [path.name for path in cache.iterdir()] == ["made-v1-x.lock"]
    cached("made", "x", recipe)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDCIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="cannot be written") as error:
        cached("made", "x", recipe)
    assert "FEDCIL_CACHE" in error.value.next


def test_full_disk_is_an_error_that_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "sync_file", full)
    with pytest.raises(InputError, match="No space left"):
        cached("made", "x", recipe)


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from fedcil.data.cache import Blocks, Recipe, cached
log = Path(sys.argv[1])
def blocks():
    for value in range(5):
        time.sleep(0.1)
        yield np.full((1, 4, 4, 1), value, np.uint8)
def prepare():
    with log.open("a") as file:
        file.write("built\\n")
    labels = np.arange(5)
    shape = (5, 4, 4, 1)
    return Recipe(name="made", train=Blocks(shape, labels, blocks()), test=Blocks(shape, labels, blocks()),
                  mean=(0.5,), std=(0.5,), class_names=tuple("abcde"))
print(cached("made", "x", prepare).digest)
"""


def test_two_processes_decode_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {child.communicate(timeout=60)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert log.read_text() == "built\n"
    assert len(digests) == 1


def test_fingerprint_sees_edits_moves_and_options(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    first = fingerprint([path], 8)
    assert fingerprint([path], 8) == first
    assert fingerprint([path], 16) != first
    path.write_text("22")
    assert fingerprint([path], 8) != first


# --- the real files, where they are ----------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("train", [True, False])
def test_real_cifar100_equals_torchvision(train: bool, real_data: RealData) -> None:
    root = real_data("cifar-100-python")
    data = load(name="cifar100", root=root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its reader is older than NumPy's
        from torchvision.datasets import CIFAR100

        theirs = CIFAR100(root, train=train)
    ours = data.train if train else data.test
    np.testing.assert_array_equal(ours.images, theirs.data)
    assert ours.labels.tolist() == theirs.targets
    assert list(data.class_names) == theirs.classes


@pytest.mark.data
def test_real_cifar100_coarse(real_data: RealData) -> None:
    root = real_data("cifar-100-python")
    fine, coarse = load(name="cifar100", root=root), load(name="cifar100_coarse", root=root)
    np.testing.assert_array_equal(fine.test.images, coarse.test.images)
    assert len(coarse.class_names) == 20
    assert np.bincount(coarse.train.labels).tolist() == [2500] * 20
    parents = {(int(one), int(other)) for one, other in zip(fine.train.labels, coarse.train.labels, strict=True)}
    assert len(parents) == 100  # each fine class has one coarse class
    beaver = fine.class_names.index("beaver")
    assert coarse.class_names[dict(parents)[beaver]] == "aquatic_mammals"


@pytest.mark.data
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_real_mnist_equals_torchvision(name: str, kind: str, real_data: RealData) -> None:
    root = real_data(kind)
    data = load(name=name, root=root)
    from torchvision import datasets

    for split, train in ((data.train, True), (data.test, False)):
        theirs = getattr(datasets, kind)(root, train=train)
        np.testing.assert_array_equal(split.images[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(split.labels, theirs.targets.numpy())
    scaled = data.train.images / np.float32(255)
    assert data.mean[0] == pytest.approx(scaled.mean(), abs=1e-3)
    assert data.std[0] == pytest.approx(scaled.std(), abs=1e-3)
