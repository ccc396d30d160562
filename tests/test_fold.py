"""The summation tree: whatever the order, the grouping and the losses, the same bits."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil.errors import RunFailed
from fedcil.fold import Fold
from fedcil.tensors import Contribution, Total, content_hash


def contribution(position: int) -> Contribution:
    """Float32 values of very different sizes, so that the order of additions shows in the last bits."""
    generator = torch.Generator().manual_seed(position)
    scale = 10.0 ** (position % 5)
    tensors = {
        "weight": torch.randn(3, 5, generator=generator) * scale,
        "bias": torch.randn(7, generator=generator),
    }
    return Contribution(tensors, weight=1.0 + position % 4)


def in_order(leaves: int, present: set[int]) -> Total | None:
    fold = Fold.empty(leaves)
    for position in sorted(present):
        fold.add(position, contribution(position))
    return fold.total()


def bits(total: Total | None) -> tuple[str, float] | None:
    return None if total is None else (content_hash(total.tensors), total.weight)


@settings(max_examples=80, deadline=None)
@given(
    leaves=st.integers(1, 33),
    workers=st.integers(1, 5),
    loss=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_order_grouping_merging_and_losses_change_no_bit(leaves: int, workers: int, loss: float, seed: int) -> None:
    """Each leaf goes to a random worker in random order; a lost one is named absent, or never mentioned."""
    rng = random.Random(seed)
    present = {position for position in range(leaves) if rng.random() >= loss}
    folds = [Fold.empty(leaves) for _ in range(workers)]
    for position in rng.sample(range(leaves), leaves):
        worker = rng.choice(folds)
        if position in present:
            worker.add(position, contribution(position))
        elif rng.random() < 0.5:
            worker.absent(position)
    rng.shuffle(folds)
    merged = Fold.empty(leaves)
    for fold in folds:
        merged.merge(fold)
    assert bits(merged.total()) == bits(in_order(leaves, present))


def test_a_plain_sum_depends_on_the_order() -> None:
    """The teeth of the test above: on the same values, sums one after another differ between orders."""

    def plain(order: list[int]) -> str:
        total = torch.zeros(3, 5)
        for position in order:
            given = contribution(position)
            total = total + given.tensors["weight"] * given.weight
        return content_hash({"weight": total})

    rng = random.Random(0)
    assert len({plain(rng.sample(range(16), 16)) for _ in range(20)}) > 1


def test_merging_in_two_steps_equals_merging_in_one() -> None:
    """A worker of workers: (a + b) + (c + d) has the bits of one fold over all leaves."""
    parts = []
    for start in range(0, 12, 3):
        part = Fold.empty(12)
        for position in range(start, start + 3):
            part.add(position, contribution(position))
        parts.append(part)
    parts[0].merge(parts[3])
    parts[2].merge(parts[1])
    parts[2].merge(parts[0])
    assert bits(parts[2].total()) == bits(in_order(12, set(range(12))))


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 6, 7, 8, 12, 100])
def test_the_mean_is_the_weighted_mean(leaves: int) -> None:
    """sum(n_k x_k) / sum(n_k) in float64, for cohorts of one and others that are no power of two."""
    given = [contribution(position) for position in range(leaves)]
    total = in_order(leaves, set(range(leaves)))
    weights = torch.tensor([c.weight for c in given], dtype=torch.float64)
    values = torch.stack([c.tensors["weight"].double() for c in given])
    expected = torch.tensordot(weights, values, dims=1) / weights.sum()
    assert total is not None
    assert total.weight == weights.sum().item()
    torch.testing.assert_close(total.mean()["weight"].double(), expected, rtol=1e-5, atol=1e-3)


def test_the_tree_has_the_shape_that_is_promised() -> None:
    """Float32: 1e8 + 1 = 1e8. Leaves 1, 1, 1e8, -1e8 give (1 + 1) + 0 = 2 as a tree, 0 from left to right."""
    values = [1.0, 1.0, 1e8, -1e8]
    fold = Fold.empty(4)
    for position, value in enumerate(values):
        fold.add(position, Contribution({"x": torch.tensor([value])}, 1.0))
    assert fold.total().tensors["x"].item() == 2.0  # type: ignore[union-attr]
    assert torch.tensor([1e8]) + 1 == torch.tensor([1e8])


def test_one_client_keeps_its_values() -> None:
    """0.25 * 3 / 3 = 0.25, and 1 and 3 are exact in binary."""
    fold = Fold.empty(1)
    fold.add(0, Contribution({"x": torch.tensor([0.25, -1.0])}, 3.0))
    total = fold.total()
    assert total is not None
    assert total.weight == 3.0
    assert total.mean()["x"].tolist() == [0.25, -1.0]


def test_nobody_gave_anything() -> None:
    empty = Fold.empty(3)
    assert empty.total() is None
    empty.absent(1)
    assert empty.total() is None


@settings(max_examples=60, deadline=None)
@given(weight=st.floats(1e-9, 1e15), mixed=st.booleans())
def test_a_leaf_is_each_tensor_times_the_weight(weight: float, mixed: bool) -> None:
    """As torch multiplies by a number, in the type that it gives."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"one": torch.randn(4, 9, generator=generator), "two": torch.randn(1, generator=generator)}
    if mixed:
        tensors |= {"double": torch.randn(5, generator=generator).double(), "whole": torch.arange(5)}
    fold = Fold.empty(1)
    fold.add(0, Contribution(tensors, weight))
    total = fold.total()
    assert total is not None
    for name, tensor in tensors.items():
        assert total.tensors[name].dtype == (tensor * weight).dtype
        assert torch.equal(total.tensors[name], tensor * weight)


