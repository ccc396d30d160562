"""Which clients a node serves, by its own configuration."""

from __future__ import annotations

from collections.abc import Mapping


def own_clients(config: Mapping[str, object], count: int) -> list[int] | None:
    """``client-ids="0-9,12"``, or partition i of n: the clients i, i + n, ...; None: any that are free."""
    if "client-ids" in config:
        return sorted({client for span in str(config["client-ids"]).split(",") for client in _span(span)})
    if "partition-id" in config:
        return list(range(int(str(config["partition-id"])), count, int(str(config["num-partitions"]))))
    return None


def _span(text: str) -> range:
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise ValueError(f"client-ids = {text!r} runs backwards")
    return range(int(first), int(last or first) + 1)
