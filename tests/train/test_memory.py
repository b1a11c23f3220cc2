"""Free memory: what the system and a control group say, whichever is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.system import available_bytes
from halfbyte.train.memory import HELD_SHARE, activation_budget_bytes


def system(root: Path, *, available_kib: int, limit: str = "", used: int = 0, inactive: int = 0) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kib} kB\n")
    if limit:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    return root


def test_without_a_control_group_it_is_what_the_system_has(tmp_path):
    assert available_bytes(system(tmp_path, available_kib=1000)) == 1000 * 1024


def test_a_control_group_without_a_limit_changes_nothing(tmp_path):
    assert available_bytes(system(tmp_path, available_kib=1000, limit="max", used=7)) == 1000 * 1024


def test_a_control_group_s_limit_counts_and_its_cached_files_do_not(tmp_path):
    root = system(tmp_path, available_kib=1000, limit="50000", used=30000, inactive=1000)
    assert available_bytes(root) == 50000 - 30000 + 1000


def test_a_full_control_group_leaves_nothing(tmp_path):
    assert available_bytes(system(tmp_path, available_kib=1000, limit="10", used=50)) == 0


def test_unknown_memory_is_half_of_all(tmp_path):
    assert available_bytes(tmp_path) > 0


def test_a_setting_decides_over_what_is_free():
    assert activation_budget_bytes(1.5) == 1_500_000_000
    free = available_bytes()
    assert 0.5 * HELD_SHARE * free <= activation_budget_bytes(None) <= 2 * HELD_SHARE * free


def test_a_bound_on_the_process_leaves_out_what_it_has_and_what_will_come() -> None:
    free = activation_budget_bytes(None)
    bounded = activation_budget_bytes(None, memory_gb=8.0)
    assert 0 < bounded <= HELD_SHARE * 8e9
    less = activation_budget_bytes(None, memory_gb=8.0, to_come_bytes=10**9)
    assert bounded - less == pytest.approx(HELD_SHARE * 1e9, rel=0.05)
    assert activation_budget_bytes(None, memory_gb=0.001) == 0
    assert activation_budget_bytes(None, memory_gb=1e6) == pytest.approx(free, rel=0.05)
