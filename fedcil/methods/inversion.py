"""Data-free training of a generator from a frozen classifier (MFCL, arXiv 2311.07784; the losses are ABD's).

Five terms: label confidence, information entropy of the mean prediction, batch-norm statistics, an image prior, and
the size of the features. The classifier is in eval mode throughout; nothing in it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcil.models.network import NORMS, Network

NORM_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Factors of the terms, and how two of them are written; 0 switches a term off."""

    label: float
    entropy: float
    norm: float
    prior: float
    activation: float
    temperature: float
    normalised_entropy: bool


class NormStatistics(NamedTuple):
    """A batch-norm layer's running statistics and those of the batch at its input; each (channels,)."""

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor
    var: Tensor


@contextmanager
def watch_norms(network: nn.Module) -> Iterator[list[NormStatistics]]:
    """Collect the input statistics of every batch-norm layer with running ones, in eval mode; afterwards the layers are
    as before.
    """
    seen: list[NormStatistics] = []
    layers = running_norms(network)
    for layer in layers:
        forward = None if type(layer) in NORMS else layer.forward  # a person's own may do more than the norm
        layer.forward = partial(_watched_norm, layer, seen, forward)
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.forward


def running_norms(network: nn.Module) -> list[nn.Module]:
    """Its batch norms, but for those that never look beyond a batch."""
    return [part for part in network.modules() if isinstance(part, NORMS) and part.running_mean is not None]


def _watched_norm(
    layer: Any, seen: list[NormStatistics], forward: Callable[[Tensor], Tensor] | None, x: Tensor
) -> Tensor:
    output, mean, var = EvalNormWithStatistics.apply(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    )
    seen.append(NormStatistics(layer.running_mean, layer.running_var, mean, var))
    return forward(x) if forward else cast(Tensor, output)


class EvalNormWithStatistics(torch.autograd.Function):
    """Batch norm in eval mode and the mean and biased variance of its input, each (channels,), in the type of the
    running statistics. Statistics come from batch norm's own kernel (30 times ``var_mean`` on a CPU), and one
    elementwise backward serves output and statistics:

        dL/dx = g_y w / sqrt(v + eps) + g_mean / n + 2 g_var (x - mean) / n,    n = elements of a channel
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
        unused = torch.zeros_like(running_mean), torch.ones_like(running_var)
        mean, var = torch.batch_norm_update_stats(x, *unused, 0.0)
        scale = torch.rsqrt(running_var + eps)
        ctx.save_for_backward(x, mean, scale if weight is None else scale * weight)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, mean, scale = ctx.saved_tensors
        of_output, of_mean, of_var = gradients
        across = (1, -1, *[1] * (x.dim() - 2))
        count = x.numel() // x.shape[1]
        slope = 2 * of_var / count
        shift = of_mean / count - slope * mean
        slope, shift, scale = (each.to(x.dtype).view(across) for each in (slope, shift, scale))
        return (of_output * scale).addcmul_(x, slope).add_(shift), None, None, None, None, None


def label_loss(logits: Tensor, temperature: float) -> Tensor:
    """CE(o / tau, argmax o): the classifier's own prediction is the target. logits (n, K); returns ()."""
    return F.cross_entropy(logits / temperature, logits.argmax(1))


def entropy_loss(logits: Tensor, *, normalised: bool = True) -> Tensor:
    """1 + sum_k p_k ln p_k / ln K for the mean prediction p, in [0, 1]; 0 iff p is uniform.

    Not normalised: sum_k p_k ln p_k, the negative entropy of the paper's formula. 0 for one class.
    """
    classes = logits.shape[1]
    mean = F.softmax(logits, dim=1).mean(0)
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)  # p = 0 has the value 0 but no gradient
    negative_entropy = (mean * mean.log()).sum()
    if not normalised:
        return negative_entropy
    return 1 + negative_entropy / math.log(classes) if classes > 1 else negative_entropy * 0


def norm_loss(statistics: list[NormStatistics]) -> Tensor:
    """Mean over layers, one at least, of the mean over channels of KL(N(running) || N(batch)); returns ()."""
    sizes = [len(layer.mean) for layer in statistics]
    # All layers as one: a GPU spends as much time on a layer's hundred numbers as on those of all.
    together = NormStatistics(*map(torch.cat, zip(*statistics, strict=True)))
    return torch.stack([layer.mean() for layer in _normal_kl(together).split(sizes)]).mean()


def _normal_kl(s: NormStatistics) -> Tensor:
    running, batch = s.running_var + NORM_EPS, s.var + NORM_EPS
    spread: Tensor = (batch / running).log() / 2
    return spread - 0.5 * (1 - (running + (s.running_mean - s.mean).square()) / batch)


def prior_loss(images: Tensor) -> Tensor:
    """Mean squared distance of images (n, c, h, w) to their blurred copies; returns ()."""
    return F.mse_loss(images, blur(images))


def blur(images: Tensor) -> Tensor:
    """Depthwise 5x5 blur, separable kernel exp(-(d / 2)^2) normalised to 1, reflected at the border."""
    taps = torch.exp(-((torch.arange(-2, 3, device=images.device, dtype=images.dtype) / 2) ** 2))
    taps = taps / taps.sum()
    channels = images.shape[1]
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = F.conv2d(padded, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def generator_loss(classifier: Network, images: Tensor, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms that are on, and each term by name. images (n, c, h, w)."""
    watched: AbstractContextManager[list[NormStatistics]] = nullcontext([])
    if weights.norm > 0:
        watched = watch_norms(classifier)
    with watched as statistics:
        features = classifier.features(images)
    logits = classifier.head(features)
    zero = torch.zeros((), dtype=images.dtype, device=images.device)
    terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "label": (weights.label, lambda: label_loss(logits, weights.temperature)),
        "entropy": (weights.entropy, lambda: entropy_loss(logits, normalised=weights.normalised_entropy)),
        "norm": (weights.norm, lambda: norm_loss(statistics)),
        "prior": (weights.prior, lambda: prior_loss(images)),
        "activation": (weights.activation, lambda: -features.abs().mean()),
    }
    values = {name: term() for name, (weight, term) in terms.items() if weight > 0}
    total = sum((terms[name][0] * value for name, value in values.items()), start=zero)
    return total, values
