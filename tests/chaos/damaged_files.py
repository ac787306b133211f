"""Valid files damaged by chance, read by the children of ingest: `python -m tests.chaos.damaged_files [--files N]`.

Whatever the bytes are, the file is taken in, and then can be read by others with pixels of the size that its header
says, or it is refused with a code of the table; no child takes more than its limits, and none needs to die.
"""

import argparse
import asyncio
import io
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from rle.utils import encode_array

from services.ingest.decoder import Decoder, Rejected
from services.ingest.reasons import REASONS, WARNINGS
from services.ingest.settings import MIB, IngestSettings
from shared.keys import is_uid
from shared.pydicom_silence import silence

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
LARGEST_SEED_BYTES = 100_000
SETTINGS = {
    "decoders": 2,
    "decode_memory_bytes": 2048 * MIB,
    "decode_cpu_s": 30,
    "decode_deadline_s": 300,
    "max_inflated_bytes": 256 * MIB,
    "max_pixel_bytes": 256 * MIB,
}
EXTREMES = (0, 1, 2, 7, 8, 255, 256, 32767, 65535)
OPENING = b"\x40\x00\x75\xa3SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
"""(0040,A375) and an item, both without a length."""
JPEG_4 = "1.2.840.10008.1.2.4."
RLE_IMAGE = {"bits_allocated": 16, "rows": 24, "columns": 32, "samples_per_pixel": 1, "number_of_frames": 1}


def image() -> np.ndarray:
    """A picture of 24 by 32, 12 bits."""
    y, x = np.mgrid[0:24, 0:32]
    return (y * 80 + x * 60 + np.random.default_rng(1).integers(0, 90, (24, 32))).astype("<u2")


def encoded(pixels: np.ndarray) -> dict[str, bytes]:
    """The picture as a frame of each transfer syntax that is encapsulated."""
    lossy = imagecodecs.jpeg8_encode(pixels, level=90, bitspersample=12)
    j2k = imagecodecs.jpeg2k_encode(pixels, reversible=True, codecformat="j2k")
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return {
        "1.2.840.10008.1.2.1.98": pixels.tobytes(),
        "1.2.840.10008.1.2.8.1": deflate.compress(pixels.tobytes()) + deflate.flush(),
        "1.2.840.10008.1.2.5": next(iter(encode_array(pixels, **RLE_IMAGE))),
        **{f"{JPEG_4}{number}": lossy for number in (51, 53, 55)},
        **{f"{JPEG_4}{number}": imagecodecs.ljpeg_encode(pixels, bitspersample=16) for number in (57, 70)},
        f"{JPEG_4}80": imagecodecs.jpegls_encode(pixels),
        f"{JPEG_4}81": imagecodecs.jpegls_encode(pixels, level=2),
        f"{JPEG_4}90": j2k,
        f"{JPEG_4}91": imagecodecs.jpeg2k_encode(pixels, level=60, codecformat="j2k"),
        **{f"{JPEG_4}{number}": imagecodecs.jpegxl_encode(pixels, lossless=True) for number in (110, 112)},
        **{f"{JPEG_4}{number}": imagecodecs.htj2k_encode(pixels, reversible=True) for number in (201, 202, 203)},
    }


def made(syntax: str, pixels: bytes, *, encapsulated: bool = True) -> bytes:
    """A file with this pixel data, in this transfer syntax."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.2"), UID("1.2.3.4.5")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = UID("1.2.3"), UID("1.2.3.4")
    dataset.Modality, dataset.PatientName = "CT", "Secretperson^Jane"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = 24, 32
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = encapsulate([pixels]) if encapsulated else pixels
    dataset["PixelData"].VR = "OB" if encapsulated else "OW"
    dataset["PixelData"].is_undefined_length = encapsulated
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.preamble = b"\0" * 128
    file = io.BytesIO()
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    dcmwrite(file, dataset, implicit_vr=implicit, little_endian=little, force_encoding=True)
    return file.getvalue()


def seeds() -> list[bytes]:
    """Valid files: one in each transfer syntax, and the small ones that pydicom brings."""
    pixels = image()
    files = [made(syntax, frame) for syntax, frame in encoded(pixels).items()]
    for syntax, order in (
        (ImplicitVRLittleEndian, "<u2"),
        (ExplicitVRLittleEndian, "<u2"),
        (ExplicitVRBigEndian, ">u2"),
    ):
        files.append(made(syntax, pixels.astype(order).tobytes(), encapsulated=False))
    bundled = [path for path in sorted(BUNDLED.rglob("*.dcm")) if path.stat().st_size < LARGEST_SEED_BYTES]
    return files + [path.read_bytes() for path in bundled]


def _at(chance: random.Random, upload: bytearray) -> int:
    """A place in the file: as often among its first elements as anywhere."""
    end = len(upload) if chance.random() < 0.5 else min(len(upload), 2000)
    return chance.randrange(min(132, end - 1), end)


def truncate(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Cut the file short."""
    del upload[_at(chance, upload) :]


