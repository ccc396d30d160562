"""The border: what was sent comes back bit for bit; of anything else only MessageRefused comes out."""

from __future__ import annotations

import ast
import json
import random
import struct
import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcil.errors import MessageRefused
from fedcil.messages import Broadcast, Failure, Payload, Report
from fedcil.tensor_files import tensor_bytes
from fedcil.tensors import Contribution, Tensors, content_hash
from fedcil.wire import (
    DIGEST_BYTES,
    MAGIC,
    PREFIX,
    Answer,
    Expected,
    admit,
    pack,
    pack_answer,
    pack_broadcast,
    pack_payload,
    spec_of,
    unpack,
    unpack_broadcast,
    unpack_payload,
)
from scenarios.reliability.mutants import (
    MUTATIONS,
    bit_flips,
    changed_values,
    deletion,
    insertion,
    throw,
    truncation,
)

LIMIT = 1 << 20
MODEL = {"body.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.zeros(4), "scale": torch.tensor(2.0)}
PLACE = [1, 0, 7]
EXPECTED = Expected(
    run="run-1",
    place=PLACE,
    samples={3: 12, 5: 1},
    spec=spec_of(MODEL),
    limit=LIMIT,
)
REPORT = {"samples": 12, "metrics": {"loss": 0.5, "steps": 3}, "state": None, "state_bytes": 0, "seconds": 0.25}
HEADER = {"run": "run-1", "place": PLACE, "client": 3, "report": REPORT, "weight": 12.0}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
]


def digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def packet(header: Any, body: bytes | Tensors = MODEL) -> bytes:
    """Any header and any bytes with a correct prefix and a correct digest."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = body if isinstance(body, bytes) else tensor_bytes(body)
    content = PREFIX.pack(MAGIC, len(head)) + head + body
    return content + digest(content)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def refused(given: bytes, expected: Expected = EXPECTED, client: int = 3) -> MessageRefused:
    with pytest.raises(MessageRefused) as caught:
        admit(given, client, expected)
    return caught.value


def noise(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    size = torch.tensor([], dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    numbers = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return numbers.view(dtype).reshape(shape)  # any bits, so NaN and infinity too


# Round trips


@settings(max_examples=100, deadline=None)
@given(
    parts=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.integers(0, 9)),
        max_size=4,
    ),
    header=st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.floats(allow_nan=False) | st.text()),
)
def test_any_tensors_and_header_come_back(parts: dict[str, Any], header: dict[str, Any]) -> None:
    header = {name: value for name, value in header.items() if value not in (float("inf"), float("-inf"))}
    tensors = {name: noise(*part) for name, part in parts.items()}
    got, back = unpack(pack(header, tensors), limit=LIMIT)
    assert got == header
    assert spec_of(back) == spec_of(tensors)
    assert content_hash(back) == content_hash(tensors)


def test_views_and_tensors_that_share_memory_come_back() -> None:
    """Channels-last, transposed, sliced, expanded, and twice the same."""
    whole = torch.arange(48.0).reshape(1, 3, 4, 4)
    tensors = {
        "last": whole.to(memory_format=torch.channels_last),
        "transposed": whole.mT,
        "slice": whole[..., ::2],
        "expanded": torch.ones(1).expand(5),
        "one": whole,
        "two": whole,
    }
    _, back = unpack(pack({}, tensors), limit=LIMIT)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


def test_a_broadcast_comes_back() -> None:
    payload = Payload.of({"x": torch.ones(2)})
    broadcast = Broadcast(task=1, phase=0, round=7, tensors=MODEL, payload=payload)
    header, tensors = unpack_broadcast(pack_broadcast(broadcast, "run-1"), limit=LIMIT)
    assert header == {"run": "run-1", "place": PLACE, "payload": payload.hash}
    assert content_hash(tensors) == content_hash(MODEL)
    with pytest.raises(MessageRefused, match="a broadcast with the keys"):
        unpack_broadcast(packet(HEADER), limit=LIMIT)


def test_a_payload_comes_back_and_another_under_its_name_does_not() -> None:
    payload = Payload.of({"x": torch.ones(2)})
    assert unpack_payload(pack_payload(payload), limit=LIMIT).hash == payload.hash
    with pytest.raises(MessageRefused, match="not the one it says it is"):
        unpack_payload(pack_payload(replace(payload, tensors={"x": torch.zeros(2)})), limit=LIMIT)


def test_an_answer_is_admitted() -> None:
    report = Report(client=3, samples=12, metrics={"loss": 0.5}, state="0" * 32, state_bytes=8, seconds=0.25)
    packed = pack_answer(Answer(report, Contribution(MODEL, 12.0)), "run-1", PLACE)
    answer = admit(packed, 3, EXPECTED)
    assert answer.result == replace(report, bytes_up=4 * (6 + 4 + 1))
    assert answer.contribution is not None
    assert answer.contribution.weight == 12.0
    assert content_hash(answer.contribution.tensors) == content_hash(MODEL)


def test_a_report_without_tensors_and_a_failure_are_admitted() -> None:
    report = Report(client=3, samples=12, state="a" * 32, state_bytes=8)
    packed = pack_answer(Answer(report), "run-1", PLACE)
    assert admit(packed, 3, replace(EXPECTED, spec={})) == Answer(report)
    failure = Failure(3, "training", "the loss is not finite")
    assert admit(pack_answer(Answer(failure), "run-1", PLACE), 3, EXPECTED) == Answer(failure)


def test_a_long_reason_is_cut() -> None:
    failure = Failure(3, "s" * 1000, "r" * 10_000)
    result = admit(pack_answer(Answer(failure), "run-1", PLACE), 3, EXPECTED).result
    assert result == Failure(3, "s" * 100, "r" * 500)


# What belongs to something else


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in REPORT.items() if key != name}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"run": "run-2"}, "another run"),
        ({"run": None}, "another run"),
        ({"place": [1, 0, 6]}, "another round"),
        ({"place": [0, 0, 7]}, "another round"),
        ({"place": [1, 0]}, "another round"),
        ({"place": "1"}, "another round"),
        ({"client": 4}, "nobody asked for"),
        ({"client": -3}, "nobody asked for"),
        ({"client": "3"}, "nobody asked for"),
        ({"client": 3.0}, "nobody asked for"),
        ({"client": True}, "nobody asked for"),
        ({"client": None}, "nobody asked for"),
        ({"client": [3]}, "nobody asked for"),
        ({"client": 10**4000}, "nobody asked for"),
        ({"client": "x" * 100_000}, "nobody asked for"),
        ({"report": None}, "no report"),
        ({"report": [1]}, "no report"),
        ({"report": {**REPORT, "samples": 13}}, "13 samples reported, 12 known"),
        ({"report": {**REPORT, "samples": 12.0}}, "samples reported"),
        ({"report": {**REPORT, "samples": "x" * 100_000}}, "samples reported"),
        ({"report": without("samples")}, "None samples"),
        ({"report": {**REPORT, "metrics": [1.0]}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": "0.5"}}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": True}}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": float("nan")}}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": float("-inf")}}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": 10**400}}}, "metrics"),
        ({"report": {**REPORT, "metrics": {"loss": 1e308}}}, "metrics"),  # two of them overflow a sum
        ({"report": without("metrics")}, "metrics"),
        ({"report": {**REPORT, "state": 3}}, "no hash"),
        ({"report": {**REPORT, "state": "../../secret"}}, "no hash"),
        ({"report": {**REPORT, "state": "0" * 33}}, "no hash"),
        ({"report": {**REPORT, "state_bytes": -1}}, "costs"),
        ({"report": {**REPORT, "state_bytes": 0.5}}, "costs"),
        ({"report": {**REPORT, "state_bytes": 10**4299}}, "costs"),  # a sum of two could not be written down
        ({"report": {**REPORT, "seconds": -0.1}}, "costs"),
        ({"report": {**REPORT, "seconds": None}}, "costs"),
        ({"report": {**REPORT, "seconds": float("inf")}}, "costs"),
        ({"report": without("seconds")}, "costs"),
        ({"weight": 0}, "a weight of 0"),
        ({"weight": -1.0}, "a weight of -1.0"),
        ({"weight": None}, "a weight of None"),
        ({"weight": True}, "a weight of True"),
        ({"weight": "12"}, "a weight of '12'"),
        ({"weight": float("nan")}, "a weight of nan"),
        ({"weight": float("inf")}, "a weight of inf"),
        ({"weight": 10**400}, "a weight of 1000.*, not of 1e-09 to 1e.15"),
        ({"weight": 1e308}, r"a weight of 1e\+308"),
        ({"weight": 1e-320}, "a weight of 1e-320"),  # 0 in float32, and 0 / 0 in the mean
        ({"failure": 3}, "no table"),
        ({"failure": {}}, "without stage and reason"),
        ({"failure": {"stage": "x", "reason": 3}}, "without stage and reason"),
    ],
)
def test_an_answer_that_does_not_belong_here_is_refused(header: dict[str, Any], words: str) -> None:
    """Each with a correct digest; the reason goes into the record, so it is short whatever was sent."""
    with pytest.raises(MessageRefused, match=words) as caught:
        admit(packet({**HEADER, **header}), 3, EXPECTED)
    assert len(str(caught.value)) < 500


def test_true_is_not_one_sample() -> None:
    given = packet({**HEADER, "client": 5, "report": {**REPORT, "samples": True}})
    assert "True samples reported, 1 known" in str(refused(given, client=5))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "missing or too many"),
        ({**MODEL, "more": torch.ones(1)}, "missing or too many: .'more'"),
        ({name: value for name, value in MODEL.items() if name != "scale"}, "missing or too many: .'scale'"),
        ({**MODEL, "x" * 10_000: torch.ones(1)}, "missing or too many"),
        ({**MODEL, "scale": torch.ones(1)}, "scale is .1,. torch.float32, not .. torch.float32"),
        ({**MODEL, "head.bias": torch.zeros(2, 2)}, "head.bias is .2, 2."),
        ({**MODEL, "body.weight": torch.zeros(3, 2)}, "body.weight is .3, 2."),
        ({**MODEL, "scale": torch.ones((1,) * 60)}, "scale is"),
        ({**MODEL, "scale": torch.tensor(2.0, dtype=torch.float64)}, "scale is .. torch.float64"),
        ({**MODEL, "scale": torch.tensor(2)}, "scale is .. torch.int64"),
        ({**MODEL, "scale": torch.tensor(float("nan"))}, "scale is not finite"),
        ({**MODEL, "scale": torch.tensor(float("inf"))}, "scale is not finite"),
        ({**MODEL, "head.bias": torch.tensor([0.0, 0.0, 0.0, float("-inf")])}, "head.bias is not finite"),
        ({**MODEL, "scale": torch.tensor(1e38)}, "too large to be summed"),  # times weight 12 it is infinite
    ],
)
def test_tensors_of_another_form_are_refused(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(MessageRefused, match=words) as caught:
        admit(packet(HEADER, tensors), 3, EXPECTED)
    assert len(str(caught.value)) < 500


def test_tensors_where_none_belong_are_refused() -> None:
    assert "where none belong" in str(refused(packet(HEADER), replace(EXPECTED, spec={})))


def test_an_answer_for_another_job_of_the_same_round_is_refused() -> None:
    """The server looks at one job at a time, under the name that it asked for."""
    assert "nobody asked for" in str(refused(packet(HEADER), client=5))


# What is no packet


def test_size_is_looked_at_before_anything_else() -> None:
    given = b"\xff" * (LIMIT + 1)
    error = refused(given)
    assert str(LIMIT + 1) in error.what
    assert f"the limit, {LIMIT}" in error.what
    whole = packet(HEADER)
    admit(whole, 3, replace(EXPECTED, limit=len(whole)))
    assert "more than the limit" in str(refused(whole, replace(EXPECTED, limit=len(whole) - 1)))


@pytest.mark.parametrize("length", [0, 1, PREFIX.size, PREFIX.size + DIGEST_BYTES - 1])
def test_too_few_bytes_are_no_packet(length: int) -> None:
    assert "no packet" in str(refused(packet(HEADER)[:length]))


def test_another_magic_and_another_digest_are_refused() -> None:
    whole = bytearray(packet(HEADER))
    whole[-1] ^= 1
    assert "digest" in str(refused(bytes(whole)))
    whole[0] ^= 1
    assert "not a fedcil packet" in str(refused(bytes(whole)))


def one(dtype: str, shape: list[int], end: int, data: int | None = None) -> bytes:
    """A safetensors body with one tensor that claims the bytes 0..end and comes with ``data`` of them."""
    claim = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    return safetensors(claim, b"\0" * (end if data is None else data))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 8,
        one("F32", [10**12], 4 * 10**12, data=64),
        safetensors(b"{}")[:8] + b"{",
        struct.pack("<Q", 4 * 10**12) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        one("F4", [2], 1),  # in the format, not in torch
        one("F6_E2M3", [4], 3),
        one("F8_E8M0", [1], 1),
        one("F32", [2**63, 0], 0),
        one("F32", [0, 2**62, 8], 0),
        one("F32", [2**40, 2**40], 4, data=4),
        one("F32", [1], 8),
        safetensors(b"[" * 100_000),
        safetensors(b"\xff\xff"),
        safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
    ids=range(16),
)
def test_a_broken_body_is_refused(body: bytes) -> None:
    assert "cannot be parsed" in str(refused(packet(HEADER, body)))


@pytest.mark.parametrize("header", [b"[" * 100_000, b"", b"{", b"\xff", b'{"a":' * 5000, b"9" * 5000])
def test_a_broken_header_is_refused(header: bytes) -> None:
    assert "cannot be parsed" in str(refused(packet(header)))


@pytest.mark.parametrize("header", [b"[]", b"null", b"3", b'"run"'])
def test_a_header_that_is_no_table_is_refused(header: bytes) -> None:
    assert "no table" in str(refused(packet(header)))


@pytest.mark.parametrize("key", ["run", "place", "client", "weight", "report", "failure"])
def test_a_value_as_deep_as_a_parser_goes_is_refused(key: str) -> None:
    """What json can just read, the making of an error message may not."""
    text = json.dumps({**HEADER, key: "@"})
    for depth in (50, 500, 900, 940, 960, 980, 1000):
        refused(packet(text.replace('"@"', "[" * depth + "]" * depth).encode()))


# Mutations


def test_mutated_answers_are_refused_or_harmless() -> None:
    """5,000 of them (scenarios/reliability/mutants.py throws 100,000); half have a correct digest."""
    findings = throw(5000, seed=0)
    assert findings.surprises == {}
    assert findings.wrongly_accepted == {}
    assert findings.dishonest_models == {}
    counts = findings.outcomes
    assert all(counts[f"refused {mutation.__name__}"] > 200 for mutation in MUTATIONS)
    accepted = sum(count for what, count in counts.items() if what.startswith("accepted"))
    assert 20 < accepted < 500  # changed values of the tensors are what a client may send


def test_mutated_payload_files_are_refused_or_what_their_name_says() -> None:
    """1,000 damaged generators as a node may find them on its disk; half have a correct digest."""
    payload = Payload.of({"generator.weight": torch.arange(12.0).reshape(3, 4), "teacher.bias": torch.ones(5)})
    whole, rng, refusals = pack_payload(payload)[:-DIGEST_BYTES], random.Random(0), 0
    mutations = [bit_flips, truncation, insertion, deletion, changed_values]
    for trial in range(1000):
        content = rng.choice(mutations)(whole, rng)
        try:
            got = unpack_payload(content + digest(content if trial % 2 else whole), limit=LIMIT)
        except MessageRefused:
            refusals += 1
        else:
            assert content_hash(got.tensors) == got.hash
            assert trial % 2 or content == whole
    assert refusals > 900


# Nothing is unpickled: at no border of ours. Ray's own transport between trusted processes of one user is its affair.

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for room in ("fedcil", "server", "client") for path in (ROOT / room).rglob("*.py"))
READER = ROOT / "fedcil" / "data" / "pickles.py"  # the official CIFAR archives, arrays and text only


def unsafe(tree: ast.AST) -> list[str]:
    """Imports of pickle and its like, calls of eval, exec and torch.load, and allow_pickle=True."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module="joblib", names=[ast.alias(name="cpu_count")]):
                pass  # reads no file of anybody's
            case ast.ImportFrom(module=str(module)):
                found += [module] if module.split(".")[0] in MODULES else []
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" as name)):
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.keyword(arg="allow_pickle", value=value):
                found += [] if isinstance(value, ast.Constant) and value.value is False else ["allow_pickle"]
            case ast.keyword(arg="weights_only"):
                found.append("weights_only")
    return found


MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert unsafe(ast.parse(path.read_text())) == (["pickle"] if path == READER else [])


def test_the_search_for_pickles_finds_them() -> None:
    imports = "import pickle\nfrom dill import x\nfrom joblib import load\nfrom joblib import cpu_count, load\n"
    text = f"{imports}torch.load(f)\nnp.load(f, allow_pickle=True)\neval('1')\nexec('1')"
    assert len(unsafe(ast.parse(text))) == 8


def test_nothing_is_unpickled_while_a_run_goes_on(tmp_path: Path) -> None:
    """Python's own audit: no class is looked up for a pickle, inline, over the wire and in a resume."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inline, wire, resumed, bait = json.loads(done.stdout.splitlines()[-1])
    assert (inline, wire, resumed) == ([], [], [])
    assert bait == ["pathlib.PosixPath"]  # the audit sees what it is made for


AUDITED = """
import contextlib, json, pathlib, pickle, sys
import fedcil
from fedcil.experiment import open_experiment
from fedcil.scenario_file import load_scenario
from scenarios.reliability.loopback import LoopbackGrid, run_over

home, seen = pathlib.Path(sys.argv[1]), []
tables = {
    "method": {"name": "mfcl", "preset": "small", "steps": 2, "pool": 8},
    "data": {"name": "digits", "classes": 4},
    "stream": {"tasks": 2},
    "clients": {"count": 4, "per_round": 2},
    "partition": {"name": "iid"},
    "training": {"rounds": 1, "epochs": 1},
}

def hook(event, arguments):
    if event == "pickle.find_class":
        seen.append(".".join(arguments))

def taken():
    found, seen[:] = list(seen), []
    return found

sys.addaudithook(hook)
run = fedcil.run(tables, output=home / "inline", figures=False)
inline = taken()
run_over(LoopbackGrid(2, home / "nodes"), open_experiment(load_scenario(tables)), home / "wire")
wire = taken()
(run.path / "summary.json").unlink()
fedcil.resume(run.path, figures=False)
resumed = taken()
pickle.loads(pickle.dumps(pathlib.PosixPath("x")))
print(json.dumps([inline, wire, resumed, taken()]))
"""


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_does_not_know_is_not_packed(number: float) -> None:
    """A packet can be read by any JSON parser, not by Python's alone."""
    with pytest.raises(ValueError, match="JSON compliant"):
        pack({"loss": number}, {})