def test_asking_for_the_total_changes_nothing() -> None:
    fold = Fold.empty(4)
    fold.add(2, contribution(2))
    assert bits(fold.total()) == bits(fold.total())
    fold.add(0, contribution(0))
    assert bits(fold.total()) == bits(in_order(4, {0, 2}))


def test_contributions_stay_as_they_were() -> None:
    given = Contribution({"x": torch.ones(2)}, 2.0)
    fold = Fold.empty(2)
    fold.add(0, given)
    fold.add(1, given)
    assert given.tensors["x"].tolist() == [1.0, 1.0]


def test_a_leaf_counts_once() -> None:
    fold = Fold.empty(4)
    fold.add(1, contribution(1))
    with pytest.raises(ValueError, match=r"leaves 1\.\.1 are counted already"):
        fold.add(1, contribution(1))
    with pytest.raises(ValueError, match="counted already"):
        fold.absent(1)
    fold.add(0, contribution(0))
    with pytest.raises(ValueError, match="counted already"):  # leaf 1 is inside the held sum of 0..1
        fold.add(1, contribution(1))


@settings(max_examples=200, deadline=None)
@given(leaves=st.integers(1, 40), nodes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 39)), max_size=60))
def test_a_sum_is_refused_exactly_if_one_of_its_leaves_was_taken(leaves: int, nodes: list[tuple[int, int]]) -> None:
    fold, taken = Fold.empty(leaves), set[int]()
    for level, index in nodes:
        span = set(range(index << level, (index + 1) << level))
        if max(span) >= leaves:
            continue
        other = Fold(leaves, {(level, index): None})
        if taken & span:
            with pytest.raises(ValueError, match=f"leaves {min(span)}..{max(span)} are counted already"):
                fold.merge(other)
        else:
            fold.merge(other)
            taken |= span
        assert {leaf for level, index in fold.sums for leaf in range(index << level, (index + 1) << level)} == taken


def test_a_merge_that_overlaps_is_refused_as_a_whole() -> None:
    ours, theirs = Fold.empty(4), Fold.empty(4)
    ours.add(3, contribution(3))
    theirs.add(0, contribution(0))
    theirs.add(2, contribution(2))
    theirs.add(3, contribution(3))
    with pytest.raises(ValueError, match=r"leaves 2\.\.3 are counted already"):
        ours.merge(theirs)
    assert bits(ours.total()) == bits(in_order(4, {3}))


@pytest.mark.parametrize("position", [3, 4, -1])
def test_a_leaf_outside_the_cohort_is_refused(position: int) -> None:
    """A negative leaf would make a total of the wrong tree, much later and without saying why."""
    with pytest.raises(ValueError, match="outside a cohort of 3"):
        Fold.empty(3).add(position, contribution(0))


def test_what_overlaps_itself_is_not_merged() -> None:
    twice = Fold(4, {(0, 0): Total({"x": torch.ones(1)}, 1.0), (1, 0): Total({"x": torch.ones(1)}, 2.0)})
    with pytest.raises(ValueError, match="counted already"):
        Fold.empty(4).merge(twice)


