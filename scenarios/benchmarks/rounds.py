"""(b) A FedAvg round, 10 clients x 50 images (ResNet-18: 2 clients), batch 10: fedcil's inline engine, one worker,
against everybody else.

Against the plain loop and Flower both sides crop and flip: they image by image with PIL, fedcil in whole batches.
Against the in-process peers both sides train on tensors as they are. Every side is a process of its own
(``peers/ours.py`` is fedcil's), and in fp32 but for fedcil in bf16 rows. Before anything is timed, each side's weights
after a round are held against the plain loop's in float64, on the same orders of the same images. A repeat is as many
rounds as take half a second.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcil.compute import Precision
from fedcil.data import Dataset, Split, digest_of
from fedcil.engines import Setting
from fedcil.engines.inline import InlinePort
from fedcil.experiment import Experiment, open_experiment
from fedcil.messages import Broadcast, Job, Request
from fedcil.port import StopSignal
from fedcil.scenario_file import load_scenario
from fedcil.state import Cursor
from fedcil.tensors import Tensors
from scenarios.benchmarks.nets import CLASSES, build
from scenarios.benchmarks.peers.session import Session
from scenarios.benchmarks.plain import BATCH, MEAN, RATE, STD, PlainLoop
from scenarios.benchmarks.timing import Case, Figure, against, for_a_while, in_turn

CLIENTS, SAMPLES = 10, 50
AGREE = 1e-10  # largest difference of a weight in float64
PICTURES = ("plain", "plain_kept", "flower")  # who crops and flips with PIL
AUGMENT = {"pictures": "crop_flip", "tensors": "none"}  # what ours does against them
SMALL_NET = "lenet"  # float64 comparisons of a ResNet prove nothing


def pixels(section: object, root: object) -> Dataset:  # noqa: ARG001  the contract of ``data.name``
    """Random images: speed does not depend on what is in them."""
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (CLIENTS * SAMPLES, 32, 32, 3), dtype=np.uint8)
    split = Split(images, np.arange(len(images)) % CLASSES)
    names = tuple(f"class {label}" for label in range(CLASSES))
    return Dataset(
        name="pixels",
        train=split,
        test=split,
        mean=MEAN,
        std=STD,
        class_names=names,
        digest=digest_of(split, split),
    )


def experiment(
    net: str,
    *,
    precision: str = "fp32",
    augment: str = "none",
    workers: int = 1,
    processes: bool | None = None,
    clients: int = CLIENTS,
) -> Experiment:
    model = {"name": "resnet18"} if net == "resnet18" else {"name": f"scenarios.benchmarks.nets:{net}"}
    scenario = {
        "data": {
            "name": "scenarios.benchmarks.rounds:pixels",
            "augment": augment,
            "samples_per_class": clients * SAMPLES // CLASSES,
        },
        "stream": {"tasks": 1},
        "partition": {"name": "iid"},
        "clients": {"count": clients, "per_round": clients},
        "model": model,
        "method": {"name": "fedavg"},
        "training": {"epochs": 1, "batch_size": BATCH, "lr": RATE, "weight_decay": 0.0, "precision": precision},
        "engine": {"workers": workers, "processes": processes},
    }
    return open_experiment(load_scenario(scenario))


class OurLoop:
    """Rounds over the inline engine's port, as the round loop makes them."""

    def __init__(self, opened: Experiment, model: torch.nn.Module, folder: Path) -> None:
        self.port = InlinePort(Setting(opened, None, folder, StopSignal()))
        self.experiment = opened
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.model: Tensors = {name: t.detach() for name, t in state.items() if t.is_floating_point()}

    def round(self) -> None:
        broadcast = Broadcast(task=0, phase=0, round=0, tensors=self.model)
        jobs = tuple(Job(client, client) for client in range(self.experiment.scenario.clients.count))
        outcome = self.port.run(Request(broadcast, jobs, len(jobs)), None, lambda _: None)
        assert outcome.total is not None, outcome.failures
        assert not outcome.failures
        self.model = outcome.total.mean()


