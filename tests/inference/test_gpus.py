"""GPUs shared by memory: real files and locks; the devices themselves are values, for a test machine has none."""

import asyncio
import subprocess
import sys
from contextlib import ExitStack

import pytest

from services.inference import gpus
from services.inference.gpus import MIB, Gpu, _take, parse, reserved
from services.inference.manifests import Needs
from services.inference.runner import ROOT
from shared.config import Misconfigured

TWO = [Gpu("0", "GPU-a", 16_000 * MIB), Gpu("1", "GPU-b", 80_000 * MIB)]

HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from services.inference.gpus import MIB, Gpu, _take
held = ExitStack()
assert _take(Path(sys.argv[1]), [Gpu("0", "GPU-a", 16_000 * MIB)], 1, 12_000 * MIB, held)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_the_driver_tells_is_read():
    """A line per device; a device that does not tell its memory is none that can be shared."""
    told = "0, GPU-1b2c, 143771\n1, MIG-77, [N/A]\n"

    assert parse(told) == [Gpu("0", "GPU-1b2c", 143_771 * MIB)]


def test_workers_share_a_device_up_to_its_memory(tmp_path):
    """Two fit, a third does not until one of them ends; a whole device goes to one alone."""
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        assert _take(tmp_path, TWO[:1], 1, 8_000 * MIB, first) == TWO[:1]
        assert _take(tmp_path, TWO[:1], 1, 8_000 * MIB, second) == TWO[:1]
        assert _take(tmp_path, TWO[:1], 1, 1 * MIB, third) == []
        assert _take(tmp_path, TWO, 1, 1 * MIB, third) == TWO[1:]

        first.close()

        assert _take(tmp_path, TWO[:1], 1, None, third) == []

        second.close()

        assert _take(tmp_path, TWO[:1], 1, None, third) == TWO[:1]
        assert _take(tmp_path, TWO[:1], 1, 1 * MIB, third) == []


def test_what_a_killed_worker_reserved_is_free(tmp_path):
    """The kernel gives the lock back, however the worker ended."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        held = other.stdout.readline()
        with ExitStack() as mine:
            refused = _take(tmp_path, TWO[:1], 1, 8_000 * MIB, mine)
            other.kill()
            other.wait()
            taken = _take(tmp_path, TWO[:1], 1, 8_000 * MIB, mine)

    assert held == b"held\n"
    assert (refused, taken) == ([], TWO[:1])


async def test_a_worker_waits_for_room_and_takes_what_all_its_maps_ask_for(tmp_path, monkeypatch):
    """The sum of its MAPs is reserved, on a device that it may use; who does not fit waits for another's end."""
    monkeypatch.setattr(gpus, "installed", lambda: TWO)
    monkeypatch.setattr(gpus, "WAIT_S", 0.01)
    asking = [Needs(gpu=1, gpu_memory_bytes=30_000 * MIB), Needs(gpu=1, gpu_memory_bytes=20_000 * MIB), Needs()]

    async def second():
        async with reserved(tmp_path, asking, ["0", "1"]) as devices:
            return devices

    async with reserved(tmp_path, asking, []) as devices:
        waiting = asyncio.create_task(second())
        done, _ = await asyncio.wait([waiting], timeout=0.2)

        assert devices == ("GPU-b",)
        assert not done
    assert await waiting == ("GPU-b",)


async def test_more_than_there_is_is_a_mistake_and_no_gpu_is_none(tmp_path, monkeypatch):
    """A worker that could never start says so; where no MAP wants a GPU, or there is none, nothing is reserved."""
    async with reserved(tmp_path, [Needs(gpu=1)], ["3"]) as devices:
        assert devices == ("3",), "this machine has no driver"
    monkeypatch.setattr(gpus, "installed", lambda: TWO)
    with pytest.raises(Misconfigured, match="1 GPUs with 90000 MiB"):
        async with reserved(tmp_path, [Needs(gpu=1, gpu_memory_bytes=90_000 * MIB)], []):
            pass
    async with reserved(tmp_path, [Needs()], ["0"]) as devices:
        assert devices == ("0",)
