"""The tables of a scenario file but ``[method]``, each a class; docs/scenario.md is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from fedcil.rule import FoldName, Rule
from fedcil.section import Above0, Count, Fraction, Ints, NonNegative, Positive, Section

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
ThreadCount = Annotated[int, Field(ge=1, le=256)]
AtLeast1 = Annotated[float, Field(ge=1.0)]
Tier = tuple[Above0, Above0, Above0, Above0]
Tiers = Annotated[tuple[Tier, ...], Field(min_length=1)]
STALENESS = 0.5
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

    @model_validator(mode="after")
    def _mapping_is_there(self) -> Self:
        if self.name == "super_imagenet" and self.mapping is None:
            raise ValueError("super_imagenet needs data.mapping, a file of super-classes (docs/data.md)")
        return self


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
    """``[partition]``: how one task's samples are shared among the clients (ways: fedcil/partitioners.py)."""

    name: Annotated[str, _one_of_or_dotted(PARTITIONS), _named(PARTITIONS)] = Field(
        "dirichlet_equal", description="a shipped way or package.module:function"
    )
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] = Field(1.0, description="dirichlet_equal, dirichlet: concentration")
    remainder: Literal["refuse", "spread"] = Field(
        "refuse", description="what to do when the samples of dirichlet_equal do not divide by clients"
    )
    min_size: Count = Field(1, description="dirichlet, quantity: samples that each client has at least")
    shards_per_client: Positive = Field(2, description="shards: pieces of the sorted samples that each client gets")
    classes_per_client: Positive = Field(2, description="classes: how many of a task's classes each client has")
    sigma: Above0 = Field(1.0, description="quantity: deviation of the log-normal client sizes")
    allow_empty: bool = Field(False, description="let clients be without samples in a task")

    def doubts(self) -> list[str]:
        words = f"partition.min_size = {self.min_size} does nothing with partition.allow_empty = true"
        return [words] if self.allow_empty and self.min_size > 1 else []


class ClientsSection(Section):
    """``[clients]``: how many data owners there are and how many are asked in a round."""

    count: Annotated[int, Field(ge=1, le=10**7)] = Field(20, description="data owners in all")
    per_round: Positive = Field(5, description="of them wanted in a round")
    over_sample: Annotated[float, Field(ge=1.0, le=100.0)] = Field(
        1.0, description="ask so many times more; the round closes when per_round are in (needs [clock])"
    )
    dropout: Fraction = Field(0.0, description="chance that a client vanishes in mid-round")


class PopulationSection(Section):
    """``[population]``: who belongs to the federation when (fedcil/population.py)."""

    name: Literal["fixed", "turnover", "growing"] = Field(
        "fixed", description="the same all the time, replaced by newcomers, or more at each task boundary"
    )
    size: Positive | None = Field(None, description="turnover, growing: members, at any time or in the first task")
    replaced_per_task: Fraction = Field(0.0, description="turnover: share that newcomers replace at each task boundary")
    replaced_per_round: Fraction = Field(
        0.0, description="turnover: share that newcomers replace before each round but a phase's first"
    )
    newcomers: Count = Field(10, description="growing: clients that join at each task boundary")
    move_on: Fraction = Field(
        0.9, description="growing: share of the old ones that get samples of the new task; the others stay behind"
    )

    @model_validator(mode="after")
    def _size_given(self) -> Self:
        if (self.name == "fixed") != (self.size is None):
            if self.size is None:
                raise ValueError(f"name = {self.name!r} needs size = the number of members")
            raise ValueError(f"size is for name = 'turnover' and 'growing'; name is {self.name!r}")
        return self

    def doubts(self) -> list[str]:
        shares = {"replaced_per_task": self.replaced_per_task, "replaced_per_round": self.replaced_per_round}
        return [
            f"population.{key} = {share:g} of {self.size} members is nobody, to the nearest whole one"
            for key, share in shares.items()
            if self.name == "turnover" and share and not self.replaced(share)
        ]

    def replaced(self, share: float) -> int:
        """Clients that a share of the members is, to the nearest whole one."""
        return int(share * (self.size or 0) + 0.5)

    def needed(self, boundaries: int, steps: int) -> int:
        """Ids that so many task boundaries and so many rounds inside phases use up."""
        if self.name == "growing":
            return (self.size or 0) + boundaries * self.newcomers
        per_task, per_round = self.replaced(self.replaced_per_task), self.replaced(self.replaced_per_round)
        return (self.size or 0) + boundaries * per_task + steps * per_round


