"""Hostile updates: what is refused, what is clipped, and how far a minority can move each fold."""

from __future__ import annotations

import errno
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcil
from fedcil.errors import MessageRefused, RunFailed, ScenarioError
from fedcil.experiment import open_experiment
from fedcil.fold import Fold
from fedcil.record.summary import finish
from fedcil.robust import admissible, combined, distance, krum_order, median, multi_krum, trimmed_mean
from fedcil.rule import PLAIN, Rule
from fedcil.scenario_file import load_scenario
from fedcil.tensors import Contribution, Tensors, Total, content_hash
from fedcil.wire import pack, unpack
from scenarios.reliability.loopback import LIMIT, LoopbackGrid, Weather, run_over, violations

START = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
FOLDS = [Rule("median"), Rule("trimmed_mean", 1), Rule("krum", 1), Rule("multi_krum", 1)]


def moved(*by: float) -> dict[str, torch.Tensor]:
    return {"a": START["a"] + torch.tensor(by[:2]), "b": START["b"] + by[2]}


def drawn(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)} for _ in range(count)
    ]


def arrays(each: Tensors) -> list[Any]:
    return [tensor.numpy() for tensor in each.values()]


# Norms


def test_the_norm_is_of_the_update_over_all_tensors() -> None:
    """sqrt(4 + 4 + 1) = 3."""
    assert distance(moved(2.0, -2.0, 1.0), START) == 3.0
    assert distance({"scale": torch.tensor(3.0)}, {"scale": torch.tensor(1.0)}) == 2.0


def test_an_update_up_to_the_limit_is_let_through_as_it_is_and_a_larger_one_is_refused() -> None:
    whole = Contribution(moved(2.0, -2.0, 1.0), 5.0)
    assert admissible(whole, START, PLAIN) is whole
    assert admissible(whole, START, Rule(norm_limit=3.0)) is whole
    with pytest.raises(MessageRefused, match=r"an update of norm 3 is larger than server.norm_limit = 2.99"):
        admissible(whole, START, Rule(norm_limit=2.99))


def test_no_norm_at_all_is_refused_too() -> None:
    """NaN is neither larger nor smaller than a limit."""
    for value in (float("nan"), float("inf"), 3e38):
        with pytest.raises(MessageRefused, match="norm"):
            admissible(Contribution(moved(value, 0.0, 0.0), 1.0), START, Rule(norm_limit=1e30))


def test_a_larger_update_is_clipped_to_the_norm_in_its_direction() -> None:
    """Norm 3 clipped to 1.5: half of the update. The weight stays."""
    whole = Contribution(moved(2.0, -2.0, 1.0), 5.0)
    clipped = admissible(whole, START, Rule(clip_norm=1.5))
    assert clipped.weight == 5.0
    assert clipped.tensors["a"].tolist() == [2.0, 1.0]
    assert clipped.tensors["b"].tolist() == [[3.5]]
    assert whole.tensors["a"].tolist() == [3.0, 0.0]  # the worker's memory is not written to
    assert admissible(whole, START, Rule(clip_norm=3.0)) is whole


def test_the_limit_is_looked_at_before_clipping() -> None:
    with pytest.raises(MessageRefused):
        admissible(Contribution(moved(2.0, -2.0, 1.0), 5.0), START, Rule(norm_limit=2.0, clip_norm=1.0))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_norm_has_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    one, two = torch.randn(300_000, generator=torch.Generator().manual_seed(1)), torch.zeros(300_000)
    expected = distance({"x": one}, {"x": two})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert distance({"x": one}, {"x": two}) == expected
    finally:
        torch.set_num_threads(before)


