"""Scenario files: read, checked, overridden, written back; and what is wrong with one is said, never thrown."""

from __future__ import annotations

import itertools
import random
import re
import time
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcil.cli.reference import reference
from fedcil.errors import ScenarioError
from fedcil.method_table import method_settings
from fedcil.methods import METHODS
from fedcil.scenario import Scenario, scenario_schema
from fedcil.scenario_file import SHIPPED, load_scenario, parse_scenario, shipped_scenarios, to_toml
from fedcil.section import Section

ROOT = Path(__file__).resolve().parent.parent

TEXTS = {name: (SHIPPED / f"{name}.toml").read_text() for name in shipped_scenarios()}
TRIPLES = ["digits", "fashion", "cifar100_small", "paper/cifar100"]


def scenario(**tables: Any) -> Scenario:
    return load_scenario({"method": {"name": "fedavg"}, **tables})


def refusal(source: Any, *overrides: str) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(source, overrides)
    return caught.value


def refused(**tables: Any) -> str:
    return str(refusal({"method": {"name": "fedavg"}, **tables}))


# Shipped scenarios


@pytest.mark.parametrize("name", TEXTS)
def test_a_shipped_scenario_comes_back_equal_from_its_own_toml(name: str) -> None:
    first = load_scenario(name)
    again = parse_scenario(tomllib.loads(to_toml(first)), where="again")
    assert again == first
    assert again.deciding() == first.deciding()
    assert to_toml(again) == to_toml(first)
    assert first.name == Path(name).name


@pytest.mark.parametrize("stem", TRIPLES)
def test_in_a_triple_only_name_and_method_differ(stem: str) -> None:
    plain = [load_scenario(f"{stem}_{method}").to_dict() for method in ("fedavg", "mfcl", "oracle")]
    for one in plain:
        assert one["name"].endswith(one["method"]["name"])
        del one["name"], one["method"]
    assert plain[0] == plain[1] == plain[2]


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits_mfcl").write_text('name = "mine"\n[method]\nname = "fedavg"\n')
    assert load_scenario("digits_mfcl").name == "mine"


# Precedence


def test_set_wins_over_file_file_over_preset_preset_over_default(tmp_path: Path) -> None:
    """latent: 1000 by default, 200 in preset ``paper``, 300 in the file, 400 by --set; steps: 100 and 5000."""
    file = tmp_path / "x.toml"
    file.write_text('[method]\nname = "mfcl"\nsynthetic = 8\n')
    assert vars(load_scenario(file).method)["latent"] == 1000
    file.write_text('[method]\nname = "mfcl"\npreset = "paper"\n')
    assert vars(load_scenario(file).method)["latent"] == 200
    file.write_text('[method]\nname = "mfcl"\npreset = "paper"\nlatent = 300\n')
    method = vars(load_scenario(file).method)
    assert (method["latent"], method["steps"]) == (300, 5000)
    assert vars(load_scenario(file, ["method.latent=400"]).method)["latent"] == 400


def test_the_later_of_two_overrides_wins() -> None:
    assert load_scenario("digits_fedavg", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.lr=1", 1.0),
        ("training.lr = 1e-3", 1e-3),
        ("model.name=resnet8", "resnet8"),
        ("model.name='resnet8'", "resnet8"),
        ("stream.sizes=[2, 8]", (2, 8)),
        ("partition.allow_empty=true", True),
        ("engine.address=ray://host:1", "ray://host:1"),
        ("engine.address=a=b", "a=b"),
        ("data={name='synthetic'}", "synthetic"),
    ],
)
def test_an_override_is_toml_and_a_bare_word_is_text(text: str, value: Any) -> None:
    made = scenario_with(text)
    section, _, field = text.partition("=")[0].strip().partition(".")
    assert getattr(getattr(made, section), field or "name") == value


def scenario_with(*overrides: str) -> Scenario:
    return load_scenario({"method": {"name": "fedavg"}}, overrides)


def test_overrides_leave_the_mapping_that_was_given_alone() -> None:
    mine = {"method": {"name": "fedavg"}, "training": {"rounds": 1}}
    assert load_scenario(mine, ["training.rounds=7", "data.classes=2"]).training.rounds == 7
    assert mine == {"method": {"name": "fedavg"}, "training": {"rounds": 1}}


def test_another_method_by_name_alone_is_refused_with_what_does_it() -> None:
    with pytest.raises(ScenarioError) as error:
        load_scenario("digits_mfcl", ["method.name=fedavg"])
    told = re.search(r"--set '(.*)'", error.value.next)
    assert told
    assert load_scenario("digits_mfcl", [told[1]]).method.name == "fedavg"


