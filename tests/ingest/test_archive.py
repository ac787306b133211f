"""Zips: what is taken from them, and what of them is an attack."""

import gzip
import io
import stat
import tarfile
import zipfile
from dataclasses import replace

import pytest

from services.ingest import archive
from services.ingest.archive import unpack
from services.ingest.protocol import ZipCaps
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


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_of_just_its_caps_is_taken(unpacked, make_zip, kind):
    """As many members, and as many bytes together, as the caps say are taken; one more of either is refused."""
    names = {"a": b"\1" * 600, "b": b"\2" * 400}
    packed = {"zip": make_zip, "tar": tar_of, "tar.gz": lambda names: gzip.compress(tar_of(names))}
    body = packed[kind](names)
    members, folder = unpacked(body, ZipCaps(entries=2, unpacked_bytes=1000, ratio=50))

    assert [(folder / str(member.number)).read_bytes() for member in members] == list(names.values())
    for entries, unpacked_bytes in ((1, 1000), (2, 999)):
        with pytest.raises(Unprocessable, match="zip_too_large"):
            unpacked(body, ZipCaps(entries, unpacked_bytes, ratio=50))


@pytest.mark.parametrize(("more", "reason_code"), [(0, None), (1, "zip_ratio")])
def test_a_member_of_just_the_ratio_is_taken(unpacked, make_zip, monkeypatch, more, reason_code):
    """The ratio is the largest that is taken."""
    monkeypatch.setattr(archive, "RATIO_FROM_BYTES", 1000)
    ((member,), _) = unpacked(make_zip({"a": b"\1" * (1000 + more)}), replace(CAPS, ratio=1))

    assert member.reason_code == reason_code


def test_a_gzipped_tar_of_just_the_ratio_is_taken(unpacked, monkeypatch):
    """The ratio of a gzipped tar is asked of it whole, headers included."""
    body = tar_of({"a": b"\1" * 600})
    monkeypatch.setattr(archive, "RATIO_FROM_BYTES", len(body))
    members, _ = unpacked(gzip.compress(body), replace(CAPS, ratio=1))

    assert [member.reason_code for member in members] == [None]
    monkeypatch.setattr(archive, "RATIO_FROM_BYTES", len(body) - 1)
    with pytest.raises(Unprocessable, match="zip_ratio"):
        unpacked(gzip.compress(body), replace(CAPS, ratio=1))


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


def test_a_link_in_a_zip_is_refused(unpacked, maker, make_part_10):
    """A member that says it is a link, as zips made on Unix can, is told and not read."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("image", make_part_10(maker.ct()))
    members, _ = unpacked(file.getvalue())

    assert [member.reason_code for member in members] == ["zip_link", None]


def tar_of(members, kind=tarfile.REGTYPE, format_=tarfile.PAX_FORMAT):
    """A tar of these names and bodies; `kind` is that of members without a body."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            if body is None:
                info.type, info.linkname = kind, "/etc/passwd"
            else:
                info.size = len(body)
            archive.addfile(info, io.BytesIO(body or b""))
    return file.getvalue()


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_taken_like_a_zip(unpacked, maker, make_part_10, packed, format_):
    """Images come out under numbers whatever their names say, in folders or not; junk is passed over."""
    image = make_part_10(maker.ct())
    names = {"../../evil": image, "/absolute": image, f"{'deep/' * 15}c.dcm": image, ".DS_Store": b"junk" * 90}
    members, folder = unpacked(packed(tar_of(names, format_=format_)))

    assert [member.path for member in members] == [str(folder / "0"), str(folder / "1"), str(folder / "2"), None]
    assert [member.reason_code for member in members] == [None] * 4
    assert (folder / "2").read_bytes() == image
    assert not (folder / "tar").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=bytes.decode
)
def test_what_is_no_file_in_a_tar_is_refused(unpacked, maker, make_part_10, kind):
    """Links, devices and pipes are told and never made; the files beside them are taken."""
    members, folder = unpacked(tar_of({"strange": None, "image": make_part_10(maker.ct())}, kind))

    assert [member.reason_code for member in members] == ["zip_link", None]
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_gzip_that_is_no_tar_is_no_archive(unpacked, maker, make_part_10):
    """A single gzipped file is not unpacked, and what is in it is not kept."""
    members, folder = unpacked(gzip.compress(make_part_10(maker.ct())))

    assert members is None
    assert not list(folder.iterdir())


