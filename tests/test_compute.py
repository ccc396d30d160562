"""The numeric configuration: what bits depend on, and what a person is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcil import cpu
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


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, *, avx512_bf16: bool, amx: bool, intel: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(cpu, "made_by_intel", lambda: intel)


@pytest.mark.parametrize(
    ("avx512_bf16", "intel", "told", "instructions"),
    [
        (False, False, "no instructions for it", "none"),
        (True, True, "half as fast", "AVX512_BF16"),  # Intel's are fast in AMX, which is not there
    ],
)
def test_where_bf16_is_slow_the_person_is_told_and_auto_is_fp32(
    avx512_bf16: bool, intel: bool, told: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu(monkeypatch, avx512_bf16=avx512_bf16, amx=False, intel=intel)
    asked, auto = experiment("training.precision=bf16"), experiment("training.precision=auto", "device=cpu")
    assert [told in note for note in asked.compute.notes] == [True]
    assert (asked.numeric()["precision"], auto.numeric()["precision"]) == ("bf16", "fp32")
    assert "small_maps" not in asked.numeric()
    assert asked.numeric()["bf16_instructions"] == instructions
    assert not auto.compute.notes


@pytest.mark.parametrize(("amx", "intel"), [(False, False), (True, True)])
def test_auto_is_bf16_where_that_is_fast(amx: bool, intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch, avx512_bf16=True, amx=amx, intel=intel)
    auto = experiment("training.precision=auto", "device=cpu")
    assert (auto.numeric()["precision"], auto.compute.notes) == ("bf16", ())


@pytest.mark.parametrize(
    ("text", "intel"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: QEMU Virtual CPU\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: no GenuineIntel\n", False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", False),  # Arm
    ],
)
def test_linux_tells_who_made_the_cpu(text: str, intel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    cpu.made_by_intel.cache_clear()
    assert cpu.made_by_intel() == intel
    cpu.made_by_intel.cache_clear()
