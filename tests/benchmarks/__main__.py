"""`make bench`: measures, prints a table and writes benchmarks/latest.json. No thresholds: the machines are noisy.

A row is `{"what", "value", "unit", "n", …}`; where two ways are compared, they run in turn and the ratio is a row.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import bench_inference, bench_ingest, bench_queue, bench_trainer, bench_training

LATEST = Path(__file__).parent.parent.parent / "benchmarks" / "latest.json"
BENCHES = (bench_ingest, bench_inference, bench_queue, bench_trainer, bench_training)


def main() -> None:
    """Run every bench."""
    rows = [row for bench in BENCHES for row in bench.rows()]
    table = Table("what", "value", "unit", "n")
    for row in rows:
        table.add_row(row["what"], f"{row['value']:.3g}", row["unit"], str(row["n"]))
    Console(file=sys.stdout).print(table)

    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    LATEST.parent.mkdir(exist_ok=True)
    LATEST.write_text(json.dumps({"time": datetime.now(UTC).isoformat(), "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
