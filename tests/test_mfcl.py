"""MFCL on the client: the merged step against the authors' order of passes, the loss terms, the replay.

scenarios/benchmarks/authors_order.py is the twin; all comparisons are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from client.training import Recipe, local_sgd
from fedcil.errors import ScenarioError
from fedcil.experiment import open_experiment
from fedcil.keys import Key
from fedcil.methods import mfcl
from fedcil.methods.base import Batch, Method, Samples
from fedcil.methods.mfcl import MFCL, new_class_loss
from fedcil.methods.replay import BATCH, Replay, draw_pool
from fedcil.models import Architecture
from fedcil.models.network import Backbone, Network, grow_head, set_norm_updates, snapshot, state_of
from fedcil.scenario_file import load_scenario
from fedcil.stream import Task
from fedcil.tables import ModelSection, TrainingSection
from fedcil.tensors import content_hash

Step = tuple[Tensor, Tensor, Tensor]

BASE: dict[str, Any] = {"synthetic": 9, "latent": 5, "generator_width": 4, "w_ft": 0.8, "w_kd": 0.6}


def settings(**changes: Any) -> MFCL:
    return MFCL(**{**BASE, **changes})


def teacher_of(small: Any, name: str = "cnn") -> Network:
    """Random, but balanced: it puts generated images into different classes."""
    teacher: Network = small.frozen(3, name, seed=3)
    latents = torch.randn(100, 5, generator=Key(0).at("balance").torch())
    teacher.head.bias -= teacher(small.generator()(latents)).mean(0)
    return teacher


def replay_of(small: Any, options: MFCL, name: str = "cnn") -> Replay:
    """What the product prepares from the payload: a teacher of 3 classes and a generator, both random."""
    payload = small.payload(teacher_of(small, name), small.generator())
    prepared = options.build().prepare(small.compute(name), small.second, payload, Key(4))
    assert isinstance(prepared, Replay)
    return prepared


def batch_of(small: Any, count: int = 6, seed: int = 0) -> Batch:
    return Batch(small.images(count, seed), small.labels(count, small.second, seed), small.second, ())


@dataclass
class Recorder:
    """Writes down each step's real images, labels and draws while the product trains."""

    labels: Tensor
    steps: list[Step] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # augmented, not yet in a step
    indices: list[Tensor] = field(default_factory=list)

    def augment(self, stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """As good as any augmentation: each image times its own random number."""
        factors = 1 + 0.1 * torch.randn(len(index), 1, 1, 1, generator=generator)
        augmented = stored[index] * factors
        self.images += augmented
        self.indices += index
        return augmented

    def watch(self, method: Method) -> Method:
        def draw(prepared: object, real: int, task: Task, key: Key) -> Any:
            draws = method.draw(prepared, real, task, key)
            labels = self.labels[torch.stack(self.indices[:real])]
            self.steps.append((torch.stack(self.images[:real]), labels, draws))
            del self.images[:real], self.indices[:real]
            return draws

        return replace(method, draw=draw)


TRAINING = TrainingSection(epochs=3, batch_size=4, batches="ragged", weight_decay=0.01)
"""11 samples: batches of 4, 4 and 3, three times."""


def train(small: Any, model: Network, options: MFCL, replay: Replay, seed: int = 0) -> list[Step]:
    """Nine steps of the product's local SGD in place; returns what they were made on."""
    recorder = Recorder(small.labels(11, small.second))
    recipe = Recipe(recorder.watch(options.build()), replay, small.second, TRAINING, 0.1, recorder.augment)
    local_sgd(model, recipe, Samples(small.images(11), recorder.labels), Key(seed))
    return recorder.steps


def differences(one: nn.Module, other: nn.Module) -> tuple[float, float]:
    """Largest difference of parameters and of running statistics."""

    def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max((a[name] - b[name]).abs().max().item() for name in a)

    statistics = [{n: t for n, t in m.named_buffers() if t.is_floating_point()} for m in (one, other)]
    return largest(*(dict(m.named_parameters()) for m in (one, other))), largest(*statistics)


def split_student(model: Network, real: Callable[[int], int]) -> None:
    """The mistake to catch: real and synthetic images in student passes of their own."""
    whole = model.features

    def features(images: Tensor) -> Tensor:
        cut = real(len(images))
        return torch.cat([whole(images[:cut]), whole(images[cut:])])

    model.features = features  # type: ignore[method-assign]


# --- the merged step and the authors' ---------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ["cnn", "resnet8"])
@pytest.mark.usefixtures("float64")
def test_the_merged_step_has_the_gradients_of_the_authors_order(
    small: Any, authors_order: ModuleType, name: str, updates: int
) -> None:
    options = settings(bn_updates=updates)
    method, replay, batch = options.build(), replay_of(small, options, name), batch_of(small)
    ours = small.network(5, name, seed=7)
    set_norm_updates(ours, method.norm_updates(small.second))
    ours.train()
    theirs = deepcopy(ours)
    set_norm_updates(theirs, 1)
    draws = method.draw(replay, len(batch.images), small.second, Key(1))

    loss = method.loss(ours, replay, batch, draws)
    loss.backward()
    twin = authors_order.loss(
        theirs,
        replay.teacher,
        replay.generator,
        (batch.images, batch.labels, draws),
        w_ft=0.8,
        w_kd=0.6,
        updates=updates,
    )
    twin.backward()

    assert loss.item() == pytest.approx(twin.item(), rel=1e-13)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-12)
    assert differences(ours, theirs)[1] <= 1e-12


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ["cnn", "resnet8"])
@pytest.mark.usefixtures("float64")
def test_local_training_ends_where_the_authors_order_ends(
    small: Any, authors_order: ModuleType, name: str, updates: int
) -> None:
    """Nine steps with weight decay, short last batches and new latents each time."""
    options = settings(bn_updates=updates)
    replay = replay_of(small, options, name)
    ours = small.network(5, name, seed=7)
    theirs, start = deepcopy(ours), deepcopy(ours)

    steps = train(small, ours, options, replay)
    common = {"lr": 0.1, "weight_decay": 0.01, "w_ft": 0.8, "w_kd": 0.6}
    authors_order.train(theirs, replay.teacher, replay.generator, steps, **common, updates=updates)

    assert sorted(len(images) for images, _, _ in steps) == [3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert len({content_hash({"latents": latents}) for _, _, latents in steps}) == 9
    assert {latents.shape for _, _, latents in steps} == {(9, 5)}  # a short batch has no fewer
    parameters, statistics = differences(ours, theirs)
    assert parameters <= 1e-12
    assert statistics <= 1e-12
    moved, shifted = differences(ours, start)
    assert moved > 0.1
    assert shifted > 0.1


@pytest.mark.usefixtures("float64")
def test_a_student_split_into_real_and_synthetic_fails_the_comparison(small: Any, authors_order: ModuleType) -> None:
    """The teeth of the tests above: batch statistics must be those of the mixture."""
    options = settings(bn_updates=2)
    replay = replay_of(small, options)
    ours = small.network(5, seed=7)
    theirs = deepcopy(ours)
    split_student(ours, lambda both: both - 9)
    steps = train(small, ours, options, replay)
    common = {"lr": 0.1, "weight_decay": 0.01, "w_ft": 0.8, "w_kd": 0.6}
    authors_order.train(theirs, replay.teacher, replay.generator, steps, **common, updates=2)
    parameters, statistics = differences(ours, theirs)
    assert parameters > 1e-3
    assert statistics > 1e-3


@pytest.mark.parametrize(("product", "twin"), [(1, 2), (2, 1)])
@pytest.mark.usefixtures("float64")
def test_the_number_of_updates_shows_in_the_running_statistics_alone(
    small: Any, authors_order: ModuleType, product: int, twin: int
) -> None:
    """Gradients in train mode do not read them."""
    options = settings(bn_updates=product)
    replay = replay_of(small, options)
    ours = small.network(5, seed=7)
    theirs = deepcopy(ours)
    steps = train(small, ours, options, replay)
    common = {"lr": 0.1, "weight_decay": 0.01, "w_ft": 0.8, "w_kd": 0.6}
    authors_order.train(theirs, replay.teacher, replay.generator, steps, **common, updates=twin)
    parameters, statistics = differences(ours, theirs)
    assert parameters <= 1e-12
    assert statistics > 1e-3


@pytest.mark.usefixtures("float64")
def test_a_pool_drawn_from_the_same_latents_gives_the_same_step(small: Any) -> None:
    """Eval mode: an image and its old-class logits do not depend on the batch in which they were made."""
    options = settings()
    fresh, batch = replay_of(small, options), batch_of(small)
    latents: list[Tensor] = []
    hook = fresh.generator.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    pool = draw_pool(fresh.generator, fresh.teacher, 300, Key(2))
    hook.remove()
    pooled = Replay(fresh.teacher, fresh.generator, pool)
    assert [len(part) for part in latents] == [256, 44]
    assert pool.images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(latents[0][0], latents[1][0])
    places = options.build().draw(pooled, 6, small.second, Key(3))

    networks = [small.network(5, seed=7) for _ in range(2)]
    loss = options.build().loss
    one = loss(networks[0].train(), pooled, batch, places)
    two = loss(networks[1].train(), fresh, batch, torch.cat(latents)[places])
    one.backward()
    two.backward()
    assert one.item() == pytest.approx(two.item(), rel=1e-12)
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    assert differences(*networks)[1] <= 1e-12


def test_one_pass_of_student_and_of_teacher(small: Any) -> None:
    """mfcl section 7: all there is to gain; with a pool the teacher sees real images only."""
    counts: dict[str, list[int]] = {}
    for pool in (0, 16):
        options = settings(pool=pool)
        replay, model = replay_of(small, options), small.network(5)
        named = {"student": model.backbone, "teacher": replay.teacher.backbone, "made": replay.generator}
        for name, module in named.items():
            seen = counts.setdefault(f"{name} {pool}", [])
            module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        draws = options.build().draw(replay, 6, small.second, Key(0))
        options.build().loss(model, replay, batch_of(small), draws)
    assert counts == {
        "student 0": [15],
        "teacher 0": [15],
        "made 0": [9],
        "student 16": [15],
        "teacher 16": [6],
        "made 16": [],
    }


# --- terms of the loss ------------------------------------------------------------------------------------

NO_TERMS = {"w_ce": 0.0, "w_ft": 0.0, "w_kd": 0.0}


def gradients(small: Any, model: Network | None = None, **weights: float) -> tuple[Tensor, Network]:
    """The loss with these weights (others 0), and the network with its gradients."""
    options = settings(**{**NO_TERMS, **weights})
    replay = replay_of(small, options)
    model = model or small.network(5, seed=7)
    draws = options.build().draw(replay, 6, small.second, Key(1))
    loss = options.build().loss(model.train(), replay, batch_of(small), draws)
    loss.backward()
    return loss.detach(), model


@pytest.mark.usefixtures("float64")
def test_the_label_term_reaches_features_and_new_rows_only(small: Any) -> None:
    _, model = gradients(small, w_ce=1.0)
    assert all(p.grad.abs().max() > 0 for p in model.backbone.parameters())  # type: ignore[union-attr]
    for head in (model.head.weight.grad, model.head.bias.grad):
        assert head is not None
        assert head[:3].eq(0).all()
        assert head[3:].ne(0).any()


@pytest.mark.usefixtures("float64")
def test_the_fine_tuning_term_reaches_the_whole_head_and_no_feature(small: Any) -> None:
    _, model = gradients(small, w_ft=1.0)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad.abs().amin(1).min() > 0  # type: ignore[union-attr]


@pytest.mark.usefixtures("float64")
def test_the_distillation_term_reaches_the_features_and_no_head(small: Any) -> None:
    _, model = gradients(small, w_kd=1.0)
    assert model.head.weight.grad is None
    assert model.head.bias.grad is None
    assert all(p.grad.abs().max() > 0 for p in model.backbone.parameters())  # type: ignore[union-attr]


def mixed(small: Any, replay: Replay, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, teacher features and labels of the step by hand."""
    batch = batch_of(small)
    with torch.no_grad():
        synthetic = replay.generator(draws)
        both = torch.cat([batch.images, synthetic])
        pseudo = replay.teacher(synthetic).argmax(1)
        return both, replay.teacher.backbone(both), torch.cat([batch.labels, pseudo])


@pytest.mark.usefixtures("float64")
def test_each_term_is_its_formula(small: Any) -> None:
    """Section 3's table, one row after another, with log-probabilities written out."""
    options = settings()
    replay = replay_of(small, options)
    draws = options.build().draw(replay, 6, small.second, Key(1))
    both, past, labels = mixed(small, replay, draws)
    model = small.network(5, seed=7).train()
    features = deepcopy(model).backbone(both)
    logits = features @ model.head.weight.T + model.head.bias
    new = logits[:6, 3:].log_softmax(1)
    ce = -sum(new[i, labels[i] - 3] for i in range(6)) / 6
    everything = logits.log_softmax(1)
    ft = -sum(everything[i, labels[i]] for i in range(15)) / 15
    kd = ((features - past) @ replay.teacher.head.weight.T).pow(2).sum() / (15 * 3)
    for name, value in {"w_ce": ce, "w_ft": ft, "w_kd": kd}.items():
        assert gradients(small, **{name: 1.0})[0].item() == pytest.approx(value.item(), rel=1e-12)  # type: ignore[union-attr]
    total = gradients(small, w_ce=2.0, w_ft=0.5, w_kd=3.0)[0].item()
    assert total == pytest.approx((2 * ce + 0.5 * ft + 3 * kd).item(), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_distillation_does_not_see_the_teachers_bias(small: Any) -> None:
    """b' is in both logits."""
    options = settings(**{**NO_TERMS, "w_kd": 1.0})
    values = []
    for shift in (0.0, 100.0):
        replay = replay_of(small, options)
        replay.teacher.head.bias += shift
        draws = options.build().draw(replay, 6, small.second, Key(1))
        loss = options.build().loss(small.network(5, seed=7).train(), replay, batch_of(small), draws)
        values.append(loss.item())
    assert values[0] == pytest.approx(values[1], rel=1e-11)


@pytest.mark.usefixtures("float64")
def test_a_student_that_is_the_teacher_has_no_distillation_loss(small: Any) -> None:
    """With the head grown and in the same mode; in train mode batch statistics make a difference."""
    options = settings(**{**NO_TERMS, "w_kd": 1.0})
    replay = replay_of(small, options)
    grown = grow_head(state_of(teacher_of(small)), 5, Key(0).torch())
    model = small.compute().frozen(grown)
    draws = options.build().draw(replay, 6, small.second, Key(1))
    assert options.build().loss(model, replay, batch_of(small), draws).item() <= 1e-24  # the teacher's norms are folded
    assert options.build().loss(model.train(), replay, batch_of(small), draws).item() > 1e-3


@pytest.mark.parametrize(("term", "moves"), [("w_ce", False), ("w_ft", True), ("w_kd", False)])
@pytest.mark.usefixtures("float64")
def test_only_fine_tuning_sees_a_shift_of_the_old_logits(small: Any, term: str, moves: bool) -> None:
    values = []
    for shift in (0.0, 2.0):
        model = small.network(5, seed=7)
        with torch.no_grad():
            model.head.bias[:3] += shift
        values.append(gradients(small, model, **{term: 1.0})[0].item())
    assert (values[0] != values[1]) == moves


def test_terms_of_weight_0_are_not_computed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's head serves L_FT alone (L_CE takes its new rows), a second pass of the old head L_KD."""

    def count(**weights: float) -> tuple[int, int, int]:
        options = settings(**{**NO_TERMS, **weights})
        replay, model = replay_of(small, options), small.network(5)
        calls = {"ce": 0, "ft": 0, "kd": 0}

        def add(name: str) -> Callable[..., None]:
            def hook(*arguments: object) -> None:
                calls[name] += 1

            return hook

        def counted(*arguments: Any) -> Tensor:
            calls["ce"] += 1
            return new_class_loss(*arguments)

        model.head.register_forward_hook(add("ft"))
        replay.teacher.head.register_forward_hook(add("kd"))
        monkeypatch.setattr(mfcl, "new_class_loss", counted)
        draws = options.build().draw(replay, 6, small.second, Key(1))
        options.build().loss(model, replay, batch_of(small), draws)
        return calls["ce"], calls["ft"], calls["kd"] - 1  # the labels take one

    assert count(w_ce=1.0) == (1, 0, 0)
    assert count(w_ft=1.0) == (0, 1, 0)
    assert count(w_kd=1.0) == (0, 0, 1)


def test_in_the_first_task_there_is_nothing_but_cross_entropy(small: Any) -> None:
    """No payload: no teacher, no generator, no draws, one update of the running statistics."""
    method = settings(bn_updates=2, pool=8).build()
    assert method.prepare(small.compute(), small.first, None, Key(0)) is None
    assert method.draw(None, 6, small.first, Key(0)) is None
    assert method.norm_updates(small.first) == 1
    assert method.norm_updates(small.second) == 2
    batch = Batch(small.images(6), small.labels(6, small.first), small.first, ())
    one, other = small.network(3).train(), small.network(3).train()
    loss = method.loss(one, None, batch, None)
    plain = F.cross_entropy(other(batch.images), batch.labels)
    loss.backward()
    plain.backward()
    assert torch.equal(loss, plain)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_in_bf16_the_loss_and_its_gradients_are_float32(small: Any) -> None:
    options, compute = settings(), small.compute("cnn", "bf16")
    payload = small.payload(teacher_of(small), small.generator())
    replay = options.build().prepare(compute, small.second, payload, Key(4))
    model = compute.network(5)
    for name, tensor in state_of(small.network(5)).items():
        state_of(model)[name].copy_(tensor)
    draws = options.build().draw(replay, 6, small.second, Key(1))
    both, past = replay.mix(small.images(6), draws)
    loss = options.build().loss(model, replay, batch_of(small), draws)
    loss.backward()
    assert {both.dtype, past.dtype, loss.dtype} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}  # type: ignore[union-attr]


# --- the replay -------------------------------------------------------------------------------------------


def test_teacher_and_generator_are_what_the_payload_says(small: Any) -> None:
    teacher, generator = teacher_of(small), small.generator()
    replay = replay_of(small, settings())
    images = small.images(6)
    torch.testing.assert_close(replay.teacher(images), teacher.eval()(images), rtol=1e-4, atol=1e-5)
    assert content_hash(state_of(replay.generator)) == content_hash(state_of(generator))
    for network in (replay.teacher, replay.generator):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("pool", [0, 16])
def test_local_training_moves_the_student_and_nothing_else(small: Any, pool: int) -> None:
    options = settings(pool=pool)
    replay, model = replay_of(small, options), small.network(5)

    def frozen() -> tuple[str, ...]:
        parts = [state_of(replay.teacher), state_of(replay.generator)]
        if replay.pool:
            parts.append({"images": replay.pool.images, "past": replay.pool.past})
        return tuple(content_hash(part) for part in parts)

    before, start = frozen(), snapshot(model)
    train(small, model, options, replay)
    assert frozen() == before
    assert all(p.grad is None for p in [*replay.teacher.parameters(), *replay.generator.parameters()])
    for name, tensor in state_of(model).items():
        assert not torch.equal(tensor, start[name]), name


def test_real_images_come_first_and_the_teacher_labels_the_others(small: Any) -> None:
    replay = replay_of(small, settings())
    draws = settings().build().draw(replay, 6, small.second, Key(1))
    real = small.images(6)
    both, past = replay.mix(real, draws)
    assert torch.equal(both[:6], real)
    torch.testing.assert_close(both[6:], replay.generator(draws))
    torch.testing.assert_close(past, replay.teacher(both))
    assert past.shape == (15, 3)
    assert len(past[6:].argmax(1).unique()) > 1  # or the tests of this file would not see wrong labels
    assert not both.requires_grad
    assert not past.requires_grad


def test_draws_come_from_their_key_alone(small: Any) -> None:
    state = torch.get_rng_state()
    for options in (settings(), settings(pool=64)):
        method, replay = options.build(), replay_of(small, options)
        one, same, other = (method.draw(replay, 6, small.second, Key(0).at(step)) for step in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_latents_are_standard_normal(small: Any) -> None:
    """45,000 numbers: mean off by at most 5 / sqrt(n), variance by 5 sqrt(2 / n)."""
    options = settings(synthetic=9000)
    draws = options.build().draw(replay_of(small, options), 6, small.second, Key(0))
    assert draws.mean().abs() < 5 / math.sqrt(45_000)
    assert (draws.var() - 1).abs() < 5 * math.sqrt(2 / 45_000)


def test_a_pool_is_drawn_once_and_covers_its_places(small: Any) -> None:
    """Places are uniform with replacement: of 4000 draws from 20 each place gets some 200."""
    options = settings(pool=20, synthetic=4000)
    replay = replay_of(small, options)
    assert replay.pool is not None
    assert replay.pool.images.shape == (20, 3, 8, 8)
    assert replay.pool.past.shape == (20, 3)
    torch.testing.assert_close(replay.pool.past, replay.teacher(replay.pool.images))
    assert len({content_hash({"x": image}) for image in replay.pool.images}) == 20
    places = options.build().draw(replay, 6, small.second, Key(0))
    counts = torch.bincount(places, minlength=20)
    assert len(counts) == 20
    assert counts.min() > 120
    same = replay_of(small, options).pool
    assert same is not None
    assert torch.equal(same.images, replay.pool.images)


@pytest.mark.parametrize("size", [1, BATCH, BATCH + 1])
def test_a_pool_of_any_size_is_full(small: Any, size: int) -> None:
    teacher = teacher_of(small)
    pool = draw_pool(small.generator(), teacher, size, Key(0))
    assert len(pool.images) == len(pool.past) == size
    torch.testing.assert_close(pool.past[-1:], teacher(pool.images[-1:]))
    assert len({content_hash({"x": image}) for image in pool.images}) == size


def test_latents_of_a_pool_are_standard_normal_and_no_graph_is_kept(small: Any) -> None:
    """The images of a generator that does nothing are its latents: 45,000 numbers, bounds as above."""
    bare: Any = nn.Identity()
    bare.latent = 100
    pool = draw_pool(bare, small.linear(torch.ones(2, 100)), 450, Key(0))
    assert pool.images.mean().abs() < 5 / math.sqrt(45_000)
    assert (pool.images.var() - 1).abs() < 5 * math.sqrt(2 / 45_000)
    assert not pool.past.requires_grad


@pytest.mark.parametrize(
    ("ratio", "real", "task", "expected"),
    [
        (1.0, 32, Task(1, 2, 4), 32),  # as many for each old class as real ones for each new class
        (1.0, 32, Task(4, 8, 10), 128),
        (0.5, 32, Task(4, 8, 10), 64),
        (1.0, 5, Task(1, 3, 5), 8),  # 7.5, rounded
        (0.01, 2, Task(1, 2, 4), 1),  # never none
    ],
)
def test_synthetic_images_in_proportion_to_classes(ratio: float, real: int, task: Task, expected: int) -> None:
    assert settings(synthetic=None, synthetic_ratio=ratio).synthetic_images(real, task) == expected


@pytest.mark.parametrize("real", [2, 32])
def test_a_fixed_number_of_synthetic_images_does_not_shrink(real: int) -> None:
    assert settings().synthetic_images(real, Task(1, 3, 5)) == 9


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"synthetic": 10},
        {"synthetic": None, "synthetic_ratio": 2.0},
        {"pool": 16},
        {"bn_updates": 2},
        {"w_ce": 0.5},
        {"w_ft": 0.5},
        {"w_kd": 0.1},
    ],
)
def test_each_setting_of_the_client_changes_training(small: Any, changes: dict[str, Any]) -> None:
    hashes = []
    for options in (settings(), settings(), settings(**changes)):
        model = small.network(5, seed=7)
        train(small, model, options, replay_of(small, options))
        hashes.append(content_hash(state_of(model)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_presets_are_the_table_of_the_specification() -> None:
    """mfcl sections 6.2 and 8."""

    def preset(name: str) -> MFCL:
        method = load_scenario({"method": {"name": "mfcl", "preset": name}}).method
        assert isinstance(method, MFCL)
        return method

    code, paper = preset("authors-code"), preset("paper")
    common = {
        "synthetic": 128,
        "synthetic_ratio": None,
        "pool": 0,
        "w_ce": 1.0,
        "w_ft": 1.0,
        "w_kd": 0.1,
        "generator_batch": 128,
        "generator_lr": 1e-3,
        "continue_generator": True,
        "w_label": 1.0,
        "w_ie": 1.0,
        "w_prior": 1e-3,
        "w_act": 0.0,
    }
    authors = {"bn_updates": 2, "latent": 1000, "steps": 100, "w_bn": 50.0}
    papers = {"bn_updates": 1, "latent": 200, "steps": 5000, "w_bn": 75.0}
    assert common | authors | {"temperature": 1000.0, "entropy": "normalised"} == {
        name: getattr(code, name) for name in [*common, *authors, "temperature", "entropy"]
    }
    assert common | papers | {"temperature": 1.0, "entropy": "plain"} == {
        name: getattr(paper, name) for name in [*common, *papers, "temperature", "entropy"]
    }


def test_a_given_value_wins_over_the_preset() -> None:
    method = load_scenario({"method": {"name": "mfcl", "preset": "paper", "steps": 7}}).method
    assert isinstance(method, MFCL)
    assert (method.steps, method.latent) == (7, 200)


@pytest.mark.parametrize("given", [{}, {"synthetic": 8, "synthetic_ratio": 1.0}])
def test_synthetic_images_are_given_as_a_number_or_a_ratio(given: dict[str, float]) -> None:
    with pytest.raises(ScenarioError, match=r"one of method\.synthetic"):
        load_scenario({"method": {"name": "mfcl", **given}})


class NoNorm(Backbone):
    """Somebody's own backbone."""

    def __init__(self, channels: int, _: ModelSection) -> None:
        super().__init__(channels)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("options", "model", "word"),
    [
        ({"upsamplings": 4}, "cnn", "4 up-samplings"),
        ({"upsamplings": 3, "generator_batch": 1}, "cnn", "first maps have one pixel"),
        ({}, f"{__name__}:NoNorm", "no batch norm"),
    ],
)
def test_a_generator_that_cannot_be_trained_is_refused_before_any_training(
    options: dict[str, int], model: str, word: str
) -> None:
    """8 pixels cannot be halved four times; without batch norm there is nothing to hold on to. The boundary where that
    would be met comes after a whole task.
    """
    scenario = {
        "device": "cpu",
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 12},
        "stream": {"tasks": 2},
        "clients": {"count": 3, "per_round": 2},
        "model": {"name": model},
        "method": {"name": "mfcl", "synthetic": 4, **options},
    }
    with pytest.raises(ScenarioError, match=word):
        open_experiment(load_scenario(scenario))


def test_without_its_norm_term_a_model_needs_no_batch_norm() -> None:
    MFCL(synthetic=4, w_bn=0.0).check_model(Architecture(lambda: NoNorm(3, ModelSection()), (3, 8, 8)))


CLIENT = ("w_ce", "w_ft", "w_kd")
SERVER = ("w_label", "w_ie", "w_bn", "w_prior", "w_act")


@pytest.mark.parametrize("names", [CLIENT, SERVER])
def test_any_terms_may_be_switched_off_but_not_all(names: tuple[str, ...]) -> None:
    """Ablations: each weight 0 or 1, in all combinations."""
    for weights in product((0.0, 1.0), repeat=len(names)):
        chosen = dict(zip(names, weights, strict=True))
        if any(weights):
            MFCL(synthetic=4, **chosen)
        else:
            with pytest.raises(ValidationError, match="would learn nothing"):
                MFCL(synthetic=4, **chosen)
