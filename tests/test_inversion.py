"""The generator's losses against plain re-statements, and the boundary that trains it (mfcl section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from fedcil.errors import Stopped
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods import inversion
from fedcil.methods.base import Boundary, part
from fedcil.methods.inversion import (
    EvalNormWithStatistics,
    NormStatistics,
    Weights,
    blur,
    entropy_loss,
    generator_loss,
    label_loss,
    norm_loss,
    prior_loss,
    watch_norms,
)
from fedcil.methods.mfcl import MFCL, vanished_classes
from fedcil.models.network import (
    Backbone,
    Network,
    freeze,
    initialise,
    load_state,
    snapshot,
    state_of,
)
from fedcil.state import ServerState
from fedcil.tensors import content_hash

TAPS = (0.111703, 0.236476, 0.303641, 0.236476, 0.111703)
ALL = Weights(
    label=1.5,
    entropy=2.0,
    norm=3.0,
    prior=0.7,
    activation=0.3,
    temperature=4.0,
    normalised_entropy=True,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Key(seed).torch(), dtype=torch.float64)


# --- label confidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_label_loss_is_the_cross_entropy_with_the_own_prediction(temperature: float) -> None:
    logits = normal(7, 4) * 5
    values = [math.log(sum(math.exp(o / temperature) for o in row)) - max(row) / temperature for row in logits.tolist()]
    assert label_loss(logits, temperature).item() == pytest.approx(sum(values) / 7, rel=1e-13)


@pytest.mark.parametrize("classes", [10, 30, 100])
def test_at_temperature_1000_the_label_loss_is_nearly_ln_k(classes: int) -> None:
    """Logits of deviation 5 become some 0.005: all classes look alike."""
    assert label_loss(normal(128, classes) * 5, 1000.0).item() == pytest.approx(math.log(classes), abs=0.02)


# --- information entropy ----------------------------------------------------------------------------------


def test_entropy_loss_by_hand() -> None:
    """Mean of softmax rows p, then 1 + sum p ln p / ln K, and sum p ln p where it is not normalised."""
    rows = [[math.exp(o) for o in row] for row in normal(6, 3).tolist()]
    p = [sum(row[k] / sum(row) for row in rows) / 6 for k in range(3)]
    negative = sum(x * math.log(x) for x in p)
    logits = normal(6, 3)
    assert entropy_loss(logits).item() == pytest.approx(1 + negative / math.log(3), rel=1e-12)
    assert entropy_loss(logits, normalised=False).item() == pytest.approx(negative, rel=1e-12)


def test_entropy_loss_is_0_for_a_uniform_mean_and_1_for_one_class() -> None:
    """Each image may be certain; only the mean over the batch counts."""
    certain = 1000 * torch.eye(4, dtype=torch.float64)
    assert entropy_loss(certain).item() == pytest.approx(0.0, abs=1e-15)
    assert entropy_loss(certain[:1].repeat(8, 1)).item() == 1.0
    assert entropy_loss(certain, normalised=False).item() == pytest.approx(-math.log(4))


def test_a_class_of_probability_0_gives_finite_losses_and_gradients() -> None:
    """0 ln 0 = 0; written as p * log(p) it would be NaN."""
    logits = torch.tensor([[0.0, 0.0, -2000.0]], dtype=torch.float64, requires_grad=True)
    loss = entropy_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(1 - math.log(2) / math.log(3))
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("normalised", [True, False])
def test_one_class_has_no_entropy_to_lose(normalised: bool) -> None:
    """ln 1 = 0 is not divided by."""
    logits = normal(5, 1).requires_grad_()
    loss = entropy_loss(logits, normalised=normalised)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.eq(0).all()  # type: ignore[union-attr]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.0, 300.0), st.integers(0, 1000))
def test_entropy_loss_stays_in_the_unit_interval(images: int, classes: int, scale: float, seed: int) -> None:
    value = entropy_loss(normal(images, classes, seed=seed) * scale).item()
    assert -1e-12 <= value <= 1 + 1e-12


# --- batch-norm statistics --------------------------------------------------------------------------------


def some_statistics(channels: int, seed: int) -> NormStatistics:
    running_mean, mean = normal(2, channels, seed=seed)
    running_var, var = normal(2, channels, seed=seed + 1).exp()
    return NormStatistics(running_mean, running_var, mean, var)


def test_norm_loss_is_the_kl_divergence_from_running_to_batch() -> None:
    """Mean over layers of the mean over channels; the 1e-8 on the variances accounts for the difference."""
    layers = [some_statistics(5, 0), some_statistics(3, 10)]
    forward, backward = [], []
    for s in layers:
        running, batch = Normal(s.running_mean, s.running_var.sqrt()), Normal(s.mean, s.var.sqrt())
        forward.append(kl_divergence(running, batch).mean())
        backward.append(kl_divergence(batch, running).mean())
    value = norm_loss(layers).item()
    assert value == pytest.approx(torch.stack(forward).mean().item(), rel=1e-6)
    assert value != pytest.approx(torch.stack(backward).mean().item(), rel=0.01)


def test_norm_loss_by_hand() -> None:
    """ln(sqrt v / sqrt(s^2 + e)) - 0.5 (1 - (s^2 + e + (m^ - m)^2) / v), v with e in it."""
    s = some_statistics(4, 3)
    values = []
    for place in range(4):
        r, v = s.running_var[place].item() + 1e-8, s.var[place].item() + 1e-8
        shift = (s.running_mean - s.mean)[place].item()
        values.append(math.log(math.sqrt(v) / math.sqrt(r)) - 0.5 * (1 - (r + shift**2) / v))
    assert norm_loss([s]).item() == pytest.approx(sum(values) / 4, rel=1e-12)


def test_norm_loss_is_finite_where_a_channel_is_constant() -> None:
    """A dead channel has variance 0 in both."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert norm_loss([NormStatistics(one, zero, one, zero)]).item() == 0.0
    assert math.isfinite(norm_loss([NormStatistics(one, one, one, zero)]).item())


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
@pytest.mark.usefixtures("float64")
def test_norm_loss_is_0_on_the_batch_that_made_the_running_statistics(small: Any, name: str) -> None:
    """One update with momentum 1; PyTorch stores n / (n - 1) times the variance that the loss is about."""
    network, images = small.network(3, name), small.images(6)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    counts: list[int] = []
    for norm in norms:
        norm.momentum = 1.0
        norm.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0][:, 0].numel()))
    network.train()
    network(images)
    freeze(network)
    for norm, count in zip(norms, counts, strict=True):
        norm.running_var *= (count - 1) / count  # type: ignore[operator]
    with watch_norms(network) as statistics:
        network(images)
    assert len(statistics) == len(norms)
    assert 0 <= norm_loss(statistics).item() <= 1e-8
    with watch_norms(network) as statistics:
        network(2 * images)
    assert norm_loss(statistics).item() > 1e-3


