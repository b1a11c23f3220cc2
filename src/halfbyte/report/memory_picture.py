"""A picture of a plan: what each way of tuning holds in memory at its peak, part by part, beside what may be taken.

It owns how that looks; it must not know how memory is forecast, only the numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import EvaluateError
from halfbyte.report.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from halfbyte.plan.terms import Memory

PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "base": (("base",), "#08519c"),
    "trained": (("adapters", "gradients", "optimizer"), "#6baed6"),
    "activations": (("activations",), "#b35806"),
    "loss": (("loss",), "#fdb863"),
    "buffers": (("buffers",), "#9e9ac8"),
    "process": (("runtime",), "#969696"),
}
"""What is drawn as one, with its colour; they keep their order in grey where they lie beside each other."""

LIMIT = "#c51b7d"
_INK = "#010203"  # stands for the colour of text, which follows the reader's light or dark page
_INKS = (
    "<style>svg{color:#1a1a1a}@media (prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"  # light, dark
)
_GB = 1e9


def memory_picture(ways: Mapping[str, Memory], limit_bytes: int, out: Path) -> Path:
    """Draws a bar for each way, its parts stacked, and the limit as a line.

    Args:
        ways: Memory at the peak by the way's name, in the order of drawing.
        limit_bytes: What may be taken.
        out: The SVG file; its bytes depend on the numbers alone.

    Returns:
        The file.

    Raises:
        EvaluateError: HB606 where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluateError(
            "HB606", "got no matplotlib, which draws the picture", fix="pip install 'halfbyte[report]'"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(7.2, 1.4 + 0.34 * len(ways)), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        _draw(figure.add_subplot(), ways, limit_bytes)
        unfinished = out.with_name(f".partial-{out.name}")
        figure.savefig(unfinished, format="svg", metadata={"Date": None, "Creator": None})
    text = unfinished.read_text(encoding="utf-8").replace(_INK, "currentColor")
    begin = text.index(">", text.index("<svg")) + 1
    unfinished.write_text(text[:begin] + _INKS + text[begin:], encoding="utf-8")
    os.replace(unfinished, out)
    return out


def _style() -> Any:
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return STYLE | dict.fromkeys(coloured, _INK) | {"axes.spines.right": False, "axes.facecolor": "none"}


def _draw(axis: Axes, ways: Mapping[str, Memory], limit_bytes: int) -> None:
    names = list(ways)
    begins = [0.0] * len(names)
    for part, (fields, colour) in PARTS.items():
        sizes = [sum(getattr(memory, field) for field in fields) / _GB for memory in ways.values()]
        axis.barh(names, sizes, left=begins, color=colour, label=part, height=0.7)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    limit = limit_bytes / _GB
    axis.axvline(limit, color=LIMIT, linewidth=1.6, linestyle="--", label=f"may be taken: {limit:.1f} GB")
    for row, end in enumerate(begins):
        axis.text(end, row, f" {end:.2f}", va="center", ha="left", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0.0, 1.12 * max(*begins, min(limit, 2 * max(begins))))
    axis.set_xlabel("memory at the peak (GB)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