# What an error says: (tables, words that must stand in it)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"training": {"ruonds": 3}}, ["unknown key training.ruonds", "'rounds'", "keys of training", "epochs"]),
        ({"trainig": {}}, ["unknown key trainig", "'training'", "keys of a scenario"]),
        ({"method": {"name": "mfcl", "preset": "small", "latnet": 3}}, ["method.latnet", "'latent'", "w_kd"]),
        ({"tuple": 1}, ["unknown key tuple", "keys of a scenario"]),
        ({"data": {"literal": 1}}, ["unknown key data.literal", "keys of data"]),
        ({"a[b": 1}, ["unknown key a[b"]),
        ({"seed": True}, ["seed = True", "valid integer"]),
        ({"seed": "3"}, ["seed = '3'", "valid integer"]),
        ({"seed": 1.0}, ["seed = 1.0", "valid integer"]),
        ({"training": {"lr": True}}, ["training.lr = True", "valid number"]),
        ({"training": {"lr": "0.1"}}, ["training.lr = '0.1'", "valid number"]),
        ({"partition": {"allow_empty": 1}}, ["partition.allow_empty = 1", "valid boolean"]),
        ({"stream": {"sizes": [2, True]}}, ["stream.sizes.1 = True", "valid integer", "stream.sizes: a list (classes"]),
        ({"clock": {"tiers": [[1.0]]}}, ["clock.tiers.0.1 is missing", "clock.tiers: a list (tiers: rows of"]),
        ({"method": {"name": "mfcl", "preset": "small", "pool": -1}}, ["pool = -1 must be", "method.pool: integer at"]),
        ({"stream": {"sizes": [2, 0]}}, ["stream.sizes = [2, 0]", "at least 1 class"]),
        ({"stream": {"sizes": []}}, ["stream.sizes = []", "at least 1 class"]),
        ({"stream": {"class_order": "naturl"}}, ["stream.class_order = 'naturl'", "'natural'"]),
        (
            {"training": {"rounds": 0}},
            ["rounds = 0 must be greater than or equal to 1", "rounds: integer at least 1 (per"],
        ),
        ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
        ({"server": {"quorum": 1.01}}, ["server.quorum = 1.01", "less than or equal to 1"]),
        ({"data": {"validation": 1.0}}, ["data.validation = 1.0", "less than 1"]),
        ({"training": {"lr": float("nan")}}, ["training.lr = nan", "finite"]),
        ({"training": {"lr": float("inf")}}, ["training.lr = inf", "finite"]),
        ({"seed": 2**63}, ["seed", "too large", "64 bits"]),
        ({"training": {"rounds": 16**5000}}, ["training.rounds", "too large"]),
        ({"engine": {"address": "\udcff"}}, ["engine.address", "no text"]),
        ({"method": {"name": "mfcll"}}, ["method", "'mfcll'", "did you mean 'mfcl'", "fedavg", "package.module"]),
        ({"method": {"name": "mfcl", "preset": "smal"}}, ["'smal'", "did you mean 'small'", "authors-code"]),
        ({"method": {"name": "fedavg", "preset": "small"}}, ["'small'", "no presets"]),
        ({"method": {"name": "fedavg", "preset": [1]}}, ["unknown preset [1]"]),
        ({"method": {"name": 3}}, ["method", "needs a name"]),
        ({"method": "mfcl"}, ["method = 'mfcl'", "needs a name"]),
        ({"method": {"name": "mfcl"}}, ["method.synthetic", "method.synthetic_ratio"]),
        ({"method": {"name": "no.such:Thing"}}, ["'no.such'", "cannot be imported"]),
        ({"method": {"name": "fedcil.fold:Nothing"}}, ["'fedcil.fold'", "has no 'Nothing'"]),
        ({"method": {"name": "fedcil.fold:Fold"}}, ["fedcil.fold:Fold", "not a class of method settings"]),
        ({"method": {"name": ".x:y"}}, ["'.x'", "cannot be imported"]),
        ({"method": {"name": ":y"}}, ["cannot be imported"]),
        ({"engine": {"name": "inlin"}}, ["engine.name = 'inlin'", "did you mean 'inline'", "'flower'"]),
        ({"data": {"name": "digit"}}, ["data.name = 'digit'", "did you mean 'digits'", "'cifar100'"]),
        ({"model": {"name": "resnet19"}}, ["model.name = 'resnet19'", "did you mean 'resnet18'"]),
        ({"name": "a/b"}, ["name = 'a/b' is not allowed", "letters, digits, dot, dash, underscore"]),
        ({"name": ""}, ["name = ''"]),
        ({"training": 3}, ["training = 3 is not allowed", "training: a table"]),
        ({"clients": {"count": 2, "per_round": 3}}, ["clients.per_round = 3", "clients.count = 2"]),
        ({"availability": {"name": "recorded"}}, ["availability", "file"]),
        ({"availability": {"file": "x"}}, ["availability", "file"]),
        ({"engine": {"gpus_per_worker": 0.5}, "device": "cpu"}, ["engine.gpus_per_worker", "device"]),
        ({"engine": {"gpus_per_worker": 1.5}}, ["engine.gpus_per_worker = 1.5", "whole number"]),
        ({"engine": {"gpus_per_worker": 0.00001}}, ["engine.gpus_per_worker = 1e-05", "0.0001"]),
        ({"data": {"name": "super_imagenet"}}, ["data.mapping", "super_imagenet"]),
    ],
)
def test_an_error_names_key_given_and_allowed(tables: dict[str, Any], words: list[str]) -> None:
    text = refused(**tables)
    assert [word for word in words if word not in text] == []


