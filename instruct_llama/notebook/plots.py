"""Plots of training runs and model internals, in one style, with units on their axes.

Every function returns a `Picture` (a matplotlib Figure) and displays nothing: end a cell with the call.
Nothing here uses pyplot or changes global settings. A history is the content of `metrics.jsonl`: records such as
{"step": 10, "train/loss": 3.2, "val/loss": 3.4}. Any record may lack any key.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .style import COLOURS, LABELS, LOOKS, History, Picture, array, panels, series, shade, smoothed, style, visible

HATCHES = ("", "////", "....", "xxxx", "----")  # of bars


def _draw(ax: Axes, history: History, keys: Sequence[str], *, x: str = "step", labels: Sequence[str] = (),
          ylabel: str = "", smooth: float = 0.0, band: Mapping[str, str] | None = None,
          lines: Mapping[str, float] | None = None, first: int = 0) -> None:  # fmt: skip
    """Draw the curves of `keys` on one panel; `first` is the index of the first curve's style in LOOKS."""
    history = list(history)
    for i, key in enumerate(keys):
        at, values = series(history, key, x)
        look = (first + i) % len(COLOURS)
        if not len(at):
            continue
        if band and key in band:
            deviation = dict(zip(*series(history, band[key], x), strict=True))
            spread = np.array([deviation.get(point, 0.0) for point in at])
            ax.fill_between(at, values - spread, values + spread, color=COLOURS[look], alpha=0.15, linewidth=0)
        if smooth and len(values) > 10:  # a few validation points need no smoothing
            ax.plot(at, values, color=COLOURS[look], alpha=0.25, linewidth=0.8)
            values = smoothed(values, smooth)
        every = (len(at) * i // (8 * len(keys)), max(1, len(at) // 8))  # keeps markers of two curves apart
        ax.plot(at, values, **LOOKS[look], markevery=every, label=labels[i] if labels else key)
    if not ax.lines:
        ax.text(0.5, 0.5, "no records yet", transform=ax.transAxes, ha="center", va="center", color="0.4")
    for i, (name, value) in enumerate((lines or {}).items()):
        ax.axhline(value, color="0.35", linestyle=(0, (1 + 4 * i, 2)), linewidth=1.3, label=f"{name}: {value:.3g}")
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()
    steps = "iteration" if keys[0].startswith("ppo/") else "optimizer step"
    name = keys[0].split("/")[-1]
    ax.xaxis.get_major_locator().set_params(integer=x == "step")
    ax.set(xlabel=steps if x == "step" else x, ylabel=ylabel or LABELS.get(name, name.replace("_", " ")))


@style()
def curves(history: History, keys: Sequence[str] | str, *, title: str = "", **options: Any) -> Picture:
    """Metrics over a run, on one panel; missing keys and records are skipped.

    Options: x, the key of the horizontal axis ("step"); labels, one per key; ylabel; smooth in [0, 1), the weight of
    the past in a moving average, drawn over the faint raw curve; band {key: key of its deviation}, a shaded interval;
    lines {name: value}, horizontal lines such as a known ceiling.
    """
    figure, ax = panels()
    _draw(ax, history, [keys] if isinstance(keys, str) else list(keys), **options)
    ax.set_title(title)
    return figure


@style()
def losses(history: History, *, smooth: float = 0.8, lines: Mapping[str, float] | None = None) -> Picture:
    """Training and validation loss of a supervised stage, with the accuracy (else the learning rate) beside them."""
    history = list(history)
    figure, (left, right) = panels(1, 2, width_ratios=(3, 2))
    _draw(left, history, ("train/loss", "val/loss"), labels=("training", "validation"), smooth=smooth, lines=lines)
    has_accuracy = any("val/accuracy" in record for record in history)
    _draw(right, history, ("val/accuracy",) if has_accuracy else ("train/lr",), first=int(has_accuracy))
    return figure


def is_live() -> bool:
    """Whether an interactive notebook front end runs this cell, so that live plots and controls are useful.

    INSTRUCT_LLAMA_STATIC=1 means no, 0 means yes. Without it: JupyterLab, Notebook and VS Code send a cell id with
    their requests to the kernel; nbclient, which runs notebooks for nbconvert, nbmake and the tour, does not.
    """
    choice = os.environ.get("INSTRUCT_LLAMA_STATIC", "")
    if choice:
        return choice == "0"
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool((kernel.get_parent("shell") or {}).get("metadata", {}).get("cellId"))


class LivePlot:
    """A plot that is updated while a stage trains: pass it to the stage's `run` as `watch`, close it afterwards.

    Keys with the same last part share a panel ("train/loss", "val/loss"). The plot is redrawn in place at most every
    `every` seconds, and drawing takes about 3% of the time at most; `close()`, or leaving a `with`, draws the last
    records. Without a live front end, as in a tour, only the final plot is drawn (see `is_live`). Without a notebook
    kernel it only collects the records, in `.history`.
    """

    def __init__(self, *keys: str, every: float = 2.0, show: Callable[..., Any] | None = None, **options: Any) -> None:
        groups: dict[str, list[str]] = {}
        for key in keys or ("train/loss", "val/loss"):
            groups.setdefault(key.split("/")[-1], []).append(key)
        self.groups, self.every, self.options = list(groups.values()), every, options  # options: those of `curves`
        self.history: list[dict[str, Any]] = []
        self._show = show or (display if getattr(get_ipython(), "kernel", None) is not None else None)
        self._handle, self._drawn = None, 0
        self._due = 0.0 if is_live() else math.inf

    def __call__(self, record: Mapping[str, Any]) -> None:
        self.history.append(dict(record))
        if time.monotonic() >= self._due:
            self._update()

    def close(self) -> None:
        """Draw the last records; the picture stays in the notebook."""
        if len(self.history) > self._drawn:
            self._update()

    def __enter__(self) -> LivePlot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @style()
    def figure(self) -> Picture:
        """The picture of the records so far."""
        columns = min(4, len(self.groups))
        rows = -(-len(self.groups) // columns)
        figure, axes = panels(rows, columns, (max(7.0, 2.5 * columns), 0.7 + 1.9 * rows), squeeze=False)
        for ax in axes.flat[len(self.groups) :]:
            ax.set_visible(False)
        for ax, keys in zip(axes.flat, self.groups, strict=False):
            _draw(ax, self.history, keys, **self.options)
        return figure

    def _update(self) -> None:
        if self._show is None:
            return
        start, self._drawn = time.monotonic(), len(self.history)
        if self._handle is None:
            self._handle = self._show(self.figure(), display_id=True)
        else:
            self._handle.update(self.figure())
        self._due = time.monotonic() + max(self.every, 30 * (time.monotonic() - start))


@style()
def ppo_panel(history: History) -> Picture:
    """The eight panels that show the progress of PPO, over its iterations."""
    history = list(history)
    figure, axes = panels(2, 4, (10.0, 4.0), sharex=True)
    groups = ("score rlhf_reward", "true_reward", "kl kl_k3", "response_length", "entropy", "clip_frac",
              "explained_variance", "ratio_abs_error")  # fmt: skip
    names = {"rlhf_reward": "minus KL penalty", "kl": "k1 estimate", "kl_k3": "k3 estimate"}
    for ax, group in zip(axes.flat, groups, strict=True):
        _draw(ax, history, [f"ppo/{k}" for k in group.split()], labels=[names.get(k, k) for k in group.split()])
    for ax in axes[0]:
        ax.set_xlabel("")
    return figure


@style()
def hacking(regular: History, hacked: History, *, names: Sequence[str] = ("with KL penalty", "kl_coef = 0")) -> Picture:
    """Reward hacking: reward-model score and true reward of two PPO runs, over the same iterations."""
    figure, axes = panels(1, 2, sharex=True)
    titles = {"score": "reward-model score", "true_reward": "true reward"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        _draw(ax, regular, (f"ppo/{key}",), labels=names[:1])
        _draw(ax, hacked, (f"ppo/{key}",), labels=names[1:], first=1)
        ax.set_title(title)
    return figure


@style()
def optimum(points: History, j_ref: float, j_star: float, *, beta: float | None = None,
            frontier: Sequence[tuple[float, float]] = ()) -> Picture:  # fmt: skip
    """PPO approaching a known optimum; `points` holds {"step", "j"} or {"step", "j", "kl", "reward"} per iteration.

    Left: J = reward − beta KL, between that of the reference and the optimum. Right, when points have kl and reward:
    their path, `frontier` [(KL, reward)] of the optimal policies at many betas, and with `beta` the line J = J*.
    """
    points = list(points)
    js, (kl, reward) = series(points, "j")[1], series(points, "reward", "kl")
    figure, axes = panels(1, 2 if len(kl) else 1, squeeze=False)
    _draw(axes[0, 0], points, ("j",), labels=("PPO",), ylabel="J = reward − β KL (reward)",
          lines={"optimum, J*": j_star, "reference": j_ref})  # fmt: skip
    axes[0, 0].set(xlabel="iteration", title=f"{(js[-1] - j_ref) / (j_star - j_ref):.1%} of the gap closed")
    if len(kl):
        ax, ends = axes[0, 1], np.array([0.0, 1.15 * max(kl.max(), *(k for k, _ in frontier), 0.01)])
        ax.plot(*np.array(sorted(frontier)).reshape(-1, 2).T, color="0.6", linewidth=4, label="optimal policies")
        if beta is not None:
            ax.plot(ends, j_star + beta * ends, ":", color="0.2", label="J = J*")
        ax.plot(kl, reward, "-o", color=COLOURS[1], markersize=3, linewidth=1, label="PPO")
        ax.plot(kl[-1:], reward[-1:], "*", color="black", markersize=10, label="last iteration")
        ax.set(xlabel="KL to the reference (nats per response)", ylabel="expected reward", title="path of PPO")
        ax.legend()
    return figure


@style()
def reward_histogram(chosen: Sequence[float], rejected: Sequence[float], *, unit: str = "deviations") -> Picture:
    """Histograms of the scores of chosen and rejected responses (paired by index), and of their differences."""
    chosen, rejected = array(chosen), array(rejected)
    figure, (left, right) = panels(1, 2)
    bins = np.histogram_bin_edges(np.concatenate((chosen, rejected)), bins=24)
    left.hist(rejected, bins, color="#f0b27a", edgecolor="#8a3f00", hatch="////", label="rejected")
    left.hist(chosen, bins, histtype="step", color=COLOURS[0], linewidth=2, label="chosen")
    left.set(xlabel=f"score ({unit})", ylabel="responses (count)")
    left.legend()
    right.hist(chosen - rejected, bins=24, color=COLOURS[0], alpha=0.7, edgecolor="white")
    right.axvline(0, color="black", linewidth=1)
    right.set(xlabel=f"chosen − rejected ({unit})", ylabel="comparisons (count)")
    right.set_title(f"{(chosen > rejected).mean():.1%} ranked correctly")
    return figure


@style()
def intervals(rows: Mapping[str, Mapping[str, float]], *, xlabel: str = "true reward (0 to 1)", title: str = "",
              expected: Mapping[str, tuple[float, float]] | None = None,
              shaded: str = "expected") -> Picture:  # fmt: skip
    """The report card as a plot: means with 95% intervals, one row each.

    `rows` is {name: {"mean", "low", "high"}}, as in `report.json`; `expected` {name: (from, to)} is shaded, and
    `shaded` is its name in the legend.
    """
    figure, ax = panels(size=(7.0, 0.9 + 0.34 * len(rows)))
    for y, (name, row) in enumerate(rows.items()):
        if expected and name in expected:
            low, high = expected[name]
            ax.barh(y, high - low, left=low, height=0.7, color="0.88", label=None if ax.patches else shaded)
        ax.plot((row["low"], row["high"]), (y, y), "-|", color=COLOURS[0], markersize=8)
        ax.plot(row["mean"], y, "o", color=COLOURS[0], markersize=6)
        text = f"{row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{xlabel}, mean and 95% interval")
    _legend_above(ax, title, bool(expected))
    return figure


def _legend_above(ax: Axes, title: str, legend: bool) -> None:
    """Put title and legend on one line above the axes, where they overlap nothing."""
    ax.set_title(title, loc="left" if legend else "center")
    if legend:
        columns = len(ax.get_legend_handles_labels()[1])
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=columns)


@style()
def bars(values: Mapping[str, float | Sequence[float]], *, ylabel: str, series: Sequence[str] = ("",), title: str = "",
         xlabel: str = "", number: str = "{:.3g}") -> Picture:  # fmt: skip
    """Named bars with their numbers; several values per name are drawn side by side, named by `series`.

    Numbers wider than their bars are rotated, so that neighbours do not overlap.
    """
    table = np.array([np.atleast_1d(value) for value in values.values()], dtype=float)  # (names, series)
    figure, ax = panels()
    room = 5.5 / (len(table) * table.shape[1])  # width of a bar in inches
    upright = max(len(number.format(value)) for value in table.flat) * 0.075 > room
    for i, column in enumerate(table.T):
        at = np.arange(len(table)) + (i + 0.5) * 0.8 / table.shape[1] - 0.4
        drawn = ax.bar(at, column, 0.8 / table.shape[1], color=COLOURS[i], alpha=0.75, hatch=HATCHES[i],
                       edgecolor="white", label=series[i])  # fmt: skip
        ax.bar_label(drawn, [number.format(v) for v in column], padding=2, fontsize=7.5, rotation=90 * upright)
    ax.set_xticks(range(len(values)), list(values), parse_math=False)
    if sum(max(map(len, name.split("\n"))) for name in values) > 90:  # characters; longer labels would overlap
        ax.tick_params(axis="x", rotation=35)
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    ax.grid(False, axis="x")
    ax.margins(y=0.3 if upright else 0.15)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _legend_above(ax, title, any(series))
    return figure


@style()
def token_heat(pieces: Sequence[str], values: Sequence[float], title: str = "", *, number: str = "{:+.2f}",
               under: Sequence[Any] = ()) -> Picture:  # fmt: skip
    """Tokens as cells, each coloured by its value and with that number below (none for nan); masks are 0 and 1.

    Signed values are coloured from orange (negative) through white to violet. `under` replaces the numbers in the
    cells, for example by token ids.
    """
    numbers = array(values)
    scale = np.nanmax(np.abs(numbers), initial=1e-9)
    figure, ax = panels()
    x, y, width = 0.0, 0, 92.0  # characters
    written = list(map(str, under)) or ["" if np.isnan(value) else number.format(value) for value in numbers]
    for piece, value, below in zip(pieces, numbers, written, strict=True):
        text = visible(piece), below
        cell = max(map(len, text)) + 1.2
        if x + cell > width:
            x, y = 0.0, y + 1
        ax.add_patch(Rectangle((x, y + 0.06), cell, 0.88, facecolor=shade(value / scale), edgecolor="0.6"))
        for dy, size, line in ((0.36, 8.5, text[0]), (0.74, 7, text[1])):
            ax.text(x + cell / 2, y + dy, line, ha="center", va="center", fontsize=size, family="monospace",
                    parse_math=False)  # fmt: skip
        x += cell
    figure.set_size_inches(7.0, 0.35 + 0.42 * (y + 1))
    ax.set(xlim=(0, width), ylim=(y + 1, 0))
    ax.set_axis_off()
    ax.set_title(title, loc="left", parse_math=False)
    return figure


@style()
def flow(boxes: Mapping[str, tuple[float, float, str]], arrows: Sequence[tuple[Any, ...]]) -> Picture:
    """A flow chart of boxes {text: (x, y, colour)} and arrows (start, end), which are box indices from 0.

    An arrow (start, end, note) is bent below the boxes between its ends and labelled with the note.
    """
    figure, ax = panels(size=(8.6, 3.4))
    drawn = [ax.text(x, y, text, ha="center", va="center", bbox={"boxstyle": "round,pad=0.4", "fc": colour})
             for text, (x, y, colour) in boxes.items()]  # fmt: skip
    for start, end, *note in arrows:
        here, there = drawn[start], drawn[end]
        ax.annotate("", there.get_position(), here.get_position(), arrowprops={
            "arrowstyle": "-|>", "color": "0.3", "shrinkA": 2, "shrinkB": 2, "patchA": here.get_bbox_patch(),
            "patchB": there.get_bbox_patch(), "connectionstyle": f"arc3,rad={0.35 if note else 0}"})  # fmt: skip
        x, y = np.mean((here.get_position(), there.get_position()), axis=0)
        ax.text(x, y - 0.6, "".join(note), ha="center", fontsize=8, color="0.3")
    x, y, _ = zip(*boxes.values(), strict=True)
    ax.set(xlim=(min(x) - 0.5, max(x) + 0.6), ylim=(min(y) - 0.35, max(y) + 0.35))
    ax.set_axis_off()
    return figure


@style()
def attention_grid(weights: Any, pieces: Sequence[str], *, title: str = "", names: Sequence[str] = ()) -> Picture:
    """Attention weights (H, T, T), one panel per head; rows are queries, columns are keys."""
    weights = array(weights)
    heads, length = weights.shape[:2]
    columns = min(heads, 2 if heads <= 4 else 4)
    rows, named = -(-heads // columns), columns < 3 and length <= 20  # else the tokens do not fit
    size = 7.0, 0.6 + rows * 5.6 / max(columns, 1.5)
    figure, axes = panels(rows, columns, size, squeeze=False, sharex=True, sharey=True)
    figure.set_layout_engine("compressed")
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    for ax in axes.flat[heads:]:
        ax.set_visible(False)
    for head, ax in zip(range(heads), axes.flat, strict=False):
        image = ax.imshow(np.ma.array(weights[head], mask=future), cmap="Blues", vmin=0, vmax=1)
        ax.set_facecolor("0.93")  # future keys, which causal attention masks
        ax.grid(False)
        ax.set_title(names[head] if names else f"head {head}")
        if named:
            words = [visible(piece) for piece in pieces]
            ax.set_xticks(range(length), words, rotation=90, fontsize=7, parse_math=False)
            ax.set_yticks(range(length), words, fontsize=7, parse_math=False)
        else:
            ax.locator_params(integer=True)
        wide = columns < 3  # else neighbouring labels would overlap
        ax.set_xlabel("key (position, attended to)" if wide else "key (position)")
        ax.set_ylabel("query (position, attends)" if wide else "query (position)")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="attention (share)", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=9.5, parse_math=False)
    return figure


@style()
def rope_picture(head_dim: int = 32, theta: float = 10_000.0, length: int = 128) -> Picture:
    """Rotary positions (RoFormer, arXiv:2104.09864): the rotation of each pair, and its effect on q . k.

    Left: cos(position x theta^(-2i/head_dim)) of pair i. Right: q . k of two equal vectors, over their distance.
    """
    pairs = np.arange(head_dim // 2)
    turns = np.outer(theta ** (-2 * pairs / head_dim), np.arange(length))  # (head_dim / 2, length) radians
    figure, (left, right) = panels(1, 2, width_ratios=(3, 2))
    image = left.imshow(np.cos(turns), aspect="auto", cmap="Greys", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=left, label="cos of the angle", ticks=(-1, 0, 1))
    left.grid(False)
    left.set(xlabel="position (tokens)", ylabel="pair of channels, i", title=f"rotation, theta = {theta:,.0f}")
    right.plot(np.cos(turns).mean(axis=0), color=COLOURS[0])
    right.set(xlabel="distance (tokens)", ylabel="q · k (share of its largest)", title="q = k before rotation")
    return figure


@style()
def codebook(nf4: Sequence[float], fp4: Sequence[float], *, weights: Any = None, title: str = "") -> Picture:
    """The 16 values of NF4 and FP4 on number lines; above them a histogram of scaled `weights`, if given."""
    figure, axes = panels(1 if weights is None else 2, 1, (7.0, 2.0 if weights is None else 3.4), squeeze=False,
                          sharex=True)  # fmt: skip
    ax = axes[-1, 0]
    for y, codes in ((1, nf4), (0, fp4)):
        codes = np.unique(array(codes))
        ax.hlines(y, -1, 1, color="0.7", linewidth=1)
        ax.plot(codes, np.full(len(codes), y), "|", color=COLOURS[1 - y], markersize=12, markeredgewidth=1.8)
        for code in codes:
            if code == 0 or np.sort(np.abs(codes - code))[1] > 0.02:  # FP4's smallest values are close to 0
                ax.text(code, y + 0.22, f"{code:.2f}", rotation=60, fontsize=7, ha="center", va="bottom")
    ax.set_yticks((0, 1), ("FP4", "NF4"))
    ax.set(ylim=(-0.4, 1.9), xlabel="value (share of the largest weight in the block)")
    ax.grid(False)
    if weights is not None:
        axes[0, 0].hist(array(weights).ravel(), bins=101, range=(-1, 1), color=COLOURS[0], alpha=0.7)
        axes[0, 0].set(ylabel="weights (count)")
    axes[0, 0].set_title(title)
    return figure