# Folds, against Flower's


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_the_median_is_flower_s(count: int) -> None:
    clients = drawn(count)
    expected = aggregate_median([(arrays(each), 1) for each in clients])
    for ours, theirs in zip(arrays(median(clients)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(("count", "cut"), [(3, 1), (5, 1), (5, 2), (10, 1), (10, 3), (11, 5)])
def test_the_trimmed_mean_is_flower_s(count: int, cut: int) -> None:
    """Flower names the share that is cut at each end."""
    clients = drawn(count)
    expected = aggregate_trimmed_avg([(arrays(each), 1) for each in clients], (cut + 0.25) / count)
    for ours, theirs in zip(arrays(trimmed_mean(clients, cut)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "byzantine"), [(3, 0), (5, 1), (7, 2), (10, 1), (10, 3)])
def test_krum_is_flower_s(count: int, byzantine: int) -> None:
    for seed in range(10):
        clients = drawn(count, seed)
        expected = aggregate_krum([(arrays(each), 1) for each in clients], byzantine, 0)
        for ours, theirs in zip(arrays(multi_krum(clients, byzantine, 1)), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("count", "byzantine"), [(5, 1), (7, 2), (10, 3)])
def test_multi_krum_chooses_whom_flower_chooses(count: int, byzantine: int) -> None:
    for seed in range(10):
        clients = drawn(count, seed)
        contents = [RecordDict({"arrays": ArrayRecord(arrays(each))}) for each in clients]
        chosen = select_multikrum(contents, byzantine, count - byzantine)
        theirs = {next(place for place, each in enumerate(contents) if each is one) for one in chosen}
        assert set(krum_order(clients, byzantine)[: count - byzantine]) == theirs


# Folds, by their bounds

numbers = st.floats(-100, 100, width=32)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), honest=st.integers(2, 8), attackers=st.integers(0, 4))
def test_a_minority_cannot_leave_the_honest_values_by_median_or_trimmed_mean(
    data: st.DataObject, honest: int, attackers: int
) -> None:
    """Fewer liars than honest: each coordinate stays between the least and the largest honest value."""
    liars = min(attackers, honest - 1)
    values = data.draw(st.lists(numbers, min_size=honest, max_size=honest))
    lies = data.draw(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=liars, max_size=liars))
    clients = [{"x": torch.tensor([value])} for value in [*values, *lies]]
    data.draw(st.randoms()).shuffle(clients)
    for result in (median(clients)["x"], trimmed_mean(clients, liars)["x"]):
        assert min(values) - 1e-3 <= result.item() <= max(values) + 1e-3


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), liars=st.integers(1, 3), size=st.floats(0.5, 1e6), extra=st.integers(0, 3))
def test_krum_gives_somebody_who_is_as_near_to_the_honest_as_they_are_to_each_other(
    seed: int, liars: int, size: float, extra: int
) -> None:
    """n >= 2 f + 3: of the n - f - 2 nearest at least one is honest, so who is chosen is no further from the honest
    than sqrt(n - f - 2) times their own diameter.
    """
    count = 2 * liars + 3 + extra
    honest = drawn(count - liars, seed)
    lie = {name: tensor + size for name, tensor in honest[0].items()}
    clients = [*honest, *[lie] * liars]
    random.Random(seed).shuffle(clients)
    chosen = multi_krum(clients, liars, 1)
    diameter = max(distance(one, two) for one in honest for two in honest)
    assert min(distance(chosen, one) for one in honest) <= diameter * (count - liars - 2) ** 0.5


def test_without_the_rule_one_liar_moves_the_mean_as_far_as_it_likes() -> None:
    """The teeth of the tests above."""
    honest = drawn(6)
    lie = {name: tensor + 1e6 for name, tensor in honest[0].items()}
    clients = [*honest, lie]
    assert distance(trimmed_mean(clients, 0), trimmed_mean(honest, 0)) > 1e5
    for rule in (median(clients), trimmed_mean(clients, 1), multi_krum(clients, 1, 1), multi_krum(clients, 1, 6)):
        assert distance(rule, trimmed_mean(honest, 0)) < 5


# As folds of a round


@pytest.mark.parametrize("rule", FOLDS, ids=lambda rule: rule.fold)
def test_order_grouping_and_absence_change_no_bit(rule: Rule) -> None:
    """Whole, or merged from parts in any order; a client that is lost is the same as one that is absent."""
    clients = drawn(9)
    present = [place for place in range(9) if place != 4]
    whole = Fold.empty(9, rule)
    for place in present:
        whole.add(place, Contribution(clients[place], 1.0 + place))
    expected = whole.total()
    assert expected is not None
    assert expected.weight == 1.0
    for seed in range(10):
        rng = random.Random(seed)
        parts = [Fold.empty(9, rule) for _ in range(3)]
        for place in rng.sample(present, 8):
            rng.choice(parts).add(place, Contribution(clients[place], 1.0 + place))
        parts[seed % 3].absent(4)
        rng.shuffle(parts)
        merged = Fold.empty(9, rule)
        for part in parts:
            merged.merge(part)
        total = merged.total()
        assert total is not None
        assert content_hash(total.tensors) == content_hash(expected.tensors)
        assert content_hash(total.mean()) == content_hash(expected.tensors)


