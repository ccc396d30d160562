"""Data sets that are trees of image files: tiny ImageNet, folders by class, Super-ImageNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_files import assert_same, assert_well_formed, load
from PIL import Image

from fedcil.data import Dataset, load_dataset, super_imagenet
from fedcil.errors import DataMissing, InputError, ScenarioError
from fedcil.tables import DataSection

pytestmark = pytest.mark.usefixtures("array_cache")


def save_image(path: Path, grey: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = grey if mode == "L" else (grey, grey // 2, 255 - grey)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three classes that are not listed in alphabetical order, two training and one validation image each."""
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
    assert data.test.labels.tolist() == [2, 0, 1]  # as val_annotations.txt has them
    assert data.class_names == ("goldfish", "n02", "tench")  # n01, n02, n03: as torchvision's ImageFolder numbers them
    assert data.mean == (0.485, 0.456, 0.406)
    assert np.abs(data.train.images[:, 5, 5, 0].astype(int) - [40, 41, 80, 81, 0, 1]).max() <= 2
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


def test_folder_with_a_link_to_nowhere(tree: Path) -> None:
    link = tree / "train/cat/lost.png"
    link.symlink_to(tree / "gone.png")
    with pytest.raises(InputError, match="cannot be read: No such file") as error:
        load(name="folder", root=tree)
    assert error.value.where == str(link)


def test_folder_that_may_not_be_looked_into(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(InputError, match="cannot be read: Permission denied") as error:
        load(name="folder", root=tree)
    assert error.value.where == str(tree / "train")


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
    path = tmp_path / "mapping.yaml"
    path.write_text(yaml.safe_dump(MAPPING))
    assert_same(load_super(imagenet, path), load_super(imagenet, mapping))


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
    with pytest.raises(InputError, match="no home folder ~nosuchuser") as home:
        load_super(imagenet, Path("~nosuchuser/mapping.json"))
    assert "data.mapping" in home.value.next
    (imagenet / "imagenet/val/n4").rename(imagenet / "elsewhere")
    with pytest.raises(DataMissing, match="1 class folders") as error:
        load_super(imagenet, mapping)
    assert error.value.where.endswith("val/n4")
    with pytest.raises(DataMissing):
        load_super(tmp_path, mapping)
