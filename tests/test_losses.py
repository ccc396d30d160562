"""Loss terms that methods share, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedcil.keys import Key
from fedcil.losses import cross_entropy_new, distillation, proximal


def logs(rows: list[list[float]], factor: float = 1.0) -> Tensor:
    return factor * torch.tensor(rows, dtype=torch.float64).log()


def test_cross_entropy_over_new_classes_by_hand() -> None:
    """Logits ln(1, 9, 3, 1) and ln(5, 5, 1, 1), classes 2 and 3 new: probabilities 3/4 of class 2 and 1/2 of
    class 3, so the mean is (ln(4/3) + ln 2) / 2. A fifth, later column is not looked at.
    """
    logits = torch.cat([logs([[1, 9, 3, 1], [5, 5, 1, 1]]), torch.full((2, 1), 9.0)], 1)
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert cross_entropy_new(logits, torch.tensor([2, 3]), 2, 4).item() == pytest.approx(expected)


def test_cross_entropy_over_new_classes_has_no_gradient_elsewhere() -> None:
    logits = torch.randn(3, 5, generator=Key(0).torch()).requires_grad_()
    cross_entropy_new(logits, torch.tensor([2, 3, 2]), 2, 4).backward()
    assert logits.grad is not None
    assert logits.grad[:, [0, 1, 4]].eq(0).all()
    assert logits.grad[:, 2:4].ne(0).all()


def test_distillation_by_hand() -> None:
    """Temperature 2, 2 images, 3 classes. Row 1: teacher (1, 2, 5) / 8, student (1/2, 1/4, 1/4), so
    (1/8 + 2 7/8) ln 2 = 15/8 ln 2. Row 2: both (1/4, 1/4, 1/2): the entropy 12/8 ln 2. Mean 27/16 ln 2.
    """
    teacher = logs([[1, 2, 5], [1, 1, 2]], factor=2.0)
    student = logs([[2, 1, 1], [1, 1, 2]], factor=2.0)
    assert distillation(teacher, student, 2.0).item() == pytest.approx(27 / 16 * math.log(2), rel=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distillation_is_least_at_the_teacher(temperature: float) -> None:
    """Its value there is the teacher's entropy, its gradient 0; no factor T^2 in either."""
    teacher = torch.randn(4, 6, generator=Key(0).torch(), dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    loss = distillation(teacher, student, temperature)
    loss.backward()
    p = (teacher / temperature).softmax(1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-13)
    assert student.grad.abs().max() < 1e-16  # type: ignore[union-attr]
    other = torch.randn(4, 6, generator=Key(1).torch(), dtype=torch.float64)
    assert distillation(teacher, other, temperature) > loss


def test_distillation_divides_both_logits_by_the_temperature() -> None:
    teacher, student = (torch.randn(4, 6, generator=Key(seed).torch()) for seed in (0, 1))
    assert torch.equal(distillation(teacher, student, 2.0), distillation(teacher / 2, student / 2, 1.0))


def test_the_proximal_term_is_the_squared_distance() -> None:
    """(1 - 4)^2 + (2 - 2)^2 + (5 - 3)^2 = 13; the norms themselves would give 3 + 2 or sqrt(13)."""
    parameters = [torch.tensor([1.0, 2.0]), torch.tensor([[5.0]])]
    anchor = [torch.tensor([4.0, 2.0]), torch.tensor([[3.0]])]
    assert proximal(parameters, anchor).item() == 13.0


def test_the_proximal_term_needs_an_anchor_for_each_parameter() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        proximal([torch.ones(1), torch.ones(1)], [torch.ones(1)])