def test_all_problems_are_in_one_error_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('seed = "3"\n[training]\nrounds = 0\nepoch = 1\n')
    error = refusal(file)
    assert error.where == str(file)
    assert error.exit_code == 2
    for word in ("seed = '3'", "training.rounds = 0", "unknown key training.epoch", "method is missing"):
        assert word in error.what


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=3", ".a=3", "", " = "])
def test_an_override_that_is_no_key_and_value_is_refused(text: str) -> None:
    assert "is not key=value" in str(refusal("digits_fedavg", text))


@pytest.mark.parametrize(
    "text",
    ["name.x=3", "seed=", "seed=[[", "seed=" + "[" * 5000, "seed=" + "9" * 5000, "seed=1\nname='x'", "data=3"],
)
def test_an_override_with_a_wrong_value_is_refused(text: str) -> None:
    refusal("digits_fedavg", text)


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)),
        b"\xff\xfe",
        b"\0" * 10,
        b"[" * 50_000,
        b"seed = " + b"[" * 50_000,
        b"seed = " + b"9" * 5000,
        b"seed = 0x" + b"f" * 5000,
        b"seed = 1\nseed = 2",
        b"seed = 1979-02-31",
        b"",
    ],
)
def test_a_file_that_is_no_scenario_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    assert refusal(file).where == str(file)


def test_a_folder_is_no_scenario(tmp_path: Path) -> None:
    assert "it is a folder" in str(refusal(tmp_path))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../scenarios/digits_mfcl", "/no/such/file.toml"])
def test_a_name_that_is_no_file_is_refused(name: str) -> None:
    assert "no scenario" in str(refusal(name))


def test_a_misspelt_name_is_guessed() -> None:
    error = refusal("digits_mfc")
    assert "did you mean 'digits_mfcl'" in error.what
    assert "paper/cifar100_mfcl" in error.allowed


# Frozen values


CLOCK = {"name": "lognormal", "samples_per_s": 1.0, "down_bytes_per_s": 1.0, "up_bytes_per_s": 1.0}


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"partition": {"name": "iid", "alpha": 0.1}}, ["partition.alpha does nothing with partition.name = 'iid'"]),
        ({"partition": {"name": "dirichlet", "alpha": 0.1}}, []),
        ({"partition": {"name": "iid", "alpha": 1.0}}, []),  # as it comes
        ({"partition": {"name": "my.module:shares", "alpha": 0.1}}, []),  # may use it
        ({"model": {"name": "cnn", "stem": "7x7"}}, ["it is for 'resnet8', 'resnet18'"]),
        ({"population": {"name": "fixed", "move_on": 0.5}, "engine": {"address": "auto"}}, ["move_on", "address"]),
        ({"population": {"name": "growing", "size": 5}, "clients": {"count": 60}}, []),
        ({"availability": {"name": "trace", "file": "when.csv"}}, []),
        ({"clock": {"tiers": [[1.0, 9.0, 9.0, 9.0]], "name": "tiers", "samples_per_s": 3.0}}, ["'lognormal'"]),
        ({"partition": {"name": "dirichlet", "min_size": 5, "allow_empty": True}}, ["min_size = 5 does nothing with"]),
        ({"clock": {**CLOCK, "staleness": 0.1}}, ["clock.staleness = 0.1 does nothing with clock.late = 'drop'"]),
        ({"clock": {**CLOCK, "deadline_s": 1.0, "late": "fold", "staleness": 0.1}}, []),
        (
            {"engine": {"processes": True, "workers": 1}},
            ["engine.processes = true does nothing with engine.workers"],
        ),
        ({"engine": {"processes": True, "workers": 2}}, []),
        (
            {"population": {"name": "turnover", "size": 5, "replaced_per_task": 0.09, "replaced_per_round": 0.1}},
            ["population.replaced_per_task = 0.09 of 5 members is nobody"],
        ),
    ],
)
def test_a_key_that_does_nothing_under_its_name_is_said(tables: dict[str, Any], says: list[str]) -> None:
    notes = scenario(**tables).notes
    assert len(notes) == len(says)
    assert all(part in note for part, note in zip(says, notes, strict=True))


