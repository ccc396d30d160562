"""FedER: what a client keeps, and how it trains with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from client.states import StateStore
from client.training import Recipe, local_sgd
from client.worker import Shared
from fedcil.keys import Key
from fedcil.losses import distillation
from fedcil.messages import Job
from fedcil.methods.base import Batch, Samples
from fedcil.methods.feder import FedER, herding, join
from fedcil.models.network import Network, state_of
from fedcil.stream import Task
from fedcil.tables import TrainingSection
from fedcil.tensors import Tensors, content_hash


def features(count: int, width: int, seed: int) -> Tensor:
    draws = torch.randn(count, width, generator=Key(seed).torch(), dtype=torch.float64)
    return F.normalize(draws, dim=1)


def stored(labels: list[int], seed: int = 0) -> Samples:
    """Grey images of 2 x 2 pixels, every one different with all but certainty."""
    generator = Key(seed).torch()
    images = torch.randint(1, 256, (len(labels), 2, 2, 1), generator=generator, dtype=torch.uint8)
    return Samples(images, torch.tensor(labels, dtype=torch.int64))


def floats(images: Tensor) -> Tensor:
    return images.float().permute(0, 3, 1, 2) / 255


def remember(small: Any, options: FedER, own: Samples, kept: Tensors | None) -> Tensors:
    memory = options.build().client_memory
    assert memory is not None
    return memory.update(small.linear(torch.eye(4)), own, kept, Task(0, 0, 1), floats)


def test_a_class_counts_once_whoever_trains_on_it_again(small: Any) -> None:
    """A client that stays behind with a task's samples has their classes in its memory and before it."""
    options = FedER(memory=8)
    own = stored([0] * 10 + [1] * 10)
    first = remember(small, options, own, None)
    again = remember(small, options, own, first)
    for kept in (first, again):
        assert kept["labels"].tolist() == [0] * 4 + [1] * 4


# --- herding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_herding_picks_what_brings_the_mean_nearest(seed: int) -> None:
    """iCaRL, algorithm 4, by trying out each image that is left."""
    x = features(9, 4, seed)
    mean, picked = x.mean(0), []
    for size in range(1, 8):
        distance = {i: (mean - x[[*picked, i]].sum(0) / size).norm().item() for i in range(9) if i not in picked}
        picked.append(min(distance, key=lambda i: distance[i]))
    assert herding(x, 7).tolist() == picked


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 20), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_shorter_list_is_the_start_of_a_longer_one(count: int, width: int, seed: int) -> None:
    """And each image is picked at most once, so that shrinking a memory is cutting its lists."""
    x = features(count, width, seed)
    longest = herding(x, count).tolist()
    assert sorted(longest) == list(range(count))
    for m in range(count):
        assert herding(x, m).tolist() == longest[:m]


def test_images_that_are_all_alike_are_picked_once_each() -> None:
    assert sorted(herding(torch.ones(5, 3), 4).tolist()) == [0, 1, 2, 3]


# --- memory -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=15), min_size=1, max_size=5),
    size=st.integers(1, 30),
)
def test_a_memory_is_never_too_large_and_holds_own_past_samples_only(
    small: Any, tasks: list[list[int]], size: int
) -> None:
    """Task t has the classes 3 t .. 3 t + 2. Each image kept was this client's, with that label, and once."""
    options, kept = FedER(memory=size), None
    had: list[tuple[int, bytes]] = []
    for t, labels in enumerate(tasks):
        own = stored([3 * t + label for label in labels], seed=t)
        had += [(int(y), x.numpy().tobytes()) for x, y in zip(own.images, own.labels, strict=True)]
        kept = remember(small, options, own, kept)
        rest = list(had)
        for x, y in zip(kept["images"], kept["labels"], strict=True):
            rest.remove((int(y), x.numpy().tobytes()))
        assert len(kept["labels"]) <= size
        assert kept["images"].dtype == torch.uint8


def test_a_memory_of_fewer_images_than_classes_keeps_those_of_the_older_ones(small: Any) -> None:
    first = remember(small, FedER(memory=3), stored([0] * 5 + [1] * 5), None)
    assert first["labels"].tolist() == [0, 1]
    second = remember(small, FedER(memory=3), stored([2] * 5 + [3] * 5, seed=1), first)
    assert second["labels"].tolist() == [0, 1, 2]
    third = remember(small, FedER(memory=3), stored([4] * 5, seed=2), second)
    assert third["labels"].tolist() == [0, 1, 2]


def test_who_stays_behind_trains_on_each_image_once() -> None:
    """Its own samples are those that its exemplars were chosen from."""
    own = stored([0] * 4)
    kept = {"images": torch.cat([own.images[:2], stored([1], seed=1).images]), "labels": torch.tensor([0, 0, 1])}
    joined = join(own, kept)
    assert joined.labels.tolist() == [0, 0, 0, 0, 1]
    assert len(joined.images.flatten(1).unique(dim=0)) == 5


