"""What `halfbyte plan` prints of past runs and of existing models, and what a run prints of what it took."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.plan.ledgers import MACHINE, forecast, ledger, write_run
from tests.short_runs import Shared, settings_in

from halfbyte import __version__
from halfbyte.cli import plan_audit, plan_history
from halfbyte.cli.plan_audit import audit
from halfbyte.cli.plan_history import history
from halfbyte.cli.summary import print_summary
from halfbyte.errors import PlanError
from halfbyte.govern.manifest import Hardware
from halfbyte.pipeline import run
from halfbyte.plan.ledger import PLAN, Ledger, Peak, Planned


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed to stdout, on a wide screen."""
    written = io.StringIO()
    for module in (plan_history, plan_audit):
        monkeypatch.setattr(module, "STDOUT", Console(file=written, width=200))
    return written


def here(**changes: object) -> Ledger:
    machine = Hardware.here()
    own = {"processor": machine.processor, "cores": machine.cores}
    return ledger(machine=own, versions={"halfbyte": __version__}, **changes)


def test_history_prints_runs_errors_and_what_they_correct(tmp_path: Path, screen: io.StringIO) -> None:
    for number, seconds in enumerate((2.2, 2.4, 2.5)):
        write_run(tmp_path / f"run-{number}", here(step_seconds=seconds), forecast())
    write_run(tmp_path / "plain", here(memory=Peak(None, None, None, None, "")))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/ledger.json").write_text("{", encoding="utf-8")
    history([tmp_path])
    text = screen.getvalue()
    assert "run-1" in text
    assert "2 s forecast, -16.7%" in text
    assert "no forecast" in text
    assert "step time: 15.3% off on average, -20.0% at worst, over 3 runs" in text
    assert "time × 1.200, runtime memory × 1.000, from 3 runs" in text
    assert "not read:" in text
    assert "torn/ledger.json: it is not JSON" in text


def test_history_of_other_machines_corrects_nothing_here(tmp_path: Path, screen: io.StringIO) -> None:
    write_run(tmp_path / "run", ledger(machine=MACHINE | {"cores": 512}), forecast())
    history([tmp_path])
    assert "are not corrected: 0 run(s) of this machine and version" in screen.getvalue()


def test_history_in_json_has_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", ledger(step_seconds=4.0), forecast())
    history([tmp_path], as_json=True)
    content = json.loads(capsys.readouterr().out)
    differences = {d["what"]: d["error"] for d in content["runs"][0]["differences"]}
    assert differences["step time"] == -0.5
    assert [e["what"] for e in content["errors"]][:2] == ["memory", "step time"]
    assert content["recalibration"]["runs"] == 0
    assert content["refused"] == []


def test_without_runs_history_says_so(
    tmp_path: Path, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    history([tmp_path])
    assert screen.getvalue() == "No run has left a ledger there yet.\n"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="HB710"):
        history([])


def test_audit_prints_a_ranking_its_rules_and_what_failed(
    tmp_path: Path, shared: Shared, screen: io.StringIO
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}", encoding="utf-8")
    audit([shared("models/stories260K-hf"), shared("models/base-11m"), tmp_path])
    text = screen.getvalue()
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["model", "parameters"]
    assert [line.split()[0] for line in lines[1:3]] == ["base-11m", "stories260K-hf"]
    assert "11,015,040" in lines[1]
    assert "most bytes for each per cent" in text
    assert "cost in quality: not measured" in text
    assert "Not audited: 1" in text
    assert "HB306" in text


def test_audit_in_markdown_and_json(
    shared: Shared, screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared("models/stories260K-hf")
    audit([folder], markdown=True, spectra=False, r=8)
    lines = screen.getvalue().splitlines()
    assert lines[1] == "| " + " | ".join(["---"] * len(plan_audit.COLUMNS)) + " |"
    assert len(lines[2].split("|")) == len(plan_audit.COLUMNS) + 2
    assert "unknown" in lines[2]  # no spectra were asked for
    assert "at rank 8" in screen.getvalue()
    audit([folder], as_json=True, spectra=False)
    content = json.loads(capsys.readouterr().out)
    assert content["audits"][0]["parameters"] == 260_032
    assert content["audits"][0]["directions_90"] is None
    assert content["faults"] == []


def test_a_run_prints_what_it_took_and_how_far_its_forecast_was_off(tmp_path: Path, shared: Shared) -> None:
    config = settings_in(tmp_path, shared)("cost.country=SE", "cost.machine_watts=40", "train.max_steps=3")
    result = run(config, evaluate=False)

    def printed() -> str:
        screen = io.StringIO()
        print_summary(result, Console(file=screen, width=200))
        return screen.getvalue()

    text = printed()
    assert "mWh, time × power (given)" in text
    assert "no price of electricity is listed for SE: set cost.price_per_kwh" in text
    assert "forecast   none was made" in text
    assert "ledger.json" in text
    assert result.summary.took is not None
    planned = Planned(forecast())
    (result.folder / PLAN).write_text(json.dumps(planned.as_dict()), encoding="utf-8")
    object.__setattr__(result.summary.took, "planned", planned)
    assert "forecast   off by memory -100.0%, step time +" in printed()
