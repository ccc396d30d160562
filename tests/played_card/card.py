"""The card: its streams, its memory, and what becomes of an operator."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tag, Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from played_card.graphs import Graph, Kernel, Memory, Pool
from played_card.tensors import Generator, OnCard

CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
Found = list[OnCard]


class Stream:
    """Work in the order of its launch. ``seen``: how much of each stream's work is done before this one's next."""

    def __init__(self, name: str) -> None:
        self.name, self.launched = name, 0
        self.seen: Counter[Stream] = Counter()

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen | Counter({other: other.launched})


@dataclass(eq=False)
class Block:
    """Memory on the card, of the stream on which it was asked for; who wrote and read it last, and when."""

    card: Card
    bytes: int
    stream: Stream
    graph: Graph | None  # in whose pool it lies
    written: tuple[Stream, int] | None = None
    read: Counter[Stream] = field(default_factory=Counter)

    def __del__(self) -> None:
        self.card.free(self)


class Card:
    """``waits``: how often the program waited for the device, by reason. ``sent``: bytes that came from the CPU."""

    def __init__(self, memory: int) -> None:
        self.memory, self.used, self.peak = memory, 0, 0
        self.waits: Counter[str] = Counter()
        self.races: list[str] = []
        self.sent = 0
        self.replays = 0
        self.default = self.current = Stream("the default stream")
        self.streams = [self.default]
        self.done: Counter[Stream] = Counter()  # what the program knows to be done of each stream
        self.graph: Graph | None = None
        self.draws = torch.Generator()
        self.given_back = False

    # Work

    def launch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator: on the card if one of its tensors lies there, or it makes one there."""
        leaves = tree_leaves((args, kwargs))
        on = [each for each in leaves if isinstance(each, OnCard)]
        off = [each for each in leaves if isinstance(each, Tensor) and not isinstance(each, OnCard)]
        here = _result_is_here(func, args, kwargs, on)
        with _disable_current_modes():
            if not on and not here:
                return func(*args, **kwargs)
            if Tag.inplace_view in func.tags:
                raise NotImplementedError(f"{func} is not played")
            mixes = func in COPIES or (func in INDEXED and isinstance(args[0], OnCard))
            if on and any(each.dim() for each in off) and not mixes:
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got some of the CPU")
            self._pass_the_border(func, args, kwargs, on, off, here)
            writes = _written(func, args, kwargs)
            self.in_order([each.block for each in on], [each.block for each in writes])
            args, kwargs = tree_map(_on_host, (args, kwargs))
            if self.graph:  # numbers of the CPU stay what they were
                args, kwargs = tree_map(lambda x: x.clone() if any(x is y for y in off) else x, (args, kwargs))
                self._save(writes)
            results = self._work(func, args, kwargs)
            return self._taken(lambda: func(*args, **kwargs), results, on, writes) if here else results

    def _work(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("generator")
        if given is not None and Generator.belongs.get(given._cdata) != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
        if Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if self.graph:
            raise RuntimeError(f"{func}: a captured step draws the same at every replay here")
        before = torch.get_rng_state()
        torch.set_rng_state(self.draws.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.draws.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _taken(self, work: Callable[[], Any], results: Any, on: Found, writes: Found) -> Any:
        """``results`` as tensors of the card: the operator's own, views of their memory, or new ones."""
        known = {id(each.host): each for each in on}
        blocks = {each.host.untyped_storage()._cdata: each.block for each in on}
        fresh: list[tuple[int, Tensor]] = []
        for place, tensor in enumerate(tree_leaves(results)):
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                memory = tensor.untyped_storage()
                if memory._cdata not in blocks:
                    blocks[memory._cdata] = self._allocate(memory.nbytes())
                    fresh.append((place, tensor))
                known[id(tensor)] = OnCard(tensor, blocks[memory._cdata])
        self.in_order([], [known[id(tensor)].block for _, tensor in fresh])
        if graph := self.graph:
            reads, written = (tuple(Memory(each.block, graph) for each in found) for found in (on, writes))
            graph.kernels.append(Kernel(work, tuple(fresh), reads, written))
        return tree_map(lambda each: known.get(id(each), each), results)

    def _pass_the_border(
        self, func: Any, args: Any, kwargs: dict[str, Any], on: Found, off: list[Tensor], here: bool
    ) -> None:
        """What moves between CPU and card, and what the program waits for."""
        copies = func in COPIES
        at_once = bool(
            kwargs.get("non_blocking") or (copies and func is not aten._to_copy.default and args[2:] == (True,))
        )
        if not here or func is aten._local_scalar_dense.default:
            if at_once:
                self.race("the CPU reads what the card may not have written yet")
            self.wait("to the CPU")
        elif copies and off:
            self.sent += sum(each.nbytes for each in off)
            if self.graph:
                raise RuntimeError(f"operation not permitted when stream is capturing: {func} from the CPU")
            if not at_once:
                self.wait("from the CPU")
        elif func in INDEXED:
            indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
            if any(each.dtype == torch.bool or not isinstance(each, OnCard) for each in indices):
                self.wait("index")
        elif on and {Tag.data_dependent_output, Tag.dynamic_output_shape} & set(func.tags):
            self.wait(str(func))

    # Order

    def wait(self, reason: str) -> None:
        """The program goes on when all work of the current stream is done, and of all streams at a synchronisation."""
        if self.graph:
            raise RuntimeError(f"operation not permitted when stream is capturing: waits ({reason})")
        self.waits[reason] += 1
        for stream in self.streams if reason in ("synchronize", "capture") else [self.current]:
            self.done |= stream.seen | Counter({stream: stream.launched})

    def in_order(self, reads: Sequence[Block], writes: Sequence[Block]) -> None:
        """The current stream's next work. A race if what it touches may still be at work on another."""
        stream = self.current
        stream.launched += 1
        stream.seen |= self.done | Counter({stream: stream.launched})
        for block in reads:
            self._after(block.written, "reads what is not yet written")
            block.read[stream] = stream.launched
        for block in writes:
            for event in (block.written, *block.read.items()):
                self._after(event, "writes over what is still in use")
            block.written = (stream, stream.launched)

    def _after(self, event: tuple[Stream, int] | None, problem: str) -> None:
        if event and self.current.seen[event[0]] < event[1]:
            self.race(f"{self.current.name} {problem} on {event[0].name}")

    def alone_in(self, pool: Pool | None) -> None:
        """Graphs of one pool have the same memory."""
        assert pool
        self._after(pool.used, "replays a graph in memory of one that is at work")
        pool.used = (self.current, self.current.launched)

    def race(self, problem: str) -> None:
        self.races.append(problem + "\n" + "".join(traceback.format_stack(limit=20)))

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def new_stream(self, *_: object) -> Stream:
        self.streams.append(Stream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    # Memory

    def _allocate(self, size: int) -> Block:
        if self.graph and self.graph.pool:
            self.graph.pool.add(size)
        else:
            self.hold(size)
        return Block(self, size, self.current, self.graph)

    def hold(self, size: int) -> None:
        if self.used + size > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.used += size
        self.peak = max(self.peak, self.used)

    def free(self, block: Block) -> None:
        """Its stream may have it for something else from now on."""
        if block.graph and block.graph.pool:
            block.graph.pool.held -= block.bytes
            return
        self.used -= block.bytes
        if self.given_back:
            return
        for event in (block.written, *block.read.items()):
            if event and event[0] is not block.stream:
                stream, when = event
                if max(block.stream.seen[stream], self.done[stream]) < when:
                    self.race(f"memory of {block.stream.name} is free while {stream.name} is at work on it")

    # Graphs

    @contextmanager
    def capture(
        self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """Kernels are kept and nothing is changed: not what was there before, and new memory holds no number."""
        self.wait("capture")
        with self.on(stream):
            self.graph, graph.pool = graph, pool or Pool(self)
            try:
                yield
            finally:
                self.graph = None
                with _disable_current_modes():
                    for memory, before in graph.before.values():
                        memory.copy_(before)
                    for tensor in (tensor for kernel in graph.kernels for _, tensor in kernel.results):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
                graph.before.clear()

    def _save(self, writes: Found) -> None:
        assert self.graph
        for each in writes:
            memory = each.host.untyped_storage()
            if each.block.graph is not self.graph and memory._cdata not in self.graph.before:
                self.graph.before[memory._cdata] = (memory, memory.clone())


def _result_is_here(func: Any, args: Any, kwargs: dict[str, Any], on: Found) -> bool:
    if func is aten.copy_.default:
        return isinstance(args[0], OnCard)
    if func is aten._foreach_copy_.default:
        return isinstance(args[0][0], OnCard)
    device = kwargs.get("device")  # of a tensor of the card that is to stay where it is: meta
    return bool(on) if device is None else torch.device(device).type != "cpu"


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU
    return value.host if isinstance(value, OnCard) else value


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Found:
    """The operator's arguments that it writes to."""
    found: Found = []
    for place, parameter in enumerate(func._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(parameter.name)
            found += [each for each in tree_leaves(given) if isinstance(each, OnCard)]
    return found
