"""The scenario: everything that decides a run's result, as one frozen value.

Each class is one table of the file (fedcil/scenario_file.py reads those); unknown keys, wrong types, numbers
out of range and combinations that cannot work are refused before any work starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    Strict,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from fedcil.dotted import load_dotted
from fedcil.errors import ScenarioError
from fedcil.methods import METHODS
from fedcil.rule import FoldName, Rule
from fedcil.section import (
    Above0,
    Count,
    Ints,
    MethodSettings,
    NonNegative,
    Positive,
    Section,
    Share,
)
from fedcil.sources import changed_since_loaded, sources_of

DATASETS = (
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "cifar100_coarse",
    "tiny_imagenet",
    "super_imagenet",
    "folder",
    "synthetic",
)
PARTITIONS = ("dirichlet_equal", "dirichlet", "iid", "shards", "classes", "quantity")
MODELS = ("cnn", "resnet8", "resnet18")
Threads = Annotated[int, Field(ge=1, le=256)]
AtLeast1 = Annotated[float, Field(ge=1.0)]
Tier = Annotated[tuple[Above0, Above0, Above0, Above0], Strict(False)]
Tiers = Annotated[tuple[Tier, ...], Strict(False), Field(min_length=1)]


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DOTTED = {"type": "string", "pattern": ":"}  # package.module:function


def _one_of_or_dotted(names: Sequence[str]) -> BeforeValidator:
    """A shipped name, or ``package.module:function`` for a user's own."""

    def check(value: object) -> object:
        if isinstance(value, str) and value not in names and ":" not in value:
            raise ValueError(f"allowed: {', '.join(map(repr, names))}, or your own as package.module:function")
        return value

    return BeforeValidator(check)


def _named(names: Sequence[str]) -> WithJsonSchema:
    """What editors are told of ``_one_of_or_dotted``."""
    return WithJsonSchema({"anyOf": [{"enum": list(names)}, DOTTED]})


class DataSection(Section):
    """``[data]``: which images, how many, how large, and how the real ones are augmented."""

    name: Annotated[str, _one_of_or_dotted(DATASETS), _named(DATASETS)] = Field(
        "digits", description="a shipped data set or package.module:function"
    )
    root: str | None = Field(None, description="folder that holds the data sets")
    classes: Positive | None = Field(None, description="use the first n classes only")
    samples_per_class: Positive | None = Field(
        None, description="use n training images of each class, drawn by the seed"
    )
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = Field(
        None, description="height = width in pixels; default: the set's own"
    )
    augment: Literal["none", "flip", "crop_flip", "rotate_flip"] = Field("none", description="of the real images")
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0,
        description="hold out this share of the training images and measure on it instead of the test set",
    )
    version: Literal["s", "m", "l"] = Field("s", description="super_imagenet: which grouping")
    mapping: str | None = Field(None, description="super_imagenet: YAML or JSON file of super-classes")
    separation: Above0 = Field(2.0, description="synthetic: distance of class centres in noise deviations")
    test_per_class: Annotated[int, Field(ge=1, le=10**7)] = Field(
        20, description="synthetic: test images of each class"
    )


