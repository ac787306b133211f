"""Zips: what is taken from them, and what of them is an attack."""

import io
import zipfile

import pytest

from services.ingest.archive import ZipCaps, unpack
from shared.errors import Unprocessable

CAPS = ZipCaps(entries=20, unpacked_bytes=1 << 26, ratio=50)


@pytest.fixture
def unpacked(tmp_path):
    def run(body, caps=CAPS):
        archive, folder = tmp_path / "upload", tmp_path / "members"
        archive.write_bytes(body)
        folder.mkdir(exist_ok=True)
        return unpack(archive, folder, caps), folder

    return run


def test_names_never_become_paths(unpacked, maker, make_part_10, make_zip):
    """A member that names a place outside is written under its number, like any other."""
    image = make_part_10(maker.ct())
    members, folder = unpacked(make_zip({"../../evil": image, "/absolute": image, "a/b/c.dcm": image}))

    assert [member.path for member in members] == [str(folder / name) for name in "012"]
    assert sorted(path.name for path in folder.rglob("*")) == ["0", "1", "2"]
    assert (folder / "0").read_bytes() == image


def test_junk_is_passed_over_without_a_word(unpacked, make_zip):
    """What lies beside the images of a study is neither taken nor refused."""
    names = ("__MACOSX/a/._im", ".DS_Store", "Thumbs.db", "viewer.exe", "README.TXT")
    junk = dict.fromkeys(names, b"x" * 300)
    members, _ = unpacked(make_zip(junk))

    assert [(member.path, member.reason_code) for member in members] == [(None, None)] * 5


def test_a_directory_of_files_is_junk(unpacked, maker, make_part_10, make_zip):
    """A DICOMDIR is known by its class, whatever its name."""
    directory = maker.ct(SOPClassUID="1.2.840.10008.1.3.10")
    ((member,), _) = unpacked(make_zip({"INDEX": make_part_10(directory)}))

    assert (member.path, member.reason_code) == (None, None)


def test_a_bomb_is_stopped_by_its_ratio(unpacked, maker, make_part_10, make_zip):
    """A member that expands beyond every image is refused, and the others are taken."""
    members, folder = unpacked(make_zip({"bomb": b"\0" * (1 << 25), "image": make_part_10(maker.ct())}))

    assert [member.reason_code for member in members] == ["zip_ratio", None]
    assert not (folder / "0").exists()
    assert members[1].path is not None


@pytest.mark.parametrize(
    "caps", [ZipCaps(entries=1, unpacked_bytes=1 << 20, ratio=50), ZipCaps(entries=9, unpacked_bytes=900, ratio=50)]
)
def test_an_archive_beyond_its_caps_is_refused_whole(unpacked, maker, make_part_10, make_zip, caps):
    """Too many members, or too many bytes in all, leave nothing to be trusted."""
    image = make_part_10(maker.ct())
    with pytest.raises(Unprocessable) as raised:
        unpacked(make_zip({"a": image, "b": image}), caps)

    assert raised.value.reason_code == "zip_too_large"


def test_a_zip_in_a_zip_is_not_opened(unpacked, make_zip):
    """Nesting is how small bombs grow."""
    ((member,), _) = unpacked(make_zip({"inner.dcm": make_zip({"a": b"b"})}))

    assert member.reason_code == "zip_in_zip"


def test_one_damaged_member_loses_no_other(unpacked, maker, make_part_10):
    """A member whose checksum fails is told; the one behind it is taken."""
    file = io.BytesIO()
    image = make_part_10(maker.ct())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", image)
        archive.writestr("b", image)
    body = bytearray(file.getvalue())
    body[300] ^= 0xFF
    members, _ = unpacked(bytes(body))

    assert [member.reason_code for member in members] == ["zip_damaged", None]


def test_an_encrypted_member_is_told(unpacked, maker, make_part_10, make_zip):
    """The flag of encryption is enough: there is no password to try."""
    body = bytearray(make_zip({"a": make_part_10(maker.ct())}))
    body[6] |= 1
    body[body.index(b"PK\x01\x02") + 8] |= 1
    ((member,), _) = unpacked(bytes(body))

    assert member.reason_code == "zip_encrypted"


@pytest.mark.parametrize("length", [4, 30, 200])
def test_a_zip_cut_short_is_damaged(unpacked, maker, make_part_10, make_zip, length):
    """Without its directory an archive is not guessed at."""
    with pytest.raises(Unprocessable) as raised:
        unpacked(make_zip({"a": make_part_10(maker.ct())})[:length])

    assert raised.value.reason_code == "zip_damaged"
