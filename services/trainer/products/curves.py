"""The course of a training as a picture: losses, distance and quality over the steps."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Json = dict[str, Any]
Points = Sequence[tuple[float, float]]

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 900, 260, 60, 150, 30, 34
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167))
"""Four colours of Okabe and Ito's palette, which people with any colour vision can tell apart."""
INK, GRID = (60, 60, 60), (225, 225, 225)
FONT = ImageFont.load_default(13)
QUALITIES = ("precision", "recall", "coverage")
TICKS = 5


def draw(rounds: Sequence[Json], threshold: float | None) -> Image.Image:
    """Draw the rounds of a training, one panel above the other.

    Args:
        rounds: the content of each evaluation.json, oldest first.
        threshold: the relative distance at which a model is approved; None if another metric decides.
    """
    step = 0.0
    losses: dict[str, list[tuple[float, float]]] = {"generator": [], "discriminator": []}
    distances, qualities = [], {name: list[tuple[float, float]]() for name in QUALITIES}
    for done in rounds:
        for loss in done["losses"]:
            step = loss["step"]
            for name, points in losses.items():
                points.append((step, loss[f"{name}_loss"]))
        evaluation = done["told"]["evaluation"]
        distances.append((step, evaluation["relative_fd"]))
        for name in QUALITIES if evaluation.get("quality") else ():
            qualities[name].append((step, evaluation["quality"][name]))
    image = Image.new("RGB", (WIDTH, 3 * PANEL), "white")
    canvas = ImageDraw.Draw(image)
    marks = {"real to real": 1.0} | ({} if threshold is None else {"threshold": threshold})
    _panel(canvas, 0, "mean loss", losses)
    _panel(canvas, PANEL, "relative distance (logarithmic)", {"relative FD": distances}, marks, logarithmic=True)
    _panel(canvas, 2 * PANEL, "quality", qualities, {"": 1.0})
    return image


def _panel(
    canvas: ImageDraw.ImageDraw,
    above: int,
    title: str,
    lines: Mapping[str, Points],
    marks: Mapping[str, float] | None = None,
    *,
    logarithmic: bool = False,
) -> None:
    """Draw lines over the steps, with their names at the right, and level marks."""
    marks = marks or {}
    every = [point for points in lines.values() for point in points if math.isfinite(point[1])]
    steps, values = [x for x, _ in every] or [1.0], [y for _, y in every] + list(marks.values())

    def scaled(value: float) -> float:
        return math.log10(max(value, 1e-3)) if logarithmic else value

    low = min(map(scaled, values)) if logarithmic else min([0.0, *values])
    high = max([*map(scaled, values), low + 1e-6])

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + step / max(steps) * (WIDTH - LEFT - RIGHT)
        share = (scaled(min(max(value, -1e9), 1e9)) - low) / (high - low)
        return x, above + PANEL - BOTTOM - share * (PANEL - TOP - BOTTOM)

    canvas.text((LEFT, above + 6), title, INK, FONT)
    for tick in range(TICKS):
        level = low + (high - low) * tick / (TICKS - 1)
        value = 10**level if logarithmic else level
        y = place(0, value)[1]
        canvas.line((LEFT, y, WIDTH - RIGHT, y), GRID)
        canvas.text((LEFT - 6, y), f"{value:.3g}", INK, FONT, anchor="rm")
    for share in (0, 0.5, 1):
        x = place(share * max(steps), high)[0]
        canvas.text((x, above + PANEL - BOTTOM + 6), f"step {share * max(steps):.0f}", INK, FONT, anchor="ma")
    for name, value in marks.items():
        y = place(0, value)[1]
        for x in range(LEFT, WIDTH - RIGHT, 8):
            canvas.line((x, y, x + 4, y), INK)
        canvas.text((WIDTH - RIGHT + 6, y), name, INK, FONT, anchor="lm")
    for index, ((name, points), colour) in enumerate(zip(lines.items(), itertools.cycle(COLOURS), strict=False)):
        places = [place(*point) for point in points if math.isfinite(point[1])]
        canvas.line(places, colour, 2)
        for x, y in places if len(places) == 1 or logarithmic else ():
            canvas.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        canvas.text((LEFT + 300 + 130 * index, above + 6), name, colour, FONT)