class StreamSection(Section):
    """``[stream]``: how classes arrive."""

    tasks: Positive = Field(5, description="how many there are")
    class_order: Literal["natural", "seeded"] | Ints = Field(
        "natural", description="the data set's, drawn by the seed, or the classes one by one"
    )
    sizes: Ints | None = Field(None, description="classes of each task; default: equal")

    @field_validator("sizes")
    @classmethod
    def _at_least_one(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and min(value, default=0) < 1:
            raise ValueError("each task needs at least 1 class")
        return value


class PartitionSection(Section):
    """``[partition]``: how one task's samples are shared among the clients (methods: fedcil/partition.py)."""

    name: Annotated[str, _one_of_or_dotted(PARTITIONS), _named(PARTITIONS)] = Field(
        "dirichlet_equal", description="a shipped way or package.module:function"
    )
    alpha: Above0 = Field(1.0, description="dirichlet_equal, dirichlet: concentration")
    remainder: Literal["refuse", "spread"] = Field(
        "refuse", description="what to do when the samples of dirichlet_equal do not divide by clients"
    )
    min_size: Count = Field(1, description="dirichlet, quantity: samples that each client has at least")
    shards_per_client: Positive = Field(2, description="shards: pieces of the sorted samples that each client gets")
    classes_per_client: Positive = Field(2, description="classes: how many of a task's classes each client has")
    sigma: Above0 = Field(1.0, description="quantity: deviation of the log-normal client sizes")
    allow_empty: bool = Field(False, description="let clients be without samples in a task")


class ClientsSection(Section):
    """``[clients]``: how many data owners there are and how many are asked in a round."""

    count: Annotated[int, Field(ge=1, le=10**7)] = Field(20, description="data owners in all")
    per_round: Positive = Field(5, description="of them wanted in a round")
    over_sample: AtLeast1 = Field(
        1.0, description="ask so many times more; the round closes when per_round are in (needs [clock])"
    )
    dropout: Share = Field(0.0, description="chance that a client vanishes in mid-round")


class PopulationSection(Section):
    """``[population]``: who belongs to the federation when (fedcil/population.py)."""

    name: Literal["fixed", "turnover", "growing"] = Field(
        "fixed", description="the same all the time, replaced by newcomers, or more at each task border"
    )
    size: Positive | None = Field(None, description="turnover, growing: members, at any time or in the first task")
    replaced_per_task: Share = Field(0.0, description="turnover: share that newcomers replace at each task border")
    replaced_per_round: Share = Field(
        0.0, description="turnover: share that newcomers replace before each round but a phase's first"
    )
    newcomers: Count = Field(10, description="growing: clients that join at each task border")
    move_on: Share = Field(
        0.9, description="growing: share of the old ones that get samples of the new task; the others stay behind"
    )

    @model_validator(mode="after")
    def _size_given(self) -> Self:
        if (self.name == "fixed") != (self.size is None):
            raise ValueError(f"size is for name = 'turnover' and 'growing', which need it; name is {self.name!r}")
        return self

    def replaced(self, share: float) -> int:
        """Clients that a share of the members is, to the nearest whole one."""
        return int(share * (self.size or 0) + 0.5)

    def needed(self, borders: int, steps: int) -> int:
        """Ids that so many task borders and so many rounds inside phases use up."""
        if self.name == "growing":
            return (self.size or 0) + borders * self.newcomers
        per_task, per_round = self.replaced(self.replaced_per_task), self.replaced(self.replaced_per_round)
        return (self.size or 0) + borders * per_task + steps * per_round


class AvailabilitySection(Section):
    """``[availability]``: who can be reached in a round (fedcil/availability.py)."""

    name: Literal["always", "bernoulli", "markov", "diurnal", "trace", "recorded"] = Field(
        "always", description="by chance, by a chain of on and off, by the time of day, or as a file says"
    )
    probability: Share = Field(1.0, description="bernoulli: chance of being there in a round")
    rounds_on: AtLeast1 = Field(10.0, description="markov: rounds a client is there in the mean")
    rounds_off: AtLeast1 = Field(10.0, description="markov: rounds it is away in the mean")
    share: Share = Field(0.5, description="diurnal: share that is there in the mean over a period")
    amplitude: Share = Field(0.4, description="diurnal: how far the share goes up and down")
    period: Annotated[float, Field(ge=1e-3)] = Field(24.0, description="diurnal: rounds of a day")
    spread: Share = Field(1.0, description="diurnal: part of a period that the clients' phases are spread over")
    file: str | None = Field(
        None, description="recorded, trace: a metrics.jsonl to replay, or a CSV file with client,from,to"
    )

    @model_validator(mode="after")
    def _file_given(self) -> Self:
        if (self.name in ("recorded", "trace")) != (self.file is not None):
            raise ValueError(f"file is for name = 'recorded' and 'trace', which need it; name is {self.name!r}")
        if self.name == "diurnal" and not self.amplitude <= min(self.share, 1 - self.share) + 1e-9:
            raise ValueError("share - amplitude and share + amplitude must lie in 0 to 1")
        return self


class ClockSection(Section):
    """``[clock]``: a simulated clock that decides who is back in time (fedcil/clock.py). Off by default."""

    name: Literal["off", "lognormal", "tiers"] = Field("off", description="how fast clients are")
    samples_per_s: Above0 | None = Field(None, description="lognormal: median training speed of a client")
    speed_sigma: NonNegative = Field(1.0, description="lognormal: deviation of the logarithm of speeds")
    down_bytes_per_s: Above0 | None = Field(None, description="lognormal: median rate to a client")
    up_bytes_per_s: Above0 | None = Field(None, description="lognormal: median rate from a client")
    network_sigma: NonNegative = Field(1.0, description="lognormal: deviation of the logarithm of rates")
    tiers: Tiers | None = Field(
        None, description="tiers: rows of [share of clients, samples a second, bytes down a second, bytes up a second]"
    )
    deadline_s: Above0 | None = Field(None, description="simulated seconds after which a round closes")
    late: Literal["drop", "fold"] = Field(
        "drop", description="updates that are late: never made, or folded into the round in which they arrive"
    )
    staleness: NonNegative = Field(0.5, description="late = fold: weight (1 + rounds late) ** -staleness")

    @model_validator(mode="after")
    def _numbers_given(self) -> Self:
        medians = (self.samples_per_s, self.down_bytes_per_s, self.up_bytes_per_s)
        if self.name == "lognormal" and None in medians:
            raise ValueError("lognormal needs samples_per_s, down_bytes_per_s and up_bytes_per_s")
        if (self.name == "tiers") != (self.tiers is not None):
            raise ValueError(f"tiers is for name = 'tiers', which needs it; name is {self.name!r}")
        if self.name == "off" and (self.deadline_s or self.late != "drop"):
            raise ValueError("deadline_s and late need a clock; allowed: name = 'lognormal' or 'tiers'")
        return self


class ModelSection(Section):
    """``[model]``: the classifier."""

    name: Annotated[str, _one_of_or_dotted(MODELS), _named(MODELS)] = Field(
        "cnn", description="a shipped network or package.module:function"
    )
    width: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="channels of the first stage; default: the model's own"
    )
    stem: Literal["3x3", "3x3_stride2", "7x7"] = Field("3x3", description="resnet8, resnet18: first layer")


