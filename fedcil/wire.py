"""Bytes <-> values, for messages that leave the process; and the one border that what comes back must pass.

A packet is a JSON header and safetensors, with a digest over both: the formats themselves accept flipped bits
silently. Whatever is wrong with a packet, one error comes out: MessageRefused. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from reprlib import repr as short
from typing import Any, TypeGuard

import torch
from safetensors.torch import load
from torch import Tensor

from fedcil.errors import MessageRefused, printable
from fedcil.messages import MOST_CHARACTERS, Answer, Broadcast, Failure, Payload, Report
from fedcil.robust import admissible
from fedcil.rule import PLAIN, Rule
from fedcil.tensor_files import tensor_bytes
from fedcil.tensors import Contribution, Tensors, count_bytes

MAGIC = b"fedcil01"
DIGEST_BYTES = 16
PREFIX = struct.Struct("<8sI")  # magic, length of the header
LARGEST = 1e100  # of a number in a report: sums of many stay finite
WEIGHTS = (1e-9, 1e15)  # the least and the largest that a contribution may have
HEADROOM = 2.0**20  # the sum of so many contributions like this one must stay finite
HASH = re.compile(r"[0-9a-f]{32}")

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""What a contribution must look like: name -> (shape, dtype)."""


def spec_of(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The form of these tensors."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def pack(header: Mapping[str, Any], tensors: Tensors) -> bytes:
    """A packet. ValueError for a header that is no JSON."""
    head = json.dumps(header, allow_nan=False).encode()
    body = PREFIX.pack(MAGIC, len(head)) + head + tensor_bytes(tensors)
    return body + _digest(body)


def unpack(packet: bytes, *, limit: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Size, magic, digest, header, tensors, in this order."""
    if len(packet) > limit:
        raise MessageRefused(f"{len(packet)} bytes are more than the limit, {limit}")
    if len(packet) < PREFIX.size + DIGEST_BYTES:
        raise MessageRefused(f"{len(packet)} bytes are no packet")
    body, digest = packet[:-DIGEST_BYTES], packet[-DIGEST_BYTES:]
    magic, length = PREFIX.unpack_from(body)
    if magic != MAGIC:
        raise MessageRefused("not a fedcil packet")
    if _digest(body) != digest:
        raise MessageRefused("the digest does not fit the content")
    try:
        header = json.loads(body[PREFIX.size : PREFIX.size + length])
        tensors = load(body[PREFIX.size + length :])
    except Exception as error:  # unknown types, too deep, too large: a parser can raise nearly anything
        raise MessageRefused(f"cannot be parsed: {error}") from None
    if not isinstance(header, dict):
        raise MessageRefused("the header is no table")
    return header, tensors


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST_BYTES).digest()


def pack_broadcast(broadcast: Broadcast, run: str) -> bytes:
    """The part of a request that all nodes of a round share; the payload goes apart, by its hash."""
    header = {
        "run": run,
        "place": place_of(broadcast),
        "payload": broadcast.payload.hash if broadcast.payload else None,
    }
    return pack(header, broadcast.tensors)


def unpack_broadcast(packet: bytes, *, limit: int) -> tuple[dict[str, Any], Tensors]:
    """(header with run, place and payload, global tensors)."""
    header, tensors = unpack(packet, limit=limit)
    if header.keys() != {"run", "place", "payload"}:
        raise MessageRefused(f"a broadcast with the keys {sorted(header)}")
    return header, tensors


def pack_payload(payload: Payload) -> bytes:
    return pack({"payload": payload.hash}, payload.tensors)


def unpack_payload(packet: bytes, *, limit: int) -> Payload:
    """The payload, if its content is what its hash says."""
    header, tensors = unpack(packet, limit=limit)
    payload = Payload.of(tensors)
    if payload.hash != header.get("payload"):
        raise MessageRefused("a payload that is not the one it says it is")
    return payload


def place_of(broadcast: Broadcast) -> list[int]:
    return [broadcast.task, broadcast.phase, broadcast.round]


def pack_answer(answer: Answer, run: str, place: Sequence[int]) -> bytes:
    """One answer as a packet."""
    result = answer.result
    header: dict[str, Any] = {"run": run, "place": list(place), "client": result.client}
    if isinstance(result, Failure):
        header |= {"failure": {"stage": result.stage, "reason": result.reason}}
        return pack(header, {})
    header["report"] = {
        "samples": result.samples,
        "metrics": dict(result.metrics),
        "state": result.state,
        "state_bytes": result.state_bytes,
        "seconds": result.seconds,
    }
    if answer.contribution is None:
        return pack(header, {})
    header["weight"] = answer.contribution.weight
    return pack(header, answer.contribution.tensors)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the border lets through: answers to this round, of this form."""

    run: str
    place: list[int]
    samples: Mapping[int, int]  # by client: what the server knows that it has
    spec: Spec  # empty: this phase sends no tensors
    limit: int
    weights: Mapping[int, float] = field(default_factory=dict)  # by client, where the server knows what it must be
    start: Tensors = field(default_factory=dict)  # the model that was sent: updates are measured from it
    rule: Rule = PLAIN


def admit(packet: bytes, client: int, expected: Expected) -> Answer:
    """The border, for an answer of ``client``. MessageRefused, with its reason, for anything that does not belong here.

    Size, digest, parse (``unpack``); run, round, client; report; names, shapes, dtypes, finite values, norm.
    """
    header, tensors = unpack(packet, limit=expected.limit)
    if header.get("run") != expected.run:
        raise MessageRefused("an answer to another run")
    if header.get("place") != expected.place:
        raise MessageRefused("an answer to another round")
    if type(header.get("client")) is not int or header["client"] != client:
        raise MessageRefused(f"an answer of client {short(header.get('client'))}, which nobody asked for")
    if "failure" in header:
        return Answer(_failure(client, header["failure"]))
    report = _report(client, header.get("report"), tensors, expected)
    if not expected.spec:
        if tensors:
            raise MessageRefused("tensors where none belong")
        return Answer(report)
    weight = _weight(header.get("weight"), expected.weights.get(client))
    _check_tensors(tensors, weight, expected.spec)
    return Answer(report, admissible(Contribution(tensors, weight), expected.start, expected.rule))


def _failure(client: int, value: Any) -> Failure:
    if not isinstance(value, dict):
        raise MessageRefused("a failure that is no table")
    stage, reason = value.get("stage"), value.get("reason")
    if not (isinstance(stage, str) and isinstance(reason, str)):
        raise MessageRefused("a failure without stage and reason")
    return Failure(client, printable(stage[:100]), printable(reason[:MOST_CHARACTERS])[:MOST_CHARACTERS])


def _report(client: int, value: Any, tensors: Tensors, expected: Expected) -> Report:
    if not isinstance(value, dict):
        raise MessageRefused("no report")
    samples, metrics, state = value.get("samples"), value.get("metrics"), value.get("state")
    if type(samples) is not int or samples != expected.samples[client]:
        raise MessageRefused(f"{short(samples)} samples reported, {expected.samples[client]} known")
    if not isinstance(metrics, dict) or not all(_is_number(number) for number in metrics.values()):
        raise MessageRefused("metrics that are not finite numbers")
    if not (state is None or (isinstance(state, str) and HASH.fullmatch(state))):
        raise MessageRefused("a client state that is no hash")
    state_bytes, seconds = value.get("state_bytes"), value.get("seconds")
    if type(state_bytes) is not int or not (0 <= state_bytes <= LARGEST and _is_number(seconds) and seconds >= 0):
        raise MessageRefused("costs that are no numbers from 0 on")
    return Report(
        client=client,
        samples=samples,
        metrics=metrics,
        state=state,
        state_bytes=state_bytes,
        bytes_up=count_bytes(tensors),
        seconds=float(seconds),
    )


def _weight(value: Any, known: float | None) -> float:
    if known is not None and value != known:
        raise MessageRefused(f"a weight of {short(value)}, {known:g} known")
    if not _is_number(value) or not WEIGHTS[0] <= value <= WEIGHTS[1]:
        raise MessageRefused(f"a weight of {short(value)}, not of {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    return float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _check_tensors(tensors: Tensors, weight: float, spec: Spec) -> None:
    if tensors.keys() != spec.keys():
        differing = sorted(tensors.keys() ^ spec.keys())[:5]
        raise MessageRefused(f"tensors missing or too many: {short(differing)}")
    for name, (shape, dtype) in spec.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            given = f"{short(tuple(tensor.shape))} {tensor.dtype}"
            raise MessageRefused(f"{name} is {given}, not {shape} {dtype}")
        if not torch.isfinite(tensor * (weight * HEADROOM)).all():
            raise MessageRefused(f"{name} is not finite, or too large to be summed")
