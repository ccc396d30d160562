"""What this CPU computes fast: told by its maker and its instructions, never by timing.

The figures behind it are in docs/performance-notes.md.
"""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path
from typing import Literal

import torch

CPUINFO = Path("/proc/cpuinfo")
ZEN_4 = 25  # family of AMD's CPUs up to Zen 4, of which only that one has AVX-512: 512 bits in two halves

Products = Literal["none", "weights", "all"]
"""Which passes of a convolution: none, the gradient of the weights, all three."""


def bf16_instructions() -> tuple[str, ...]:
    """Those that oneDNN's kernels in bf16 are chosen by; empty where torch emulates."""
    there = {"AVX512_BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return tuple(name for name, supported in there.items() if supported)


def fast_bf16() -> bool:
    """Whether bf16 is faster than fp32. AVX512-bf16 multiplies twice as fast as fp32 on AMD's CPUs and half as fast on
    Intel's, whose place for bf16 is AMX; a virtual machine may have the one without the other.
    """
    found = bf16_instructions()
    return "AMX" in found or ("AVX512_BF16" in found and not made_by_intel())


def products(precision: str) -> Products:
    """What of a convolution over a small map a matrix product does faster than oneDNN. In bf16 all of it on Zen 5 (and,
    not measured, with AMX), in fp32 with AVX2 alone and on Intel's CPUs; on Zen 4 in both the gradient of the weights.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and is_zen_4():
        return "weights" if precision == "fp32" or fast_bf16() else "none"
    if precision == "bf16":
        return "all" if fast_bf16() else "none"
    return "all" if capability == "AVX2" or (capability == "AVX512" and made_by_intel()) else "none"


def made_by_intel() -> bool:
    """False where nobody knows."""
    return "GenuineIntel" in _named()


def is_zen_4() -> bool:
    """Of CPUs with AVX-512."""
    name = _named()
    return "AuthenticAMD" in name and re.search(rf"family\s*:?\s*{ZEN_4}\b", name, re.IGNORECASE) is not None


@cache
def _named() -> str:
    """Maker and family, as Linux tells, elsewhere as ``platform`` does."""
    if not CPUINFO.exists():
        return platform.processor()
    lines = CPUINFO.read_text().splitlines()
    return " ".join(line for line in lines if line.startswith(("vendor_id", "cpu family")))
