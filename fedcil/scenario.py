"""The scenario: everything that decides a run's result, as one frozen value.

Its tables are classes (fedcil/tables.py, method_table.py; fedcil/scenario_file.py reads a file of them); unknown
keys, wrong types, numbers out of range and combinations that cannot work are refused before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from fedcil.method_table import method_settings, read_method
from fedcil.methods import METHODS
from fedcil.methods.settings import MethodSettings
from fedcil.section import Count, Section
from fedcil.sources import changed_since_loaded, sources_of
from fedcil.tables import (
    DOTTED,
    AvailabilitySection,
    ClientsSection,
    ClockSection,
    DataSection,
    EngineSection,
    ModelSection,
    PartitionSection,
    PopulationSection,
    ServerSection,
    StreamSection,
    TrainingSection,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Scenario(Section):
    """A whole run as a value. Two equal scenarios on the same data give the same ``metrics.jsonl``."""

    name: Annotated[str, Field(pattern=NAME, max_length=100)] = Field(
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
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(read_method)]
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
        return (*idle, *(doubt for part in parts.values() for doubt in part.doubts()))

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
        idle = ("engine.", "data.root", "data.mapping", "availability.file", "server.checkpoint_every")
        return {key: value for key, value in flatten(self.to_dict()).items() if not key.startswith(idle)}

    def own_code(self) -> dict[str, str]:
        """Digests, by module, of the files in which a person's own method, model, data set and partition are, and of
        what these import from beside them.
        """
        return sources_of(self._targets())

    def _targets(self) -> tuple[str, ...]:
        return self.method.name, self.model.name, self.data.name, self.partition.name


def _without_none(value: Any) -> Any:
    """Of tables that a person's own options hold, too, where pydantic's ``exclude_none`` leaves it."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def flatten(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


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