def flip(chance: random.Random, upload: bytearray, __: bytes) -> None:
    """Turn some bits over."""
    for _ in range(chance.randint(1, 4)):
        upload[_at(chance, upload)] ^= 1 << chance.randrange(8)


def overwrite(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Put random bytes in place of others."""
    at, octets = _at(chance, upload), chance.randbytes(chance.randint(1, 16))
    upload[at : at + len(octets)] = octets


def splice(chance: random.Random, upload: bytearray, other: bytes) -> None:
    """Go on with the rest of another file."""
    upload[_at(chance, upload) :] = other[chance.randrange(len(other)) :]


def repeat(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Have a part twice."""
    at = _at(chance, upload)
    upload[at:at] = upload[at : at + chance.randint(1, 400)]


def omit(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Leave a part out."""
    at = _at(chance, upload)
    del upload[at : at + chance.randint(1, 40)]


def lengthen(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Let an element, an item or a fragment claim another length."""
    starts = [at for at in range(132, len(upload) - 8, 2) if upload[at + 4 : at + 6].isalpha() or upload[at] == 0xFE]
    if starts:
        at = chance.choice(starts)
        long = upload[at] == 0xFE or upload[at + 6 : at + 8] == b"\0\0"
        length = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, len(upload)))
        place = at + (4 if upload[at] == 0xFE else 8 if long else 6)
        told = struct.pack("<I", length) if long or upload[at] == 0xFE else struct.pack("<H", length & 0xFFFF)
        upload[place : place + len(told)] = told


