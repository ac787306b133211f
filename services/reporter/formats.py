"""How the report says numbers: values in, words out."""

import math
from datetime import UTC, datetime

from shared.messages import Evaluation


def number(value: float) -> str:
    """Return three significant digits, whole numbers with thousands separated."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if abs(value) >= 1000:  # noqa: PLR2004 - where digits after the point stop telling anything
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"  # noqa: PLR2004 - as above


def relative(value: float) -> str:
    """Return a relative distance: two decimals tell 1.98 from 2.02, where a threshold may lie between."""
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def seconds(value: float) -> str:
    """Return a duration as people say it."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:  # noqa: PLR2004 - two minutes
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def thousands(count: int) -> str:
    """Return a count with its thousands separated."""
    return f"{count:,}"


def count(n: int, one: str, many: str | None = None) -> str:
    """Return a count and what is counted, in its singular or plural."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def utc(time: datetime) -> str:
    """Return a time to the minute."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def parameter(value: float | str) -> str:
    """Return a training's parameter as it is written in JSON, numbers short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def coverage(found: Evaluation) -> str:
    """Tell which share of real images the generated ones cover, and, behind it, how much other real images do."""
    if not found.quality:
        return "-"
    return f"{found.quality.coverage:.2f}" + (f" of {found.real_quality.coverage:.2f}" if found.real_quality else "")


def coordinate(value: object) -> object:
    """Return a float in six digits, which place it on a drawing; anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else value
