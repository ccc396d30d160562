"""Cheaper passes of a frozen network; where a person's own layers would answer otherwise, nothing is changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from fedcil.models.network import Network

ROUNDING = 1e-3  # of the largest feature: what folded norms may change (seen: 1e-6)
_ONE_TRACE = threading.Lock()  # torch.fx changes ``nn.Module`` while it traces, and puts back what it found


@torch.no_grad()
def fold_norms(network: Network, images: Tensor) -> None:
    """Fold batch norms of a frozen network into the convolutions before them; equal up to rounding.

    A person's own backbone stays as it is if torch.fx cannot trace it (say, with a branch on its input) or copy it, or
    if what comes out gives other features for these ``images``: fx folds a convolution that is used twice as if each
    use were all of it.
    """
    backbone = network.backbone
    plain = backbone(images)
    try:
        folded: Any = fuse(_traced(copy.deepcopy(backbone)), inplace=True, no_trace=True)
        found = folded(images)
    except Exception:  # of a person's own code, or of fx about it
        return
    if _near(found, plain):
        folded.width = backbone.width
        network.backbone = folded


class _Tracer(fx.Tracer):
    """Modules that other threads call meanwhile do what they always do."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _traced(module: nn.Module) -> fx.GraphModule:
    with _ONE_TRACE:
        return fx.GraphModule(module, _Tracer().trace(module))


def _near(found: Tensor, plain: Tensor) -> bool:
    """Features that are all 0 say nothing."""
    scale = plain.abs().max()
    return bool(scale > 0 and (found - plain).abs().max() <= ROUNDING * scale)


@torch.no_grad()
def change_alike(network: Network, change: Callable[[nn.Module], None], images: Tensor) -> None:
    """``change`` the type of a frozen backbone's weights if its features for these ``images`` stay what they are."""
    plain = network.features(images)
    weights = {parameter: parameter.data for parameter in network.backbone.parameters()}
    change(network.backbone)
    try:
        alike = _near(network.features(images), plain)
    except RuntimeError:  # a layer that has switched autocast off
        alike = False
    if not alike:
        for parameter, data in weights.items():
            parameter.data = data


def narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights of a frozen module's convolutions and linear layers in the type that autocast would bring them to anew at
    every call: the same bits for less.
    """
    for part in module.modules():
        own = {name for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))}
        # Who inherits from them, or has more tensors than they have, may compute with its weights otherwise.
        if type(part) in (nn.Conv2d, nn.Linear) and own <= {"weight", "bias"}:
            part.to(dtype)
