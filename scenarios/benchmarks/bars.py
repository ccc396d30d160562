"""What a figure should not be above, or below; a run of few repeats has bars of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PEERS = ("pfl", "fedlab", "blazefl")
SIZES = (10, 100, 1000)


@dataclass(frozen=True, slots=True)
class Bars:
    """By a row's name. ``most`` and ``most_wall``: ratios in CPU and wall seconds; ``seconds``: our own for one client;
    ``least``: ratios of which larger is better; ``facts``: (what, the most) of rows that are no ratios.
    """

    most: Mapping[str, float]
    most_wall: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, tuple[str, float]] = field(default_factory=dict)


FULL = Bars(
    most={
        "step_32_128_fp32_fresh": 1 / 1.8,
        "step_32_128_bf16_fresh": 1 / 3.8,
        "step_32_128_fp32_pooled": 1 / 2.1,
        "step_32_128_bf16_pooled": 1 / 4.5,
        "step_8_32_fp32_fresh": 1 / 1.6,
        "step_8_32_bf16_fresh": 1 / 3.3,
        "boundary_fp32": 1 / 1.6,
        "boundary_bf16": 1 / 2.5,
        "round_lenet_fp32_vs_plain": 0.52,
        "round_lenet_fp32_vs_flower": 0.27,
        "round_cnn4_fp32_vs_plain": 0.68,
        "round_cnn4_fp32_vs_flower": 0.50,
        "round_cnn4_bf16_vs_plain": 0.50,
        "round_resnet18_fp32_vs_plain": 0.95,
        "round_resnet18_bf16_vs_plain": 0.55,
        "engine_ray_1mb_100_vs_flower": 1 / 50,
        "two_workers_cnn4": 1.10,
        "two_workers_resnet18": 1.10,
        **{f"round_{net}_fp32_vs_{peer}": 0.80 for net in ("lenet", "cnn4") for peer in PEERS},
    },
    most_wall={"two_workers_cnn4": 1 / 1.7, "two_workers_resnet18": 1 / 1.7},
    seconds={
        **{f"engine_inline_1mb_{clients}_vs_flower": 0.2e-3 for clients in SIZES},
        "engine_ray_1mb_100_vs_flower": 0.35e-3,
    },
    least={"floor_fraction_fp32": 0.70, "floor_fraction_bf16": 0.75},
    facts={
        **{f"memory_{clients}": ("more_than_100_mb", 4.0) for clients in (1000, 10_000)},
        **{f"whole_digits_{method}": ("first_round_s", 6.0) for method in ("fedavg", "mfcl", "oracle")},
    },
)

# Three repeats are enough to see that nothing has become much slower.
QUICK = Bars(
    most={
        "step_8_32_fp32_fresh": 1 / 1.5,
        "step_8_32_fp32_pooled": 1 / 1.9,
        "step_8_32_bf16_fresh": 1 / 2.8,
        "step_8_32_bf16_pooled": 1 / 3.5,
        "round_lenet_fp32_vs_plain": 0.70,
        "round_lenet_fp32_vs_flower": 0.36,
        "round_cnn4_fp32_vs_plain": 0.68,
        "round_cnn4_fp32_vs_flower": 0.50,
        "round_cnn4_bf16_vs_plain": 0.60,
        "engine_ray_1mb_10_vs_flower": 1 / 4,
        "engine_ray_1mb_100_vs_flower": 1 / 20,
    },
    seconds={f"engine_inline_1mb_{clients}_vs_flower": 0.3e-3 for clients in (10, 100)},
)
