"""Whether a round counts, and when rounds that do not end the run."""

from __future__ import annotations

import logging
import math
from collections import Counter

from fedcil.errors import RunFailed, TooFewClients
from fedcil.messages import BORDER, UNEXPECTED, Outcome
from fedcil.stream import Task

LOG = logging.getLogger("fedcil.border")
BRING_BACK = "bring clients back and `fedcil resume RUN`"
ANEW = "begin anew with another {} or server.quorum"
WAYS_OUT = {
    "": ANEW.format("availability"),
    "dropout": ANEW.format("clients.dropout"),
    "late": ANEW.format("clock.deadline_s"),
    "deadline": ANEW.format("server.deadline_s"),
    BORDER: ANEW.format("server.norm_limit"),
    "samples": ANEW.format("training.batch_size, training.batches, partition"),
    "training": "mend the loss, or begin anew with a lower training.lr",
    UNEXPECTED: "mend the method, the model or the data",
    "fit": "mend the method's fit",
    "state": "mend the method's client_memory",
    "worker": "see whether memory runs out (`fedcil plan`), or lower engine.workers",
}
"""What may help, by the stage of a simulation's failures; the first: nobody was asked."""


def round_status(answered: int, asked: int, quorum: float, least: int = 0) -> str:
    """ok, empty (nobody was asked), or no_quorum: too few of the asked answered, or fewer than a robust fold needs."""
    if asked == answered == 0:
        return "empty"
    return "ok" if answered >= max(least, needed_answers(quorum, asked)) else "no_quorum"


def needed_answers(quorum: float, asked: int) -> int:
    """The least number that is this share of the asked, and not 0."""
    return max(1, math.ceil(quorum * asked - 1e-9))  # 0.28 times 25 is more than 7 in binary


def log_refused(outcome: Outcome) -> None:
    """Who sent something that was refused, and why: it may be a bug, or an attack."""
    for failure in outcome.failures:
        if failure.stage == BORDER:
            LOG.warning("client %d was refused: %s", failure.client, failure.reason)


def refuse_broken_method(outcome: Outcome, asked: int) -> None:
    """RunFailed if every client of the round raised: that is the method's or the data's doing, not the clients'."""
    raised = [failure for failure in outcome.failures if failure.stage == UNEXPECTED]
    if asked and len(raised) == asked:
        raise RunFailed(
            f"all {asked} clients of a round raised an error; client {raised[0].client}: {raised[0].reason}",
            where="the method, the model or the data",
            next="mend it and start a new run, or `fedcil resume RUN`",
        )


def too_few(rounds: int, task: Task, quorum: float, outcome: Outcome) -> TooFewClients:
    """The error after so many ``rounds`` in a row; ``outcome``: the last one's, which says why."""
    reasons = Counter(f"{failure.stage}: {failure.reason}" for failure in outcome.failures).most_common(1)
    return TooFewClients(
        f"{rounds} rounds in a row without enough clients" + "".join(f" ({reason})" for reason, _ in reasons),
        where=f"task {task.index + 1}",
        allowed=f"at least one answer and server.quorum = {quorum:g} of the answers wanted",
        next=_way_out(outcome),
    )


def _way_out(outcome: Outcome) -> str:
    stages = Counter(failure.stage for failure in outcome.failures)
    if stages and stages["training"] == stages.total():
        return WAYS_OUT["training"]
    if outcome.attendance is not None:  # real nodes
        return BRING_BACK
    ((stage, _),) = stages.most_common(1) or [("", 0)]
    return f"{WAYS_OUT.get(stage, WAYS_OUT[''])}; `fedcil resume RUN` tries as many rounds once more"
