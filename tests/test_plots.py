"""Every picture: labelled axes with units, nothing cut off, no state left behind; and the live plot's timing."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch

from instruct_llama.notebook import plots

HISTORY = [
    {"step": step, "train/loss": 5.0 / step, "train/lr": 0.003, "val/chosen_mean": 1.0 * step, "val/chosen_std": 0.5}
    | ({"val/loss": 6.0 / step, "val/accuracy": step / 40} if step % 10 == 0 else {})
    for step in range(1, 31)
]
PPO_KEYS = "score penalised true_reward kl kl_k3 length entropy clip_frac explained_variance ratio".split()
PPO = [{"step": step} | {f"ppo/{key}": math.sin(step + i) for i, key in enumerate(PPO_KEYS)} for step in range(1, 13)]
WALK = [{"step": i, "j": 0.1 * i, "kl": 0.05 * i, "reward": 0.12 * i} for i in range(9)]
ROWS = {"sft": {"mean": 0.5, "low": 0.48, "high": 0.52, "n": 512}, "ppo": {"mean": 0.92, "low": 0.9, "high": 0.94}}
PIECES = ["<s>", "▁costs", "▁$5", "▁or", "▁$6", "\n", "</s>"]
NF4, FP4 = torch.linspace(-1, 1, 16), torch.tensor([0.0, 0.0052, 0.1667, 0.25, 0.333, 0.5, 0.667, 1.0])
ATTENTION = torch.full((4, 7, 7), 1 / 7)

MADE = {
    "curves": lambda: plots.curves(HISTORY, ["train/loss", "val/loss"], smooth=0.5, lines={"uniform": 6.2}),
    "band": lambda: plots.curves(HISTORY, "val/chosen_mean", ylabel="score (deviations)",
                                 band={"val/chosen_mean": "val/chosen_std"}),
    "nothing": lambda: plots.curves([], ["train/loss"]),
    "losses": lambda: plots.losses(HISTORY),
    "losses without accuracy": lambda: plots.losses([{"step": 1, "train/loss": 2.0, "train/lr": 0.1}]),
    "ppo_panel": lambda: plots.ppo_panel(PPO),
    "hacking": lambda: plots.hacking(PPO, PPO[:5]),
    "optimum": lambda: plots.optimum(WALK, 0.0, 0.85, beta=0.2, frontier=[(0.5, 1.1), (0.1, 0.8)]),
    "optimum over iterations": lambda: plots.optimum([{"step": p["step"], "j": p["j"]} for p in WALK], 0.0, 0.85),
    "reward_histogram": lambda: plots.reward_histogram([2.0, 1.0, 0.5, 3.0], torch.tensor([1.0, 1.5, 0.0, -1.0])),
    "intervals": lambda: plots.intervals(ROWS, title="report card"),
    "intervals with ranges": lambda: plots.intervals(ROWS, expected={"ppo": (0.9, 1.0)}),
    "bars": lambda: plots.bars({"sums": (0.5, 0.6), "$x$": (1.0, 0.0)}, ylabel="share (of answers)", series=("a", "b")),
    "many bars": lambda: plots.bars({f"kind {i}": (0.25, 0.45, 0.125) for i in range(8)}, ylabel="share (of answers)",
                                    series=("a", "b", "c"), number="{:.2f}"),
    "attention_grid": lambda: plots.attention_grid(ATTENTION, PIECES, title="layer 0"),
    "attention_grid of five": lambda: plots.attention_grid(ATTENTION[[0] * 5], PIECES),
    "rope_picture": lambda: plots.rope_picture(16, 500_000.0, 40),
    "codebook": lambda: plots.codebook(NF4, FP4),
    "codebook over weights": lambda: plots.codebook(NF4, FP4, weights=torch.linspace(-1, 1, 200)),
    "LivePlot": lambda: plots.LivePlot("ppo/score", "ppo/kl", "train/loss", "val/loss", "val/accuracy").figure(),
}  # fmt: skip
UNITLESS = {"iteration", "optimizer step", "learning rate", "mean |ratio - 1|", "pair of channels, i",
            "cos of the angle", "expected reward"}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def picture(request):
    before = dict(matplotlib.rcParams)
    figure = MADE[request.param]()
    figure.png = figure._repr_png_()
    assert dict(matplotlib.rcParams) == before
    return figure


def shown_axes(picture):
    return [ax for ax in picture.axes if ax.get_visible() and ax.axison]


def test_axes_are_labelled_with_units(picture):
    labels = [label for ax in shown_axes(picture) for label in (ax.get_xlabel(), ax.get_ylabel()) if label]
    assert labels
    assert {label for label in labels if "(" not in label and "key" not in label and "query" not in label} <= UNITLESS


@plots.style()
def test_nothing_is_cut_off_or_written_over(picture):
    box, (width, height) = picture.get_tightbbox(), picture.get_size_inches()
    assert box.x0 >= -0.03 and box.y0 >= -0.03 and box.x1 <= width + 0.03 and box.y1 <= height + 0.03
    panels = [ax.get_tightbbox() for ax in shown_axes(picture)]  # with their labels
    for i, one in enumerate(panels):
        for other in panels[:i]:
            overlap = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(overlap) < 2  # pixels


def test_small_png_that_pyplot_never_hears_of(picture):
    assert picture.png.startswith(b"\x89PNG") and len(picture.png) < 100_000
    assert not matplotlib._pylab_helpers.Gcf.get_all_fig_managers()


def test_the_same_picture_is_the_same_bytes():
    assert MADE["intervals"]()._repr_png_() == MADE["intervals"]()._repr_png_()


def test_curves_leave_out_what_is_missing():
    history = [{"step": 1, "a": 2.0}, {"step": 2}, {"a": 9.0}, {"step": 3, "a": None}, {"step": 4, "a": float("nan")},
               {"step": 5, "a": 4}]  # fmt: skip
    at, values = plots.series(history, "a")
    assert at.tolist() == [1.0, 5.0] and values.tolist() == [2.0, 4.0]
    (line,) = plots.curves(iter(history), ["a", "absent"]).axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 2.0], [5.0, 4.0]]


def test_smoothed_by_hand():
    assert plots.smoothed([1.0, 0.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3, 1 / 7])
    assert plots.smoothed([3.0] * 4, 0.9) == pytest.approx([3.0] * 4)


def test_curves_differ_without_colour():
    lines = plots.curves(HISTORY, ["train/loss", "val/loss", "val/accuracy"]).axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 3


def test_band_is_one_deviation_to_both_sides():
    (band,) = MADE["band"]().axes[0].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.min() == 0.5 and ys.max() == 30.5


def test_hacking_shares_the_iterations():
    left, right = plots.hacking(PPO, PPO[:3]).axes
    assert left.get_shared_x_axes().joined(left, right)
    assert [line.get_label() for line in left.lines] == ["with KL penalty", "kl_coef = 0"]


def test_optimum_says_how_much_of_the_gap_is_closed():
    assert plots.optimum(WALK, 0.0, 1.0).axes[0].get_title() == "80.0% of the gap closed"


def test_reward_histogram_counts_the_pairs_ranked_right():
    figure = plots.reward_histogram([1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 1.0, 1.0])
    assert figure.axes[1].get_title() == "75.0% ranked correctly"


def test_intervals_stand_top_down_at_their_values():
    (ax,) = plots.intervals(ROWS).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sft", "ppo"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.lines[0].get_xdata().tolist() == [0.48, 0.52]
    assert ax.texts[1].get_text() == "0.920  [0.900, 0.940]"


def test_token_heat_writes_the_numbers_and_takes_dollars_as_text():
    values = [float("nan"), 0.5, -0.25, 0.0, 0.125, 1.0, -1.0]
    (ax,) = plots.token_heat(PIECES, values, "KL of $5 and $6, nats").axes
    texts = [text.get_text() for text in ax.texts]
    assert texts[::2] == ["<s>", "▁costs", "▁$5", "▁or", "▁$6", "⏎", "</s>"]
    assert texts[1::2] == ["", "+0.50", "-0.25", "+0.00", "+0.12", "+1.00", "-1.00"]
    assert not any(text.get_parse_math() for text in ax.texts)
    with pytest.raises(ValueError):
        plots.token_heat(PIECES, values[1:])


@pytest.mark.parametrize("names, columns", [(8, 3), (7, 3), (8, 2), (4, 5), (8, 1)])
def test_numbers_of_neighbouring_bars_do_not_run_together(names, columns):
    values = {f"kind {i}": [0.44 - 0.0001 * i] * columns for i in range(names)}  # all of one height
    figure = plots.bars(values, ylabel="share (of answers)", series=[""] * columns, number="{:.2f}")
    figure._repr_png_()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.x0)
    assert len(boxes) == names * columns
    assert all(one.x1 + 2 <= other.x0 for one, other in zip(boxes, boxes[1:], strict=False))  # pixels


def test_token_heat_writes_what_it_is_told_under_the_pieces():
    figure = plots.token_heat(["▁a", "<0x4B>"], [0, 1], under=[270, 83])
    assert [text.get_text() for text in figure.axes[0].texts] == ["▁a", "270", "<0x4B>", "83"]
    plain, marked = (patch.get_facecolor() for patch in figure.axes[0].patches)
    assert plain != marked == matplotlib.colors.to_rgba(plots.shade(1.0))


def test_flow_joins_its_boxes_and_writes_the_note_beside_its_arrow():
    boxes = {"data": (0, 1, "white"), "model": (1, 1, "#dce6f4"), "result": (2, 0, "white")}
    figure = plots.flow(boxes, [(0, 1), (0, 2, "also")])
    (ax,) = figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [(t.get_text(), t.get_position()) for t in ax.texts[:3]] == [(k, v[:2]) for k, v in boxes.items()]
    ends = [(t.xyann, t.xy) for t in ax.texts if hasattr(t, "xyann")]
    assert ends == [((0, 1), (1, 1)), ((0, 1), (2, 0))]
    assert ["also"] == [t.get_text() for t in ax.texts[3:] if t.get_text()]


def test_token_heat_wraps_and_stays_in_the_picture():
    (ax,) = plots.token_heat(["▁word"] * 100, np.linspace(-1, 1, 100)).axes
    assert max(cell.get_x() + cell.get_width() for cell in ax.patches) <= ax.get_xlim()[1]
    assert len({cell.get_y() for cell in ax.patches}) > 5


def test_shade_keeps_black_text_readable_and_its_sign_apart():
    def darkness(colour):
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 1 - (0.299 * r + 0.587 * g + 0.114 * b)

    assert plots.shade(0.0) == plots.shade(float("nan")) == "#f6f6f7"
    assert all(darkness(plots.shade(value)) < 0.55 for value in (-5.0, -1.0, 1.0))
    assert plots.shade(1.0) != plots.shade(-1.0)


def test_attention_hides_the_future_only():
    image = plots.attention_grid(ATTENTION, PIECES).axes[0].images[0].get_array()
    assert image.mask.sum() == 7 * 6 / 2 and not image.mask[3, :4].any() and image.mask[3, 4:].all()


def test_rope_picture_by_hand():
    picture = plots.rope_picture(4, 100.0, 3)  # two pairs: 1 and 1/10 radian a position
    expected = [[1, math.cos(1), math.cos(2)], [1, math.cos(0.1), math.cos(0.2)]]
    np.testing.assert_allclose(picture.axes[0].images[0].get_array(), expected)
    np.testing.assert_allclose(picture.axes[1].lines[0].get_ydata(), np.mean(expected, axis=0))


# ---------------------------------------------------------------- the live plot


class Display:
    """What IPython's display does, counted."""

    def __init__(self):
        self.shown, self.updates = [], []

    def __call__(self, picture, display_id=False):
        assert display_id is True
        self.shown.append(picture)
        return self

    def update(self, picture):
        self.updates.append(picture)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", "0")  # as where somebody watches
    now = [100.0]
    monkeypatch.setattr(plots.time, "monotonic", lambda: now[0])
    return now


