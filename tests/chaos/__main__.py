"""Runs the whole kill sweep: `python -m tests.chaos [--only NAME…] [--pairs N] [--seed N]`."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.chaos import services, sweep
from tests.chaos.journeys import JOURNEYS
from tests.chaos.sweep import Verdict

RUNTIME = "runtime"


def main() -> int:
    """Kill at every boundary; print what went wrong, and return 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill workers at every boundary.")
    names = [RUNTIME, *JOURNEYS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="the queue runtime, or services")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of kills of the runtime (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="which pairs")
    arguments = parser.parse_args()
    n_wrong = sweep_runtime(arguments.pairs, arguments.seed) if RUNTIME in arguments.only else 0
    chosen = [name for name in arguments.only if name != RUNTIME]
    if chosen:
        n_wrong += asyncio.run(sweep_services(chosen))
    return min(n_wrong, 1)


def sweep_runtime(pairs: int, seed: int) -> int:
    """Kill a test service at every boundary, and at a sample of pairs; return how many outcomes were wrong."""
    began = time.monotonic()
    with sweep.arena() as here:
        places = sweep.boundaries(here)
        twice = [one for one in sweep.sampled(places, 0, pairs, seed) if len(one.kills) > 1]
        verdicts = here.run_all(sweep.every_kill(places) + twice)
    for verdict in verdicts:
        tell(RUNTIME, verdict)
    return sums(RUNTIME, len(places), verdicts, began)


async def sweep_services(names: Sequence[str]) -> int:
    """Kill each service at every call; return how many outcomes were wrong."""
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        async with services.arena(Path(folder)) as here:
            for name in names:
                began = time.monotonic()
                await here.learn([name])
                kills = services.every_kill(here.places[name])
                verdicts = await here.run_all([(name, kill) for kill in kills], partial(tell, name))
                n_wrong += sums(name, len(here.places[name]), verdicts, began)
    return n_wrong


def tell(name: str, verdict: Verdict) -> None:
    """Print what went wrong in a scenario."""
    if verdict.wrong:
        sys.stdout.write(f"{name}: {' then '.join(verdict.scenario.kills)}: {'; '.join(verdict.wrong)}\n")
        sys.stdout.flush()


def sums(name: str, n_places: int, verdicts: Sequence[Verdict], began: float) -> int:
    """Print the sums, and return how many outcomes were wrong."""
    kills, n_wrong = sum(verdict.kills for verdict in verdicts), sum(bool(verdict.wrong) for verdict in verdicts)
    counted = f"{n_places} boundaries, {len(verdicts)} scenarios, {kills} kills, {n_wrong} wrong"
    sys.stdout.write(f"{name}: {counted}, {time.monotonic() - began:.0f} s\n")
    sys.stdout.flush()
    return n_wrong


if __name__ == "__main__":
    sys.exit(main())
