"""Pictures of policies in the plane of KL and score, with the exact frontier of the best ones."""

from __future__ import annotations

from collections.abc import Sequence

from ..conformance import EXACT, Report, frontier
from .style import COLOURS, Picture, panels, style


@style()
def conformance_picture(reports: Sequence[Report]) -> Picture:
    """Each loss by its gradient (left) and by the policy that it leads to (right), with the numbers of the left.

    Left: the cosine of its expected gradient with that of J. Right: KL and score of that policy and, as a line, the
    highest score at each KL; the star is the optimum of J.
    """
    figure, (left, right) = panels(1, 2, size=(10.0, 1.2 + 0.2 * len(reports)), width_ratios=(3, 2))
    rows = range(len(reports))
    exact = [report.cosine > EXACT for report in reports]
    colours = [COLOURS[0] if is_exact else COLOURS[1] for is_exact in exact]
    hatches = ["" if is_exact else "////" for is_exact in exact]  # for readers in greyscale
    left.barh(rows, [report.cosine for report in reports], color=colours, hatch=hatches, edgecolor="white", height=0.7)
    left.set_yticks(rows, [f"{report.variant.name}  {row + 1}" for row, report in zip(rows, reports, strict=True)])
    left.invert_yaxis()
    left.set(xlabel="cosine with the gradient of J", xlim=(min(-0.35, *(r.cosine for r in reports)), 1.05))
    kls, scores = zip(*frontier(), strict=True)
    right.plot(kls, scores, color="0.3", linewidth=1.2, label="frontier")
    for row, report in zip(rows, reports, strict=True):
        right.plot(report.kl, report.score, "o" if exact[row] else "x", color=colours[row])
    for (kl, score), names in _places(reports).items():
        right.annotate(", ".join(names), (kl, score), xytext=(4, -9), textcoords="offset points", fontsize=7)
    right.plot([], [], "o", color=COLOURS[0], label="gradient of J")
    right.plot([], [], "x", color=COLOURS[1], label="another gradient")
    right.legend(loc="lower right")
    right.set(xlabel="KL to the reference (nats per response)", ylabel="E[r]")
    return figure


def _places(reports: Sequence[Report]) -> dict[tuple[float, float], list[str]]:
    """The numbers of the reports at each point (KL, E[r]), points closer than the markers' size taken together."""
    places: dict[tuple[float, float], list[str]] = {}
    for number, report in enumerate(reports, start=1):
        near = (place for place in places if abs(place[0] - report.kl) < 0.15 and abs(place[1] - report.score) < 0.05)
        places.setdefault(next(near, (report.kl, report.score)), []).append(str(number))
    return places
