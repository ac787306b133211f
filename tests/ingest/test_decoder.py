"""Files that kill their reader: the file is refused, and the next one gets a new reader."""

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from services.ingest.decoder import REASON_OF_FAILURE, Decoder, Rejected
from services.ingest.protocol import Locate
from services.ingest.reasons import DEAD_LETTERS, REASONS
from services.ingest.settings import IngestSettings
from shared.errors import Unavailable

MISBEHAVING = """
import os, sys
from pathlib import Path

replies, wish = os.dup(1), Path(sys.argv[1])

from services.ingest import worker

def misbehaving(do):
    def done(asked):
        reply = do(asked)
        wanted = wish.read_text() if wish.exists() else ""
        if wanted == "fork": os.fork()
        if wanted == "talk":
            wish.unlink()
            os.write(replies, b"{}" + os.linesep.encode())
        return reply
    return done

worker.OPERATIONS = {asked: misbehaving(do) for asked, do in worker.OPERATIONS.items()}
worker.main()
"""


@pytest.fixture
async def decoder():
    made = Decoder(IngestSettings(decoders=1, decode_deadline_s=30))
    yield made
    await made.stop()


async def test_a_reader_that_dies_costs_one_file(decoder, maker, make_part_10, tmp_path):
    """A crash refuses the file that was being read; the next file is read by a new process."""
    good = tmp_path / "good"
    good.write_bytes(make_part_10(maker.ct()))
    await decoder.normalise(good, tmp_path / "out")
    (child,) = decoder._files.all
    first_pid = child.pid
    pipe = tmp_path / "never"
    os.mkfifo(pipe)
    reading = asyncio.create_task(decoder.normalise(pipe, tmp_path / "out"))
    while not child._lock.locked():
        await asyncio.sleep(0)
    os.kill(first_pid, signal.SIGSEGV)
    with pytest.raises(Rejected) as raised:
        await reading
    instance = await decoder.normalise(good, tmp_path / "out")

    assert raised.value.reason_code == "decoder_crashed"
    assert instance.series_uid == maker.series_uid
    assert child.pid != first_pid