def test_live_plot_draws_at_most_every_two_seconds_and_once_at_the_end(clock):
    display = Display()
    watch = plots.LivePlot("train/loss", show=display)
    for step in range(1, 101):  # 0.1 s a step, ten seconds in all
        watch({"step": step, "train/loss": 1.0 / step})
        clock[0] += 0.1
    assert len(display.shown) == 1 and 3 <= len(display.updates) <= 4
    watch.close()
    watch.close()
    assert len(display.updates) <= 5
    last = display.updates[-1].axes[0].lines[0]
    assert len(last.get_xdata()) == 100


def test_live_plot_spends_little_of_the_time_drawing(clock, monkeypatch):
    display = Display()
    watch = plots.LivePlot("train/loss", show=display)
    draw = watch.figure
    monkeypatch.setattr(watch, "figure", lambda: (clock.__setitem__(0, clock[0] + 1.0), draw())[1])  # one second each
    for step in range(1000):
        watch({"step": step, "train/loss": 1.0})
        clock[0] += 0.1
    assert len(display.shown) + len(display.updates) <= 6


@pytest.mark.parametrize("static", ["1", "yes", ""])  # "": no front end either
def test_live_plot_that_nobody_watches_is_drawn_once_at_the_end(clock, monkeypatch, static):
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", static)
    display = Display()
    with plots.LivePlot("train/loss", show=display) as watch:
        for step in range(1, 101):
            watch({"step": step, "train/loss": 1.0 / step})
            clock[0] += 10.0
        assert display.shown == []
    assert len(display.shown) == 1 and display.updates == []
    assert len(display.shown[0].axes[0].lines[0].get_xdata()) == 100


