"""Energy is what counters say where there are some; else an interval with its method, or unknown with the reason."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.plan.machines import MILLION, RANGE_UJ, Zone

from halfbyte.plan import counters
from halfbyte.plan.counters import Nvml, open_nvml, open_rapl
from halfbyte.plan.energy import WITHOUT_COUNTER, Meter, energy_of, power_of
from halfbyte.plan.terms import Estimate

UNKNOWN_PROCESSOR = "Some Processor 9000"


def test_a_counter_is_read_as_the_energy_it_moved_by(tmp_path: Path) -> None:
    zone = Zone(tmp_path, "intel-rapl:0", "package-0")
    meter = Meter(UNKNOWN_PROCESSOR, root=tmp_path)
    zone.set(5 * MILLION + 7200 * MILLION)
    reading = meter.read()
    assert reading.energy == Estimate.exact(2.0, "Wh", "measured", reading.energy.source)
    assert "package-0" in reading.energy.source
    assert reading.counters["rapl"] == "package-0"


def test_a_counter_that_wraps_round_is_read_on(tmp_path: Path) -> None:
    zone = Zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 100 * MILLION)
    rapl = open_rapl(tmp_path)
    for energy in (50 * MILLION, RANGE_UJ - MILLION, 9 * MILLION):  # round, nearly round, round again
        zone.set(energy)
        rapl.advance()
    assert rapl.joules == 150 + (RANGE_UJ // MILLION - 51) + 10


def test_nested_domains_are_counted_once(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }
    made = {domain: Zone(tmp_path, name, domain) for name, domain in zones.items()}
    rapl = open_rapl(tmp_path)
    for domain, joules in (("package-0", 100), ("core", 70), ("uncore", 5), ("dram", 20), ("package-1", 50)):
        made[domain].set(5 * MILLION + joules * MILLION)
    made["psys"].set(5 * MILLION + 400 * MILLION)
    rapl.advance()
    assert rapl.joules == 100 + 20 + 50
    assert rapl.told == "package-0, package-1, dram"


def test_the_platform_s_counter_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    zone = Zone(tmp_path, "intel-rapl:0", "psys", 0)
    rapl = open_rapl(tmp_path)
    zone.set(3 * MILLION)
    rapl.advance()
    assert rapl.joules == 3


def test_a_counter_for_root_alone_says_so_and_energy_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Zone(tmp_path, "intel-rapl:0", "package-0")
    read = counters._text

    def refused(file: Path) -> str:
        if file.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(file))
        return read(file)

    monkeypatch.setattr(counters, "_text", refused)  # whoever runs the tests may be root
    reading = Meter("AMD EPYC 7763", root=tmp_path).read()
    assert "root alone" in reading.counters["rapl"]
    assert reading.energy.is_known
    assert reading.energy.method == "time × power (table)"


def test_a_counter_that_stands_still_is_none(tmp_path: Path) -> None:
    Zone(tmp_path, "intel-rapl:0", "package-0", 0)
    reading = Meter(UNKNOWN_PROCESSOR, root=tmp_path).read()
    assert not reading.energy.is_known
    assert "stands still, as in a virtual machine" in reading.counters["rapl"]
    assert "set cost.machine_watts" in reading.energy.why


@pytest.mark.parametrize("broken", ["max_energy_range_uj", "energy_uj"])
def test_a_counter_that_is_no_number_is_none(tmp_path: Path, broken: str) -> None:
    zone = Zone(tmp_path, "intel-rapl:0", "package-0")
    (zone.folder / broken).write_text("0x12\n", encoding="ascii")
    assert open_rapl(tmp_path).joules is None
    (zone.folder / broken).unlink()
    assert open_rapl(tmp_path).told.startswith("RAPL counters cannot be read")


def test_a_counter_that_goes_away_leaves_no_half_sum(tmp_path: Path) -> None:
    zone, other = Zone(tmp_path, "intel-rapl:0", "package-0"), Zone(tmp_path, "intel-rapl:1", "package-1")
    rapl = open_rapl(tmp_path)
    zone.set(90 * MILLION)
    (other.folder / "energy_uj").unlink()
    rapl.advance()
    zone.set(99 * MILLION)
    rapl.advance()
    assert rapl.joules is None
    assert "could not be read any more" in rapl.told


def test_without_a_counter_energy_is_computing_time_by_power(tmp_path: Path) -> None:
    meter = Meter("Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz", root=tmp_path)
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    reading = meter.read()
    energy = reading.energy
    assert reading.cpu_seconds >= 0.3
    assert energy.mid == pytest.approx(3.97 * reading.cpu_seconds / 3600)
    assert energy.low == pytest.approx((energy.mid or 0) / WITHOUT_COUNTER)
    assert energy.high == pytest.approx((energy.mid or 0) * WITHOUT_COUNTER)
    assert "Cascade Lake" in energy.source
    assert energy.date


def test_given_watts_win_over_the_table_and_are_the_whole_machine_s(tmp_path: Path) -> None:
    reading = Meter("AMD EPYC", 360.0, tmp_path).read()
    assert reading.energy.mid == pytest.approx(360.0 * reading.seconds / 3600)
    assert (reading.energy.low, reading.energy.high) == (reading.energy.mid, reading.energy.mid)


def test_nothing_known_is_unknown_and_never_zero(tmp_path: Path) -> None:
    reading = Meter(UNKNOWN_PROCESSOR, root=tmp_path).read()
    assert reading.energy.mid is None
    assert UNKNOWN_PROCESSOR in reading.energy.why
    assert reading.counters == {
        "rapl": "this system offers no RAPL counter",
        "nvml": "there is no NVIDIA GPU",
    }


@pytest.mark.parametrize(
    ("processor", "watts"),
    [
        ("AMD EPYC 7601 32-Core Processor", 2.55),
        ("AMD EPYC 7763 64-Core Processor", 1.69),
        ("AMD EPYC", 1.69),
        ("Intel(R) Xeon(R) Gold 6142 CPU @ 2.60GHz", 4.26),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 3.5),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 5.42),
        ("AMD Ryzen 7 5800X 8-Core Processor", 5.42),
        ("Apple M3", None),
    ],
)
def test_the_power_table_knows_a_processor_by_its_name(processor: str, watts: float | None) -> None:
    assert power_of(processor, 1.0).mid == watts


def test_a_forecast_s_energy_multiplies_intervals(tmp_path: Path) -> None:
    seconds = Estimate("s", 1800.0, 3600.0, 7200.0, "calibrated")
    power = power_of("AMD EPYC", 2.0)
    energy = energy_of(seconds, power)
    assert energy.mid == pytest.approx(2 * 1.69)
    assert energy.low == pytest.approx(2 * 1.69 / 6)
    assert energy.high == pytest.approx(2 * 1.69 * 6)
    assert energy_of(Estimate.unknown("s", "not calibrated"), power).why == "not calibrated"
    assert "cost.machine_watts" in energy_of(seconds, power_of("", 1.0)).why


class FakeNvml(ModuleType):
    """NVML with two GPUs, of which the second may have no counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, second_counts: bool = True) -> None:
        super().__init__("pynvml")
        self.energies_mj = [1_000_000, 5_000_000]
        self.second_counts = second_counts

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{'AB'[handle]}0"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle and not self.second_counts:
            raise self.NVMLError("Not Supported")
        return self.energies_mj[handle]


