"""A packet (``wire.py``) as a record of Flower, on both sides."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord

from fedcil.errors import MessageRefused


def packet_record(packet: bytes) -> ArrayRecord:
    return ArrayRecord([np.frombuffer(packet, dtype=np.uint8)])


def packet_of(record: object) -> bytes:
    """The bytes in a record. MessageRefused if it is not one array of them."""
    try:
        (array,) = record.to_numpy_ndarrays()  # type: ignore[attr-defined]
        content: bytes = array.tobytes()
    except Exception as error:  # whatever a foreign record can raise
        raise MessageRefused(f"not a packet: {type(error).__name__}") from None
    return content
