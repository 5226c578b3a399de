"""An evaluation as a picture: right answers against tokens per second and against tokens per forward pass.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; shapes tell the rules apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from dllm_export.tools.frontier import Evaluation, Outcome, find_frontier

Measure: TypeAlias = Callable[[Outcome], float]
Box: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Lower left and upper right corner, in pixels."""

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
GREY = "#5f5f5f"
INCHES, DPI = (8.4, 4.9), 200
"""At 840 pixels, the width of a README, a point is 1.39 pixels: no text is below 8.5 points."""
SMALL, TEXT, TITLE = 8.5, 9.0, 10.5
MARK, GAP = 6.0, 4.0
NEAR, FAR = 58, 250
"""How far a label may be from its mark: the frontier is named in any case, another mark only where there is room."""


def draw_chart(evaluation: Evaluation, path: Path) -> Figure:
    """Draw the picture and save it; the file's ending says in which format."""
    figure = Figure(figsize=INCHES, dpi=DPI, facecolor="white")
    styles = Styles(evaluation.outcomes)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.86, bottom=styles.bottom, wspace=0.07)
    draw_panel(left, evaluation.outcomes, lambda outcome: outcome.speed, styles)
    draw_panel(right, evaluation.outcomes, lambda outcome: outcome.tokens_per_pass, styles)
    left.set_xlabel("tokens per second", fontsize=TEXT)
    right.set_xlabel("tokens per forward pass", fontsize=TEXT)
    left.set_ylabel("right answers", fontsize=TEXT)
    figure.text(0.012, 0.955, "Right answers against speed", fontsize=TITLE, weight="bold")
    figure.text(0.012, 0.905, describe_figure(evaluation), fontsize=SMALL, color=GREY)
    styles.draw_keys(figure)
    for axes, measure in ((left, lambda one: one.speed), (right, lambda one: one.tokens_per_pass)):
        label_groups(axes, evaluation.outcomes, measure)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return figure


def describe_figure(evaluation: Evaluation) -> str:
    """What the picture shows, in one line."""
    asked = max((outcome.asked for outcome in evaluation.outcomes), default=0)
    return (
        f"{len(evaluation.outcomes)} combinations of a cache policy and a decoding rule, {asked} answers each. The line is "
        f"the frontier, bars are 95 % intervals."
    )


class Styles:
    """A colour for each policy and a shape for each rule, and the key to them below the panels."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
        self.rules = list(dict.fromkeys(outcome.transfer for outcome in outcomes))

    def colour(self, policy: str) -> str:
        """Colours come again after seven policies, then as outlines."""
        return COLOURS[self.policies.index(policy) % len(COLOURS)]

    def face(self, policy: str) -> str:
        """The inside of a mark."""
        return self.colour(policy) if self.policies.index(policy) < len(COLOURS) else "white"

    def shape(self, rule: str) -> str:
        """The mark of a rule."""
        return SHAPES[self.rules.index(rule) % len(SHAPES)]

    @property
    def lines(self) -> tuple[int, int]:
        """Lines that the keys of policies and rules take."""
        return -(-len(self.policies) // 7), -(-len(self.rules) // 7)

    @property
    def bottom(self) -> float:
        """Where the panels end, as a share of the figure's height."""
        return 0.135 + 0.05 * sum(self.lines)

    def draw_keys(self, figure: Figure) -> None:
        """Two lists without a frame: colours, then shapes."""
        dots = [self._mark("o", self.colour(name), self.face(name), name) for name in self.policies]
        marks = [self._mark(self.shape(name), GREY, GREY, name) for name in self.rules]
        for title, handles, rows, below in (
            ("policy", dots, self.lines[0], self.lines[1]),
            ("rule", marks, self.lines[1], 0),
        ):
            height = 0.05 * (below + rows)
            figure.text(0.012, height - 0.0215, title, fontsize=SMALL, color=GREY, va="center")
            figure.legend(
                handles=handles,
                loc="upper left",
                bbox_to_anchor=(0.06, height),
                ncols=-(-len(handles) // rows),
                frameon=False,
                fontsize=SMALL,
                handletextpad=0.1,
                columnspacing=1.1,
                borderpad=0.15,
                borderaxespad=0.2,
            )

    def _mark(self, shape: str, colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [], [], marker=shape, color=colour, markerfacecolor=face, linestyle="none", markersize=5.5, label=label
        )


def draw_panel(axes: Axes, outcomes: Sequence[Outcome], measure: Measure, styles: Styles) -> None:
    """All outcomes, the interval of those on the frontier, and the frontier as steps."""
    frontier = [outcomes[place] for place in find_frontier([(measure(one), one.share) for one in outcomes])]
    speeds, shares = [measure(one) for one in frontier], [100 * one.share for one in frontier]
    axes.set_xscale("log")
    axes.step(
        [min(measure(one) for one in outcomes), *speeds], [shares[0], *shares], where="pre", color="#9a9a9a", zorder=1
    )
    for one in frontier:
        axes.vlines(measure(one), 100 * one.low, 100 * one.high, color="#c8c8c8", linewidth=1.2, zorder=0)
    for one in outcomes:
        axes.plot(
            measure(one),
            100 * one.share,
            marker=styles.shape(one.transfer),
            color=styles.colour(one.policy),
            markerfacecolor=styles.face(one.policy),
            markersize=MARK,
            markeredgewidth=0.9,
            alpha=0.85,
            linestyle="none",
            zorder=3 if one in frontier else 2,
        )
    low = min(min(100 * one.share for one in outcomes), *(100 * one.low for one in frontier))
    high = max(max(100 * one.share for one in outcomes), *(100 * one.high for one in frontier))
    span = max(high - low, 1.0)
    # Room above the marks for the labels.
    axes.set_ylim(low - 0.08 * span, high + 0.35 * span)
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if low - 0.08 * span <= tick <= 100])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    slowest, fastest = min(map(measure, outcomes)), max(map(measure, outcomes))
    room = max((fastest / slowest) ** 0.12, 1.3)
    axes.set_xlim(slowest / room, fastest * room)
    axes.tick_params(labelsize=SMALL, colors=GREY, length=3)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bdbdbd")


