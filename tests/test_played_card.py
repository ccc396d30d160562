"""The instrument of test_on_card.py: it computes as a CPU does, and sees what it is there to see."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from played_card import Card, played_card
from torch import nn
from torch.nn import functional as F

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    with played_card(monkeypatch, memory=1 << 20) as card:
        yield card


def learned(device: str) -> list[torch.Tensor]:
    """A few steps of a small network, with what fedcil's have in them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    network = copy.deepcopy(network.to(device).to(memory_format=torch.channels_last))
    images, labels = images.to(device), labels.to(device)
    for _ in range(3):
        found = torch.autograd.grad(F.cross_entropy(network(images), labels), list(network.parameters()))
        with torch.no_grad():
            torch._foreach_add_(list(network.parameters()), found, alpha=-0.1)
    return [tensor.cpu() for tensor in network.state_dict().values()]


def test_it_computes_as_a_cpu_does_and_gives_all_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learned("cpu")
    with played_card(monkeypatch) as card:
        assert all(torch.equal(one, two) for one, two in zip(learned("cuda"), expected, strict=True))
        gc.collect()
        assert card.used == 0
        assert card.peak > 4 * 8 * 6 * 64
        assert not card.races


def test_tensors_lie_where_they_were_put(card: Card) -> None:
    found = []
    here = torch.ones(3, device=CUDA)
    thread = threading.Thread(target=lambda: found.append(torch.tensor([1.0, 2.0, 3.0], device=CUDA) + here))
    thread.start()
    thread.join()
    assert (found[0].device.type, here.cpu().device.type) == ("cuda", "cpu")
    assert found[0].tolist() == [2.0, 3.0, 4.0]
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(3)
    assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # a number of the CPU may go with them


def test_what_the_program_waits_for_is_counted(card: Card) -> None:
    numbers = torch.arange(3).to(CUDA, non_blocking=True)
    assert (card.sent, card.waits.total()) == (24, 0)
    numbers.to(torch.float32).mul_(2).index_select(0, numbers)
    assert card.waits.total() == 0
    assert int(numbers.sum()) == 3
    assert numbers[numbers > 0].shape == (2,)
    assert dict(card.waits) == {"to the CPU": 1, "index": 1}


def test_streams_that_do_not_wait_for_each_other_race(card: Card) -> None:
    side = torch.cuda.Stream()
    numbers = torch.ones(3, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        numbers.mul_(2)
    assert not card.races
    numbers.add_(1)
    assert [race.splitlines()[0] for race in card.races] == [
        "the default stream reads what is not yet written on stream 1",
        "the default stream writes over what is still in use on stream 1",
        "the default stream writes over what is still in use on stream 1",
    ]


def test_memory_that_another_stream_works_on_is_not_to_be_freed(card: Card) -> None:
    side = torch.cuda.Stream()
    numbers = torch.ones(3, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        numbers.sum()
    del numbers
    assert "is free while stream 1 is at work on it" in card.races[0]


def test_a_graph_changes_nothing_until_it_is_replayed(card: Card) -> None:
    numbers, graph = torch.ones(3, device=CUDA), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = numbers * 2
        numbers += 1
    assert numbers.tolist() == [1.0, 1.0, 1.0]
    assert twice.isnan().all()
    for expected in (2.0, 3.0):
        graph.replay()
        assert numbers.tolist() == [expected] * 3
    assert twice.tolist() == [4.0, 4.0, 4.0]
    assert card.replays == 2
    assert not card.races


def test_a_graph_does_not_keep_what_it_reads(card: Card) -> None:
    numbers, graph = torch.ones(3, device=CUDA), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = numbers * 2
    del numbers
    graph.replay()
    assert twice.shape == (3,)
    assert card.races[0].startswith("a graph works on memory that was freed after its capture")


@pytest.mark.parametrize(
    "work", [lambda n: n.sum().item(), lambda n: n[n > 0], lambda n: n + torch.ones(3).to(CUDA), lambda n: n.normal_()]
)
def test_a_capture_neither_waits_nor_draws(work: object, card: Card) -> None:
    numbers = torch.ones(3, device=CUDA)
    with (
        pytest.raises(RuntimeError, match=r"not permitted when stream is capturing|draws"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        work(numbers)
    assert numbers.tolist() == [1.0, 1.0, 1.0]


def test_memory_ends(card: Card) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 20, device=CUDA)
    assert card.used == 0


def test_graphs_of_one_pool_run_one_after_the_other(card: Card) -> None:
    numbers, pool = [torch.ones(3, device=CUDA) for _ in range(2)], torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in numbers]
    for graph, own in zip(graphs, numbers, strict=True):
        with torch.cuda.graph(graph, pool=pool):
            own.mul_(2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graphs[0].replay()
    with torch.cuda.stream(side):
        graphs[1].replay()
    assert card.races[0].startswith("stream 1 replays a graph in memory of one that is at work on the default stream")


def test_a_generator_belongs_to_one_device(card: Card) -> None:
    torch.zeros(3, device=CUDA).normal_(generator=torch.Generator(CUDA))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.zeros(3, device=CUDA).normal_(generator=torch.Generator())


def test_a_tensor_of_the_cpu_is_not_indexed_from_the_card(card: Card) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=CUDA)]
