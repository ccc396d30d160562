"""What each figure should not be above; smaller is better everywhere."""

from __future__ import annotations

PEERS = ("pfl", "fedlab", "blazefl")

BARS: dict[str, float] = {
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
} | {f"round_{net}_fp32_vs_{peer}": 0.80 for net in ("lenet", "cnn4") for peer in PEERS}

SECONDS: dict[str, float] = {  # our own CPU seconds for one client
    **{f"engine_inline_1mb_{clients}_vs_flower": 0.2e-3 for clients in (10, 100, 1000)},
    "engine_ray_1mb_100_vs_flower": 0.35e-3,
}
LEAST: dict[str, float] = {"floor_fraction_fp32": 0.70, "floor_fraction_bf16": 0.75}  # here larger is better