class TrainingSection(Section):
    """``[training]``: local training and its schedule, the same in every task."""

    rounds: Positive = Field(10, description="per task")
    epochs: Count = Field(5, description="local epochs of each client and round")
    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="real images of a step")
    batches: Literal["even", "ragged", "drop_last"] = Field(
        "ragged", description="how an epoch that is no multiple of the batch size is cut"
    )
    lr: Above0 = Field(0.1, description="learning rate of a task's first round")
    lr_end: Above0 = Field(
        default_factory=lambda given: given["lr"] / 10,
        validate_default=True,
        description="what it falls to exponentially, one round after a task's last; equal to lr: constant; "
        "default: a tenth of lr",
    )
    weight_decay: NonNegative = Field(1e-5, description="of SGD")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="of SGD, from 0 for each client and round"
    )
    precision: Literal["fp32", "tf32", "bf16", "auto"] = Field(
        "fp32", description="of clients, boundary and evaluation; auto: bf16 where the machine is faster by it"
    )
    threads: Threads = Field(1, description="intra-operator threads of one client")


class ServerSection(Section):
    """``[server]``: averaging, evaluation, checkpoints, and when a round counts."""

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="a client's weight in the mean: its samples, or 1"
    )
    fold: FoldName = Field("mean", description="how models become one; all but mean count each client once")
    byzantine: Count = Field(0, description="trimmed_mean, krum, multi_krum: clients of a round that may lie")
    norm_limit: Above0 | None = Field(None, description="largest L2 norm of an update; more is refused")
    clip_norm: Above0 | None = Field(None, description="largest L2 norm of an update; more is scaled down to it")
    evaluate_every: Count = Field(1, description="rounds; 0: at the end of each task only")
    checkpoint_every: Positive = Field(1, description="rounds")
    deadline_s: Above0 | None = Field(None, description="seconds a round may take; none: no limit")
    quorum: Share = Field(0.0, description="share of the answers wanted that must come")
    patience: Positive = Field(10, description="rounds without quorum in a row before the run ends")
    threads: Threads = Field(1, description="intra-operator threads of boundary and evaluation")

    @model_validator(mode="after")
    def _byzantine_is_used(self) -> Self:
        if self.byzantine and self.fold in ("mean", "median"):
            raise ValueError(f"byzantine belongs to trimmed_mean, krum and multi_krum, not to fold = {self.fold!r}")
        if self.fold == "trimmed_mean" and not self.byzantine:
            raise ValueError("fold = 'trimmed_mean' needs byzantine = 1 or more: how many to leave out at either end")
        return self

    @property
    def rule(self) -> Rule:
        """The rule of phases whose clients send the model."""
        return Rule(self.fold, self.byzantine, self.norm_limit, self.clip_norm)


