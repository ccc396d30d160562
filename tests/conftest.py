"""What tests of several files share: small random networks, images and payloads; data roots; runs that are stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from uuid import uuid4

import psutil
import pytest
import torch
from torch import Tensor, nn

import fedcil
from fedcil.compute import Compute, Precision
from fedcil.data import download
from fedcil.errors import Stopped
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import prefixed
from fedcil.models import make_architecture
from fedcil.models.generator import Generator
from fedcil.models.network import Backbone, Network, freeze, initialise, state_of
from fedcil.port import StopSignal
from fedcil.stream import Task
from fedcil.tables import ModelSection

if "FEDCIL_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what most tests expect is a CPU's
pytest.register_assert_rewrite("data_files")  # it has asserts of its own
REAL = Path(os.environ.get("FEDCIL_DATA_ROOT", "nowhere")).absolute()  # before a test changes the environment


class Flat(Backbone):
    """Features are the pixels: what goes into the head can be written down."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Small:
    """Everything in torch's default dtype, so that the fixture ``float64`` makes all of it double."""

    image: ClassVar[tuple[int, int, int]] = (3, 8, 8)
    first: ClassVar[Task] = Task(0, 0, 3)
    second: ClassVar[Task] = Task(1, 3, 5)

    def compute(self, name: str = "cnn", precision: Precision = "fp32") -> Compute:
        architecture = make_architecture(ModelSection(name=name, width=4), self.image, Key(0))
        return Compute(architecture, torch.device("cpu"), precision)

    def network(self, classes: int, name: str = "cnn", seed: int = 0) -> Network:
        """Random in all its tensors: no batch norm has mean 0, variance 1, scale 1 or shift 0."""
        network = self.compute(name).network(classes)
        generator = Key(seed).at("network").torch()
        initialise(network, generator)
        shake_norms(network, generator)
        return network

    def frozen(self, classes: int, name: str = "cnn", seed: int = 0) -> Network:
        network = self.network(classes, name, seed)
        freeze(network)
        return network

    def generator(self, latent: int = 5, width: int = 4, seed: int = 0) -> Generator:
        with torch.device("meta"):
            made = Generator(channels=3, size=8, latent=latent, width=width)
        made = made.to_empty(device="cpu")
        draws = Key(seed).at("generator").torch()
        initialise(made, draws)
        shake_norms(made, draws)
        freeze(made)
        return made

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Network:
        """Logits are ``weight @ pixels + bias``."""
        with torch.device("meta"):
            network = Network(Flat(weight.shape[1]), weight.shape[0])
        network = network.to_empty(device="cpu")
        with torch.no_grad():
            network.head.weight.copy_(weight)
            network.head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        return network

    def images(self, count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, *self.image, generator=Key(seed).at("images").torch())

    def labels(self, count: int, task: Task, seed: int = 0) -> Tensor:
        return torch.randint(task.old, task.seen, (count,), generator=Key(seed).at("labels").torch())

    def payload(self, teacher: Network, generator: Generator) -> Payload:
        """What MFCL's boundary hands to clients."""
        parts = prefixed("teacher", state_of(teacher)) | prefixed("generator", state_of(generator))
        return Payload.of(parts)


def shake_norms(module: nn.Module, generator: torch.Generator) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.3, generator=generator)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(part.bias, 0.0, 0.3, generator=generator)


class StopAfter:
    """A watcher that asks for a stop after so many recorded lines."""

    def __init__(self, lines: int, stop: StopSignal) -> None:
        self.left, self.stop = lines, stop

    def recorded(self, line: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.set(130)

    def client_done(self, client: int) -> None: ...

    def boundary_step(self, step: int, steps: int, terms: Any) -> None: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU and FEDCIL_TEST_GPU=1"))


@pytest.fixture
def real_data() -> Callable[..., Path]:
    """A data root with these folders in it. A test that needs them is skipped where they are not, except in CI."""

    def root(*parts: str) -> Path:
        if not REAL.joinpath(*parts).exists():
            missing = pytest.fail if os.environ.get("FEDCIL_REQUIRE_DATA") else pytest.skip
            missing(f"needs the real files: set FEDCIL_DATA_ROOT to a folder with {'/'.join(parts)}")
        return REAL

    return root


@pytest.fixture
def array_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own array cache, and no way to the network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDCIL_CACHE", str(folder))
    monkeypatch.delenv("FEDCIL_DATA_ROOT", raising=False)

    def no_network(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(download, "refuse_silence", no_network)
    return folder


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run by a number without a user."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "FEDCIL_DATA_ROOT", "FEDCIL_CLIENT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def stopped_run() -> Callable[..., Path]:
    """Runs a scenario, stops it after so many recorded lines, and says where it lies."""

    def run(scenario: Any, lines: int, output: Path, overrides: Sequence[str] = ()) -> Path:
        stop = StopSignal()
        options: Any = {"output": output, "figures": False, "watcher": StopAfter(lines, stop), "stop": stop}
        with pytest.raises(Stopped):
            fedcil.run(scenario, overrides=overrides, **options)
        (folder,) = output.iterdir()
        return folder

    return run


@pytest.fixture
def inside_a_flower_run() -> Iterator[None]:
    """Messages can be made only inside a run: Flower's own identity of this process."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    yield
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Fails if a process that this test has started is still there after so many seconds, whoever its parent is by
    then: it is known by a mark in its environment.
    """
    mark = uuid4().hex
    monkeypatch.setenv("FEDCIL_TEST", mark)
    monkeypatch.setenv("SPT_NOENV", "1")  # or Ray's processes write their names over it

    def check(within: float) -> None:
        until = time.monotonic() + within
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left

    return check


def marked(mark: str) -> list[str]:
    """Commands of the running processes whose environment has it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ends just now, or is another user's
            if process.environ().get("FEDCIL_TEST") == mark:
                found.append(f"{process.pid}: {' '.join(process.cmdline())}")
    return found


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, latents and images are made in double precision inside the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def authors_order() -> ModuleType:
    """The plain twin that the benchmarks time, by its file: it is no part of the package under test."""
    path = Path(__file__).parent.parent / "scenarios" / "benchmarks" / "authors_order.py"
    spec = importlib.util.spec_from_file_location("authors_order", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Writes ``mine.py`` in a folder where Python looks, and gives the folder."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(source: str) -> Path:
        (folder / "mine.py").write_text(source)
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        sys.path_importer_cache.clear()
        return folder

    yield write
    sys.modules.pop("mine", None)
