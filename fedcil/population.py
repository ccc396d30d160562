"""Who belongs to the federation: newcomers are clients never seen before, and who leaves does not come back.

A client is an id below ``clients.count``; a population says in which rounds each id is a member. A task's samples are
shared among its members only, so a newcomer brings data nobody has seen, and a leaver takes its own along. Whether
a member can be *reached* in a round is another question (fedcil/availability.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import ScenarioError

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.tables import PopulationSection
    from fedcil.timeline import Timeline

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Population:
    """Client c is a member in the rounds [arrives[c], leaves[c]), both (clients,), numbered by the timeline.

    ``behind[task]`` (clients,) are the members who get nothing of that task's samples and stay with those they had.
    """

    timeline: Timeline
    arrives: Ints
    leaves: Ints
    behind: tuple[Mask, ...]

    def present(self, number: int) -> Mask:
        """Who is a member in round ``number``, (clients,)."""
        mask: Mask = (self.arrives <= number) & (number < self.leaves)
        return mask

    def sharing(self, task: int) -> Ints:
        """Ids of those who share the task's samples, sorted: its members at any time, but those who stay behind."""
        return np.flatnonzero(self.members(task) & ~self.behind[task])

    def members(self, task: int) -> Mask:
        """Who is a member at any time of the task, (clients,)."""
        span = self.timeline.span(task)
        mask: Mask = (self.arrives < span.stop) & (span.start < self.leaves)
        return mask

    def sources(self, task: int) -> Ints:
        """The task whose samples each client has in this one, (clients,): an earlier one for who stayed behind."""
        found = np.full(len(self.arrives), task)
        for earlier in range(task, 0, -1):
            found[(found == earlier) & self.behind[earlier]] = earlier - 1
        return found

    def source(self, client: int, task: int) -> int:
        """The same of one client."""
        while self.behind[task][client]:
            task -= 1
        return task

    def gone(self, number: int) -> Mask:
        """Who has left for good before round ``number``, (clients,)."""
        mask: Mask = self.leaves <= number
        return mask


def make_population(section: PopulationSection, clients: int, timeline: Timeline, key: Key) -> Population:
    """Draw from ``key.at("population", ...)``. ScenarioError if there are fewer ids than will be needed."""
    needed = section.needed(len(timeline.starts) - 1, steps_inside(timeline))
    if clients < needed:
        raise ScenarioError(
            f"{clients} clients are too few: population.name = {section.name!r} needs {needed} over the run",
            where="clients.count",
            allowed=f"at least {needed}: newcomers are clients never seen before",
            next=f"set clients.count = {needed}",
        )
    if section.name == "turnover":
        return _turnover(section, clients, timeline, key)
    if section.name == "growing":
        return _growing(section, clients, timeline, key)
    return _fixed(clients, timeline)


def steps_inside(timeline: Timeline) -> int:
    """Rounds that follow another of the same phase: where turnover inside a task happens."""
    return sum(length - 1 for task in range(len(timeline.starts)) for length in timeline.lengths(task))


def _fixed(clients: int, timeline: Timeline) -> Population:
    """Everyone from the first round on; three numbers, however many clients."""
    always, never = np.broadcast_to(np.int64(0), clients), np.broadcast_to(np.int64(NEVER), clients)
    return Population(timeline, always, never, (np.broadcast_to(np.False_, clients),) * len(timeline.starts))


def _turnover(section: PopulationSection, clients: int, timeline: Timeline, key: Key) -> Population:
    """As many come as leave. Who leaves is drawn by the place, so methods with the same rounds see the same people."""
    arrives, leaves = np.full(clients, NEVER), np.full(clients, NEVER)
    known = section.size or 0
    arrives[:known] = 0
    for place in timeline.places():
        number, (task, phase, round) = timeline.round_number(*place), place
        count = section.replaced(section.replaced_per_round if round else section.replaced_per_task)
        if not count or not number or (phase and not round):
            continue
        here = np.flatnonzero((arrives <= number) & (number < leaves))
        draw = key.at("population", task, phase, round).numpy()
        leaves[draw.choice(here, count, replace=False)] = number
        arrives[known : known + count] = number
        known += count
    return Population(timeline, arrives, leaves, _fixed(clients, timeline).behind)


def _growing(section: PopulationSection, clients: int, timeline: Timeline, key: Key) -> Population:
    """GLFC's groups (arXiv 2203.11473, fl_main.py of its code): at each boundary newcomers, and most old ones move on.

    Newcomers are U_n, who moves on U_b, who stays behind U_o: drawn afresh at each boundary, so who stayed behind may
    move on later.
    """
    arrives, known = np.full(clients, NEVER), section.size or 0
    arrives[:known] = 0
    behind = [np.zeros(clients, dtype=np.bool_)]
    for task in range(1, len(timeline.starts)):
        moving = int(known * section.move_on + 1e-9)  # a share like 0.9 of 10 is not exact in binary
        order = key.at("population", task).numpy().permutation(known)
        behind.append(np.isin(np.arange(clients), order[moving:]))
        arrives[known : known + section.newcomers] = timeline.span(task).start
        known += section.newcomers
    return Population(timeline, arrives, np.full(clients, NEVER), tuple(behind))
