"""A simulated clock: how long each client would take, and who is back in time. Nothing here waits or measures.

Every client has a device and a network of its own, drawn from the key. What a round asks of it (samples to go through,
bytes down and up) then takes so many simulated seconds, known before anybody trains: the same on every engine, on every
machine, and after a resume. The numbers are the scenario's; fedcil ships none as typical. FedScale (arXiv 2105.11367)
and FLASH (2006.06983) publish traces of phones, whose speeds spread over more than an order of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import ScenarioError

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.tables import ClockSection

Floats = NDArray[np.float64]
FASTEST = 1e100  # samples or bytes a second, and its inverse the slowest: what can be added up


@dataclass(frozen=True, slots=True)
class Devices:
    """Of each client, (clients,): samples trained in a second, bytes received and bytes sent in a second."""

    speed: Floats
    down: Floats
    up: Floats

    def seconds(self, client: int, samples: int, down: int, up: int) -> float:
        """Receive ``down`` bytes, train, send ``up`` bytes: one after the other."""
        return float(down / self.down[client] + samples / self.speed[client] + up / self.up[client])


def make_devices(section: ClockSection, clients: int, key: Key) -> Devices | None:
    """Draw each client's device from ``key.at("clock", ...)``; more clients change nobody's. None where it is off.
    ScenarioError for times that are no numbers any more.
    """
    if section.name == "off":
        return None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        devices = _drawn(section, clients, key.at("clock"))
    shares = [share for share, *_ in section.tiers or ()]
    rates = np.concatenate([devices.speed, devices.down, devices.up])
    if not (rates.min() >= 1 / FASTEST and max([rates.max(), *shares]) <= FASTEST):
        raise ScenarioError(
            f"the clock gives clients {rates.min():g} to {rates.max():g} samples or bytes a second",
            where="clock",
            allowed=f"{1 / FASTEST:g} to {FASTEST:g}",
            next="change the medians or the tiers, or lower speed_sigma and network_sigma",
        )
    return devices


def _drawn(section: ClockSection, clients: int, key: Key) -> Devices:
    if section.name == "tiers":
        shares, *columns = np.array(section.tiers, dtype=np.float64).T
        tier = np.searchsorted(np.cumsum(shares) / shares.sum(), key.at("tier").numpy().random(clients), side="right")
        return Devices(*(column[tier] for column in columns))
    speed = np.exp(section.speed_sigma * key.at("speed").numpy().standard_normal(clients))
    network = np.exp(section.network_sigma * key.at("network").numpy().standard_normal(clients))
    return Devices(
        speed=(section.samples_per_s or 0.0) * speed,
        down=(section.down_bytes_per_s or 0.0) * network,  # who receives slowly sends slowly too
        up=(section.up_bytes_per_s or 0.0) * network,
    )


def asked_clients(per_round: int, over_sample: float) -> int:
    """How many are asked so that ``per_round`` may answer (Bonawitz et al., arXiv 1902.01046: 130 % of the target)."""
    return math.ceil(per_round * over_sample - 1e-9)  # 10 times 1.1 is more than 11 in binary


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What becomes of a round's cohort. ``late``: client -> seconds after the round's begin when it is done.

    ``seconds``: how long the round lasts; None without a clock.
    """

    on_time: tuple[int, ...]
    late: Mapping[int, float] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    seconds: float | None = None


def close_round(
    durations: Mapping[int, float], broken: Mapping[int, float], wanted: int, deadline: float | None
) -> Schedule:
    """When a round closes and who is in: the first ``wanted`` answers, or those before the deadline.

    ``durations``: seconds of each client that was asked. ``broken``: those that vanish, and after which part of their
    duration; the server sees that a connection broke, so a round in which nobody is left to wait for closes too. Equal
    durations are taken in the order of ids.
    """
    back = sorted((seconds, client) for client, seconds in durations.items() if client not in broken)
    if wanted and len(back) >= wanted:
        end = back[wanted - 1][0]
    else:
        end = max([seconds for seconds, _ in back] + [durations[client] * part for client, part in broken.items()])
    end = end if deadline is None else min(end, deadline)
    on_time = {client for seconds, client in back[:wanted] if seconds <= end}
    return Schedule(
        on_time=tuple(sorted(on_time)),
        late={client: seconds for seconds, client in sorted(back, key=lambda pair: pair[1]) if client not in on_time},
        dropped=tuple(sorted(broken)),
        seconds=end,
    )
