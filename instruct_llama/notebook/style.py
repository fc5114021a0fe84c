"""The style of all plots (small, readable in greyscale, PNG in any notebook), and helpers for their data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

History = Iterable[Mapping[str, Any]]  # the records of metrics.jsonl

COLOURS = ("#1b4f91", "#d9730d", "#2f9e6e", "#8a4fbf", "#444444")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1)))
LOOKS = [  # of curves, distinct in greyscale too
    {"color": c, "linestyle": d, "marker": m} for c, d, m in zip(COLOURS, DASHES, "os^Dv", strict=True)
]
# fmt: off
STYLE = {
    "figure.dpi": 80, "font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "lines.linewidth": 1.6, "lines.markersize": 4,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.88", "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6,
}
LABELS = {  # by the last part of a metric's key
    "loss": "loss (nats)", "accuracy": "accuracy (share)", "lr": "learning rate", "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second", "gap": "chosen − rejected (score)", "score": "RM score (deviations)",
    "true_reward": "true reward (0 to 1)", "kl": "KL (nats per response)", "response_length": "length (tokens)",
    "entropy": "entropy (nats per token)", "clip_frac": "clipped (share of tokens)",
    "explained_variance": "explained variance (share)", "ratio": "mean ratio",
    "ratio_abs_error": "mean |ratio - 1|", "approx_kl": "KL of old to new policy (nats per token)",
    "eos_rate": "with end token (share)",
}
# fmt: on


def style() -> Any:
    """A context with the settings of all plots here: `with il.plots.style(): ...` for a figure of your own."""
    return matplotlib.rc_context(STYLE)


class Picture(Figure):
    """A Figure that is displayed as PNG in any notebook, whatever the backend, and is unknown to pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with style():  # not savefig, which draws twice; without metadata, equal pictures have equal bytes
            FigureCanvasAgg(self).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 2.6), **options: Any):
    """A Picture of `size` inches and its axes, as returned by `Figure.subplots`."""
    figure = Picture(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def array(values: Any) -> np.ndarray:
    """A tensor of any device and dtype, or a sequence, as a numpy array of floats."""
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else np.asarray(values, dtype=float)


def visible(piece: str) -> str:
    """A token's text in one line: spaces, line breaks and unprintable characters become symbols."""
    piece = piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "▁")
    return "".join(c if c.isprintable() else "�" for c in piece) or "∅"


def shade(value: float) -> str:
    """A background colour "#rrggbb" for black text: orange at -1, white at 0 (and nan), violet at +1."""
    return to_hex(matplotlib.colormaps["PuOr"](0.5 + 0.27 * float(np.clip(np.nan_to_num(value), -1, 1))))


def series(history: History, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """The x values and `key` values of the records that have both, finite: two float arrays of equal length."""
    pairs = [(r[x], r[key]) for r in history if r.get(x) is not None and r.get(key) is not None]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]


def smoothed(values: Sequence[float], weight: float) -> np.ndarray:
    """Exponential moving average with bias correction (as in Adam); `weight` in [0, 1) is that of the past."""
    mean, out = 0.0, []
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return np.array(out)