def nest(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Open sequences inside sequences."""
    at = _at(chance, upload)
    upload[at:at] = OPENING * chance.choice((1, 10, 100, 1000, 10_000))


def lie(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Let the image's header tell another size, depth or sign."""
    element = chance.choice((0x02, 0x03, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 0x06))
    at = upload.find(struct.pack("<HH", 0x28, element) + b"US\x02\0")
    if at >= 0:
        upload[at + 8 : at + 10] = struct.pack("<H", chance.choice(EXTREMES))


def lie_in_codestream(chance: random.Random, upload: bytearray, _: bytes) -> None:
    """Change numbers where codestreams tell their size."""
    for start in (
        b"\xff\x4f\xff\x51",
        b"\xff\xc0",
        b"\xff\xc1",
        b"\xff\xc3",
        b"\xff\xf7",
        b"\xff\x0a",
        b"\xfe\xff\x00\xe0",
    ):
        at = upload.find(start, 400)
        if at >= 0 and chance.random() < 0.7:
            place = at + chance.randint(2, 60)
            upload[place : place + 4] = struct.pack(">I", chance.choice((0, 1, 60_000, 0x7FFFFFFF, 0xFFFFFFFF)))


MUTATIONS: tuple[Callable[[random.Random, bytearray, bytes], None], ...] = (
    truncate,
    flip,
    overwrite,
    splice,
    repeat,
    omit,
    lengthen,
    nest,
    lie,
    lie_in_codestream,
)
WEIGHTS = (1, 4, 4, 1, 1, 1, 2, 1, 4, 4)
"""What leaves the structure whole comes further into the reader, so it comes more often."""


def mutant(seed: int, files: list[bytes]) -> bytes:
    """The file of a number: a valid one, changed in one to three ways."""
    chance = random.Random(seed)  # noqa: S311 - the same number is the same file for ever
    upload = bytearray(chance.choice(files))
    for mutate in chance.choices(MUTATIONS, WEIGHTS, k=chance.choice((1, 1, 2, 3))):
        if len(upload) > 200:
            mutate(chance, upload, chance.choice(files))
    return bytes(upload)


@dataclass
class Tally:
    """What became of the files."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unforeseen: Counter = field(default_factory=Counter)
    """Places of exceptions that no rule expected: they have a code, and are worth a rule."""
    peak_bytes: int = 0
    """Most address space that a child had."""
    slowest_s: float = 0


async def read_all(numbers: range, files: list[bytes], folder: Path) -> Tally:
    """Read the mutants of these numbers, as many at a time as there are children."""
    silence()
    settings = IngestSettings(**SETTINGS)
    decoder, tally, left = Decoder(settings), Tally(), iter(numbers)

    async def work(place: Path) -> None:
        for number in left:
            await _read(number, mutant(number, files), place, decoder, tally)

    await asyncio.gather(*(work(folder / str(slot)) for slot in range(settings.decoders)))
    await decoder.stop()
    if tally.peak_bytes > settings.decode_memory_bytes:
        tally.wrong.append(f"a child took {tally.peak_bytes} bytes")
    return tally


async def _read(number: int, upload: bytes, place: Path, decoder: Decoder, tally: Tally) -> None:
    path, out = place.with_suffix(".in"), place.with_suffix(".out")
    path.write_bytes(upload)
    began = time.monotonic()
    try:
        instance = await decoder.normalise(path, out)
    except Rejected as rejected:
        tally.outcomes[rejected.reason_code] += 1
        if rejected.reason_code not in REASONS:
            tally.wrong.append(f"{number}: refused without a documented code")
        if ".py:" in rejected.place:
            tally.unforeseen[rejected.place] += 1
    else:
        tally.outcomes["taken in"] += 1
        tally.wrong += [f"{number}: {what}" for what in _wrong(instance, out.read_bytes())]
    tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
    tally.peak_bytes = max([tally.peak_bytes, *map(_peak_bytes, decoder._files.all)])


def _wrong(instance, body: bytes) -> list[str]:
    """What is wrong with an instance that was taken in, for who reads it with pydicom alone."""
    found = []
    stored = dcmread(io.BytesIO(body))
    uids = stored.StudyInstanceUID, stored.SeriesInstanceUID, stored.SOPInstanceUID
    if uids != (instance.study_uid, instance.series_uid, instance.sop_instance_uid) or not all(map(is_uid, uids)):
        found.append("other UIDs in the file than in its key")
    if body[:132] != b"\0" * 128 + b"DICM" or stored.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian:
        found.append("not normalised")
    if not set(instance.warnings) <= set(WARNINGS):
        found.append("a warning that is not documented")
    if "PixelData" in stored and stored.SamplesPerPixel in (1, 3) and "NumberOfFrames" not in stored:
        try:
            shape = stored.pixel_array.shape[:2]
        except Exception as error:  # noqa: BLE001 - whatever it is, a reader stumbles over it
            found.append(f"pixels that cannot be read: {type(error).__name__} {str(error)[:80]}")
        else:
            if shape != (stored.Rows, stored.Columns):
                found.append("pixels of another size")
    return found


def _peak_bytes(child) -> int:
    """Largest address space of a child so far."""
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak")), 0)


def main() -> int:
    """Read as many mutants as asked for; print what became of them, and return 1 if something was wrong."""
    parser = argparse.ArgumentParser(description="Read files that were damaged by chance.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(arguments.first, arguments.first + arguments.files)
        tally = asyncio.run(read_all(numbers, seeds(), Path(folder)))
    for what in tally.wrong:
        sys.stdout.write(f"{what}\n")
    for outcome, n in tally.outcomes.most_common():
        sys.stdout.write(f"{n:6} {outcome}\n")
    sys.stdout.write(f"unforeseen: {dict(tally.unforeseen)}\n")
    sys.stdout.write(
        f"{arguments.files} files, {len(tally.wrong)} wrong, slowest {tally.slowest_s:.1f} s, "
        f"a child's peak {tally.peak_bytes // MIB} MiB, {time.monotonic() - began:.0f} s\n"
    )
    return min(len(tally.wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
