"""A person's own backbone: it starts as its constructor fills it, and its bits are the run's."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedcil
from client.training import layers_draw
from fedcil.compute import Compute
from fedcil.errors import ScenarioError
from fedcil.keys import Key
from fedcil.models import Architecture, make_architecture
from fedcil.models.network import Backbone, drop_counters, initialise, set_norm_updates, snapshot, state_of
from fedcil.models.own import Manners, try_out
from fedcil.record.checkpoints import CheckpointFolder
from fedcil.tables import ModelSection
from fedcil.tensors import Tensors, content_hash

SOURCE = '''
import torch
from torch import nn
from fedcil.models.network import Backbone


class Tokens(Backbone):
    """Patches that look at each other: layers and tensors that fedcil's own networks have none of."""

    def __init__(self, channels, section):
        super().__init__(section.width)
        width = section.width
        self.patches = nn.Conv2d(channels, width, 4, 4)
        nn.init.constant_(self.patches.weight, 0.3)  # as a pretrained file would be read in
        self.patches.requires_grad_(False)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.GroupNorm(1, 5)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("order", torch.randperm(5))
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1), persistent=False)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), 1, -1), patches], 1) + self.place
        tokens = self.drop(self.mix(self.norm(tokens[:, self.order])))
        looks = (tokens @ tokens.transpose(1, 2) / 4 + self.mask).softmax(-1)
        return (looks @ tokens).mean(1)


def build(channels, section):
    return Tokens(channels, section)
