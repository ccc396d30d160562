"""The numeric configuration: what bits depend on, and what a person is told."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcil import cpu
from fedcil.compute import apply_precision
from fedcil.experiment import Experiment, open_experiment
from fedcil.models.network import state_of
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


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    """As torch has it in the end."""
    yield
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    apply_precision("fp32")


@pytest.mark.usefixtures("fp32_precision")
@pytest.mark.parametrize("where", ["fp32_precision", "cudnn.fp32_precision", "mkldnn.fp32_precision"])
def test_fp32_is_exact_whatever_a_program_has_asked_torch_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's convolutions would take it from there."""
    *parts, name = where.split(".")
    monkeypatch.setattr(attrgetter(".".join(["backends", *parts]))(torch), name, "tf32")
    experiment("device=cpu")
    operators = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    assert {attrgetter(f"{each}.fp32_precision")(torch.backends) for each in operators} == {"ieee"}
    assert not torch.backends.cudnn.allow_tf32  # torch's older names say the same
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("fp32_precision")
def test_a_teacher_is_folded_in_tf32_too(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tf32 rounds away is as much as folding is allowed to change; played on a CPU."""

    def convolve(layer: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
            images, weight = ((each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in (images, weight))
        return plain(layer, images, weight, bias)

    plain = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", convolve)
    apply_precision("tf32")
    for seed in range(5):
        network = small.network(5, "resnet8", seed)
        teacher = small.compute("resnet8", "tf32").teacher(state_of(network))
        assert not any(isinstance(part, nn.BatchNorm2d) for part in teacher.modules())
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


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
    ("text", "intel", "zen_4"),
    [
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: QEMU Virtual CPU\n", True, False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: no GenuineIntel, family 25\n", False, False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", False, True),
        ("vendor_id\t: HygonGenuine\ncpu family\t: 25\n", False, False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", False, False),  # Arm
    ],
)
def test_linux_tells_who_made_the_cpu(
    text: str, intel: bool, zen_4: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    cpu._named.cache_clear()
    assert (cpu.made_by_intel(), cpu.is_zen_4()) == (intel, zen_4)
    cpu._named.cache_clear()


@pytest.mark.parametrize(
    ("name", "intel", "zen_4"),
    [
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", False, True),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", False, False),
        ("Intel64 Family 6 Model 183 Stepping 1, GenuineIntel", True, False),
        ("arm", False, False),
    ],
)
def test_where_there_is_no_linux_python_tells(
    name: str, intel: bool, zen_4: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "nothing")
    monkeypatch.setattr(cpu.platform, "processor", lambda: name)
    cpu._named.cache_clear()
    assert (cpu.made_by_intel(), cpu.is_zen_4()) == (intel, zen_4)
    cpu._named.cache_clear()