def test_it_keeps_copies_and_counts_each_leaf_once() -> None:
    """A worker trains the next client in the same memory."""
    memory = {"x": torch.zeros(2)}
    fold = Fold.empty(3, Rule("median"))
    for place in range(3):
        memory["x"].fill_(float(place))
        fold.add(place, Contribution(memory, 1.0))
    total = fold.total()
    assert total is not None
    assert total.tensors["x"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="counted already"):
        fold.add(1, Contribution(memory, 1.0))
    with pytest.raises(ValueError, match="counted already"):
        fold.merge(fold)
    with pytest.raises(ValueError, match="outside a cohort of 3"):
        fold.absent(3)


def test_a_partial_sum_is_nobodys_contribution() -> None:
    fold = Fold.empty(4, Rule("median"))
    with pytest.raises(ValueError, match="outside a cohort of 4"):
        fold.merge(Fold(4, {(1, 0): Total({"x": torch.ones(1)}, 2.0)}))
    assert fold.total() is None


@pytest.mark.parametrize(("rule", "least"), [(FOLDS[0], 1), (FOLDS[1], 3), (FOLDS[2], 5), (FOLDS[3], 5)])
def test_with_fewer_contributions_than_it_needs_a_fold_says_nothing(rule: Rule, least: int) -> None:
    clients = drawn(5)
    for count in range(6):
        fold = Fold.empty(5, rule)
        for place in range(count):
            fold.add(place, Contribution(clients[place], 1.0))
        assert (fold.total() is not None) == (count >= least)


# In a run, on every way that answers take

TABLES: dict[str, Any] = {
    "method": {"name": "fedavg"},
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 30, "image_size": 4},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 6, "per_round": 6},
    "model": {"width": 2},
    "training": {"rounds": 3, "epochs": 1},
    "server": {"evaluate_every": 0},
}
RULES = {
    "median": "server.fold='median'",
    "trimmed_mean": "server={fold='trimmed_mean', byzantine=1}",
    "krum": "server={fold='krum', byzantine=1}",
    "multi_krum": "server={fold='multi_krum', byzantine=1}",
    "clipped": "server.clip_norm=0.05",
    "limited": "server.norm_limit=0.4",
}


@pytest.mark.parametrize("rule", RULES)
def test_inline_and_the_border_of_flower_give_the_same_metrics(rule: str, tmp_path: Path) -> None:
    """In this process contributions never meet the border; what it would do happens to them all the same."""
    inline = fedcil.run(TABLES, overrides=[RULES[rule]], output=tmp_path / "inline", figures=False)
    wire = over_the_wire(tmp_path, RULES[rule])
    assert wire.results == inline.results
    plain = fedcil.run(TABLES, output=tmp_path / "plain", figures=False)
    assert plain.results != inline.results
    if rule == "limited":
        refused = [failure for line in inline.kind("round") for failure in line["failures"]]
        assert {failure["stage"] for failure in refused} == {"border"}
        assert 0 < len(refused) < 36


def over_the_wire(tmp_path: Path, *overrides: str, tamper: Any = lambda client, place, packet: packet) -> fedcil.Run:
    """The same scenario through Flower's messages, ClientApp and the border."""
    grid = LoopbackGrid(3, tmp_path / "home", tamper=tamper)
    experiment = open_experiment(load_scenario(TABLES, overrides))
    return run_over(grid, experiment, tmp_path / "wire")


def forged(packet: bytes, change: Any) -> bytes:
    """Another header and other tensors under a correct digest: what a hostile client can send."""
    header, tensors = unpack(packet, limit=LIMIT)
    header, tensors = change(header, dict(tensors))
    return pack(header, tensors)


def replaced(value: Any) -> Any:
    return lambda header, tensors: (header, tensors | {"head.bias": value(tensors["head.bias"])})