def test_a_gzipped_bomb_is_inflated_no_further_than_the_ratio(unpacked, tmp_path):
    """What is written to the disk on the way is bounded, too."""
    with pytest.raises(Unprocessable) as raised:
        unpacked(gzip.compress(tar_of({"bomb": bytes(1 << 25)})))

    assert raised.value.reason_code == "zip_ratio"
    assert (tmp_path / "members" / "tar").stat().st_size <= 1 << 24


@pytest.mark.parametrize(
    "caps", [ZipCaps(entries=1, unpacked_bytes=1 << 20, ratio=50), ZipCaps(entries=9, unpacked_bytes=900, ratio=50)]
)
def test_a_tar_beyond_its_caps_is_refused_whole(unpacked, maker, make_part_10, caps):
    """The caps of a zip are those of a tar."""
    image = make_part_10(maker.ct())
    with pytest.raises(Unprocessable) as raised:
        unpacked(tar_of({"a": image, "b": image}), caps)

    assert raised.value.reason_code == "zip_too_large"


def test_a_tar_cut_short_is_told_wherever_it_is_cut(unpacked, maker, make_part_10):
    """A tar that ends before its end does not pass for a smaller one; what came whole is taken."""
    image = make_part_10(maker.ct())
    body = tar_of({"a": image, "b": image}, format_=tarfile.USTAR_FORMAT)
    second = 512 + -(-len(image) // 512) * 512
    cuts = {second - 700: (0, ["zip_damaged"]), second: (1, ["zip_damaged"]), second + 100: (1, ["zip_damaged"])}
    for length, (n_images, codes) in cuts.items():
        members, _ = unpacked(body[:length])

        assert sum(member.path is not None for member in members) == n_images
        assert sorted({member.reason_code for member in members} - {None}) == codes


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_a_second_tar_behind_the_first_is_told(unpacked, maker, make_part_10, packed):
    """Readers stop at the end of the first; what lies behind it is not lost without a word."""
    one, other = (packed(tar_of({name: make_part_10(maker.ct())})) for name in "ab")
    members, _ = unpacked(one + other)

    assert [member.reason_code for member in members] == [None, "zip_damaged"]


def test_an_empty_file_beside_images_is_told(unpacked, maker, make_part_10, make_zip):
    """It may be an image whose export failed, so it is looked at like any other."""
    names = {"IM1": make_part_10(maker.ct()), "IM2": b"", ".empty": b""}
    for body in (make_zip(names), tar_of(names)):
        members, _ = unpacked(body)

        assert [member.path is not None for member in members] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "create_system", "external_attr"),
    [("d\\", 0, 0), ("d", 0, 0x10), ("d", 3, (stat.S_IFDIR | 0o755) << 16), ("Icon\r", 3, 0)],
)
def test_a_folder_that_lacks_its_slash_is_passed_over(unpacked, name, create_system, external_attr):
    """Writers of zips tell folders in several ways."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.create_system, entry.external_attr = create_system, external_attr
        archive.writestr(entry, b"")
    ((member,), _) = unpacked(file.getvalue())

    assert (member.path, member.reason_code) == (None, None)


def test_a_document_that_is_a_zip_inside_is_junk(unpacked, make_zip):
    """Viewers and manuals lie beside the images of a disc."""
    inner = make_zip({"a": b"text"})
    members, _ = unpacked(make_zip({"viewer.jar": inner, "manual.docx": inner, "study.zip": inner}))

    assert [member.reason_code for member in members] == [None, None, "zip_in_zip"]


def test_attributes_of_another_system_are_no_mode(unpacked, maker, make_part_10):
    """Only a zip made on Unix says by them that a member is a link."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        image = zipfile.ZipInfo("image")
        image.create_system, image.external_attr = 0, stat.S_IFLNK << 16
        archive.writestr(image, make_part_10(maker.ct()))
    ((member,), _) = unpacked(file.getvalue())

    assert member.path is not None


def test_a_damaged_header_in_a_tar_is_told(unpacked, maker, make_part_10):
    """The members behind it cannot be found, and that is not passed over."""
    image = make_part_10(maker.ct())
    body = bytearray(tar_of({"a": image, "b": image}, format_=tarfile.USTAR_FORMAT))
    body[512 + -(-len(image) // 512) * 512] ^= 0xFF
    members, _ = unpacked(bytes(body))

    assert [member.reason_code for member in members] == [None, "zip_damaged"]


def test_an_archive_in_a_tar_is_not_opened(unpacked, make_zip):
    """Nesting is refused in every form."""
    inner = tar_of({"a": b"b"})
    members, _ = unpacked(tar_of({"zip": make_zip({"a": b"b"}), "tar": inner, "tgz": gzip.compress(inner)}))

    assert [member.reason_code for member in members] == ["zip_in_zip"] * 3
