"""The real files, where they are: what torchvision reads from them, and what is known of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import load

RealData = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("array_cache")


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