class AvailabilitySection(Section):
    """``[availability]``: who can be reached in a round (fedcil/availability.py)."""

    name: Literal["always", "bernoulli", "markov", "diurnal", "trace", "recorded"] = Field(
        "always", description="by chance, by a chain of on and off, by the time of day, or as a file says"
    )
    probability: Fraction = Field(1.0, description="bernoulli: chance of being there in a round")
    rounds_on: AtLeast1 = Field(10.0, description="markov: rounds a client is there in the mean")
    rounds_off: AtLeast1 = Field(10.0, description="markov: rounds it is away in the mean")
    share: Fraction = Field(0.5, description="diurnal: share that is there in the mean over a period")
    amplitude: Fraction = Field(0.4, description="diurnal: how far the share goes up and down")
    period: Annotated[float, Field(ge=1e-3)] = Field(24.0, description="diurnal: rounds of a day")
    spread: Fraction = Field(1.0, description="diurnal: part of a period that the clients' phases are spread over")
    file: str | None = Field(
        None, description="recorded, trace: a metrics.jsonl to replay, or a CSV file with client,from,to"
    )

    @model_validator(mode="after")
    def _file_given(self) -> Self:
        if (self.name in ("recorded", "trace")) != (self.file is not None):
            if self.file is None:
                kind = "a metrics.jsonl to replay" if self.name == "recorded" else "a CSV file with client,from,to"
                raise ValueError(f"name = {self.name!r} needs file = {kind}")
            raise ValueError(f"file is for name = 'recorded' and 'trace'; name is {self.name!r}")
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
        None,
        description="tiers: rows of [share of clients, samples a second, bytes down a second, bytes up a second];"
        " shares are of their sum",
    )
    deadline_s: Above0 | None = Field(None, description="simulated seconds after which a round closes")
    late: Literal["drop", "fold"] = Field(
        "drop", description="updates that are late: never made, or folded into the round in which they arrive"
    )
    staleness: NonNegative = Field(STALENESS, description="late = fold: weight (1 + rounds late) ** -staleness")

    def doubts(self) -> list[str]:
        words = f"clock.staleness = {self.staleness:g} does nothing with clock.late = 'drop'"
        return [words] if self.late == "drop" and self.staleness != STALENESS else []

    @model_validator(mode="after")
    def _numbers_given(self) -> Self:
        medians = (self.samples_per_s, self.down_bytes_per_s, self.up_bytes_per_s)
        if self.name == "lognormal" and None in medians:
            raise ValueError("lognormal needs samples_per_s, down_bytes_per_s and up_bytes_per_s")
        if (self.name == "tiers") != (self.tiers is not None):
            if self.tiers is None:
                raise ValueError("name = 'tiers' needs tiers = rows of [share, samples/s, bytes/s down, bytes/s up]")
            raise ValueError(f"tiers is for name = 'tiers'; name is {self.name!r}")
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
    threads: ThreadCount = Field(1, description="intra-operator threads of one client")

    def doubts(self) -> list[str]:
        words = (
            f"training.lr_end = {self.lr_end:g} is above training.lr = {self.lr:g}: the rate rises within every task"
        )
        return [words] if self.lr_end > self.lr else []


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
    quorum: Fraction = Field(0.0, description="share of the answers wanted that must come")
    patience: Positive = Field(10, description="rounds without quorum in a row before the run ends")
    threads: ThreadCount = Field(1, description="intra-operator threads of boundary and evaluation")

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
    workers: ThreadCount | None = Field(
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
    address: str | None = Field(None, description="ray, flower: an existing cluster")
    gpus_per_worker: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="ray, flower: share of a GPU; default: as many workers as its memory holds"
    )

    def doubts(self) -> list[str]:
        words = "engine.processes = true does nothing with engine.workers = 1, which is a thread of this process"
        return [words] if self.name == "inline" and self.processes and self.workers == 1 else []

    @field_validator("gpus_per_worker")
    @classmethod
    def _as_ray_counts(cls, value: float | None) -> float | None:
        if value and not (1e-4 <= value <= 1 or value.is_integer()):
            raise ValueError("a part of one GPU, from 0.0001 on, or a whole number of them")
        return value