@pytest.mark.parametrize(("version", "classes"), [("s", 100), ("m", 75), ("l", 50)])
def test_the_protocol_on_super_imagenet_draws_the_class_order_and_balances_clients(version: str, classes: int) -> None:
    """Each client has as many images of each class of a task as any other (arXiv 2311.07784)."""
    paper = load_scenario(f"paper/super_imagenet_{version}_mfcl")
    assert paper.stream.class_order == "seeded"
    assert (paper.partition.name, paper.partition.classes_per_client) == ("classes", classes // paper.stream.tasks)


def test_no_shipped_scenario_sets_what_does_nothing() -> None:
    assert not [note for name in TEXTS for note in load_scenario(name).notes]


def test_no_part_of_a_scenario_can_be_changed() -> None:
    made = scenario()
    sections = [getattr(made, name) for name in Scenario.model_fields if isinstance(getattr(made, name), Section)]
    assert len(sections) == 12
    for part in [made, *sections]:
        with pytest.raises(ValidationError, match="frozen"):
            part.__setattr__(next(iter(type(part).model_fields)), 1)


# Digest

IGNORED = {"data.root", "data.mapping", "server.checkpoint_every"}
OTHER = {  # a value that differs from the default and can stand alone
    "data.root": "/elsewhere",
    "data.mapping": "x.yaml",
    "engine.address": "auto",
    "server.fold": "median",
    "server.byzantine": {"fold": "trimmed_mean", "byzantine": 1},
    "stream.class_order": "seeded",
    "clients.per_round": 3,
    "population.name": {"name": "turnover", "size": 5},
    "population.size": {"name": "turnover", "size": 6},
    "availability.rounds_on": 2.0,
    "availability.rounds_off": 2.0,
    "clients.over_sample": {"count": 21},  # needs a clock: tests/test_late.py
    "clock.name": CLOCK,
    "clock.tiers": {"name": "tiers", "tiers": [[1.0, 1.0, 1.0, 1.0]]},
    "clock.deadline_s": CLOCK | {"deadline_s": 1.0},
    "clock.late": CLOCK | {"late": "fold"},
    "availability.name": {"name": "recorded", "file": "x"},
    "availability.file": {"name": "recorded", "file": "y"},
    "method.name": "oracle",
    "method.preset": {"name": "mfcl", "preset": "paper"},
}


def another(section: str, field: str, info: Any) -> dict[str, Any]:
    """The tables of a scenario in which one field is not what it is by default."""
    value = OTHER.get(f"{section}.{field}")
    if isinstance(value, dict):
        return {section: value}
    if value is None:
        value = different(info.default, info.annotation)
    return {section: {field: value}}


def different(default: Any, annotation: Any) -> Any:
    choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
    if choices:
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return 0.5 if default != 0.5 else 0.25
    if isinstance(default, str):
        return {"digits": "mnist", "dirichlet_equal": "iid", "cnn": "resnet8", "run": "other"}[default]
    kinds = [("bool", True), ("float", 2.0), ("tuple", [1]), ("int", 8)]
    return next(value for kind, value in kinds if kind in str(annotation))


SECTIONS = {
    name: info.annotation
    for name, info in Scenario.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section) and name != "method"
}
FIELDS = [(section, field) for section, kind in SECTIONS.items() for field in kind.model_fields]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_key_but_engine_places_and_checkpoints_changes_the_digest(section: str, field: str) -> None:
    changed = scenario(**another(section, field, SECTIONS[section].model_fields[field]))
    assert changed != scenario()
    ignored = section == "engine" or f"{section}.{field}" in IGNORED
    assert (changed.deciding() == scenario().deciding()) == ignored