async def test_a_reader_that_the_machine_killed_is_tried_once_more(decoder, maker, make_part_10, tmp_path):
    """SIGKILL says nothing about the file: it is read again, by a new process; a file that ends two is refused."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (child,) = decoder._files.all

    async def kill_next(calls: int) -> None:
        while child.pid is None or child.calls != calls or not child._lock.locked():
            await asyncio.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)

    reading = asyncio.create_task(decoder.normalise(pipe, tmp_path / "out"))
    await kill_next(0)
    first = child.pid
    while child.pid in (None, first):
        await asyncio.sleep(0.01)
    await asyncio.to_thread(pipe.write_bytes, make_part_10(maker.ct()))
    instance = await reading
    again = asyncio.create_task(decoder.normalise(pipe, tmp_path / "out"))
    await kill_next(1)
    await kill_next(0)
    with pytest.raises(Rejected, match="decoder_crashed"):
        await again

    assert instance.series_uid == maker.series_uid


async def test_a_library_that_forks_changes_no_reply(decoder, maker, make_part_10, tmp_path):
    """Of each file what was read of it is told, by one process, though all that it forks come back as well."""
    (tmp_path / "wish").write_text("fork")
    (child,) = decoder._files.all
    child._argv = (sys.executable, "-c", MISBEHAVING, str(tmp_path / "wish"))
    told, pids = [], set()
    for number in range(6):
        (tmp_path / "file").write_bytes(make_part_10(maker.ct(number)))
        told.append((await decoder.normalise(tmp_path / "file", tmp_path / "out")).sop_instance_uid)
        pids.add(child.pid)
        assert dcmread(tmp_path / "out").SOPInstanceUID == told[-1]

    assert told == [maker.ct(number).SOPInstanceUID for number in range(6)]
    assert len(pids) == 1


async def test_a_reader_that_is_not_understood_is_replaced_and_costs_nothing(decoder, maker, make_part_10, tmp_path):
    """A file, and a series, whose child says what is no answer is read again, by a new one."""
    file, wish = tmp_path / "file", tmp_path / "wish"
    file.write_bytes(make_part_10(maker.ct()))
    children = [decoder._files.all[0], decoder._series.all[0]]
    for child in children:
        child._argv = (sys.executable, "-c", MISBEHAVING, str(wish))
    await decoder.normalise(file, tmp_path / "out")
    await decoder.series_call(Locate(str(tmp_path / "out")))
    before = [child.pid for child in children]
    wish.write_text("talk")
    instance = await decoder.normalise(file, tmp_path / "out")
    wish.write_text("talk")
    located = await decoder.series_call(Locate(str(tmp_path / "out")))

    assert instance.series_uid == maker.series_uid
    assert len(located.slices) == 1
    assert not wish.exists()
    assert {child.pid for child in children}.isdisjoint(before)


async def test_a_full_disk_refuses_nothing(decoder, maker, make_part_10, tmp_path):
    """What the machine cannot write now comes again; the file is not at fault."""
    good = tmp_path / "good"
    good.write_bytes(make_part_10(maker.ct()))

    with pytest.raises(Unavailable):
        await decoder.normalise(good, Path("/dev/full"))


async def test_a_reader_that_hangs_is_killed(maker, tmp_path):
    """A file that is not read within the deadline is refused."""
    os.mkfifo(tmp_path / "never")
    decoder = Decoder(IngestSettings(decoders=1, decode_deadline_s=1))
    with pytest.raises(Rejected) as raised:
        await decoder.normalise(tmp_path / "never", tmp_path / "out")
    await decoder.stop()

    assert raised.value.reason_code == "deadline"


async def test_a_child_is_replaced_before_it_is_old(decoder, maker, make_part_10, tmp_path, monkeypatch):
    """After its share of files a child makes way for a new one, and no file notices."""
    monkeypatch.setattr("services.ingest.decoder.CALLS_OF_A_CHILD", 2)
    file = tmp_path / "file"
    file.write_bytes(make_part_10(maker.ct()))
    (child,) = decoder._files.all
    pids = []
    for _ in range(5):
        await decoder.normalise(file, tmp_path / "out")
        pids.append(child.pid)

    assert pids == [pids[0], pids[0], pids[2], pids[2], pids[4]]
    assert len(set(pids)) == 3


async def test_memory_that_others_left_refuses_nothing(decoder, maker, make_part_10, tmp_path):
    """A file that finds a child short of memory is read again, by a new one."""
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(make_part_10(maker.ct()))
    other.write_bytes(make_part_10(maker.ct(1)))
    await decoder.normalise(other, tmp_path / "out")
    (child,) = decoder._files.all
    first = child.pid
    used = int(Path(f"/proc/{first}/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.prlimit(first, resource.RLIMIT_AS)
    resource.prlimit(first, resource.RLIMIT_AS, (used, hard))  # as if the files before had taken it all
    file.write_bytes(make_part_10(maker.ct(2, Rows=1024, Columns=1024, PixelData=bytes(2 << 20))))
    instance = await decoder.normalise(file, tmp_path / "out")

    assert instance.series_uid == maker.series_uid
    assert child.pid != first


async def test_a_crash_leaves_no_image_on_the_disk(decoder, maker, make_part_10, tmp_path):
    """A child may not dump core: its memory holds a patient's image."""
    file = tmp_path / "file"
    file.write_bytes(make_part_10(maker.ct()))
    await decoder.normalise(file, tmp_path / "out")
    (child,) = decoder._files.all

    assert resource.prlimit(child.pid, resource.RLIMIT_CORE) == (0, 0)


async def test_memory_is_bounded(maker, make_part_10, tmp_path):
    """A file that needs more memory than allowed is refused as too large."""
    pixels = np.zeros((8192, 8192), "<u2").tobytes()
    file = tmp_path / "large"
    file.write_bytes(make_part_10(maker.ct(Rows=8192, Columns=8192, PixelData=pixels)))
    settings = IngestSettings(decoders=1).model_copy(update={"decode_memory_bytes": 400 * 1024 * 1024})
    decoder = Decoder(settings)
    with pytest.raises(Rejected) as raised:
        await decoder.normalise(file, tmp_path / "out")
    await decoder.stop()

    assert raised.value.reason_code == "too_large"


def test_every_way_to_fail_has_a_documented_code():
    """What the parent says of a child's end is in the table that people read."""
    assert set(REASON_OF_FAILURE.values()) <= set(REASONS)
    assert {f"series_{code}" for code in REASON_OF_FAILURE} <= set(DEAD_LETTERS)


async def test_a_zip_is_told_from_a_file(decoder, maker, make_part_10, make_zip, tmp_path):
    """Content decides: a DICOM file is no archive, an empty archive has no members."""
    file, archive = tmp_path / "a.zip", tmp_path / "b.dcm"
    file.write_bytes(make_part_10(maker.ct()))
    archive.write_bytes(make_zip({}))

    assert await decoder.unpack(file, tmp_path) is None
    assert await decoder.unpack(archive, tmp_path) == []