def label_groups(axes: Axes, outcomes: Sequence[Outcome], measure: Measure) -> None:
    """Names beside marks, one label for marks that lie on one another; the frontier's come first and are bold."""
    places = find_frontier([(measure(one), one.share) for one in outcomes])
    frontier = [outcomes[place] for place in places]
    spots = [tuple(axes.transData.transform((measure(one), 100 * one.share))) for one in outcomes]
    half = MARK / 2 * DPI / 72 + 2
    taken = [(np.subtract(spot, half), np.add(spot, half)) for spot in spots]
    far, near = offsets(FAR), offsets(NEAR)
    groups = [[outcomes[place] for place in group] for group in find_groups(spots, (4 * half, 2 * half))]
    names = Names(outcomes)
    for members in sorted(groups, key=lambda group: not any(one in frontier for one in group)):
        best = [one for one in members if one in frontier]
        point = measure((best or members)[-1]), 100 * (best or members)[-1].share
        text, weight = names.describe(members), "bold" if best else "normal"
        offset = find_place(axes, text, weight, point, taken, far if best else near)
        if offset is not None:
            axes.annotate(
                text,
                point,
                xytext=offset,
                textcoords="offset points",
                fontsize=SMALL,
                weight=weight,
                ha="center",
                va="center",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
                zorder=4,
            )


def find_groups(spots: Sequence[tuple[float, ...]], reach: tuple[float, float]) -> list[list[int]]:
    """Places of marks that touch one another, from left to right: within `reach` (across, up) of a group's first."""
    groups: list[list[int]] = []
    for place in sorted(range(len(spots)), key=lambda place: spots[place]):
        near = (
            group
            for group in groups
            if all(abs(a - b) < far for a, b, far in zip(spots[group[0]], spots[place], reach, strict=True))
        )
        group = next(near, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


class Names:
    """What to call some of the outcomes, in few words."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._policies = list(dict.fromkeys(one.policy for one in outcomes))
        self._rules = list(dict.fromkeys(one.transfer for one in outcomes))

    def describe(self, members: Sequence[Outcome]) -> str:
        """Policies, then rules."""
        policies = [name for name in self._policies if any(one.policy == name for one in members)]
        rules = [name for name in self._rules if any(one.transfer == name for one in members)]
        return f"{self._list(policies, self._policies, 'policies', 4)}\n{self._list(rules, self._rules, 'rules', 2)}"

    def _list(self, some: list[str], every: list[str], noun: str, most: int) -> str:
        if len(some) == 1 or len(every) == 2:
            return ", ".join(some)
        if len(some) == len(every):
            return f"all {noun}"
        rest = [name for name in every if name not in some]
        if len(rest) == 1:
            return f"all {noun} but {rest[0]}"
        lines = [", ".join(some[start : start + 2]) for start in range(0, len(some), 2)]
        return ",\n".join(lines) if len(some) <= most else f"{len(some)} {noun}"


def find_place(
    axes: Axes, text: str, weight: str, point: tuple[float, float], taken: list[Box], places: NDArray[np.float64]
) -> tuple[float, float] | None:
    """The first of these offsets, in points, where a label is free; it is taken then. None where all are taken."""
    probe = axes.text(0, 0, text, fontsize=SMALL, weight=weight)
    size, panel = probe.get_window_extent(), axes.get_window_extent()
    probe.remove()
    centre = axes.transData.transform(point) + places * DPI / 72
    half = np.array([size.width / 2 + GAP, size.height / 2 + GAP])
    low, high = centre - half, centre + half
    free = (low > (panel.x0, panel.y0)).all(1) & (high < (panel.x1, panel.y1)).all(1)
    for box in taken:
        free &= ~((low < box[1]).all(1) & (high > box[0]).all(1))
    if not free.any():
        return None
    place = int(np.argmax(free))
    taken.append((low[place], high[place]))
    return float(places[place][0]), float(places[place][1])


def offsets(most: float) -> NDArray[np.float64]:  # [places, 2]
    """Places around a point in points, nearest first; above before below, and beside it last: there runs the frontier."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(-132.0, 133, 6), np.arange(-90.0, 91, 6)))
    cost = 0.8 * abs(x) + abs(y) + np.where(y < 0, 12, 0) + np.where(abs(y) < 14, 40, 0)
    order = np.argsort(cost, kind="stable")
    wanted = order[((abs(y) >= 14) | (abs(x) >= 26))[order] & (cost[order] <= most)]
    places: NDArray[np.float64] = np.stack((x, y), axis=1)[wanted]
    return places
