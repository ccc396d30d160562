"""How tensors are computed in this process: device, precision, layout, threads.

Bits depend on all of these, so they are resolved once from what the machine can do (never from timing),
recorded with the run, and the same for every worker: the numeric configuration.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

import torch

from fedcil.errors import ScenarioError
from fedcil.messages import Tensors
from fedcil.models import Architecture
from fedcil.models.network import Network, fold_norms, freeze, load_state

Precision = Literal["fp32", "tf32", "bf16"]
STACK_ON_GPU = 8


@dataclass(frozen=True, slots=True)
class Compute:
    """Networks of one architecture on one device in one precision."""

    architecture: Architecture
    device: torch.device
    precision: Precision

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def network(self, classes: int) -> Network:
        """A network with uninitialised memory, channels last."""
        network = self.architecture.build(classes, self.autocast).to(self.device)
        return network.to(memory_format=torch.channels_last)

    def frozen(self, tensors: Tensors) -> Network:
        """A network with these tensors, in eval mode, whose parameters need no gradient."""
        network = self.network(len(tensors["head.bias"]))
        load_state(network, tensors)
        freeze(network)
        return network

    def teacher(self, tensors: Tensors) -> Network:
        """A frozen network for many passes: batch norm folded into the convolutions (1.1 times as fast in fp32)."""
        network = self.frozen(tensors)
        fold_norms(network)
        return network


def resolve_device(wanted: str) -> torch.device:
    """auto: a GPU where there is one. ScenarioError if a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ScenarioError(
            "device = 'cuda' but torch sees no GPU",
            where="device",
            allowed="auto, cpu",
            next="use device = 'auto'",
        )
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """auto: bf16 where the machine has instructions for it, else fp32."""
    if wanted == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if wanted == "tf32" and device.type == "cpu":
        raise ScenarioError(
            "training.precision = 'tf32' is a format of NVIDIA GPUs",
            where="training.precision",
            allowed="fp32, bf16, auto on a CPU",
            next="use training.precision = 'auto'",
        )
    return wanted  # type: ignore[return-value]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_stack(wanted: int | None, device: torch.device) -> int:
    """How many clients are trained as one model where the scenario leaves it open: on a CPU this does not pay
    (docs/performance.md); on a GPU, whose kernels a single client's batch does not fill, it should (not measured yet).
    """
    return wanted or (STACK_ON_GPU if device.type == "cuda" else 1)


def apply_precision(precision: Precision) -> None:
    """Matrix products on a GPU: exact in fp32, through tf32 where that was asked for."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def numeric_configuration(compute: Compute, threads: int, server_threads: int, stack: int = 1) -> dict[str, str | int]:
    """What must be equal for two runs to agree bit for bit. ``stack``: clients trained as one model."""
    device = compute.device
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": device.type,
        "device_model": model,
        "precision": compute.precision,
        "layout": "channels_last",
        "execution": "fused" if stack == 1 else f"stacked {stack}",
        "threads": threads,
        "server_threads": server_threads,
        "torch": torch.__version__,
    }


def _cpu() -> str:
    """The instruction set that torch's kernels are chosen by, not the marketing name."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
