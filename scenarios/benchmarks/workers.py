"""Two inline workers against one: FedAvg rounds on two cores. Weights are equal bit for bit, whatever the number.

The second worker is a process where a long run would make it one by itself, else a thread. A repeat is as many rounds
as take a second, as in a run.
"""

from __future__ import annotations

from functools import partial

import torch

from fedcil.engines.workers import SMALL_BYTES
from fedcil.tensors import count_bytes
from scenarios.benchmarks.nets import build
from scenarios.benchmarks.peers.session import children_cpu
from scenarios.benchmarks.rounds import OurLoop, our_loop
from scenarios.benchmarks.timing import Figure, against, in_turn, timed, times_in_a_second


def measure(net: str, repeats: int) -> dict[str, Figure]:
    """``two_workers_<net>``: CPU(2) / CPU(1) as ``ratio``, wall(2) / wall(1) as ``wall_ratio``."""
    with our_loop(net, workers=1) as one, our_loop(net, workers=2, processes=small_net(net)) as two:
        one.round()
        two.round()
        if not all(torch.equal(one.model[name], two.model[name]) for name in one.model):
            raise AssertionError(f"{net}: two workers give other weights than one")
        turns = times_in_a_second(one.round)
        cases = {
            "one": timed(partial(rounds, one, turns), turns, children_cpu),
            "two": timed(partial(rounds, two, turns), turns, children_cpu),
        }
        costs = in_turn(cases, repeats)
    return {f"two_workers_{net}": against(costs["two"], costs["one"])}


def small_net(net: str) -> bool:
    return count_bytes(dict(build(net).named_parameters())) <= SMALL_BYTES


def rounds(loop: OurLoop, turns: int) -> None:
    for _ in range(turns):
        loop.round()