class EngineSection(Section):
    """``[engine]``: where clients run. It changes cost, not results; ``lanes`` change rounding."""

    name: Literal["inline", "ray", "flower"] = Field(
        "inline", description="in this process, in Ray's actors, or as nodes of Flower's simulation"
    )
    workers: Threads | None = Field(
        None,
        description="default: one per core that the run may use (affinity, a container's quota), at most one per asked "
        "client; inline on a GPU always one",
    )
    processes: bool | None = Field(
        None,
        description="inline: all workers but one are processes (Linux); default: for small models and long runs "
        "without server.deadline_s",
    )
    lanes: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="clients that a worker trains side by side by captured steps; 0: one by one; default: 5 on a GPU",
    )
    address: str | None = Field(None, description="ray: an existing cluster")
    gpus_per_worker: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="ray, flower: share of a GPU; default: as many workers as its memory holds"
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _as_ray_counts(cls, value: float | None) -> float | None:
        if value and not (1e-4 <= value <= 1 or value.is_integer()):
            raise ValueError("a part of one GPU, from 0.0001 on, or a whole number of them")
        return value


def _load_method(value: object) -> object:
    """Lay the preset under the given options and let the named method's settings class check them."""
    if isinstance(value, MethodSettings):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"needs a name; allowed: {', '.join(METHODS)}")
    settings = method_settings(value["name"])
    preset = value.get("preset")
    if preset is None:
        return settings.model_validate(dict(value))
    if not isinstance(preset, str) or preset not in settings.presets:
        allowed = ", ".join(settings.presets) or "this method has no presets"
        hint = did_you_mean(str(preset), settings.presets)
        raise ValueError(f"unknown preset {preset!r}; allowed: {allowed}{hint}")
    replaced = {name for group in settings.either_or if group & value.keys() for name in group}
    kept = {name: item for name, item in settings.presets[preset].items() if name not in replaced}
    return settings.model_validate({**kept, **value})


def method_settings(name: str) -> type[MethodSettings]:
    """The settings class of a method, by its name in the table or as ``package.module:Class``."""
    target = METHODS.get(name, name)
    if ":" not in target:
        raise ValueError(
            f"unknown method {name!r}; allowed: {', '.join(METHODS)}, or your own as package.module:Class"
            + did_you_mean(name, METHODS)
        )
    try:
        loaded = load_dotted(target, "method.name")
    except ScenarioError as error:
        raise ValueError(error.what) from None
    if not (isinstance(loaded, type) and issubclass(loaded, MethodSettings)):
        raise ValueError(f"{target} is not a class of method settings (fedcil.section.MethodSettings)")
    return loaded


