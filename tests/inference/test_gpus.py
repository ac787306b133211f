"""GPUs shared by memory: real files and locks; the devices themselves are values, for a test machine has none."""

import asyncio
import subprocess
import sys
from contextlib import closing

import pytest

from services.inference.package.manifests import Needs
from services.inference.serving import gpus
from services.inference.serving.gpus import MIB, Gpu, Share, parse
from shared.config import Misconfigured
from tests.conftest import ROOT

TWO = [Gpu("0", "GPU-a", 16_000 * MIB), Gpu("1", "GPU-b", 80_000 * MIB)]

HOLD = """
import sys
from pathlib import Path
from services.inference.serving import gpus
from services.inference.package.manifests import Needs
gpus.installed = lambda: [gpus.Gpu("0", "GPU-a", 16_000 * gpus.MIB)]
share = gpus.Share(Path(sys.argv[1]), ())
assert share.cover([Needs(gpu=1, gpu_memory_bytes=12_000 * gpus.MIB)])
print("held", flush=True)
sys.stdin.read()
"""


def test_what_the_driver_tells_is_read():
    """A line per device; a device that does not tell its memory is none that can be shared."""
    told = "0, GPU-1b2c, 143771\n1, MIG-77, [N/A]\n"

    assert parse(told) == [Gpu("0", "GPU-1b2c", 143_771 * MIB)]


def asking(*mib):
    """What MAPs ask for that say so much, or nothing."""
    return [Needs(gpu=1, gpu_memory_bytes=one * MIB if one else None) for one in mib]


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(gpus, "installed", lambda: TWO)


@pytest.fixture
def share(tmp_path):
    """Make workers' shares of one machine; all are closed at the end."""
    shares = []

    def make(*allowed):
        shares.append(Share(tmp_path, allowed))
        return shares[-1]

    yield make
    for one in shares:
        one.close()


def test_workers_share_a_device_up_to_its_memory(two, share):
    """Two fit, a third does not until one of them ends; a whole device goes to one alone."""
    first, second, third = share("0"), share("0"), share("0")

    assert first.cover(asking(8_000))
    assert second.cover(asking(8_000))
    assert not third.cover(asking(1))
    first.close()
    assert not third.cover(asking(None))
    second.close()
    assert third.cover(asking(None))
    assert not first.cover(asking(1))
    assert share("0", "1").cover(asking(1))


def test_a_share_grows_and_shrinks_with_what_the_maps_ask_for(two, share):
    """What does not fit beside the others changes nothing; more devices come to those that are held."""
    mine, other = share(), share("GPU-b")
    assert mine.cover(asking(10_000))
    assert other.cover(asking(70_000))

    assert mine.devices == ("GPU-a",)
    assert mine.cover(asking(10_000, 5_000))
    assert not mine.cover([Needs(gpu=2, gpu_memory_bytes=15_000 * MIB)])
    assert (mine.devices, share("0").cover(asking(2_000))) == (("GPU-a",), False)
    assert mine.cover([Needs(gpu=2, gpu_memory_bytes=9_000 * MIB)])
    assert mine.devices == ("GPU-a", "GPU-b")
    assert mine.cover([Needs()])
    assert (mine.devices, share("0").cover(asking(16_000))) == ((), True)


def test_what_a_killed_worker_reserved_is_free(tmp_path, monkeypatch, share):
    """The kernel gives the lock back, however the worker ended."""
    monkeypatch.setattr(gpus, "installed", lambda: TWO[:1])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        held = next(line for line in other.stdout if line == b"held\n")
        mine = share()
        refused = mine.cover(asking(8_000))
        other.kill()
        other.wait()
        taken = mine.cover(asking(8_000))

    assert held == b"held\n"
    assert (refused, taken) == (False, True)


async def test_a_worker_waits_for_room_and_takes_what_all_its_maps_ask_for(tmp_path, two, monkeypatch):
    """The sum of its MAPs is reserved, on a device that it may use; who does not fit waits for another's end."""
    monkeypatch.setattr(gpus, "WAIT_S", 0.01)
    wanted = [*asking(30_000, 20_000), Needs()]
    with closing(Share(tmp_path, ["0", "1"])) as second:
        with closing(Share(tmp_path, [])) as first:
            await first.wait_for(wanted)
            waiting = asyncio.create_task(second.wait_for(wanted))
            done, _ = await asyncio.wait([waiting], timeout=0.2)

            assert first.devices == ("GPU-b",)
            assert not done
        await waiting
        assert second.devices == ("GPU-b",)


async def test_more_than_there_is_is_a_mistake_and_no_gpu_is_none(share, monkeypatch):
    """A worker that could never start says so; where no MAP wants a GPU, or there is none, nothing is reserved."""
    mine = share("3")
    await mine.wait_for(asking(None))
    assert mine.devices == ("3",), "this machine has no driver"
    monkeypatch.setattr(gpus, "installed", lambda: TWO)
    with pytest.raises(Misconfigured, match="1 GPUs with 90000 MiB"):
        await share().wait_for(asking(90_000))
    free = share("0")
    await free.wait_for([Needs()])

    assert free.devices == ("0",)
