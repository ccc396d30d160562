"""Mutated answers thrown at the border: whatever arrives, one exception comes out, and the model stays honest.

    python -m scenarios.reliability.mutants [--trials 100000] [--seed 0] [--output mutants.json]

Every trial is a round of two honest clients and one whose answer was mutated. Half of the mutants carry a digest
that was made anew, so that what lies behind it is tested too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from fedcil.errors import MessageRefused
from fedcil.gather import Gathered
from fedcil.messages import BORDER, Broadcast, Failure, Job, Report, Request
from fedcil.robust import distance
from fedcil.rule import Rule
from fedcil.tensors import Contribution, Tensors, content_hash
from fedcil.wire import DIGEST_BYTES, PREFIX, Answer, Expected, admit, pack_answer, spec_of

LIMIT = 1 << 20
NORM_LIMIT = 10.0
PLACE = [1, 0, 7]
CLIENTS = (2, 3, 5)
LIAR = 3
MODEL = {"body.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.zeros(4), "scale": torch.tensor(2.0)}
REQUEST = Request(
    Broadcast(task=1, phase=0, round=7, tensors=MODEL),
    tuple(Job(client, place) for place, client in enumerate(CLIENTS)),
    len(CLIENTS),
    Rule(norm_limit=NORM_LIMIT),
)
EXPECTED = Expected(
    run="run-1",
    place=PLACE,
    samples={LIAR: 12},
    spec=spec_of(MODEL),
    limit=LIMIT,
    weights={LIAR: 12.0},
    start=MODEL,
    rule=REQUEST.rule,
)
WORDS = [b"12", b"3", b"0.5", b"null", b'"', b"run", b"F32", b"[2", b"data_offsets", b"client", b"body.weight", b"{"]
OTHERS = [b"-1", b"1e999", b"NaN", b"true", b"[]", b"", b"99999999999999999999", b"F64", b"BF16", b"../x", b"\xff"]


def update(client: int) -> dict[str, torch.Tensor]:
    """A model a little away from what was sent."""
    generator = torch.Generator().manual_seed(client)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in MODEL.items()}


def answer_of(client: int, place: list[int] | None = None) -> bytes:
    report = Report(client=client, samples=12, metrics={"loss": 0.5, "steps": 3}, seconds=0.25)
    return pack_answer(Answer(report, Contribution(update(client), 12.0)), "run-1", place or PLACE)


WHOLE = answer_of(LIAR)
STRANGERS = [answer_of(2), answer_of(LIAR, [1, 0, 6]), answer_of(5)]  # another client's, an old round's


def digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


# Mutations: (body without its digest, rng) -> another body


def bit_flips(body: bytes, rng: random.Random) -> bytes:
    changed, end = bytearray(body), rng.choice((len(body), 600, PREFIX.size))
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(end, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncation(body: bytes, rng: random.Random) -> bytes:
    return body[: rng.randrange(len(body))]


def insertion(body: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(body))
    return body[:place] + rng.randbytes(rng.randint(1, 40)) + body[place:]


def deletion(body: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(body))
    return body[:place] + body[place + rng.randint(1, 40) :]


def swapped_header(body: bytes, rng: random.Random) -> bytes:
    """This one's header before another's tensors, or the other way round."""
    other = rng.choice(STRANGERS)[:-DIGEST_BYTES]
    first, second = (body, other) if rng.random() < 0.5 else (other, body)
    return first[: _header_end(first)] + second[_header_end(second) :]


def changed_word(body: bytes, rng: random.Random) -> bytes:
    """A number, name or bracket of the headers becomes something else; the stated length follows, or not."""
    end = _header_end(body)
    old, new = rng.choice(WORDS), rng.choice(OTHERS)
    if rng.random() < 0.5:
        return body[:end] + body[end:].replace(old, new, 1)
    head = body[PREFIX.size : end].replace(old, new, 1)
    return body[:8] + len(head).to_bytes(4, "little") + head + body[end:]


def changed_number(body: bytes, rng: random.Random) -> bytes:
    """One number of the JSON header is another."""
    end = _header_end(body)
    numbers = [*re.finditer(rb"-?\d+(\.\d+)?", body[PREFIX.size : end])]
    found = rng.choice(numbers)
    new = str(rng.choice((0, -1, 0.5, 2**31, 2**63, 1e300, rng.randint(0, 99)))).encode()
    start, stop = PREFIX.size + found.start(), PREFIX.size + found.end()
    head = body[PREFIX.size : start] + new + body[stop:end]
    return body[:8] + len(head).to_bytes(4, "little") + head + body[end:]


def changed_values(body: bytes, rng: random.Random) -> bytes:
    """Whole floats of the tensors are other floats: NaN, infinite, huge, or a little off."""
    words = [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x00\x00\x00\x40", rng.randbytes(4)]
    place = len(body) - 4 * rng.randint(1, 11)
    return body[:place] + rng.choice(words) + body[place + 4 :]


def replay(_: bytes, rng: random.Random) -> bytes:
    return rng.choice(STRANGERS)[:-DIGEST_BYTES]


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    bit_flips,
    truncation,
    insertion,
    deletion,
    swapped_header,
    changed_word,
    changed_number,
    changed_values,
    replay,
)


def _header_end(body: bytes) -> int:
    _, length = PREFIX.unpack_from(body)
    return min(len(body), PREFIX.size + int(length))


# Trials


@dataclass(slots=True)
class Findings:
    """What became of the mutants. All but ``outcomes`` must stay empty."""

    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: Counter[str] = field(default_factory=Counter)  # exceptions other than MessageRefused
    wrongly_accepted: Counter[str] = field(default_factory=Counter)
    dishonest_models: Counter[str] = field(default_factory=Counter)

    @property
    def passed(self) -> bool:
        return not (self.surprises or self.wrongly_accepted or self.dishonest_models)


def honest_round() -> Gathered:
    gathered = Gathered(REQUEST, lambda _: None)
    for client in CLIENTS:
        if client != LIAR:
            gathered.answer(Report(client=client, samples=12), Contribution(update(client), 12.0))
    return gathered


def model_of(gathered: Gathered) -> Tensors:
    total = gathered.outcome().total
    assert total is not None
    return total.mean()


def trial(rng: random.Random, findings: Findings, honest: Tensors) -> None:
    """One mutant in one round."""
    mutation, again = rng.choice(MUTATIONS), rng.random() < 0.5
    body, seal = WHOLE[:-DIGEST_BYTES], WHOLE[-DIGEST_BYTES:]
    mutant = mutation(body, rng)
    packet = mutant + (digest(mutant) if again else seal)
    gathered = honest_round()
    try:
        answer = admit(packet, LIAR, EXPECTED)
    except MessageRefused as error:
        gathered.fail(LIAR, BORDER, error.what)
        findings.outcomes[f"refused {mutation.__name__}"] += 1
        if content_hash(model_of(gathered)) != content_hash(honest):
            findings.dishonest_models[f"refused {mutation.__name__}"] += 1
        return
    except Exception as error:
        findings.surprises[f"{mutation.__name__}: {type(error).__name__}: {error}"[:200]] += 1
        return
    kind = "unchanged" if mutant == body else "accepted"
    findings.outcomes[f"{kind} {mutation.__name__}"] += 1
    if mutant != body and not again:
        findings.wrongly_accepted[f"{mutation.__name__}: digest"] += 1
    findings.wrongly_accepted.update(f"{mutation.__name__}: {text}" for text in faults_of(answer))
    take_in(answer, gathered)
    if distance(model_of(gathered), honest) > furthest(honest):
        findings.dishonest_models[mutation.__name__] += 1


def take_in(answer: Answer, gathered: Gathered) -> None:
    if isinstance(answer.result, Failure):
        gathered.fail(LIAR, answer.result.stage, answer.result.reason)
    else:
        gathered.answer(answer.result, answer.contribution)


def furthest(honest: Tensors) -> float:
    """How far one of three equal weights can pull: a third of the way to the furthest update that is let through."""
    return (NORM_LIMIT + distance(honest, MODEL)) / 3 * (1 + 1e-5)


def faults_of(answer: Answer) -> list[str]:
    """What is wrong with an answer that was let through."""
    result, contribution = answer.result, answer.contribution
    if result.client != LIAR:
        return ["client"]
    if isinstance(result, Failure):
        return []
    if contribution is None or result.samples != 12 or contribution.weight != 12.0:
        return ["samples or weight"]
    if spec_of(contribution.tensors) != EXPECTED.spec:
        return ["shape"]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in contribution.tensors.values())
    return ([] if finite else ["not finite"]) + (
        [] if distance(contribution.tensors, MODEL) <= NORM_LIMIT else ["norm"]
    )


def throw(trials: int, seed: int) -> Findings:
    rng, findings = random.Random(seed), Findings()
    honest_only = honest_round()
    honest_only.fail(LIAR, BORDER, "")
    honest = model_of(honest_only)
    for _ in range(trials):
        trial(rng, findings, honest)
    return findings


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(trials: int, seed: int) -> dict[str, Any]:
    throw(2000, seed + 1)  # what is allocated once is no growth
    before, started = memory_mb(), time.perf_counter()
    findings = throw(trials, seed)
    return {
        "trials": trials,
        "seed": seed,
        "passed": findings.passed,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_growth_mb": round(memory_mb() - before, 1),
        "outcomes": dict(sorted(findings.outcomes.items())),
        "surprises": dict(findings.surprises),
        "wrongly_accepted": dict(findings.wrongly_accepted),
        "dishonest_models": dict(findings.dishonest_models),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    result = report(given.trials, given.seed)
    given.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