class NormAndMore(nn.BatchNorm2d):
    """A person's own: a norm with an activation in it."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def test_a_norm_that_does_more_does_so_while_it_is_watched() -> None:
    chain = nn.Sequential(NormAndMore(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = chain(x)
    with watch_norms(chain) as statistics:
        found = chain(x)
    assert torch.equal(found, expected)
    (seen,) = statistics  # the other layer has no running statistics to hold a batch against
    torch.testing.assert_close(seen.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(seen.var, x.var((0, 2, 3), correction=0))


@pytest.mark.usefixtures("float64")
def test_what_is_watched_are_biased_statistics_of_a_layers_input(small: Any) -> None:
    network, x = small.frozen(3), small.images(6)
    with watch_norms(network) as statistics:
        network(x)
    for layer in network.backbone.layers:
        if isinstance(layer, nn.BatchNorm2d):
            s = statistics.pop(0)
            count = x[:, 0].numel()
            mean = x.sum((0, 2, 3)) / count
            var = (x - mean[:, None, None]).pow(2).sum((0, 2, 3)) / count
            torch.testing.assert_close(s.mean, mean)
            torch.testing.assert_close(s.var, var)
            assert torch.equal(s.running_mean, layer.running_mean)  # type: ignore[arg-type]
            assert torch.equal(s.running_var, layer.running_var)  # type: ignore[arg-type]
        x = layer(x)
    assert not statistics


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (6, 3)])
def test_the_fused_norm_has_the_gradients_of_its_formula(shape: tuple[int, ...], affine: bool) -> None:
    """Against numerical differences: of the output, the mean and the variance of the input. An epsilon that shows."""
    draws = Key(3).at("norm").torch()
    x = torch.randn(shape, generator=draws).requires_grad_()
    running_mean, running_var = torch.randn(3, generator=draws), torch.rand(3, generator=draws) + 0.5
    weight, bias = (torch.randn(3, generator=draws), torch.randn(3, generator=draws)) if affine else (None, None)

    def norm(x: Tensor) -> Any:
        return EvalNormWithStatistics.apply(x, running_mean, running_var, weight, bias, 0.5)

    assert torch.autograd.gradcheck(norm, (x,))
    output, mean, var = norm(x)
    torch.testing.assert_close(output, F.batch_norm(x, running_mean, running_var, weight, bias, eps=0.5))
    torch.testing.assert_close((var, mean), torch.var_mean(x, (0, *range(2, x.dim())), correction=0))


def hooks(network: nn.Module) -> int:
    return sum(
        len(layer._forward_pre_hooks)
        + len(layer._forward_hooks)
        + len(layer._backward_hooks)
        + ("forward" in vars(layer))
        for layer in network.modules()
    )


def test_no_hook_is_left_behind(small: Any) -> None:
    """Nor after an error: the classifier would go on computing what nobody reads."""
    network = small.frozen(3)
    generator_loss(network, small.images(4), ALL)
    assert hooks(network) == 0
    with pytest.raises(RuntimeError), watch_norms(network):
        network(torch.zeros(2, 7, 8, 8))  # 7 channels are not 3
    assert hooks(network) == 0


def test_statistics_are_float32_under_bf16(small: Any) -> None:
    network = small.compute("cnn", "bf16").frozen(state_of(small.network(3)))
    with watch_norms(network) as statistics:
        network(small.images(4))
    assert {s.mean.dtype for s in statistics} == {s.var.dtype for s in statistics} == {torch.float32}
    loss, terms = generator_loss(network, small.images(4), ALL)
    assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}


class WithNorm1d(Backbone):
    """Somebody's own backbone: batch norm behind the pooling."""

    def __init__(self) -> None:
        super().__init__(3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(images.mean((2, 3)))
        return features


def test_batch_norm_over_vectors_counts_like_any_other(small: Any) -> None:
    network = Network(WithNorm1d(), 2)
    freeze(network)
    images = small.images(6)
    with watch_norms(network) as statistics:
        network(images)
    torch.testing.assert_close(statistics[0].mean, images.mean((0, 2, 3)))


def test_watching_a_norm_does_not_change_what_it_gives() -> None:
    """Nor where its epsilon is not PyTorch's."""
    norm, x = nn.BatchNorm2d(3, eps=0.5).eval(), torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    with watch_norms(norm):
        assert torch.equal(norm(x), expected)


# --- image prior ------------------------------------------------------------------------------------------


def reflected(place: int, size: int) -> int:
    if place < 0:
        return -place
    return 2 * (size - 1) - place if place >= size else place


def blurred_by_loops(image: list[list[float]]) -> list[list[float]]:
    """5 x 5 with exp(-(dy^2 + dx^2) / 4), normalised; borders mirrored without repeating the edge."""
    kernel = {(y, x): math.exp(-((y / 2) ** 2)) * math.exp(-((x / 2) ** 2)) for y in range(-2, 3) for x in range(-2, 3)}
    whole = sum(kernel.values())
    tall, wide = len(image), len(image[0])
    return [
        [
            sum(k * image[reflected(r + y, tall)][reflected(c + x, wide)] for (y, x), k in kernel.items()) / whole
            for c in range(wide)
        ]
        for r in range(tall)
    ]


def test_the_blur_is_the_explicit_sum() -> None:
    images = normal(2, 3, 4, 6)
    expected = torch.tensor([[blurred_by_loops(c) for c in image] for image in images.tolist()])
    torch.testing.assert_close(blur(images), expected.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prior_loss(images).item(), (images - expected).square().mean().item(), rtol=1e-6, atol=0)


def test_the_blur_has_the_authors_weights() -> None:
    """The picture of one bright pixel is the kernel: outer products of the five weights; it sums to 1."""
    image = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    image[0, 0, 4, 4] = 1.0
    picture = blur(image)[0, 0]
    assert picture.sum().item() == pytest.approx(1.0, abs=1e-14)
    taps = torch.tensor(TAPS, dtype=torch.float64)
    torch.testing.assert_close(picture[2:7, 2:7], torch.outer(taps, taps), rtol=0, atol=1e-6)
    assert picture[:2].eq(0).all()


def test_the_prior_has_the_gradient_of_its_formula() -> None:
    """Through the images and through their blurred copies; against numerical differences."""
    assert torch.autograd.gradcheck(prior_loss, (normal(1, 2, 4, 4).requires_grad_(),))


def test_constant_images_have_no_prior_loss() -> None:
    assert prior_loss(torch.full((2, 3, 8, 8), 2.5, dtype=torch.float64)).item() < 1e-28


# --- all terms together -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_the_generators_loss_is_the_weighted_sum(small: Any) -> None:
    """Written out once more with a forward pass by hand."""
    network, images = small.frozen(4), small.images(6).requires_grad_()
    x, kl = images, []
    for layer in network.backbone.layers:
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            running = Normal(layer.running_mean, (layer.running_var + 1e-8).sqrt())  # type: ignore[operator]
            kl.append(kl_divergence(running, Normal(mean, (var + 1e-8).sqrt())).mean())
        x = layer(x)
    features = x.mean((2, 3))
    logits = features @ network.head.weight.T + network.head.bias
    p = logits.softmax(1).mean(0)
    expected = {
        "label": nn.functional.cross_entropy(logits / 4, logits.argmax(1)),
        "entropy": 1 + (p * p.log()).sum() / math.log(4),
        "norm": torch.stack(kl).mean(),
        "prior": (images - blur(images)).square().mean(),
        "activation": -features.abs().mean(),
    }
    total, terms = generator_loss(network, images, ALL)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-10)
    weighted = sum(getattr(ALL, name) * terms[name].item() for name in expected)
    assert total.item() == pytest.approx(weighted, rel=1e-12)
    by_hand = sum(getattr(ALL, name) * value for name, value in expected.items())
    torch.testing.assert_close(torch.autograd.grad(total, images), torch.autograd.grad(by_hand, images))