'''


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """By seed of the run."""
    (tmp_path / "tokens.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    section = ModelSection(name="tokens:build", width=8)
    yield lambda seed=0: make_architecture(section, (1, 8, 8), Key(seed))
    sys.modules.pop("tokens", None)


def litter() -> None:
    """Freed memory that says so where nobody fills it."""
    for size in (8, 40, 64, 128, 512):
        _ = [torch.full((size,), float("nan")) for _ in range(50)]


def test_it_starts_with_what_its_constructor_made(architecture: Any) -> None:
    litter()
    network = architecture().start(3, Key(0).torch()).eval()
    backbone = network.backbone
    assert (backbone.patches.weight == 0.3).all()
    assert not backbone.token.any()
    assert 0 < backbone.place.std() < 0.1
    assert (backbone.norm.weight == 1).all()
    assert (backbone.mix.weight == 1).all()
    assert sorted(backbone.order.tolist()) == list(range(5))
    assert network(torch.zeros(2, 1, 8, 8)).isfinite().all()


def test_the_seed_of_the_run_decides_and_no_other_generator(architecture: Any) -> None:
    before = torch.get_rng_state()
    hashes = [content_hash(snapshot(architecture(seed).start(3, Key(seed).torch()))) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_state_is_the_same_in_every_network(architecture: Any) -> None:
    """Orders and masks are not sent: each worker makes them itself."""
    compute = Compute(architecture(), torch.device("cpu"), "fp32")
    one, two = compute.network(3), Compute(architecture(), torch.device("cpu"), "fp32").network(4)
    assert torch.equal(one.backbone.order, two.backbone.order)
    assert torch.equal(one.backbone.mask, two.backbone.mask)
    assert not {"backbone.order", "backbone.mask"} & state_of(one).keys()


def test_the_head_is_drawn_as_that_of_a_shipped_network(architecture: Any) -> None:
    head = nn.Linear(8, 3)
    initialise(head, Key(4).torch())
    assert torch.equal(architecture().start(3, Key(4).torch()).head.weight, head.weight)


def test_what_a_run_has_to_know_of_it_is_found_out(architecture: Any) -> None:
    manners = try_out(architecture(), "tokens:build")
    assert manners.draws
    assert manners.frozen == {"backbone.patches.weight", "backbone.patches.bias"}
    assert try_out(Architecture(Plain, (1, 8, 8), Key(0)), "plain") == Manners()


def test_only_networks_whose_layers_draw_pay_for_it(small: Any, architecture: Any) -> None:
    plain, tokens = small.network(3), architecture().build(3)
    for network, channels in ((plain, 3), (tokens, 1)):
        with layers_draw(network, Key(0)):
            network(torch.rand(2, channels, 8, 8, generator=Key(1).torch()))
    assert (plain.random, tokens.random) == (False, True)


class Plain(Backbone):
    """Nothing but what every shipped network has."""

    def __init__(self) -> None:
        super().__init__(4)
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images).mean((2, 3))
        return features


def test_a_shipped_one_is_drawn_by_fedcil() -> None:
    one = Architecture(Plain, (1, 8, 8)).start(3, Key(1).torch())
    two = Architecture(Plain, (1, 8, 8)).build(3)
    initialise(two, Key(1).torch())
    assert content_hash(snapshot(one)) == content_hash(snapshot(two))


UNFIT = """
import torch
from torch import nn
from fedcil.models.network import Backbone


class Unfit(Backbone):
    def __init__(self, width, layer):
        super().__init__(width)
        self.layer = layer

    def forward(self, images):
        return self.layer(images)


def width(channels, section):
    return Unfit(3, nn.Flatten())


def maps(channels, section):
    return Unfit(4, nn.Conv2d(channels, 4, 3))


def pair(channels, section):
    return Unfit(4, nn.AdaptiveMaxPool2d(1, return_indices=True))


def lazy(channels, section):
    return Unfit(4, nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))


def colours(channels, section):
    return Unfit(4, nn.Conv2d(3, 4, 3))


def nothing(channels, section):
    return None


def few(channels):
    return Unfit(4, nn.Flatten())


def broken(channels, section):
    raise KeyError("stem")


def complex(channels, section):
    return Unfit(4, nn.Linear(8, 8, dtype=torch.complex64))


def half(channels, section):
    return Unfit(4, nn.Linear(8, 8, dtype=torch.bfloat16))


def leaving(channels, section):
    raise SystemExit("no weights here")


def endless(channels, section):
    module = Unfit(4, nn.Flatten())
    module.register_buffer("mask", torch.full((2,), float("-inf")))
    return module
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("width", "for two images it gives (2, 64) and not (2, 3); its width is 3"),
        ("maps", "gives (2, 4, 6, 6) and not (2, 4)"),
        ("pair", "gives tuple and not (2, 4)"),
        ("lazy", "Lazy"),
        ("colours", "expected input[2, 1, 8, 8] to have 3 channels"),
        ("nothing", "'NoneType' object has no attribute 'width'"),
        ("few", "takes 1 positional argument but 2 were given"),
        ("broken", "KeyError: 'stem' (unfit.py:45)"),
        ("leaving", "SystemExit: no weights here (unfit.py:"),
        ("complex", "backbone.layer.weight is not of real numbers"),
        ("endless", "backbone.mask would be sent and is not finite"),
        ("half", "backbone.layer.weight would be sent and summed in half precision; make it float32"),
    ],
)
def test_what_is_no_backbone_is_one_error_before_anything_runs(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfit.py").write_text(UNFIT)
    monkeypatch.syspath_prepend(str(tmp_path))
    section = ModelSection(name=f"unfit:{name}", width=8)
    try:
        with pytest.raises(ScenarioError, match=f"unfit:{name}") as caught:
            try_out(make_architecture(section, (1, 8, 8), Key(0)), section.name)
    finally:
        sys.modules.pop("unfit", None)
    assert says in str(caught.value)
    assert caught.value.where == "model.name"


class Old(Backbone):
    """With a weight that is computed before each pass: it cannot be copied."""

    def __init__(self) -> None:
        super().__init__(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self.layer(images)).mean((2, 3))
        return features


def test_a_teacher_that_cannot_be_copied_keeps_its_norms() -> None:
    compute = Compute(Architecture(Old, (3, 8, 8), Key(0)), torch.device("cpu"), "fp32")
    network = compute.network(2)
    images = torch.rand(3, 3, 8, 8, generator=Key(1).torch())
    torch.testing.assert_close(compute.teacher(snapshot(network))(images), network.eval()(images))


def test_a_plan_counts_layers_that_put_out_several_tensors(tmp_path: Path) -> None:
    source = SOURCE.replace("nn.Dropout(0.2)", "nn.LSTM(width, width)").replace(
        "self.drop(", "(lambda x: self.drop(x)[0])("
    )
    (tmp_path / "tokens.py").write_text(source)
    words = [sys.executable, "-m", "fedcil", "plan", "digits_fedavg", "--json"]
    words += ["--set", "model.name=tokens:build", "--set", "model.width=8"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted_memory_mb"] > 0


def run(folder: Path, *more: str) -> fedcil.Run:
    (folder / "tokens.py").write_text(SOURCE)
    sets = ["model.name=tokens:build", "model.width=8", "stream.tasks=2", "training.rounds=2", "clients.count=6"]
    words = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", "--no-figures", "--json"]
    words += [part for text in (*sets, *more) for part in ("--set", text)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return fedcil.load(folder / json.loads(done.stdout)["run_dir"])


def model_of(finished: fedcil.Run) -> Tensors:
    return CheckpointFolder(finished.path / "checkpoints").load().state.server.model


def test_it_runs_with_the_same_bits_on_one_worker_and_two(tmp_path: Path) -> None:
    """From the command line: what the constructor froze stays to the last bit (means of 0.3 may be another number), the
    rest is trained, and dropout draws by place.
    """
    models = [model_of(run(tmp_path, f"engine.workers={workers}")) for workers in (1, 2)]
    assert content_hash(models[0]) == content_hash(models[1])
    assert (models[0]["backbone.patches.weight"] == 0.3).all()
    assert models[0]["backbone.token"].any()


class SharedConv(Backbone):
    """One convolution under two norms."""

    def __init__(self) -> None:
        super().__init__(6)
        self.conv, self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.first = nn.Conv2d(3, 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.two(self.conv(torch.relu(self.one(self.conv(x))))).mean((2, 3))  # type: ignore[no-any-return]


class Particular(SharedConv):
    """Code that torch.fx stumbles over."""

    def forward(self, images: Tensor) -> Tensor:
        assert isinstance(images, Tensor)
        assert len(images) > 0
        return super().forward(images)


class Spectral(Backbone):
    """A weight that is computed before each pass, which fx folds as if it were a constant."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).mean((2, 3))  # type: ignore[no-any-return]


class Tokenwise(Backbone):
    """As many tokens as channels: a norm over tokens looks to fx like one over channels."""

    def __init__(self) -> None:
        super().__init__(8)
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.linear(images.mean(1))).mean(1)  # type: ignore[no-any-return]


class Precise(Backbone):
    """A part that is not done in bf16, and a branch, so that fx cannot see it."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).mean((2, 3))
        if x.sum() > 1e9:
            return x
        with torch.autocast(images.device.type, enabled=False):
            return self.linear(x.float())  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", [SharedConv, Particular, Spectral, Tokenwise, Precise])
def test_a_teacher_is_the_network_whatever_can_be_folded_of_it(backbone: Any, precision: Any) -> None:
    compute = Compute(Architecture(backbone, (3, 8, 8), Key(0)), torch.device("cpu"), precision)
    network = compute.network(3)
    draws = Key(2).torch()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draws))
    tensors, images = snapshot(network), torch.rand(4, 3, 8, 8, generator=Key(1).torch())
    with torch.no_grad():
        expected = compute.frozen(tensors)(images)
        found = compute.teacher(tensors)(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if precision == "fp32" else 0.02)


class Memories(Backbone):
    """What is no state, or not where it was: a flag that is set once, and a buffer that is replaced at each pass."""

    def __init__(self, channels: int, _: ModelSection) -> None:
        super().__init__(channels * 4)
        self.conv = nn.Conv2d(channels, channels * 4, 3)
        self.register_buffer("ready", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("shift", torch.zeros(channels * 4))
        self.register_buffer("level", torch.zeros(channels * 4))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv(images).mean((2, 3))
        if self.training and not self.ready:
            self.shift.copy_(-x.detach().mean(0))
            self.ready.fill_(1)
        if self.training:
            self.level = 0.5 * self.level + 0.5 * x.detach().mean(0)
        return x + self.shift + self.level


def test_what_one_client_leaves_in_a_buffer_is_nothing_to_the_next(tmp_path: Path) -> None:
    """Or results would depend on who trains on which worker."""
    sets = [f"model={{name='{__name__}:Memories'}}", "stream.tasks=2", "training.rounds=3", "clients.count=8"]
    models = [
        model_of(
            fedcil.run(
                "digits_fedavg",
                overrides=[*sets, f"engine={{workers={workers}, processes=false}}"],
                output=tmp_path / str(workers),
                figures=False,
            )
        )
        for workers in (1, 3)
    ]
    assert content_hash(models[0]) == content_hash(models[1])
    assert models[0]["backbone.level"].any()  # a client sends what stands there now, not what once stood there


def test_a_norm_keeps_its_own_momentum() -> None:
    norms = [nn.BatchNorm2d(2, momentum=momentum) for momentum in (0.1, 0.01, 0.0, None)]
    module = nn.ModuleList(norms)
    drop_counters(module)
    for updates, expected in ((2, [0.19, 0.0199, 0.0, 0.19]), (1, [0.1, 0.01, 0.0, 0.1])):
        set_norm_updates(module, updates)
        assert [norm.momentum for norm in norms] == pytest.approx(expected)