def test_each_class_gets_its_share_and_old_lists_are_cut(small: Any) -> None:
    """12 images: 6 for each of 2 classes, then 3 for each of 4; the first three of a list stay."""
    options = FedER(memory=12)
    first = remember(small, options, stored([0] * 10 + [1] * 10), None)
    assert torch.bincount(first["labels"]).tolist() == [6, 6]
    second = remember(small, options, stored([2] * 10 + [3] * 2, seed=1), first)
    assert torch.bincount(second["labels"]).tolist() == [3, 3, 3, 2]
    for label in (0, 1):
        old, new = (kept["images"][kept["labels"] == label] for kept in (first, second))
        assert torch.equal(new, old[:3])


def test_exemplars_are_herded_on_normalised_features(small: Any) -> None:
    """On the pixels as they are, dark images would be picked that point the wrong way."""
    own = stored([0] * 60)
    kept = remember(small, FedER(memory=8), own, None)
    pixels = floats(own.images).flatten(1)
    chosen = herding(F.normalize(pixels, dim=1), 8)
    assert torch.equal(kept["images"], own.images[chosen])
    assert chosen.tolist() != herding(pixels, 8).tolist()


def test_a_memory_without_limit_is_all_data_so_far(small: Any) -> None:
    """What the oracle's clients train on."""
    first, second = stored([0] * 7 + [1] * 5), stored([2] * 6, seed=1)
    kept = remember(small, FedER(memory=10_000), first, None)
    both = join(second, kept)

    def as_set(samples: Samples) -> list[tuple[int, bytes]]:
        pairs = zip(samples.labels, samples.images, strict=True)
        return sorted((int(y), x.numpy().tobytes()) for y, x in pairs)

    assert as_set(both) == sorted(as_set(first) + as_set(second))
    assert torch.equal(both.images[:6], second.images)


def test_a_client_that_joins_late_trains_on_its_own_samples() -> None:
    own = stored([2, 3])
    assert join(own, None) is own


def test_a_memory_survives_its_file(small: Any, tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    kept = remember(small, FedER(memory=6), stored([0] * 5 + [1] * 5), None)
    loaded = store.load(store.save(kept))
    assert content_hash(loaded) == content_hash(kept)
    again = stored([2] * 4, seed=1)
    one, other = (remember(small, FedER(memory=6), again, memory) for memory in (kept, loaded))
    assert content_hash(one) == content_hash(other)


def test_exemplars_come_from_a_file_to_where_the_samples_are(tmp_path: Path) -> None:
    """States are loaded on the CPU; samples may be on a GPU, for which the meta device stands in here."""
    store = StateStore(tmp_path)
    name = store.save({"images": stored([0]).images, "labels": stored([0]).labels})
    shared: Any = SimpleNamespace(states=store, device=torch.device("meta"))
    kept = Shared.kept(shared, Job(0, 0, name))
    assert kept is not None
    assert kept["images"].device.type == kept["labels"].device.type == "meta"


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_the_loss_is_cross_entropy_over_all_classes_plus_distillation_of_old_ones(small: Any) -> None:
    model, teacher = small.frozen(5), small.frozen(3, seed=3)
    batch = Batch(small.images(6), torch.tensor([0, 1, 2, 3, 4, 4]), small.second, ())
    logits = model(batch.images)
    plain = F.cross_entropy(logits, batch.labels)
    old = distillation(teacher(batch.images), logits[:, :3], 1.5)
    loss = FedER(kd_weight=0.7, temperature=1.5).build().loss
    assert loss(model, teacher, batch, None).item() == pytest.approx((plain + 0.7 * old).item(), rel=1e-13)
    assert loss(model, None, batch, None).item() == pytest.approx(plain.item(), rel=1e-13)
    off = FedER(kd_weight=0.0).build().loss
    assert off(model, teacher, batch, None).item() == pytest.approx(plain.item(), rel=1e-13)


def trained(small: Any, options: FedER) -> Network:
    model: Network = small.network(5)
    training = TrainingSection(epochs=1, batch_size=4)
    teacher = small.frozen(3, seed=3)
    recipe = Recipe(options.build(), teacher, small.second, training, 0.1, lambda images, index, _: images[index])
    local_sgd(model, recipe, Samples(small.images(10), torch.arange(10) % 5), Key(0))
    return model


@pytest.mark.parametrize("changes", [{"kd_weight": 2.0}, {"temperature": 3.0}])
def test_each_setting_of_the_loss_changes_training(small: Any, changes: dict[str, float]) -> None:
    one, other = (trained(small, FedER(**options)) for options in ({}, changes))  # type: ignore[arg-type]
    assert content_hash(state_of(one)) != content_hash(state_of(other))


def test_clients_train_and_then_all_of_them_remember() -> None:
    train, remember_ = FedER().build().phases(Task(0, 0, 2), 7)
    assert (train.work, train.rounds, train.who) == ("train", 7, "sampled")
    assert (remember_.work, remember_.rounds, remember_.who) == ("remember", 1, "all")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_of_new_classes_that_do_not_all_fit_the_first_are_kept(small: Any, size: int) -> None:
    """As they came in the stream, and not as a set of numbers happens to be walked through."""
    kept = remember(small, FedER(memory=size), stored([9, 16, 7, 8] * 3), None)
    assert sorted(kept["labels"].tolist()) == [7, 8, 9, 16][:size]
