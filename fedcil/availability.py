"""Who can be reached in a round: a pure function of the place in the run, so a resumed run sees the same.

``markov``, ``diurnal`` and ``trace`` count rounds through the whole run (fedcil/timeline.py); what is read from files
is in fedcil/traces.py. Who is a member at all is another question (fedcil/population.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.traces import recorded, trace

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.tables import AvailabilitySection
    from fedcil.timeline import Timeline

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Availability:
    """(task, phase, round) -> who can be reached then, (clients,), to be read only. ``digest``: of what a file says, if
    one does.
    """

    present: Callable[[int, int, int], Mask]
    digest: str | None = None

    def __call__(self, task: int, phase: int, round: int) -> Mask:
        return self.present(task, phase, round)


def make_availability(section: AvailabilitySection, clients: int, key: Key, timeline: Timeline) -> Availability:
    """Of the clients 0..clients - 1.

    Raises InputError if a file is missing or broken, or a record has not all rounds.
    """
    key = key.at("availability")
    if section.name == "recorded":
        answered, digest = recorded(Path(str(section.file)), clients, timeline.places())
        return Availability(lambda *place: mask_of(answered(*place), clients), digest)
    if section.name == "always":
        everyone = np.ones(clients, dtype=np.bool_)
        return Availability(lambda *_: everyone)
    if section.name == "bernoulli":
        return Availability(lambda *place: key.at(*place).numpy().random(clients) < section.probability)
    if section.name == "trace":
        there, digest = trace(Path(str(section.file)), clients)
        return Availability(lambda *place: mask_of(there(timeline.round_number(*place)), clients), digest)
    model = Markov(section, clients, key) if section.name == "markov" else Diurnal(section, clients, key)
    return Availability(lambda *place: model.at(timeline.round_number(*place)))


def mask_of(ids: Collection[int], clients: int) -> Mask:
    """Which of the clients 0..clients - 1 are among ``ids``, (clients,)."""
    mask = np.zeros(clients, dtype=np.bool_)
    mask[np.fromiter(ids, dtype=np.int64, count=len(ids))] = True
    return mask


class Markov:
    """Each client is there for ``rounds_on`` rounds in the mean and away for ``rounds_off``, both geometric.

    A round's state follows from the draws of all rounds before it, so it is a function of its number alone; the last
    one is kept, only to save time.
    """

    def __init__(self, section: AvailabilitySection, clients: int, key: Key) -> None:
        self._on, self._off = section.rounds_on, section.rounds_off
        self._clients, self._key = clients, key.at("markov")
        self._number, self._mask = -1, np.zeros(0, dtype=np.bool_)

    def at(self, number: int) -> Mask:
        if number < self._number:
            self._number = -1
        while self._number < number:
            self._number += 1
            draws = self._key.at(self._number).numpy().random(self._clients)
            if self._number == 0:  # as many as there are in the long run
                self._mask = draws < self._on / (self._on + self._off)
            else:
                self._mask = np.where(self._mask, draws >= 1 / self._on, draws < 1 / self._off)
        return self._mask


class Diurnal:
    """A client's chance is a sine of the round: ``share`` + ``amplitude`` sin(2 pi (round / ``period`` + its phase)).

    Phases are uniform over the part ``spread`` of a period: 0 is one time zone for all, 1 the whole earth.
    """

    def __init__(self, section: AvailabilitySection, clients: int, key: Key) -> None:
        self._section, self._clients, self._key = section, clients, key.at("diurnal")
        self._phases = section.spread * self._key.at("phase").numpy().random(clients)

    def at(self, number: int) -> Mask:
        section, draws = self._section, self._key.at(number).numpy().random(self._clients)
        waves = np.sin(2 * np.pi * (number / section.period + self._phases))
        mask: Mask = draws < section.share + section.amplitude * waves
        return mask