def test_gpus_in_use_are_counted_and_others_not() -> None:
    nvml = FakeNvml()
    counter = Nvml(nvml)
    nvml.energies_mj = [1_007_000, 9_000_000]
    counter.count([])
    assert counter.joules == 0
    counter.count(["a0"])
    assert counter.joules == 7
    counter.count(["a0", "b0"])
    assert counter.joules == 7 + 4000


def test_a_gpu_without_a_counter_makes_the_whole_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    zone = Zone(tmp_path, "intel-rapl:0", "package-0")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(second_counts=False))
    used: list[str] = []
    monkeypatch.setattr(counters, "gpus_in_use", lambda: used)
    meter = Meter(UNKNOWN_PROCESSOR, root=tmp_path)
    zone.set(3605 * MILLION)
    assert meter.read().energy.mid == 1.0
    used.append("b0")
    energy = meter.read().energy
    assert energy.mid is None
    assert "b0 has no energy counter" in energy.why


def test_gpus_add_to_the_processor_but_not_to_given_watts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    zone = Zone(tmp_path, "intel-rapl:0", "package-0")
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(counters, "gpus_in_use", lambda: ["a0"])
    meter = Meter(UNKNOWN_PROCESSOR, root=tmp_path)
    nvml.energies_mj[0] += 7_200_000
    zone.set(3605 * MILLION)
    assert meter.read().energy.mid == 3.0
    (zone.folder / "energy_uj").unlink()
    given = Meter(UNKNOWN_PROCESSOR, 1.0, tmp_path)
    nvml.energies_mj[0] += 7_200_000
    reading = given.read()
    assert reading.energy.mid == pytest.approx(reading.seconds / 3600)


def test_a_gpu_without_its_package_is_missed_only_once_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    used: list[str] = []
    monkeypatch.setattr(counters, "gpus_in_use", lambda: used)
    counter = open_nvml(tmp_path)
    counter.advance()
    assert counter.joules == 0
    used.append("a0")
    counter.advance()
    assert counter.joules is None
    assert "pip install 'halfbyte[energy]'" in counter.told


def test_gpus_are_in_use_once_torch_has_memory_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counters.gpus_in_use() == []
    held = [0, 4096]
    cuda: Any = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_reserved=lambda i: held[i],
        get_device_properties=lambda i: SimpleNamespace(uuid=f"uuid-{i}"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    assert counters.gpus_in_use() == ["uuid-1"]
