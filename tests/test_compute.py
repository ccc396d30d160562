"""The numeric configuration: what bits depend on, and what a person is told."""

from __future__ import annotations

import pytest
import torch

from fedcil.experiment import Experiment, open_experiment
from fedcil.scenario_file import load_scenario


def experiment(*overrides: str) -> Experiment:
    return open_experiment(load_scenario("digits_fedavg", overrides))


def test_bf16_on_another_cpu_is_another_numeric_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert experiment("training.precision=bf16").numeric()["bf16_instructions"] == "AVX512_BF16 AMX"
    assert "bf16_instructions" not in experiment().numeric()


def test_products_in_fp32_are_part_of_the_numeric_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = experiment("training.precision=fp32").numeric()
    assert (found["small_maps"], str(found["device_model"]).endswith(" AVX2")) == ("products", True)


def test_where_bf16_is_emulated_the_person_is_told_and_auto_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    asked, auto = experiment("training.precision=bf16"), experiment("training.precision=auto", "device=cpu")
    assert ["no instructions for it" in note for note in asked.compute.notes] == [True]
    assert (asked.numeric()["precision"], auto.numeric()["precision"]) == ("bf16", "fp32")
    assert "small_maps" not in asked.numeric()
    assert asked.numeric()["bf16_instructions"] == "none"
    assert not auto.compute.notes
