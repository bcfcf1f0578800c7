"""Plots of an ablation. matplotlib is imported when one is drawn; it takes a second to load."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, pairwise
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's palette, told apart by colour-blind readers as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C2E", "#444444")
MARKERS = "osD^vPXp"
INK, GRID = "#222222", "#E3E3E3"
Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""
MANY = 48
"""More points than this have a legend of their series in place of labels."""
LOSSLESS = 1e-6
"""A KL below this is the rounding of float32 logits; a log scale has no place for it."""


@dataclass(frozen=True)
class Point:
    """A scheme in the plot of quality against size.

    Args:
        series: points of a series are joined.
        label: written at the point, or in a legend.
        bits: bits per element.
        kl: mean KL with the bounds of its interval.
    """

    series: str
    label: str
    bits: float
    kl: tuple[float, float, float]


@dataclass(frozen=True)
class RecallMap:
    """Recall of a scheme at (depth, length)."""

    label: str
    recall: Mapping[tuple[float, int], float]


def _figure(width: float, height: float) -> Figure:
    # A Figure of its own, without pyplot: no window system is asked for and no global state set.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quality_figure(points: Sequence[Point]) -> Figure | None:
    """Mean KL (log scale) against bits per element; None if no point has any loss to show."""
    shown = [p for p in points if p.kl[0] > LOSSLESS]
    if not shown:
        return None
    figure = _figure(8.4, 5.4)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    _frame(axes, shown, [p.label for p in points if p not in shown])
    series: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(shown, key=lambda p: (p.bits, -p.kl[0])):
        series[point.series].append(point)
    # After all colours the markers go on by one: no two of 64 series look alike.
    styles = [(c, MARKERS[(i + j) % 8]) for j in range(8) for i, c in enumerate(COLORS)]
    lines = []
    for own, (color, marker) in zip(series.values(), cycle(styles), strict=False):
        x, y = [p.bits for p in own], [p.kl[0] for p in own]
        low = [max(0.0, p.kl[0] - max(p.kl[1], LOSSLESS)) for p in own]
        high = [max(0.0, p.kl[2] - p.kl[0]) for p in own]
        axes.errorbar(x, y, yerr=(low, high), fmt="none", ecolor=color, alpha=0.5, lw=1.2, zorder=2)
        axes.plot(x, y, color=color, lw=1.4, alpha=0.6, zorder=2)
        lines += axes.plot(
            x, y, ls="", color=color, marker=marker, ms=7, mec="white", mew=0.8, zorder=4
        )
    if len(shown) > MANY:
        figure.set_figwidth(10.4)
        figure.legend(lines, list(series), loc="outside right upper", fontsize=8, frameon=False)
    else:
        colors = dict(zip(series, cycle(COLORS), strict=False))
        _label(figure, axes, shown, [colors[p.series] for p in shown])
    return figure


def pareto_figure(points: Sequence[Point], fused: Sequence[bool]) -> Figure | None:
    """Mean KL against measured size, `bits` in MiB, with the front that nothing beats in both.

    Points carry numbers, from small to large, and a legend their labels. Schemes that a fused
    kernel serves are filled, others hollow. None if there is no loss to show.
    """
    shown = [(p, f) for p, f in zip(points, fused, strict=True) if p.kl[0] > LOSSLESS]
    if not shown:
        return None
    shown.sort(key=lambda s: (s[0].bits, -s[0].kl[0]))
    placed = [p for p, _ in shown]
    names = [f"{i}  {p.label}" for i, p in enumerate(placed, 1)]
    # Inches that the legend takes beside the axes, or above their usual height.
    figure = _figure(6.6 + 0.07 * max(map(len, names)), max(5.4, 0.6 + 0.165 * len(names)))
    axes = figure.add_subplot()
    axes.set_yscale("log")
    _frame(axes, placed, [p.label for p in points if p.kl[0] <= LOSSLESS])
    axes.set_xlabel("MiB of the cache in use, exact window and metadata counted", color=INK)
    front = pareto_front(placed)
    axes.plot([p.bits for p in front], [p.kl[0] for p in front], "--", color=INK, lw=1, zorder=2)
    colors = [COLORS[0] if p in front else COLORS[7] for p in placed]
    marks = [
        axes.scatter(
            p.bits, p.kl[0], s=46, color=color if solid else "white", edgecolors=color, lw=1.4,
            zorder=4,
        )
        for (p, solid), color in zip(shown, colors, strict=True)
    ]  # fmt: skip
    axes.set_title("Loss of quality against measured size (filled: fused kernel)", loc="left")
    figure.legend(
        marks, names, loc="outside right upper", fontsize=8, labelcolor=colors, frameon=False,
        handletextpad=0.2, labelspacing=0.45,
    )  # fmt: skip
    _number(figure, axes, placed, colors)
    return figure


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in size and loss at once, from small to large."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.kl[0])):
        if not front or point.kl[0] < front[-1].kl[0]:
            front.append(point)
    return front


def _frame(axes: Axes, points: Sequence[Point], lossless: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    bits, loss = [p.bits for p in points], [p.kl[0] for p in points]
    span = max(max(bits) - min(bits), 1.0)
    axes.set_xlim(min(bits) - 0.12 * span, max(bits) + 0.3 * span)
    decades = max(math.log10(max(loss) / min(loss)), 0.5)
    axes.set_ylim(min(loss) / 10 ** (0.2 * decades), max(loss) * 10 ** (0.15 * decades))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("bits per element, metadata counted", color=INK)
    axes.set_ylabel("mean KL to full precision, nats", color=INK)
    axes.set_title("Loss of quality against cache size", loc="left", color=INK, weight="bold")
    axes.grid(True, color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    note = "lower left is better" + (f"; without loss: {', '.join(lossless)}" if lossless else "")
    axes.annotate(
        note, (0.0, 0.0), (8, 8), xycoords="axes fraction", textcoords="offset points",
        color="#888888", fontsize=9, style="italic",
    )  # fmt: skip


def _label(figure: Figure, axes: Axes, points: Sequence[Point], colors: Sequence[str]) -> None:
    """Write the labels of points with about the same bits in a column beside them.

    The column stands to the right unless that would cover more points or labels than the left.
    """
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # from here on data have places
    places = [axes.transData.transform((p.bits, p.kl[0])) for p in points]
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in places]
    for column in _columns([x for x, _ in places]):
        column.sort(key=lambda i: places[i][1])
        texts = [
            axes.annotate(
                points[i].label, (0, 0), xycoords="figure pixels", color=colors[i], fontsize=9,
                va="center", zorder=5, path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            for i in column
        ]  # fmt: skip
        widths = [t.get_window_extent().width for t in texts]
        heights = _spread([places[i][1] for i in column], LINE)
        right = max(places[i][0] for i in column) + GAP
        left = min(places[i][0] for i in column) - GAP
        sides = [
            [(right, y - LINE / 2, right + w, y + LINE / 2) for y, w in zip(heights, widths)],  # noqa: B905
            [(left - w, y - LINE / 2, left, y + LINE / 2) for y, w in zip(heights, widths)],  # noqa: B905
        ]
        frame = cast(Box, tuple(axes.bbox.extents))
        boxes = min(sides, key=lambda side: sum(_covered(box, taken, frame) for box in side))
        taken += boxes
        for i, text, box in zip(column, texts, boxes, strict=True):
            middle = (box[1] + box[3]) / 2
            text.set_position((box[0], middle))
            end = (box[0] - 3 if boxes is sides[0] else box[2] + 3, middle)
            # A label that is not right beside its point needs a line to it.
            if abs(middle - places[i][1]) > LINE / 3 or abs(end[0] - places[i][0]) > GAP:
                line = axes.transData.inverted().transform([tuple(places[i]), end])
                axes.plot(*line.T, color=colors[i], lw=0.8, alpha=0.8, zorder=3)


def _number(figure: Figure, axes: Axes, points: Sequence[Point], colors: Sequence[str]) -> None:
    """Write 1, 2, ... each as close to its point as no marker and no other text is."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # from here on data have places, which nothing may move
    figure.set_layout_engine("none")
    frame = cast(Box, tuple(axes.bbox.extents))
    places = [axes.transData.transform((p.bits, p.kl[0])) for p in points]
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in places]
    taken += [cast(Box, tuple(text.get_window_extent().extents)) for text in axes.texts]
    for i, (x, y) in enumerate(places):
        text = axes.annotate(
            str(i + 1), (x, y), xycoords="figure pixels", color=colors[i], fontsize=8, ha="center",
            va="center", zorder=5, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        size = text.get_window_extent()
        for turn in count():
            # Around the point, and around again a little farther out.
            radius, angle = MARK + 12 + 10 * (turn // 16), math.tau * (turn % 16) / 16
            at = (x + radius * math.cos(angle), y + radius * math.sin(angle))
            half = (size.width / 2 + 1, size.height / 2 + 1)
            box = (at[0] - half[0], at[1] - half[1], at[0] + half[0], at[1] + half[1])
            if _covered(box, taken, frame) == 0:
                break
        taken.append(box)
        text.set_position(at)
        if turn >= 16:  # with others in between
            share = 1 - half[0] / radius  # short of the number
            end = (x + share * (at[0] - x), y + share * (at[1] - y))
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*line.T, color=colors[i], lw=0.7, zorder=3)


# Pixels: half a marker, from points to labels, from line to line of labels, between columns.
MARK, GAP, LINE, CLOSE = 9.0, 30.0, 22.0, 60.0


def _columns(x: Sequence[float]) -> list[list[int]]:
    """Indices of points that stand so close that labels of one would hide the next."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    columns = [[order[0]]]
    for before, i in pairwise(order):
        if x[i] - x[before] > CLOSE:
            columns.append([])
        columns[-1].append(i)
    return columns


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending heights at least `gap` apart, each group of neighbours centred on what it wants."""
    groups: list[list[float]] = []  # of wanted heights
    for y in wanted:
        groups.append([y])
        while len(groups) > 1 and _span(groups[-2], gap)[1] + gap > _span(groups[-1], gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_span(group, gap)[0] + i * gap for group in groups for i in range(len(group))]


def _span(group: Sequence[float], gap: float) -> tuple[float, float]:
    centre, half = sum(group) / len(group), (len(group) - 1) * gap / 2
    return centre - half, centre + half


def _covered(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Area that a box shares with others, and what of its sides lies outside of the frame."""
    area = 0.0
    for other in taken:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        area += max(width, 0.0) * max(height, 0.0)
    outside = max(frame[0] - box[0], 0.0) + max(box[2] - frame[2], 0.0)
    outside += max(frame[1] - box[1], 0.0) + max(box[3] - frame[3], 0.0)
    return area + 1000 * outside


def passkey_figure(maps: Sequence[RecallMap]) -> Figure:
    """Recall by depth and length, one panel for each scheme.

    Raises:
        ValueError: without maps.
    """
    if not maps:
        raise ValueError("maps is empty; no recall to draw")
    columns = min(len(maps), 5 if len(maps) > 8 else 4)
    rows = -(-len(maps) // columns)
    depths = sorted({depth for m in maps for depth, _ in m.recall})
    lengths = sorted({length for m in maps for _, length in m.recall})
    panel = max(1.7, 0.55 * len(lengths))
    figure = _figure(panel * columns + 1.3, (0.33 * len(depths) + 0.75) * rows + 0.6)
    figure.suptitle("Passkey recall by length and depth", x=0.01, ha="left", weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, recall_map in zip(grid.flat, maps, strict=False):
        image = _heat(axes, recall_map, depths, lengths)
    for axes in grid.flat[len(maps) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("depth of the key", fontsize=8, color=INK)
    for i, axes in enumerate(grid.flat[: len(maps)]):
        if i + columns >= len(maps):  # nothing below, even where the last row is short
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("tokens", fontsize=8, color=INK)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, aspect=25, pad=0.015)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"], fontsize=8)
    bar.outline.set_visible(False)
    return figure


def _heat(axes: Axes, m: RecallMap, depths: Sequence[float], lengths: Sequence[int]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("recall", ["#B2402A", "#F3E3C8", "#0A6A64"])
    colors = ramp.with_extremes(bad="#EEEEEE")
    values = [[m.recall.get((d, n), math.nan) for n in lengths] for d in depths]
    image = axes.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = INK if 0.2 < value < 0.8 else "white"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_title(m.label, fontsize=8.5, color=INK, loc="left")
    axes.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return image


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
