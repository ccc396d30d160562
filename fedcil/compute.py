"""How tensors are computed in this process: device, precision, layout, threads.

Bits depend on all of these, so they are resolved once from what the machine can do (never from timing),
recorded with the run, and the same for every worker: the numeric configuration.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedcil import cpu
from fedcil.errors import ScenarioError
from fedcil.models import Architecture
from fedcil.models.frozen import change_alike, fold_norms, narrow
from fedcil.models.network import Network, freeze, load_state
from fedcil.models.pooling import pool_before_relu
from fedcil.models.small_maps import convolve_small_maps_by_products
from fedcil.tensors import Tensors

Precision = Literal["fp32", "tf32", "bf16"]
LANES_ON_GPU = 5


@dataclass(frozen=True, slots=True)
class Compute:
    """Networks of one architecture on one device in one precision."""

    architecture: Architecture
    device: torch.device
    precision: Precision

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before anything is computed."""
        if self.precision == "bf16" and not has_bf16(self.device):
            return (
                "training.precision = 'bf16', but this machine has no instructions for it: a step takes about "
                "ten times as long as in fp32",
            )
        if self.precision == "bf16" and not bf16_pays(self.device):
            return (
                "training.precision = 'bf16', but without AMX this CPU multiplies half as fast in it as in fp32: "
                "a step takes longer",
            )
        return ()

    @property
    def products(self) -> cpu.Products:
        """What of large convolutions over small maps is done by matrix products: where oneDNN's own take longer."""
        return cpu.products(self.precision) if self.device.type == "cpu" else "none"

    def network(self, classes: int) -> Network:
        """A network with uninitialised memory, channels last."""
        network = self._plain(classes)
        self._hasten(network.backbone)
        return network

    def frozen(self, tensors: Tensors) -> Network:
        """A network with these tensors, in eval mode, whose parameters need no gradient."""
        network = self._loaded(tensors)
        self._hasten(network.backbone)
        return network

    def teacher(self, tensors: Tensors) -> Network:
        """A frozen network for many passes: batch norm folded into the convolutions (1.1 times as fast in fp32)."""
        network = self._loaded(tensors)
        # They know torch's own layers only, so they come first.
        images = torch.randn(2, *self.architecture.image, generator=torch.Generator().manual_seed(0)).to(self.device)
        with exact(self.precision):  # what tf32 rounds away is more than folding may change
            fold_norms(network, images)
        change_alike(network, self.settle, images)
        self._hasten(network.backbone)
        return network

    def settle(self, module: nn.Module) -> None:
        """Narrow a frozen module's weights once and not at every call."""
        if self.autocast:
            narrow(module, self.autocast)

    def _loaded(self, tensors: Tensors) -> Network:
        network = self._plain(len(tensors["head.bias"]))
        load_state(network, tensors)
        freeze(network)
        return network

    def _plain(self, classes: int) -> Network:
        network = self.architecture.build(classes, self.autocast).to(self.device)
        pool_before_relu(network.backbone)
        return network.to(memory_format=torch.channels_last)

    def _hasten(self, backbone: nn.Module) -> None:
        if self.products != "none":
            convolve_small_maps_by_products(backbone, all_passes=self.products == "all")


def resolve_device(wanted: str) -> torch.device:
    """auto: a GPU where there is one. ScenarioError if a GPU is asked for and there is none."""
    available = wanted != "cpu" and torch.cuda.is_available()  # asking makes every process know the driver
    if wanted == "cuda" and not available:
        raise ScenarioError(
            "device = 'cuda' but torch sees no GPU",
            where="device",
            allowed="auto, cpu",
            next="use device = 'auto'",
        )
    return torch.device("cuda" if available else "cpu")


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """auto: bf16 where the machine has instructions for it that are faster than those of fp32, else fp32."""
    if wanted == "auto":
        return "bf16" if bf16_pays(device) else "fp32"
    if wanted == "tf32" and device.type == "cpu":
        raise ScenarioError(
            "training.precision = 'tf32' is a format of NVIDIA GPUs",
            where="training.precision",
            allowed="fp32, bf16, auto on a CPU",
            next="use training.precision = 'auto'",
        )
    return wanted  # type: ignore[return-value]


def has_bf16(device: torch.device) -> bool:
    """Whether the machine has instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu.bf16_instructions())


def bf16_pays(device: torch.device) -> bool:
    """Whether they are faster than those of fp32."""
    return has_bf16(device) and (device.type == "cuda" or cpu.fast_bf16())


@dataclass(frozen=True, slots=True)
class Execution:
    """How a worker trains clients: one by one, or side by side in ``lanes``."""

    lanes: int = 0

    @property
    def at_once(self) -> int:
        """Clients that a worker trains at the same time."""
        return max(1, self.lanes)

    @property
    def name(self) -> str:
        """What bits depend on; the number of lanes is no part of it."""
        return "captured" if self.lanes else "fused"


def resolve_execution(lanes: int | None, device: torch.device, draws: bool, alone: bool = False) -> Execution:
    """Where the scenario leaves it open: lanes on a GPU, which one client's small kernels do not fill; on a CPU one
    client fills a core. ``alone``: clients come to a worker one at a time, so it has use for one lane. ``draws``: the
    network draws in training, as dropout does, and a lane's step is the same for every place of a run, so there are no
    lanes: ScenarioError where some are asked for.
    """
    if lanes and draws:
        raise ScenarioError(
            f"engine.lanes = {lanes}, but the backbone draws in training, as dropout does",
            where="engine.lanes, model.name",
            allowed="0, or a backbone that draws nothing",
            next="leave engine.lanes out",
        )
    if lanes is None:
        usual = 1 if alone else LANES_ON_GPU
        lanes = usual if device.type == "cuda" and not draws else 0
    return Execution(lanes)


def apply_precision(precision: Precision) -> None:
    """Products and convolutions: exact in fp32, on a GPU through tf32 where that was asked for."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    backends: Any = torch.backends
    for operators in (backends.cudnn.conv, backends.cudnn.rnn):  # else they follow ``torch.backends.fp32_precision``
        operators.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    for operators in (backends.mkldnn.conv, backends.mkldnn.rnn):
        operators.fp32_precision = "ieee"


@contextmanager
def exact(precision: Precision) -> Iterator[None]:
    """fp32 as it is for a while, where a run computes in ``precision``."""
    apply_precision("fp32")
    try:
        yield
    finally:
        apply_precision(precision)


def numeric_configuration(
    compute: Compute, threads: int, server_threads: int, execution: Execution
) -> dict[str, str | int]:
    """What must be equal for two runs to agree bit for bit."""
    device = compute.device
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": device.type,
        "device_model": model,
        "precision": compute.precision,
        "layout": "channels_last",
        "execution": execution.name,
        "threads": threads,
        "server_threads": server_threads,
        "torch": torch.__version__,
        **_convolutions(compute),
    }


def _convolutions(compute: Compute) -> dict[str, str]:
    """What a CPU computes convolutions by beyond its instruction set."""
    found = {}
    if compute.products != "none":
        found["small_maps"] = "products" if compute.products == "all" else "products for the gradient of weights"
    if compute.precision == "bf16" and compute.device.type == "cpu":
        found["bf16_instructions"] = " ".join(cpu.bf16_instructions()) or "none"
    return found


def _cpu() -> str:
    """The instruction set that torch's kernels are chosen by, not the marketing name."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