def test_live_plot_closes_with_its_block_even_when_training_stops(clock):
    display = Display()
    with pytest.raises(KeyboardInterrupt), plots.LivePlot("train/loss", show=display) as watch:
        watch({"step": 1, "train/loss": 2.0})
        watch({"step": 2, "train/loss": 1.0})
        raise KeyboardInterrupt
    assert len(display.updates[-1].axes[0].lines[0].get_xdata()) == 2


def test_live_plot_does_nothing_outside_a_notebook(capfd):
    with plots.LivePlot() as watch:
        watch({"step": 1, "train/loss": 2.0})
    assert watch.history == [{"step": 1, "train/loss": 2.0}] and watch._handle is None
    assert capfd.readouterr() == ("", "")


def test_live_plot_groups_keys_that_end_alike():
    watch = plots.LivePlot("train/loss", "val/loss", "val/accuracy", smooth=0.5)
    assert watch.groups == [["train/loss", "val/loss"], ["val/accuracy"]]
    for record in HISTORY:
        watch(record)
    left, right = watch.figure().axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss (nats)", "accuracy (share)")


def test_long_names_under_bars_are_slanted_and_a_legend_stands_beside_the_title():
    few, many = (
        plots.bars({f"skill number {i}": [0.5, 0.7] for i in range(n)}, ylabel="share", series=("a", "b"), title="t")
        for n in (3, 12)
    )
    slant = [{label.get_rotation() for label in picture.axes[0].get_xticklabels()} for picture in (few, many)]
    assert slant == [{0.0}, {35.0}]
    assert few.axes[0].get_title(loc="left") == "t"
    few.draw_without_rendering()
    assert few.axes[0].get_legend().get_window_extent().y0 >= few.axes[0].get_window_extent().y1 - 1


def test_the_shading_of_intervals_is_called_as_told():
    (ax,) = plots.intervals(ROWS, expected={"ppo": (0.5, 1.0)}, shaded="one half to ceiling").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one half to ceiling"]
