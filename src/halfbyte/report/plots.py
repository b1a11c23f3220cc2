"""Pictures of a run, drawn from the files it left.

It owns how they look; it must not know models or training, only the files' lines.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import EvaluateError, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

RAW, SMOOTH, RATE, HELD_OUT = "#9ecae1", "#08519c", "#b35806", "#7b3294"
"""Colours that people with colour blindness tell apart, and that keep their order in grey."""

SMOOTHED_SHARE = 0.02
"""Width of the smoothing, as a share of the run's steps."""

STYLE: dict[str, Any] = {
    "svg.hashsalt": "halfbyte",  # ids in the file depend on the picture alone
    "svg.fonttype": "none",  # text stays text: small, searchable, and the same whatever fonts are installed
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
}


@dataclass(frozen=True)
class Curve:
    """What a run's metrics.jsonl says of each optimizer step.

    Args:
        step: (S,) step numbers.
        loss: (S,) loss of each step.
        lr: (S,) learning rate of each step.
        held_out: (S,) held-out loss after each step; NaN where it was not measured.
    """

    step: NDArray[np.float64]
    loss: NDArray[np.float64]
    lr: NDArray[np.float64]
    held_out: NDArray[np.float64]


def loss_curve(metrics: Path, out: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draws loss and learning rate over the steps of a run.

    Args:
        metrics: A run's metrics.jsonl, lines with `step`, `loss` and `lr`.
        out: Path of the pictures without suffix.
        title: Heading; "" for none.

    Returns:
        The SVG, whose bytes depend on metrics and title only, and the PNG.

    Raises:
        EvaluateError: HB605 for a file that is missing, empty or holds other lines (all are named), HB606
            where matplotlib is not installed.
    """
    curve = read_curve(metrics)
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluateError(
            "HB606", "got no matplotlib, which draws the loss curve", fix="pip install 'halfbyte[report]'"
        ) from error
    svg, png = out.with_name(out.name + ".svg"), out.with_name(out.name + ".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type,unused-ignore]
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, curve, title)
        _save(figure, svg, {"Date": None, "Creator": None})
        _save(figure, png, {"Software": None})
    return svg, png


def draw_loss(metrics: Path, out: Path, note: Callable[[str], None]) -> None:
    """Draws a finished run's curve, or says what is missing for it: no run is lost for a picture.

    Args:
        metrics: As for `loss_curve`.
        out: As for `loss_curve`.
        note: Told what is missing.
    """
    try:
        loss_curve(metrics, out)
    except EvaluateError as error:
        if error.code != "HB606":
            raise
        note(f"No loss curve: {error.what}. To do: {error.fix}")


def read_curve(metrics: Path) -> Curve:
    """The numbers of a metrics.jsonl.

    A loss that is not finite is kept: the line has a gap there.

    Raises:
        EvaluateError: HB605 for a file that is missing, empty or holds other lines (all are named).
    """
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError("HB605", f"the file cannot be read: {error}", where=str(metrics)) from error
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            held_out = record.get("held_out_loss")
            rows.append(
                (
                    float(record["step"]),
                    float(record["loss"]),
                    float(record["lr"]),
                    math.nan if held_out is None else float(held_out),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            bad.append(f"line {number}: {line[:80]}")
    if bad or not rows:
        raise EvaluateError(
            "HB605",
            f"{len(bad)} lines are no JSON objects with step, loss and lr:{listed(bad)}"
            if bad
            else "got no lines",
            where=str(metrics),
            fix="give the metrics.jsonl of a training run",
        )
    step, loss, lr, held_out = np.array(rows).T
    return Curve(step, loss, lr, held_out)


def smoothed(values: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Gaussian average over neighbours on both sides, without lag; values not finite are passed over.

    Args:
        values: (S,) numbers.
        width: Standard deviation of the weights, in steps, above 0.

    Returns:
        (S,) averages; NaN where no finite value is near.
    """
    reach = min(math.ceil(3.0 * width), values.size)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    is_finite = np.isfinite(values)
    inner = slice(reach, reach + values.size)
    total = np.convolve(np.where(is_finite, values, 0.0), weights)[inner]
    weight = np.convolve(is_finite.astype(np.float64), weights)[inner]
    averages: NDArray[np.float64] = np.full(values.shape, np.nan)
    np.divide(total, weight, out=averages, where=weight > 1e-9)
    return averages


def _draw(figure: Figure, curve: Curve, title: str) -> None:
    loss_axis: Axes = figure.add_subplot()
    rate_axis: Axes = loss_axis.twinx()
    loss_axis.set_zorder(rate_axis.get_zorder() + 1)
    loss_axis.patch.set_visible(False)
    marker = "o" if curve.step.size == 1 else ""  # a line needs two points
    average = smoothed(curve.loss, max(1.0, SMOOTHED_SHARE * curve.step.size))
    lines = [
        *loss_axis.plot(
            curve.step, curve.loss, color=RAW, linewidth=0.8, marker=marker, label="loss, each step"
        ),
        *loss_axis.plot(
            curve.step, average, color=SMOOTH, linewidth=2.0, marker=marker, label="loss, smoothed"
        ),
        *(_held_out(loss_axis, curve) if np.isfinite(curve.held_out).any() else ()),
        *rate_axis.plot(
            curve.step, curve.lr, color=RATE, linewidth=1.2, linestyle="--", label="learning rate"
        ),
    ]
    loss_axis.set_xlabel("optimizer step")
    loss_axis.set_ylabel("loss (nats per trained token)")
    loss_axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    loss_axis.margins(x=0.01)
    rate_axis.set_ylabel("learning rate", color=RATE)
    rate_axis.tick_params(axis="y", colors=RATE)
    rate_axis.set_ylim(bottom=0.0, top=max(float(curve.lr.max()) * 1.08, 1e-12))
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    loss_axis.locator_params(axis="x", integer=True)
    loss_axis.legend(
        handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=11)


def _held_out(axis: Axes, curve: Curve) -> list[Line2D]:
    measured = np.isfinite(curve.held_out)
    return axis.plot(
        curve.step[measured],
        curve.held_out[measured],
        color=HELD_OUT,
        linewidth=1.2,
        marker="o",
        markersize=4.0,
        label="held-out loss",
    )


def _save(figure: Figure, path: Path, metadata: Mapping[str, str | None]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata=dict(metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
