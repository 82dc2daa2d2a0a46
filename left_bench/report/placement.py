"""Labels beside the points of a scatter plot, none on top of another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

Box = tuple[float, float, float, float]
"""Left, bottom, right, top; pixels."""
_FONT_SIZE = 8
_PADDING = 1.5
_MARKER = 4.5
_DIRECTIONS = tuple(math.radians(angle) for angle in (0, 180, 30, 150, 330, 210, 60, 120, 300, 240, 90, 270))
_CLOSEST, _NEAR, _FAR = 6, 60, 600  # distances of a label's edge from its point; points


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    *,
    avoid: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
    crowd: Sequence[tuple[float, float]] = (),
) -> list[Annotation]:
    """Write each label near its point where it covers neither another label nor a point.

    Places are tried nearest first, in twelve directions, inside the axes; a label that had to move away gets a thin
    line to its point. The axes' limits have to be final.

    Args:
        points: data coordinates, one per label.
        crowd: points without a label, not to be covered either.
        avoid: upright or level line segments, as two points each, that a label covers only where no near place is free.
    """
    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()  # the layout has to be settled before pixels can be counted
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    pixels_per_point = figure.get_dpi() / 72
    centres = [(float(x), float(y)) for x, y in map(axes.transData.transform, points)]
    bounds = axes.get_window_extent(renderer)
    inside: Box = (bounds.x0, bounds.y0, bounds.x1, bounds.y1)
    marker = _MARKER * pixels_per_point
    unnamed = [(float(x), float(y)) for x, y in map(axes.transData.transform, crowd)]
    taken: list[Box] = [(x - marker, y - marker, x + marker, y + marker) for x, y in [*centres, *unnamed]]
    lines = [_segment_box(axes.transData.transform(start), axes.transData.transform(end)) for start, end in avoid]
    placed: list[Annotation] = []
    # crowded points choose first: a lonely one finds room anywhere
    order = sorted(range(len(points)), key=lambda i: sorted(math.dist(centres[i], other) for other in centres)[1:4])
    for i in order:
        text = axes.annotate(
            labels[i], points[i], (0, 0), textcoords="offset points", fontsize=_FONT_SIZE, ha="center", va="center"
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})
        extent = text.get_window_extent(renderer)
        half = (extent.width / 2 + _PADDING, extent.height / 2 + _PADDING)
        dx, dy, radius = _free_place(centres[i], half, taken, lines, inside, pixels_per_point)
        text.set_position((dx / pixels_per_point, dy / pixels_per_point))
        if radius > 3 * _CLOSEST:
            _leader(axes, points[i], (dx, dy), half, pixels_per_point)
        x, y = centres[i]
        taken.append((x + dx - half[0], y + dy - half[1], x + dx + half[0], y + dy + half[1]))
        text.set_gid(f"label-{i}")
        placed.append(text)
    return placed


def _free_place(
    centre: tuple[float, float],
    half: tuple[float, float],
    taken: Sequence[Box],
    lines: Sequence[Box],
    inside: Box,
    pixels_per_point: float,
) -> tuple[float, float, int]:
    """Offset of the label's centre from the point in pixels, and the radius in points at which it was found."""
    # near and off the lines, else over a line, else beside the axes of a plot that is too full
    for within, blocked, furthest in ((True, [*taken, *lines], _NEAR), (True, taken, _FAR), (False, taken, _FAR)):
        for dx, dy, radius in _offsets(half, pixels_per_point, furthest):
            x, y = centre[0] + dx, centre[1] + dy
            box = (x - half[0], y - half[1], x + half[0], y + half[1])
            fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
            if (fits or not within) and not any(overlap(box, other) for other in blocked):
                return dx, dy, radius
    return 0.0, 0.0, 0


def _segment_box(start: Any, end: Any) -> Box:
    (x0, x1), (y0, y1) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return (x0, y0, x1, y1)


def _offsets(half: tuple[float, float], pixels_per_point: float, furthest: int) -> Iterator[tuple[float, float, int]]:
    for radius in range(_CLOSEST, furthest, 6):
        for angle in _DIRECTIONS:
            reach = radius * pixels_per_point
            # the box's edge, not its centre, stands at the radius
            dx = math.cos(angle) * reach + math.copysign(half[0], math.cos(angle)) * (abs(math.cos(angle)) > 0.1)
            dy = math.sin(angle) * reach + math.copysign(half[1], math.sin(angle)) * (abs(math.sin(angle)) > 0.1)
            yield dx, dy, radius


def _leader(
    axes: Axes,
    point: tuple[float, float],
    offset: tuple[float, float],
    half: tuple[float, float],
    pixels_per_point: float,
) -> None:
    """A thin line from the point to the nearest edge of its label."""
    dx, dy = offset
    end = (dx - math.copysign(min(half[0], abs(dx)), dx), dy - math.copysign(min(half[1], abs(dy)), dy))
    axes.annotate(
        "",
        point,
        (end[0] / pixels_per_point, end[1] / pixels_per_point),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": "#8C8C8C", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        zorder=1,
    )


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
