"""Two inline workers against one: a FedAvg round on two cores. Weights are equal bit for bit, whatever the number."""

from __future__ import annotations

import torch

from scenarios.benchmarks.rounds import our_loop
from scenarios.benchmarks.timing import Figure, against, in_turn, timed


def measure(net: str, repeats: int) -> dict[str, Figure]:
    """``two_workers_<net>``: CPU(2) / CPU(1) as ``ratio``, wall(2) / wall(1) as ``wall_ratio``."""
    with our_loop(net, workers=1) as one, our_loop(net, workers=2) as two:
        one.round()
        two.round()
        if not all(torch.equal(one.model[name], two.model[name]) for name in one.model):
            raise AssertionError(f"{net}: two workers give other weights than one")
        costs = in_turn({"one": timed(one.round), "two": timed(two.round)}, repeats)
    return {f"two_workers_{net}": against(costs["two"], costs["one"])}