def test_a_sum_that_reaches_beyond_the_cohort_is_refused() -> None:
    broken = Fold(3, {(1, 1): Total({"x": torch.ones(1)}, 1.0)})  # leaves 2..3
    with pytest.raises(ValueError, match="outside a cohort of 3"):
        Fold.empty(3).merge(broken)


def test_folds_of_different_cohorts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 leaves"):
        Fold.empty(3).merge(Fold.empty(4))


def test_different_tensors_are_refused() -> None:
    fold = Fold.empty(2)
    fold.add(0, Contribution({"x": torch.ones(1)}, 1.0))
    with pytest.raises(RunFailed, match=r"different names: \['x', 'y'\]"):
        fold.add(1, Contribution({"y": torch.ones(1)}, 1.0))


def test_the_order_of_names_does_not_matter() -> None:
    """One client's tensors may come in another order, after travelling through a file format that sorts."""
    fold = Fold.empty(2)
    fold.add(0, Contribution({"x": torch.tensor([1.0]), "y": torch.tensor([10.0])}, 1.0))
    fold.add(1, Contribution({"y": torch.tensor([20.0]), "x": torch.tensor([2.0])}, 1.0))
    total = fold.total()
    assert total is not None
    assert {name: tensor.item() for name, tensor in total.tensors.items()} == {"x": 3.0, "y": 30.0}


def test_folds_in_order_hold_few_sums() -> None:
    """1000 = 1111101000 in binary has 6 ones, so leaves 0..999 are 6 maximal aligned intervals."""
    fold = Fold.empty(1000)
    one = Contribution({"x": torch.ones(1)}, 1.0)
    for position in range(1000):
        fold.add(position, one)
        assert len(fold.sums) <= 10
    assert len(fold.sums) == 6


def test_a_thousand_clients_in_random_order_take_no_time() -> None:
    """Each addition looks at all held sums; that must stay far below the cost of a round."""
    fold = Fold.empty(1000)
    one = Contribution({"x": torch.ones(1)}, 1.0)
    start = time.perf_counter()
    for position in random.Random(0).sample(range(1000), 1000):
        fold.add(position, one)
    assert fold.total().weight == 1000.0  # type: ignore[union-attr]
    assert time.perf_counter() - start < 2.0


def test_a_merged_fold_is_empty_so_that_nobody_counts_it_again() -> None:
    """Its sums are added to in place from now on, as those that were made here."""
    ours, theirs = Fold.empty(4), Fold.empty(4)
    theirs.add(0, contribution(0))
    (taken,) = theirs.sums.values()
    ours.merge(theirs)
    assert not theirs.sums
    assert theirs.total() is None
    ours.add(1, contribution(1))
    assert bits(ours.total()) == bits(in_order(4, {0, 1}))
    assert ours.sums[1, 0].tensors["weight"] is taken.tensors["weight"]  # type: ignore[union-attr]


def test_what_was_given_or_lies_in_the_memory_of_others_is_never_written_to() -> None:
    """Sums that a fold did not make itself may lie in memory that is read-only, or be counted elsewhere too."""
    given = [Contribution({"x": torch.full((3,), float(leaf))}, 2.0) for leaf in range(4)]
    others = {(0, leaf): Total({"x": 2 * given[leaf].tensors["x"]}, 2.0) for leaf in (0, 2)}
    fold = Fold.empty(4)
    fold.merge(Fold(4, dict(others)))
    fold.add(1, given[1])
    fold.add(3, given[3])
    total = fold.total()
    assert total is not None
    assert torch.equal(total.tensors["x"], torch.full((3,), 12.0))
    assert [others[0, leaf].tensors["x"][0].item() for leaf in (0, 2)] == [0.0, 4.0]
    assert [c.tensors["x"][0].item() for c in given] == [0.0, 1.0, 2.0, 3.0]
    again = fold.total()
    assert again is not None
    assert torch.equal(again.tensors["x"], total.tensors["x"])


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 5, 8, 9])
def test_a_leaf_of_a_whole_cohort_counts_once(leaves: int) -> None:
    """All have answered: the largest sums are held, and no answer that comes again joins them."""
    fold = Fold.empty(leaves)
    for leaf in range(leaves):
        fold.add(leaf, Contribution({"x": torch.ones(2)}, 1.0))
    for leaf in range(leaves):
        with pytest.raises(ValueError, match="counted already"):
            fold.add(leaf, Contribution({"x": torch.ones(2)}, 1.0))
    total = fold.total()
    assert total is not None
    assert total.weight == leaves