@pytest.mark.parametrize("tables", [{"seed": 1}, {"name": "x"}, {"device": "cpu"}, {"method": {"name": "oracle"}}])
def test_seed_name_device_and_method_change_the_digest(tables: dict[str, Any]) -> None:
    assert scenario(**tables).deciding() != scenario().deciding()


def test_every_option_of_every_method_changes_the_digest() -> None:
    for method in METHODS:
        kind = method_settings(method)
        first = {"name": method, **({"preset": "small"} if kind.presets else {})}
        base = scenario(method=first)
        for field, info in kind.model_fields.items():
            if field in ("name", "preset", "synthetic"):
                continue
            value = different(vars(base.method)[field], info.annotation)
            changed = scenario(method={**first, field: value})
            assert changed.deciding() != base.deciding(), (method, field)


def test_an_integer_for_a_number_is_the_same_scenario() -> None:
    whole, real = scenario(training={"lr": 1}), scenario(training={"lr": 1.0})
    assert whole == real
    assert whole.deciding() == real.deciding()


# to_toml


@pytest.mark.parametrize(
    ("given_", "lr_end"), [({}, 0.01), ({"lr": 0.5}, 0.05), ({"lr": 0.5, "lr_end": 0.5}, 0.5), ({"lr_end": 1.0}, 1.0)]
)
def test_the_rate_falls_to_a_tenth_where_nothing_else_is_said(given_: dict[str, float], lr_end: float) -> None:
    found = scenario(training=given_)
    assert found.training.lr_end == lr_end
    assert scenario(**found.to_dict()) == found
    assert [("rises" in note) for note in found.notes] == [True] * (lr_end > found.training.lr)


@settings(max_examples=200, deadline=None)
@given(text=st.text(), sizes=st.lists(st.integers(1, 2**62), min_size=1), lr=st.floats(1e-300, 1e300))
def test_awkward_values_come_back_from_toml(text: str, sizes: list[int], lr: float) -> None:
    """Quotes, control characters, emoji; whole numbers of 62 bits; floats with all their digits."""
    first = scenario(
        data={"mapping": text}, engine={"address": text}, stream={"sizes": sizes}, training={"lr": lr, "lr_end": lr}
    )
    assert parse_scenario(tomllib.loads(to_toml(first)), where="again") == first


def test_the_data_root_is_not_written() -> None:
    assert "secret" not in to_toml(scenario(data={"root": "/home/secret"}))


# Schema


def test_the_schema_is_one_and_takes_every_shipped_scenario() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = scenario_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for text in TEXTS.values():
        validator.validate(tomllib.loads(text))


def test_the_schema_takes_own_code_and_names_what_is_shipped() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(scenario_schema())
    own = {
        "data": {"name": "mine:load"},
        "partition": {"name": "mine:share"},
        "method": {"name": "smooth:Smooth", "x": 1},
    }
    assert validator.is_valid(own)
    assert not validator.is_valid({"data": {"name": "digit"}, "method": {"name": "fedavg"}})


def test_the_schema_names_every_method_with_its_presets() -> None:
    *shipped, own = scenario_schema()["properties"]["method"]["oneOf"]
    assert own["properties"]["name"]["pattern"] == ":"
    parts = {part["properties"]["name"]["const"]: part for part in shipped}
    assert parts.keys() == METHODS.keys()
    for name, part in parts.items():
        assert part["properties"]["preset"]["enum"] == [*method_settings(name).presets, None]
        assert "name" in part["required"]
        assert part["additionalProperties"] is False


def test_the_reference_is_as_the_schema_is() -> None:
    """Every key with what it is: one without a description cannot be written."""
    written = (ROOT / "docs" / "scenario.md").read_text()
    assert written == reference() + "\n", "run `fedcil schema --tables > docs/scenario.md`"


