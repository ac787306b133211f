"""What a warm MAP process saves: a study through it, against a study through a process of its own."""

import asyncio
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from cli.phantom import write_ct_series
from services.inference.maps import load
from services.inference.runner import MapRunner, Study
from services.inference.settings import InferenceSettings

MAP = "ct_tissues"
SLICES, SIZE = 8, 128
WARM_PER_FRESH = 3
REPEATS = 3


def rows() -> list[dict[str, Any]]:
    """Run both in turn, and return medians; seconds of processor are those of the MAP's process, user and system."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_rows(Path(folder)))


async def _rows(folder: Path) -> list[dict[str, Any]]:
    found = load(MAP, InferenceSettings().maps_file.parent / MAP)
    source = write_ct_series(folder / "series", slices=SLICES, size=SIZE)
    warm_runner, fresh_runner = MapRunner([found]), MapRunner([found], recycle_after=1)
    studies = iter(range(1_000))

    async def study(runner: MapRunner) -> None:
        laid = Study.make(folder / str(next(studies)))
        for path in source.iterdir():
            (laid.input / path.name).hardlink_to(path)
        run = await runner.run(MAP, laid)
        if run.outcome != "ran":
            raise RuntimeError(f"the MAP ended as {run.outcome}: {run.error_type} {run.where}")

    warm: list[tuple[float, float]] = []
    fresh: list[tuple[float, float]] = []
    try:
        await study(warm_runner)
        pid = warm_runner.pid(MAP)
        for _ in range(REPEATS):
            fresh.append(await _measured(lambda: study(fresh_runner), _cpu_of_ended))
            warm += [await _measured(lambda: study(warm_runner), lambda: _cpu_of(pid)) for _ in range(WARM_PER_FRESH)]
    finally:
        await warm_runner.stop()

    return [*_compared("CPU", warm, fresh, 0), *_compared("wall", warm, fresh, 1)]


def _compared(
    measure: str, warm: Sequence[tuple[float, float]], fresh: Sequence[tuple[float, float]], index: int
) -> list[dict[str, Any]]:
    what = f"{MAP}, {SLICES} slices of {SIZE} x {SIZE}: {measure}"
    warm_s, fresh_s = (statistics.median(one[index] for one in runs) for runs in (warm, fresh))
    return [
        _row(f"{what}, warm process", warm_s, "s", len(warm)),
        _row(f"{what}, process per study", fresh_s, "s", len(fresh)),
        _row(f"{what}, ratio", fresh_s / warm_s, "x", len(fresh)),
    ]


async def _measured(work: Callable[[], Awaitable[None]], cpu_s: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of processor and of wall that `work` took."""
    cpu, wall = cpu_s(), time.perf_counter()
    await work()
    return cpu_s() - cpu, time.perf_counter() - wall


def _cpu_of_ended() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_of(pid: int | None) -> float:
    """Return the user and system seconds of a process that still runs (proc_pid_stat(5), fields 14 and 15)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "inference", "what": what, "value": value, "unit": unit, "n": n}


if __name__ == "__main__":
    for row in rows():
        print(f"{row['what']:60} {row['value']:8.3f} {row['unit']:2} n={row['n']}")  # noqa: T201 - a program's output