ATTACKS: dict[str, tuple[Any, str]] = {
    "nan": (replaced(lambda bias: bias * float("nan")), "head.bias is not finite"),
    "infinity": (replaced(lambda bias: bias + float("inf")), "head.bias is not finite"),
    "shape": (replaced(lambda bias: bias[:1]), "head.bias is (1,)"),
    "dtype": (replaced(lambda bias: bias.double()), "torch.float64"),
    "missing": (lambda h, t: (h, {k: v for k, v in t.items() if k != "head.bias"}), "missing or too many"),
    "extra": (lambda h, t: (h, t | {"backdoor": torch.ones(1)}), "missing or too many"),
    "huge norm": (replaced(lambda bias: bias + 1e6), "larger than server.norm_limit = 50"),
    "sample count": (lambda h, t: (h | {"report": h["report"] | {"samples": 10**6}}, t), "1000000 samples reported"),
    "weight": (lambda h, t: (h | {"weight": 1e6}, t), "a weight of 1000000"),
    "another run": (lambda h, t: (h | {"run": "yesterday"}, t), "another run"),
    "another client": (lambda h, t: (h | {"client": 1}, t), "nobody asked for"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name_and_the_round_goes_on_without_it(
    attack: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 2 attacks in every round. Everyone else's models become the mean of what is left, to the bit."""
    change, words = ATTACKS[attack]

    def tamper(client: int, place: Any, packet: bytes) -> bytes:
        return forged(packet, change) if client == 2 else packet

    with caplog.at_level(logging.WARNING, logger="fedcil.border"):
        run = over_the_wire(tmp_path, "server.norm_limit=50.0", tamper=tamper)
    without = over_the_wire(tmp_path / "again", "server.norm_limit=50.0", tamper=lost(2))
    for line, other in zip(run.kind("round"), without.kind("round"), strict=True):
        (failure,) = line["failures"]
        assert (failure["client"], failure["stage"]) == (2, "border")
        assert words in failure["reason"]
        assert line["losses"] == other["losses"]
    assert [line["accuracy"] for line in run.kind("task")] == [line["accuracy"] for line in without.kind("task")]
    assert any("client 2 was refused" in record.message and words in record.message for record in caplog.records)


def lost(client: int) -> Any:
    return lambda who, place, packet: b"" if who == client else packet


def test_old_answers_other_s_answers_and_cut_or_swollen_ones_are_refused(tmp_path: Path) -> None:
    """Each with the digest that it was once sent with, or made anew."""
    kept: dict[int, bytes] = {}

    def tamper(client: int, place: Any, packet: bytes) -> bytes:
        kept.setdefault(client, packet)
        swollen = forged(packet, lambda h, t: (h | {"note": "x" * (2 << 20)}, t))
        return {0: kept[0] if client == 0 else b"", 1: packet[:-5], 2: swollen, 3: b""}.get(client, packet)

    run = over_the_wire(tmp_path, tamper=tamper)
    first, *later = run.kind("round")
    assert {f["client"] for f in first["failures"]} == {1, 2, 3}  # client 0's first answer is of this round
    for line in later:
        reasons = {failure["client"]: failure["reason"] for failure in line["failures"]}
        assert reasons[0] == "an answer to another round"
        assert "digest" in reasons[1]
        assert "more than the limit" in reasons[2]
        assert reasons[3] == "0 bytes are no packet"
        assert line["answered"] == [4, 5]


def test_the_median_shrugs_off_what_the_border_has_to_let_through(tmp_path: Path) -> None:
    """A finite update of the right form, far away: the mean follows it, the median does not."""

    def tamper(client: int, place: Any, packet: bytes) -> bytes:
        return forged(packet, replaced(lambda bias: bias + 1e6)) if client == 2 else packet

    finals = {}
    for name, override in (("mean", "server.quorum=0.0"), ("median", RULES["median"])):
        grid = LoopbackGrid(3, tmp_path / name, tamper=tamper)
        run_over(grid, open_experiment(load_scenario(TABLES, [override])), tmp_path / "out")
        finals[name] = max(float(model["head.bias"].abs().max()) for model in grid.ledger.broadcasts.values())
    assert finals["mean"] > 1e5
    assert finals["median"] < 10


def test_the_history_checker_finds_what_it_is_made_for(tmp_path: Path) -> None:
    grid = LoopbackGrid(3, tmp_path / "home")
    run = run_over(grid, open_experiment(load_scenario(TABLES)), tmp_path / "out")
    assert violations(run, grid.ledger) == []
    grid.ledger.delivered[(0, 0, 1), 3] = grid.ledger.delivered[(0, 0, 0), 3]
    assert any("not the mean" in text for text in violations(run, grid.ledger))
    del grid.ledger.delivered[(1, 0, 2), 4]
    assert any("nothing came from 4" in text for text in violations(run, grid.ledger))


def test_an_answer_that_comes_twice_counts_once(tmp_path: Path) -> None:
    """Every request reaches its node twice, and both answers lie there when the server looks."""
    grid = LoopbackGrid(3, tmp_path / "home", Weather(doubled=1.0, reordered=True))
    run = run_over(grid, open_experiment(load_scenario(TABLES)), tmp_path / "out")
    assert grid.ledger.count["doubled"] == 18
    assert violations(run, grid.ledger) == []
    inline = fedcil.run(TABLES, output=tmp_path / "inline", figures=False)
    assert run.results == inline.results


def test_below_what_a_robust_fold_needs_the_round_has_no_quorum(tmp_path: Path) -> None:
    """Six asked, two refused, Krum for f = 1 needs five."""

    def tamper(client: int, place: Any, packet: bytes) -> bytes:
        return b"" if client in (1, 4) and place[2] == 1 else packet

    run = over_the_wire(tmp_path, RULES["krum"], tamper=tamper)
    assert [line["status"] for line in run.kind("round")] == ["ok", "no_quorum", "ok"] * 2


# In a scenario


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("server.byzantine=1", "byzantine belongs to"),
        ("server={fold='median', byzantine=1}", "byzantine belongs to"),
        ("server.fold='trimmed_mean'", "needs byzantine"),
        ("server={fold='trimmed_mean', byzantine=3}", "needs 7 clients in a round, clients.per_round is 6"),
        ("server={fold='krum', byzantine=2}", "needs 7 clients in a round"),
        ("server.fold='mode'", "fold"),
        ("server.norm_limit=0.0", "norm_limit"),
        ("server.clip_norm=-1.0", "clip_norm"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_the_run(override: str, words: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario(TABLES, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("override", ["server.fold='median'", "server.clip_norm=1.0", "server.norm_limit=1.0"])
def test_a_rule_for_models_is_refused_for_a_method_of_statistics(override: str) -> None:
    tables = TABLES | {"method": {"name": "afcl", "expansion": 0}}
    with pytest.raises(ScenarioError, match="no client of 'afcl' ever sends the model"):
        open_experiment(load_scenario(tables, [override]))
    tables = TABLES | {"method": {"name": "afcl", "expansion": 0, "backbone": "task1"}}
    open_experiment(load_scenario(tables, [override]))


def test_a_mixed_method_has_its_models_folded_robustly_and_its_statistics_summed(tmp_path: Path) -> None:
    tables = TABLES | {"method": {"name": "afcl", "expansion": 8, "backbone": "task1"}}
    run = fedcil.run(tables, overrides=[RULES["median"]], output=tmp_path, figures=False)
    assert {(line["phase_name"], line["status"]) for line in run.kind("round")} == {
        ("train", "ok"),
        ("statistics", "ok"),
    }
    grid = LoopbackGrid(2, tmp_path / "home")
    wire = run_over(grid, open_experiment(load_scenario(tables, [RULES["median"]])), tmp_path / "wire")
    assert wire.results == run.results


# The end of a run


@pytest.mark.parametrize("what", ["folder", "figures"])
def test_a_disk_that_fails_when_all_rounds_are_over_is_a_clear_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed before the tables are written, or there is no room for the pictures."""

    def vanished(folder: Any) -> fedcil.Run:
        shutil.rmtree(folder.path)
        return finish(folder)

    def full(run: fedcil.Run) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "folder":
        monkeypatch.setattr("fedcil.api.finish", vanished)
    else:
        monkeypatch.setattr("fedcil.api.draw", full)
    with pytest.raises(RunFailed, match=r"cannot (write|be read): No s"):
        fedcil.run(TABLES, output=tmp_path)


@pytest.mark.parametrize("byzantine", [0, 1, 2, 3])
def test_krum_takes_one_and_multi_krum_all_but_so_many(byzantine: int) -> None:
    """By their names, as a round has them."""
    generator = torch.Generator().manual_seed(0)
    given = [{"w": torch.randn(5, generator=generator)} for _ in range(9)]
    for rule, keep in ((Rule("krum", byzantine), 1), (Rule("multi_krum", byzantine), 9 - byzantine)):
        total = combined(given, rule)
        assert total is not None
        assert torch.equal(total.tensors["w"], multi_krum(given, byzantine, keep)["w"])
    krum = combined(given, Rule("krum", byzantine))
    assert krum is not None
    assert any(torch.equal(krum.tensors["w"], each["w"]) for each in given)
