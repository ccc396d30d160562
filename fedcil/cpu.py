"""What this CPU computes fast: told by its maker and its instructions, never by timing.

The figures behind it are in docs/performance-notes.md.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


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


def fp32_products_pay() -> bool:
    """Whether a matrix product has a higher rate than oneDNN's convolution over a small map: with AVX2 alone, and on
    Intel's CPUs. AMD's with AVX-512 do convolutions by it and products by AVX2.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX2" or (capability == "AVX512" and made_by_intel())


@cache
def made_by_intel() -> bool:
    """As Linux tells, elsewhere as ``platform`` does; False where neither knows."""
    if not CPUINFO.exists():
        return "GenuineIntel" in platform.processor()
    return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in CPUINFO.read_text().splitlines())
