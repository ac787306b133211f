"""Runs the whole kill sweep: `python -m tests.chaos [--pairs N] [--seed N]`."""

import argparse
import sys
import time

from tests.chaos.sweep import arena, boundaries, every_kill, sampled


def main() -> int:
    """Kill at every boundary and at a sample of pairs; print what went wrong, and return how much did."""
    parser = argparse.ArgumentParser(description="Kill a worker at every boundary.")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with arena() as here:
        places = boundaries(here)
        pairs = [one for one in sampled(places, 0, arguments.pairs, arguments.seed) if len(one.kills) > 1]
        verdicts = here.run_all(every_kill(places) + pairs)
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    for verdict in wrong:
        sys.stdout.write(f"{' then '.join(verdict.scenario.kills)}: {'; '.join(verdict.wrong)}\n")
    kills = sum(verdict.kills for verdict in verdicts)
    seconds = time.monotonic() - began
    sys.stdout.write(
        f"{len(places)} boundaries, {len(verdicts)} scenarios, {kills} kills, {len(wrong)} wrong, {seconds:.0f} s\n"
    )
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
