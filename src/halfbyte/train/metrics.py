"""What is written down about each optimizer step, and the process's peak memory.

It owns the lines of metrics.jsonl; it knows nothing of models, optimizers or displays.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from halfbyte.system import process_bytes


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl.

    Args:
        step: Optimizer step, from 1.
        epoch: Passes over the data finished after this step, fractional.
        loss: Plain cross-entropy in nats per trained token over the whole step, before its update; of a preference
            objective its loss per pair.
        lr: Learning rate of the update.
        grad_norm: Global L2 norm of the gradient before clipping.
        trained_tokens: Tokens that carry loss in this step.
        tokens: All tokens of the step, without padding.
        documents: Rows of the step.
        fill: `tokens` over what the step's passes have room for: the budget of packed ones, the positions of padded
            ones.
        tokens_per_s: `tokens` by the step's wall time.
        seconds: Wall time since training began.
        peak_rss_bytes: Largest resident memory of the process so far; None where the system does not say.
        objective: What was minimised, where label smoothing or z-loss make that another number than `loss`;
            else None.
        held_out_loss: Loss of the held-out rows after this step's update, nats per trained token; None where it was
            not measured.
        reward_better: Mean reward of the step's better answers, of a preference objective; else None, as both next.
        reward_worse: Mean reward of its worse answers.
        reward_accuracy: Share of its pairs in which the better answer has the higher reward.
        grad_variance: Variance of the step's gradient over which rows it gets, estimated from its micro-batches; None
            for a step of one.
        grad_signal: Squared norm of the gradient without that noise; an estimate too, and at times negative.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    documents: int
    fill: float
    tokens_per_s: float
    seconds: float
    peak_rss_bytes: int | None
    objective: float | None = None
    held_out_loss: float | None = None
    reward_better: float | None = None
    reward_worse: float | None = None
    reward_accuracy: float | None = None
    grad_variance: float | None = None
    grad_signal: float | None = None


class MetricsFile:
    """Appends one JSON line per step, each flushed, so that a crash loses none.

    Args:
        path: The file.
        after: Step that a run goes on from: lines of later steps, which are done anew, are dropped. 0 begins the
            file anew.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(path, after)
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()

    def write(self, record: StepRecord) -> None:
        """Append one step."""
        self._file.write(json.dumps(asdict(record), allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps up to one; a line cut off by a crash ends them."""
    kept: list[str] = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.append(line)
    return kept


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not count it."""
    # The count of `getrusage` begins with what the process that started this one had.
    if (peak := process_bytes().get("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
