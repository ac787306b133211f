"""What `radqueue upload` finds in what it sends."""

import gzip
import hashlib
import io
import os
import tarfile

import pytest

from cli.study import uploads
from shared.operations.refused import Refused


def tar_of(members, mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, body in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("folder"))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_the_instances_of_a_tar_are_those_of_its_files(dicom_bytes, tmp_path, mode):
    """A tar, gzipped or not and whatever its name, has the instances of its members; links and folders are none."""
    members = {f"study/{n}.dcm": dicom_bytes() for n in range(2)} | {"readme.txt": b"hello"}
    for name, body in members.items():
        (tmp_path / name.replace("/", "_")).write_bytes(body)
    archive = tmp_path / "study"
    archive.write_bytes(tar_of(members, mode))
    (sent,) = uploads.collect([archive], "d")
    plain = [one for path in tmp_path.glob("*.dcm") for one in uploads.instances(*uploads.collect([path], "d"))[0]]
    found, others = uploads.instances(sent)

    assert {(one.sop_instance_uid, one.sha, one.object_sha256) for one in found} == {
        (one.sop_instance_uid, one.sha, one.object_sha256) for one in plain
    }
    assert len(found) == 2
    assert {one.upload_sha256 for one in found} == {sent.sha256}
    assert {sent.sha256, hashlib.sha256(b"hello").hexdigest()} <= others


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    """Images that nobody may see are not passed over; a marker and what is hidden are."""
    for name in ("a", ".hidden", "_COMPLETE"):
        (tmp_path / name).write_bytes(b"x")
    closed, trash = tmp_path / "closed", tmp_path / ".Trashes"
    trash.mkdir()
    scandir = os.scandir

    def may_not(path):
        if path in {str(closed), str(trash)}:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", may_not)
    found = list(uploads.files(tmp_path))
    closed.mkdir()

    assert found == [tmp_path / "a"]
    with pytest.raises(Refused, match="closed: Permission denied"):
        list(uploads.files(tmp_path))


@pytest.mark.parametrize("cut", [600, -3000])
def test_nothing_more_is_expected_of_a_damaged_tar(dicom_bytes, tmp_path, cut):
    """What came whole is expected, and what did not is none of it: ingest says why."""
    archive = tmp_path / "study.tar"
    archive.write_bytes(tar_of({"a": dicom_bytes(PixelData=bytes(4000), Rows=40, Columns=50)}, "w:")[:cut])
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"no tar"))
    found = [uploads.instances(one)[0] for one in uploads.collect([archive, tmp_path / "text.gz"], "d")]

    assert [len(instances) for instances in found] == [int(cut < 0), 0]
