"""Checkpoints: tensors by content hash first, then one JSON file that names them, renamed last.

The last two are kept. A damaged one is passed over for the one before it; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from fedcil.errors import NotResumable
from fedcil.files import write_atomic
from fedcil.messages import Payload
from fedcil.state import Cursor, Pending, RunState, ServerState
from fedcil.tensor_files import named_path, read_named, write_tensors
from fedcil.tensors import Tensors, Total, content_hash, moved

FORMAT = 1
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's state, how long its metrics.jsonl was then, and the identity that a resume must match."""

    state: RunState
    metrics_length: int
    identity: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Named:
    """The files that a checkpoint needs beside its own."""

    tensors: frozenset[str]
    client_states: frozenset[str]


def named_by(plain: Mapping[str, Any]) -> Named:
    tensors = {name for name in plain["tensors"].values() if name} | {late["tensors"] for late in plain["pending"]}
    return Named(frozenset(tensors), frozenset(plain["client_states"].values()))


class CheckpointFolder:
    """``checkpoints/``: ``state-<n>.json`` and the tensors they name. One writer at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._last: int | None = None  # the state that was saved or loaded last; later ones are damaged
        self.client_states: frozenset[str] = frozenset()  # named by the checkpoints that are kept, as of the last save
        self._named: dict[int, Named] = {}  # of the checkpoints that are kept, as far as they were read or written
        self._intact: set[str] = set()  # tensors that were written or read whole since this was opened

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a new checkpoint, then remove what only older ones than the last two need."""
        numbers = self._numbers()
        last = self._last if self._last is not None else max(numbers, default=-1)
        for damaged in range(last + 1, max(numbers, default=-1) + 1):
            self._state_path(damaged).unlink(missing_ok=True)
        server = checkpoint.state.server
        groups = {
            "model": self._put(server.model),
            "memory": self._put(server.memory),
            "payload": self._put(server.payload.tensors, server.payload.hash) if server.payload else None,
        }
        pending = [_pending_to_json(late, self._put(late.total.tensors)) for late in checkpoint.state.pending]
        plain = _to_json(checkpoint, groups) | {"pending": pending}
        plain["digest"] = _digest(plain)
        write_atomic(self._state_path(last + 1), json.dumps(plain).encode())
        self._last = last + 1
        self._named[self._last] = named_by(plain)
        self._forget_old()

    def load(self) -> Checkpoint:
        """The newest intact checkpoint. NotResumable if there is none, or if it has a newer format."""
        problems = []
        for number in reversed(self._numbers()):
            path = self._state_path(number)
            try:
                checkpoint = self._read(path)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                problems.append(f"{path.name}: {error}")
            else:
                self._last = number
                return checkpoint
        raise NotResumable(
            "no intact checkpoint" + (f" ({'; '.join(problems)})" if problems else ""),
            where=str(self.folder),
            next="start the run anew with `fedcil run`; what metrics.jsonl has of this one stays",
        )

    def _read(self, path: Path) -> Checkpoint:
        plain = json.loads(path.read_text())
        if plain.pop("digest") != _digest(plain):
            raise ValueError("the digest does not fit the content")
        if plain["format"] > FORMAT:
            raise NotResumable(
                f"checkpoint format {plain['format']} is newer than this fedcil's {FORMAT}",
                where=str(path),
                next="resume with the version of fedcil that wrote it (environment.json)",
            )
        groups = plain["tensors"]
        payload = groups["payload"]
        server = ServerState(
            model=self._get(groups["model"]),
            memory=self._get(groups["memory"]),
            payload=Payload(self._get(payload), payload) if payload else None,
        )
        state = RunState(
            server=server,
            cursor=Cursor(**plain["cursor"]),
            client_states={int(client): name for client, name in plain["client_states"].items()},
            client_state_bytes={int(client): size for client, size in plain["client_state_bytes"].items()},
            holders=frozenset(plain["holders"]),
            short_rounds=plain["short_rounds"],
            nodes={node: tuple(clients) for node, clients in plain["nodes"].items()},
            pending=tuple(self._read_pending(late) for late in plain["pending"]),
        )
        return Checkpoint(state, plain["metrics_length"], plain["identity"])

    def _read_pending(self, plain: Mapping[str, Any]) -> Pending:
        total = Total(self._get(plain["tensors"]), plain["weight"])
        fields = {name: plain[name] for name in ("client", "number", "left_s", "samples")}
        return Pending(**fields, total=total)

    def _put(self, tensors: Tensors, name: str | None = None) -> str:
        if name is None:
            tensors = moved(tensors, torch.device("cpu"))  # once, for its hash and for the file
            name = content_hash(tensors)
        if name not in self._intact:
            write_tensors(named_path(self.folder, name), tensors)
            self._intact.add(name)
        return name

    def _get(self, name: str) -> Tensors:
        tensors = read_named(self.folder, name)
        self._intact.add(name)
        return tensors

    def _forget_old(self) -> None:
        numbers = self._numbers()
        for number in numbers[:-KEPT]:
            self._state_path(number).unlink()
        self._named = {
            number: self._named.get(number) or named_by(json.loads(self._state_path(number).read_text()))
            for number in numbers[-KEPT:]
        }
        named = frozenset[str]().union(*(each.tensors for each in self._named.values()))
        self.client_states = frozenset[str]().union(*(each.client_states for each in self._named.values()))
        self._intact &= named
        for path in self.folder.iterdir():
            left_by_a_kill = path.name.startswith(".")
            if left_by_a_kill or (path.suffix == ".safetensors" and path.stem not in named):
                path.unlink()

    def _numbers(self) -> list[int]:
        matches = (re.fullmatch(r"state-(\d+)\.json", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _state_path(self, number: int) -> Path:
        return self.folder / f"state-{number}.json"


def _digest(plain: Mapping[str, Any]) -> str:
    """Of everything in a state file but the digest itself, in every format."""
    return blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def _to_json(checkpoint: Checkpoint, groups: Mapping[str, str | None]) -> dict[str, Any]:
    """Plain values with text as keys: what reading the file gives again."""
    state = checkpoint.state
    return {
        "format": FORMAT,
        "identity": dict(checkpoint.identity),
        "cursor": asdict(state.cursor),
        "tensors": dict(groups),
        "client_states": {str(client): name for client, name in state.client_states.items()},
        "client_state_bytes": {str(client): size for client, size in state.client_state_bytes.items()},
        "holders": sorted(state.holders),
        "short_rounds": state.short_rounds,
        "nodes": {node: list(clients) for node, clients in state.nodes.items()},
        "metrics_length": checkpoint.metrics_length,
    }


def _pending_to_json(late: Pending, tensors: str) -> dict[str, Any]:
    plain = {"client": late.client, "number": late.number, "left_s": late.left_s, "samples": late.samples}
    return plain | {"weight": late.total.weight, "tensors": tensors}
