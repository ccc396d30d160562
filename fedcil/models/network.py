"""A classifier: backbone, one linear head, no task id. And what a network's state is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fedcil.tensors import Tensors

Module = TypeVar("Module", bound=nn.Module)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORM_MOMENTUM = 0.1  # PyTorch's default: the share of the batch in one update of the running statistics


class Backbone(nn.Module):
    """Images (n, channels, height, width) -> features (n, ``width``)."""

    width: int
    he_convolutions = False  # N(0, sqrt(2 / (k k out))) instead of PyTorch's default

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class Network(nn.Module):
    """Backbone and head. Under ``precision`` (say bfloat16) the backbone runs in autocast; features, head
    and losses are always in the parameters' own type.

    ``random``: whether a pass in train mode may draw from torch's global generator (dropout); local training finds out.
    """

    random = True

    def __init__(self, backbone: Backbone, classes: int, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)
        self.precision = precision
        drop_counters(self)

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, width)."""
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            features = self.backbone(images)
        return cast(Tensor, features.to(self.head.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) -> logits (n, classes)."""
        return cast(Tensor, self.head(self.features(images)))


def drop_counters(module: nn.Module) -> None:
    """Batch norms that do not count batches: only an average over all of them (``momentum=None``) would read it, and it
    costs a call for each layer and step. Such a layer has PyTorch's default momentum then.
    """
    for part in module.modules():
        if isinstance(part, NORMS):
            part.num_batches_tracked = None
            part.own_momentum = NORM_MOMENTUM if part.momentum is None else part.momentum  # type: ignore[assignment]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent floating-point buffers by name: the module's own memory, not copies.

    Integer buffers are no state: averaging them has no meaning. They, and buffers that torch would not save, are what
    the constructor makes them.
    """
    saved = module.state_dict().keys()
    named: Iterable[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point() and name in saved}


def allocate(module: Module) -> Module:
    """A module made on the meta device, now on the CPU with memory that is not initialised.

    ``Module.to_empty`` does the same, but its ``empty_like`` of a meta tensor imports sympy: half a second.
    """
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    return module


def load_state(module: nn.Module, tensors: Tensors) -> None:
    """Copy ``tensors`` into the module, in place. ValueError if names or shapes differ."""
    copy_into(state_of(module), tensors)


def copy_into(own: Tensors, tensors: Tensors) -> None:
    """Copy ``tensors`` into tensors of the same names and shapes, in place. ValueError if these differ."""
    if own.keys() != tensors.keys():
        raise ValueError(f"tensors differ in name: {sorted(own.keys() ^ tensors.keys())}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
    torch._foreach_copy_(list(own.values()), [tensors[name] for name in own])


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All but those that somebody has frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: tensor.clone() for name, tensor in state_of(module).items()}


def freeze(module: nn.Module) -> None:
    """Eval mode, and no gradient is ever computed for the module's own parameters."""
    module.eval().requires_grad_(False)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's default initialisation, drawn from ``generator`` instead of the global one.

    A backbone with ``he_convolutions`` gets those of the CIFAR ResNets: N(0, sqrt(2 / (k k out))).
    """
    he = any(part.he_convolutions for part in module.modules() if isinstance(part, Backbone))
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            _initialise_linear(part, generator, he)
        elif isinstance(part, NORMS):
            if part.running_mean is not None and part.running_var is not None:
                part.running_mean.zero_()
                part.running_var.fill_(1)
            if part.affine:
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)


def _initialise_linear(part: nn.Conv2d | nn.Linear, generator: torch.Generator, he: bool) -> None:
    if he and isinstance(part, nn.Conv2d):
        fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
        nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out), generator=generator)
    else:
        nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)
    if part.bias is not None:
        bound = 1 / math.sqrt(part.weight[0].numel())
        nn.init.uniform_(part.bias, -bound, bound, generator=generator)


def grow_head(tensors: Tensors, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The same network with a head of ``classes`` rows: old rows bit for bit, new rows freshly drawn
    (mfcl section 1: ``Linear(d, V)`` with the default initialisation, old rows written over it).
    """
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    head = allocate(nn.Linear(weight.shape[1], classes, device="meta"))
    initialise(head, generator)
    new_weight, new_bias = head.weight.detach().to(weight), head.bias.detach().to(bias)
    new_weight[: len(weight)] = weight
    new_bias[: len(bias)] = bias
    return {**tensors, "head.weight": new_weight, "head.bias": new_bias}


def set_norm_updates(module: nn.Module, updates: int) -> None:
    """How often a batch counts in batch norm's running statistics: as so many updates with the layer's own momentum.
    ``module`` has gone through ``drop_counters``.
    """
    for part in module.modules():
        if isinstance(part, NORMS):
            part.momentum = 1.0 - (1.0 - cast(float, part.own_momentum)) ** updates


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