@contextmanager
def our_loop(net: str, **options: Any) -> Iterator[OurLoop]:
    with tempfile.TemporaryDirectory() as folder:
        loop = OurLoop(experiment(net, **options), build(net), Path(folder))
        try:
            yield loop
        finally:
            loop.port.close()


def write_data(path: Path, clients: int = CLIENTS) -> Path:
    """The clients' images, each client's in the order in which fedcil's first round trains on them."""
    opened = experiment(SMALL_NET, clients=clients)
    rows = []
    for client in range(clients):
        place = opened.round_key(Cursor()).at("client", client, "epoch", 0, "order")
        rows.append(opened.indices(client, opened.stream.tasks[0])[torch.randperm(SAMPLES, generator=place.torch())])
    train = opened.data.train
    np.savez(path, images=train.images[np.stack(rows)], labels=train.labels[np.stack(rows)])
    return path


def weights_differ(data: Path, peer: Session | None = None) -> float:
    """Largest difference of a weight after a round in float64: fedcil's (or the peer's) against the plain loop's."""
    exact = PlainLoop(data, SMALL_NET, "exact")
    exact.round()
    if peer is None:
        theirs = _our_exact_weights()
    else:
        peer.begin(SMALL_NET, "exact")
        peer.round()
        theirs = peer.weights(data.with_name("weights.npz"))
    return max(float(np.abs(theirs[name] - weight).max()) for name, weight in exact.weights().items())


def _our_exact_weights() -> dict[str, np.ndarray[Any, Any]]:
    """fedcil computes in torch's default type; the weights to start from are drawn in float32 by all."""
    start = build(SMALL_NET).double()
    torch.set_default_dtype(torch.float64)
    try:
        with our_loop(SMALL_NET) as ours:
            ours.model = dict(start.named_parameters())
            ours.round()
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: tensor.detach().numpy() for name, tensor in ours.model.items()}


def agreement(difference: float) -> dict[str, float]:
    """A row of the table; AssertionError if sides do not do the same work."""
    if not difference <= AGREE:
        raise AssertionError(f"weights differ from the plain loop's by {difference:g} in float64")
    return {"differ_by": difference}


def our_rounds(opened: ExitStack, net: str, clients: int, precisions: Sequence[str]) -> dict[str, Callable[[], object]]:
    """``<precision>_<pictures or tensors>``: a round of each; ``opened`` closes their ports."""
    cases: dict[str, Callable[[], object]] = {}
    for precision, (mode, augment) in itertools.product(precisions, AUGMENT.items()):
        loop = opened.enter_context(our_loop(net, precision=precision, augment=augment, clients=clients))
        cases[f"{precision}_{mode}"] = loop.round
    return cases


def measure(
    net: str,
    ours: Session,
    sides: Mapping[str, Session | None],
    repeats: int,
    precisions: tuple[Precision, ...],
    clients: int = CLIENTS,
    limit_s: float = float("inf"),
) -> dict[str, Figure]:
    """``round_<net>_<precision>_vs_<side>``; ``sides``: the plain loop and peers by name, None where a peer could not
    be had: such rows say what ours cost.
    """
    modes = {name: "pictures" if name in PICTURES else "tensors" for name in sides}
    cases: dict[str, Case] = {}
    for name, side in sides.items():
        if side is not None:
            side.begin(net, modes[name])
            cases[name] = side.case()
    ours.begin("round", net, clients, *precisions)
    for precision, mode in itertools.product(precisions, sorted(set(modes.values()))):
        cases[f"{precision}_{mode}"] = ours.case(1, f"{precision}_{mode}")
    whiles = {name: for_a_while(case) for name, case in cases.items()}  # warm by that
    costs = in_turn(whiles, repeats, warm_up=0, limit_s=limit_s)
    return {
        f"round_{net}_{precision}_vs_{name}": against(costs[f"{precision}_{mode}"], costs.get(name))
        for name, mode in modes.items()
        for precision in precisions
    }