@pytest.mark.parametrize(
    "tables",
    [
        {"method": {"latent": 5}},
        {"method": {"name": "fedavg", "latent": 5}},
        {"method": {"name": "mfcl", "preset": "x"}},
        {"method": {"name": "fedavg"}, "sead": 1},
        {"method": {"name": "fedavg"}, "training": {"rounds": 0}},
        {},
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(tables: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert not jsonschema.Draft202012Validator(scenario_schema()).is_valid(tables)
    refusal(tables)


# Fuzz

VALUES = [
    "-1",
    "0",
    "1e400",
    "nan",
    "-inf",
    "true",
    '"x"',
    "[]",
    "[[1]]",
    "{}",
    "1979-05-27",
    "0xffff_ffff_ffff_ffff_f",
]


def mutated(text: str, rng: random.Random) -> bytes:
    """One to three of: a flipped bit, a line deleted, doubled or moved, a value or a key replaced, the end cut off."""
    content = text.encode()
    for _ in range(rng.randint(1, 3)):
        lines = content.split(b"\n")
        place = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            flipped = bytearray(content or b"x")
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            content = bytes(flipped)
        elif kind == 5:
            content = content[: rng.randrange(len(content) + 1)]
        else:
            line = lines[place]
            key, _, value = line.partition(b"=")
            if kind == 1:
                lines[place : place + 1] = []
            elif kind == 2:
                lines.insert(rng.randrange(len(lines)), line)
            elif kind == 3:
                lines[place] = key + b"= " + rng.choice(VALUES).encode()
            else:
                lines[place] = rng.choice([b"x", b"method.name", b"data", b'""']) + b" =" + value
            content = b"\n".join(lines)
    return content


def test_a_mutated_scenario_is_a_scenario_or_a_scenario_error(tmp_path: Path) -> None:
    """2,000 files; each is read in well under a second, and what is accepted can be written and read again."""
    rng = random.Random(0)
    file = tmp_path / "x.toml"
    accepted = unnamed = 0
    for trial, name in zip(range(2000), itertools.cycle(TEXTS), strict=False):
        file.write_bytes(mutated(TEXTS[name], rng))
        started = time.process_time()
        try:
            made = load_scenario(file)
        except ScenarioError as error:
            unnamed += str(file) not in str(error)
        else:
            accepted += 1
            assert trial % 10 or parse_scenario(tomllib.loads(to_toml(made)), where="again") == made
        assert time.process_time() - started < 1.0
    assert unnamed == 0
    assert 100 < accepted < 1500  # some changes do no harm, most do


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from([f"{s}.{f}" for s, f in FIELDS] + ["method.name", "seed", ""]), raw=st.text(max_size=20))
def test_any_override_is_a_scenario_or_a_scenario_error(key: str, raw: str) -> None:
    try:
        made = load_scenario("digits_mfcl", [f"{key}={raw}"])
    except ScenarioError:
        return
    assert isinstance(made, Scenario)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"rounds": 3}, "unknown key rounds (did you mean training.rounds?)"),
        ({"width": 3}, "unknown key width (did you mean model.width?)"),
        (
            {"availability": {"name": "trace"}},
            "name = 'trace' needs file = a CSV file",
        ),
        ({"population": {"name": "turnover"}}, "name = 'turnover' needs size = the number of members"),
    ],
)
def test_a_key_in_the_wrong_place_or_missing_is_said_where_it_belongs(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario(**given_)
    assert says in caught.value.what


@pytest.mark.parametrize("source", [5, None, b"digits_fedavg"])
def test_what_is_no_scenario_is_said(source: Any) -> None:
    with pytest.raises(ScenarioError, match="is no scenario"):
        load_scenario(source)


@pytest.mark.parametrize("overrides", ["training.rounds=2", {"training.rounds": 2}, [5]])
def test_overrides_that_are_no_list_are_said(overrides: Any) -> None:
    with pytest.raises(ScenarioError, match="is no list of overrides") as caught:
        load_scenario("digits_fedavg", overrides)
    assert '["training.rounds=20", "seed=1"]' in str(caught.value)


def test_a_file_without_its_ending_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").touch()
    with pytest.raises(ScenarioError, match=r"did you mean 'mine\.toml'"):
        load_scenario("mine")


def test_a_rate_that_is_none_is_one_problem() -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario(training={"lr": -1.0})
    assert len(caught.value.what.splitlines()) == 1
    assert caught.value.what.startswith("training.lr = -1.0 must be greater than 0")


def test_overrides_may_come_from_a_generator() -> None:
    assert load_scenario("digits_fedavg", (text for text in ["training.rounds=7"])).training.rounds == 7


def test_a_mapping_of_any_kind_is_a_table_and_its_keys_are_text() -> None:
    tables = {"method": {"name": "fedavg"}, "training": MappingProxyType({"rounds": 7})}
    for overrides in ((), ("seed=1",)):
        assert load_scenario(MappingProxyType(tables), overrides).training.rounds == 7
    for odd in ({3: 4}, {"training": {3: 4}}):
        with pytest.raises(ScenarioError, match="3 is no name of a key"):
            load_scenario({**tables, **odd})
