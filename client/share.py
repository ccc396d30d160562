"""Which clients a node serves, by its own configuration."""

from __future__ import annotations

from collections.abc import Mapping


def own_clients(config: Mapping[str, object], count: int) -> list[int] | None:
    """``client-ids="0-9,12"``, or partition i of n: the clients i, i + n, ...; None: any that are free."""
    if "client-ids" in config:
        spans = [span.partition("-") for span in str(config["client-ids"]).split(",")]
        return sorted({client for first, _, last in spans for client in range(int(first), int(last or first) + 1)})
    if "partition-id" in config:
        return list(range(int(str(config["partition-id"])), count, int(str(config["num-partitions"]))))
    return None