@pytest.mark.parametrize("off", ["label", "entropy", "norm", "prior", "activation"])
def test_a_term_of_weight_0_is_not_computed(small: Any, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    def broken(*arguments: object, **options: object) -> Tensor:
        raise AssertionError(f"{off} was computed")

    if off != "activation":
        monkeypatch.setattr(inversion, f"{off}_loss", broken)
        with pytest.raises(AssertionError, match=off):
            generator_loss(small.frozen(3), small.images(4), ALL)
    total, terms = generator_loss(small.frozen(3), small.images(4), replace(ALL, **{off: 0.0}))
    assert off not in terms
    assert len(terms) == 4
    assert torch.isfinite(total)


def test_without_the_norm_term_no_statistics_are_computed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the dearest part of a step after the passes themselves."""

    def broken(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("statistics were computed")

    monkeypatch.setattr(EvalNormWithStatistics, "apply", broken)
    with pytest.raises(AssertionError, match="statistics"):
        generator_loss(small.frozen(3), small.images(4), ALL)
    generator_loss(small.frozen(3), small.images(4), replace(ALL, norm=0.0))


def test_the_activation_term_is_the_size_of_features_that_may_be_negative(small: Any) -> None:
    network, images = Network(WithNorm1d(), 2), small.images(6)
    freeze(network)
    features = network.features(images)
    assert features.min() < 0
    torch.testing.assert_close(generator_loss(network, images, ALL)[1]["activation"], -features.abs().mean())


def test_freezing_the_classifier_changes_no_gradient_of_the_images(small: Any) -> None:
    tensors = state_of(small.network(3))
    gradients = []
    for free in (False, True):
        network = small.compute().frozen(tensors)
        network.requires_grad_(free)
        images = small.images(4).requires_grad_()
        generator_loss(network, images, ALL)[0].backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients)


# --- the boundary -----------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "synthetic": 4,
    "latent": 6,
    "generator_width": 8,
    "steps": 4,
    "generator_batch": 8,
    "temperature": 1.0,
    "w_act": 0.1,
}


def nothing(step: int, steps: int, terms: Mapping[str, float]) -> None:
    pass


def cross(
    small: Any,
    payload: Payload | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] = nothing,
    seed: int = 0,
    **options: Any,
) -> Boundary:
    method = MFCL(**{**BASE, **options}).build()
    state = ServerState(model=state_of(small.network(3)), memory={"kept": torch.ones(1)}, payload=payload)
    return method.boundary(state, small.first, Key(seed).at("boundary"), small.compute(), progress)


def test_a_boundary_leaves_the_classifier_alone(small: Any) -> None:
    """Parameters and running statistics; the teacher that clients get is the model, bit for bit."""
    network = small.network(3)
    state = ServerState(model=state_of(network))
    before = content_hash(state.model)
    made = MFCL(**BASE).build().boundary(state, small.first, Key(0), small.compute(), nothing)
    assert content_hash(state.model) == content_hash(made.state.model) == before
    assert made.state.payload is not None
    assert content_hash(part("teacher", made.state.payload.tensors)) == before
    assert hooks(network) == 0


def test_the_classifier_in_a_boundary_is_in_eval_mode_and_does_not_move(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, str]] = []
    original = inversion.generator_loss

    def watched(classifier: Network, images: Tensor, weights: Weights) -> Any:
        assert not any(p.requires_grad for p in classifier.parameters())
        seen.append((classifier.training, content_hash(state_of(classifier))))
        return original(classifier, images, weights)

    monkeypatch.setattr("fedcil.methods.mfcl.generator_loss", watched)
    cross(small)
    assert seen == [(False, content_hash(state_of(small.network(3))))] * 4


def generator_of(made: Boundary) -> dict[str, Tensor]:
    assert made.state.payload is not None
    return part("generator", made.state.payload.tensors)


def test_the_generator_goes_on_where_the_last_boundary_ended(small: Any) -> None:
    """With no steps to train, it comes out of a boundary as it went in: weights and running statistics."""
    first = cross(small)
    again = cross(small, first.state.payload, seed=1, steps=0)
    assert content_hash(generator_of(again)) == content_hash(generator_of(first))
    new = cross(small, first.state.payload, seed=1, steps=0, continue_generator=False)
    assert content_hash(generator_of(new)) == content_hash(generator_of(cross(small, seed=1, steps=0)))
    assert content_hash(generator_of(new)) != content_hash(generator_of(first))


def test_a_continued_generators_first_loss_is_not_a_new_ones(small: Any) -> None:
    payload = cross(small, steps=20, generator_lr=0.01).state.payload
    continued = cross(small, payload, seed=1, steps=1).log["generator"]
    new = cross(small, payload, seed=1, steps=1, continue_generator=False).log["generator"]
    assert continued.keys() == new.keys()
    assert all(continued[name] != new[name] for name in new)


def test_a_new_generator_is_pytorchs_default_drawn_from_the_key(small: Any) -> None:
    """The bounds of Linear(6, 32): 1 / sqrt(6); scale 1 and shift 0 in batch norm."""
    one, same, other = (generator_of(cross(small, seed=seed, steps=0)) for seed in (0, 0, 1))
    assert content_hash(one) == content_hash(same) != content_hash(other)
    assert 0.9 / 6**0.5 < one["project.weight"].abs().max() <= 1 / 6**0.5
    assert one["norm.weight"].eq(1).all()
    assert one["norm.running_var"].eq(1).all()


def test_a_boundary_touches_no_global_generator(small: Any) -> None:
    state = torch.get_rng_state()
    cross(small)
    assert torch.equal(state, torch.get_rng_state())


def test_training_lowers_the_loss(small: Any) -> None:
    log = cross(small, steps=60, generator_lr=0.01, generator_batch=32).log["generator"]
    assert log["norm"][-1] < log["norm"][0] / 2


def test_a_boundary_is_adam_on_the_generator_by_hand(small: Any) -> None:
    """The same latents, PyTorch's plain Adam, three steps: the same images.

    Compared in train mode: a bias before a batch norm has no gradient but rounding, which Adam blows up to
    full steps; batch statistics take it out again.
    """
    options = MFCL(**{**BASE, "steps": 3})
    key, classifier = Key(0).at("boundary"), small.frozen(3)
    twin = options.make_generator(small.compute())
    initialise(twin, key.at("generator").torch())
    twin.train()
    optimizer = torch.optim.Adam(twin.parameters(), 1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    weights = replace(ALL, label=1.0, entropy=1.0, norm=50.0, prior=1e-3, activation=0.1, temperature=1.0)
    for step in range(3):
        latents = torch.randn(8, 6, generator=key.at("latents", step).torch())
        optimizer.zero_grad()
        generator_loss(classifier, twin(latents), weights)[0].backward()
        optimizer.step()
    state = ServerState(model=state_of(classifier))
    made = options.make_generator(small.compute())
    load_state(made, generator_of(options.build().boundary(state, small.first, key, small.compute(), nothing)))
    untrained = options.make_generator(small.compute())
    initialise(untrained, key.at("generator").torch())
    latents = torch.randn(16, 6, generator=Key(1).torch())
    torch.testing.assert_close(made(latents), twin(latents), rtol=1e-3, atol=1e-3)
    assert (untrained(latents) - twin(latents)).abs().max() > 0.02


def test_the_log_has_each_term_at_ten_steps_and_the_last(small: Any) -> None:
    made = cross(small, steps=20)
    assert made.log["generator"].keys() == {"label", "entropy", "norm", "prior", "activation"}
    assert {len(values) for values in made.log["generator"].values()} == {11}
    assert {len(values) for values in cross(small, steps=1).log["generator"].values()} == {1}


def test_progress_is_told_each_step_and_may_stop_it(small: Any) -> None:
    told: list[tuple[int, int]] = []

    def stop_at_3(step: int, steps: int, terms: Mapping[str, float]) -> None:
        told.append((step, steps))
        if step == 3:
            raise Stopped(130)

    with pytest.raises(Stopped):
        cross(small, progress=stop_at_3)
    assert told == [(1, 4), (2, 4), (3, 4)]


def test_the_histogram_is_what_the_teacher_says_of_4096_images(small: Any) -> None:
    """A head with one large bias puts all of them into one class, and the others are warned of."""
    made = cross(small)
    assert len(made.log["histogram"]) == 3
    assert sum(made.log["histogram"]) == 4096
    tensors = snapshot(small.network(3))
    tensors["head.bias"][1] = 50.0
    state = ServerState(model=tensors)
    skewed = MFCL(**BASE).build().boundary(state, small.first, Key(0), small.compute(), nothing)
    assert skewed.log["histogram"] == [0, 4096, 0]
    (warning,) = skewed.warnings
    assert warning.labels == (0, 2)


def test_a_class_has_vanished_below_a_fifth_of_its_share() -> None:
    """300 images, 3 classes: a share is 100, a fifth of it 20."""
    assert vanished_classes([20, 140, 140]) == ()
    (warning,) = vanished_classes([19, 141, 140])
    assert warning.labels == (0,)
    assert "{classes}" in warning.text
    assert "method.w_ie" in warning.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent", 7),
        ("generator_width", 6),
        ("upsamplings", 1),
        ("steps", 5),
        ("generator_batch", 9),
        ("generator_lr", 2e-3),
        ("temperature", 2.0),
        ("entropy", "plain"),
        ("w_label", 0.5),
        ("w_ie", 2.0),
        ("w_bn", 10.0),
        ("w_prior", 1.0),
        ("w_act", 1.0),
    ],
)
def test_each_setting_of_the_generator_changes_it(small: Any, name: str, value: object) -> None:
    one, same, other = cross(small), cross(small), cross(small, **{name: value})
    assert content_hash(generator_of(one)) == content_hash(generator_of(same))
    assert content_hash(generator_of(one)) != content_hash(generator_of(other))


def test_settings_weigh_the_terms_that_they_name() -> None:
    asked = {"w_label": 0.1, "w_ie": 0.2, "w_bn": 0.3, "w_prior": 0.4, "w_act": 0.5, "temperature": 7.0}
    assert MFCL(**{**BASE, **asked, "entropy": "plain"}).loss_weights() == inversion.Weights(
        label=0.1, entropy=0.2, norm=0.3, prior=0.4, activation=0.5, temperature=7.0, normalised_entropy=False
    )
    assert MFCL(**{**BASE, "entropy": "normalised"}).loss_weights().normalised_entropy


def test_memory_goes_through_a_boundary(small: Any) -> None:
    assert cross(small).state.memory == {"kept": torch.ones(1)}


def test_one_class_in_the_first_task_trains_a_finite_generator(small: Any) -> None:
    state = ServerState(model=state_of(small.network(1)))
    made = MFCL(**BASE).build().boundary(state, small.first, Key(0), small.compute(), nothing)
    assert all(torch.isfinite(tensor).all() for tensor in generator_of(made).values())
    assert made.warnings == ()


def test_a_classifier_that_rules_a_class_out_trains_a_finite_generator(small: Any) -> None:
    """exp(-150) is 0 in float32: the mean prediction of a class is then exactly 0, and 0 ln 0 has no slope."""
    tensors = snapshot(small.network(3))
    tensors["head.bias"][1] = 150.0
    state = ServerState(model=tensors)
    made = MFCL(**BASE).build().boundary(state, small.first, Key(0), small.compute(), nothing)
    assert all(torch.isfinite(tensor).all() for tensor in generator_of(made).values())


@pytest.mark.gpu
def test_a_boundary_runs_on_a_gpu(small: Any) -> None:
    compute = replace(small.compute(), device=torch.device("cuda"))
    model = {name: tensor.cuda() for name, tensor in state_of(small.network(3)).items()}
    made = MFCL(**BASE).build().boundary(ServerState(model=model), small.first, Key(0), compute, nothing)
    assert all(tensor.is_cuda for tensor in generator_of(made).values())