class Scenario(Section):
    """A whole run as a value. Two equal scenarios on the same data give the same ``metrics.jsonl``."""

    name: Annotated[str, Field(pattern=NAME)] = Field(
        "run", description="of the run folder, and what seeds are grouped by"
    )
    seed: Count = Field(0, description="of everything that is drawn")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    data: DataSection = DataSection()
    stream: StreamSection = StreamSection()
    partition: PartitionSection = PartitionSection()
    clients: ClientsSection = ClientsSection()
    population: PopulationSection = PopulationSection()
    availability: AvailabilitySection = AvailabilitySection()
    clock: ClockSection = ClockSection()
    model: ModelSection = ModelSection()
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_load_method)]
    training: TrainingSection = TrainingSection()
    server: ServerSection = ServerSection()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.clients.per_round > self.clients.count:
            raise ValueError(
                f"clients.per_round = {self.clients.per_round} is more than clients.count = {self.clients.count}"
            )
        if self.clients.over_sample > 1 and self.clock.name == "off":
            raise ValueError("clients.over_sample needs a clock: clock.name says who of them is in first")
        self._refuse_small_population()
        if self.server.rule.least > self.clients.per_round:
            raise ValueError(
                f"server.fold = {self.server.fold!r} with byzantine = {self.server.byzantine} needs "
                f"{self.server.rule.least} clients in a round, clients.per_round is {self.clients.per_round}"
            )
        if self.clock.late == "fold" and self.server.fold != "mean":
            raise ValueError("clock.late = 'fold' adds late updates to a mean: it needs server.fold = 'mean'")
        if self.engine.processes and self.server.deadline_s is not None:
            raise ValueError("engine.processes = true and server.deadline_s: only threads give up at a deadline")
        if self.engine.gpus_per_worker and self.device == "cpu":
            raise ValueError("engine.gpus_per_worker needs device = 'cuda' or 'auto'")
        if self.data.name == "super_imagenet" and self.data.mapping is None:
            raise ValueError("data.mapping is needed for super_imagenet: a file of super-classes (docs/data.md)")
        return self

    def _refuse_small_population(self) -> None:
        """What can be known before the method's phases are; fedcil/population.py counts the rounds inside tasks too."""
        size, needed = self.population.size, self.population.needed(self.stream.tasks - 1, 0)
        if size is not None and self.clients.per_round > size:
            raise ValueError(f"clients.per_round = {self.clients.per_round} is more than population.size = {size}")
        if self.clients.count < needed:
            raise ValueError(
                f"clients.count = {self.clients.count} is too small: population.name = {self.population.name!r} over"
                f" {self.stream.tasks} tasks needs {'at least ' * bool(self.population.replaced_per_round)}{needed}"
                " (newcomers are clients never seen before)"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Settings that do nothing, or hardly what was meant."""
        parts = {key: part for key, part in self if isinstance(part, Section) and key != "method"}
        idle = [
            f"{table}.{key} does nothing with {table}.name = {name!r}; it is for {', '.join(map(repr, users))}"
            for table, part in parts.items()
            for name, key, users in part.idle()
        ]
        lr, lr_end = self.training.lr, self.training.lr_end
        rises = f"training.lr_end = {lr_end:g} is above training.lr = {lr:g}: the rate rises within every task"
        return (*idle, *([rises] if lr_end > lr else []))

    @property
    def stale_code(self) -> tuple[str, ...]:
        """Own modules of which this process has another version than the disk, in words."""
        return tuple(
            f"{module} has changed since it was imported, and this process goes on with what it imported"
            for module in changed_since_loaded(self._targets())
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are not set (TOML has no null)."""
        plain: dict[str, Any] = _without_none(self.model_dump(mode="json"))
        return plain

    def deciding(self) -> dict[str, Any]:
        """What decides the result, by key (``training.lr``): all but engine, how often state is saved, and where files
        lie; what is in them is known by digests.
        """
        idle = ("engine.", "data.root", "availability.file", "server.checkpoint_every")
        return {key: value for key, value in flatten(self.to_dict()).items() if not key.startswith(idle)}

    def own_code(self) -> dict[str, str]:
        """Digests, by module, of the files in which a person's own method, model, data set and partition are, and of
        what these import from beside them.
        """
        return sources_of(self._targets())

    def _targets(self) -> tuple[str, ...]:
        return self.method.name, self.model.name, self.data.name, self.partition.name


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def flatten(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """A hint with the nearest of ``names``, or nothing."""
    near = difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != given else ""


def scenario_schema() -> dict[str, Any]:
    """JSON schema of a scenario file; ``[method]`` is the union of all methods in the table."""
    schema = Scenario.model_json_schema()
    methods = []
    for name in METHODS:
        part = method_settings(name).model_json_schema()
        part["properties"]["name"] = {"const": name, "type": "string"}
        part["required"] = sorted({"name", *part.get("required", ())})
        part["properties"]["preset"] = {"enum": [*method_settings(name).presets, None]}
        schema["$defs"].update(part.pop("$defs", {}))
        methods.append(part)
    methods.append({"type": "object", "required": ["name"], "properties": {"name": DOTTED}})  # a person's own
    schema["properties"]["method"] = {"oneOf": methods}
    return schema
