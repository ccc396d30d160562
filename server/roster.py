"""Which node serves which clients. An id is given out once, kept by its node, and lives in the run's state.

A node that returns with its key has its old id, and so its old clients. Who takes what is free gets nothing of a node
that is away, since what its clients hold is there; who names its clients takes them over. Nodes that come when every
client is served are spare.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from reprlib import repr as short

from fedcil.errors import MessageRefused
from fedcil.hello import Hello, Share


class Roster:
    """Shares by node; clients are 0..count - 1. ``samples``: by client, what the server knows that it has."""

    def __init__(
        self, samples: Sequence[tuple[int, ...]], data: str, precision: str, shares: Mapping[int, Share]
    ) -> None:
        self._samples, self._data, self._precision = samples, data, precision
        self.shares: dict[int, Share] = dict(shares)

    def offers(self, nodes: Collection[int], reserved: Collection[int] = ()) -> dict[int, Share]:
        """What each of these nodes may take: first its old share, then an even part of the clients that nobody serves
        and that are not ``reserved`` (offered to a node that has not answered yet). Of those, nodes without a share get
        all, if there are any.
        """
        takers = [node for node in sorted(nodes) if not self.shares.get(node)] or sorted(nodes)
        free = self.free(reserved)
        parts = {node: tuple(free[place :: len(takers)]) for place, node in enumerate(takers)}
        return {node: self.shares.get(node, ()) + parts.get(node, ()) for node in nodes}

    def welcome(self, node: int, hello: Hello, offer: Share, present: Collection[int]) -> Share:
        """Give it what it asks for; of what it was offered, what nobody has taken since. MessageRefused, with the
        reason, for a node that cannot take part.
        """
        if hello.data != self._data:
            raise MessageRefused(f"it has other data: digest {short(hello.data)}, {short(self._data)} here")
        if hello.precision != self._precision:
            here = f"the server in {self._precision}: give training.precision a name"
            raise MessageRefused(f"it computes in {short(hello.precision)}, {here}")
        self._refuse_strangers(hello)
        mine = set(hello.clients)
        if not hello.fixed and not mine <= set(offer):
            raise MessageRefused(f"it takes {_some(mine - set(offer))}, which it was not offered")
        for other in sorted(set(present) - {node}):
            if taken := mine.intersection(self.shares.get(other, ())):
                if hello.fixed:
                    raise MessageRefused(f"node {other} serves {_some(taken)} already")
                mine -= taken
        for other, theirs in self.shares.items():  # nodes that are away give way to the owner of a fixed share
            if not mine.isdisjoint(theirs):
                self.shares[other] = tuple(client for client in theirs if client not in mine)
        self.shares[node] = tuple(sorted(mine))
        return self.shares[node]

    def free(self, reserved: Collection[int] = ()) -> list[int]:
        taken = {client for share in self.shares.values() for client in share} | set(reserved)
        return [client for client in range(len(self._samples)) if client not in taken]

    def _refuse_strangers(self, hello: Hello) -> None:
        for client, counts in hello.samples.items():
            if client >= len(self._samples):
                raise MessageRefused(f"it serves client {client}: there are 0 to {len(self._samples) - 1}")
            known = self._samples[client]
            if counts != known:
                raise MessageRefused(f"client {client} has {short(list(counts))} samples, {short(list(known))} known")


def _some(clients: Collection[int]) -> str:
    shown = sorted(clients)[:5]
    return f"client {', '.join(map(str, shown))}" + (" and more" if len(clients) > len(shown) else "")
