"""The object store, against S3 over HTTP."""

import asyncio
import os
import uuid

import pytest

from shared.aws import connect
from shared.errors import Unavailable
from shared.objects import PART_BYTES, ObjectMissing, ObjectStore


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


@pytest.fixture
def prefix() -> str:
    return f"test-objects/{uuid.uuid4().hex}/"


async def test_what_is_put_is_got_listed_and_deleted(objects, prefix):
    """An object is there between put and delete, with its size, under a key with spaces and plus signs."""
    key = prefix + "a b+c.bin"
    await objects.put(key, b"four")

    assert await objects.get(key) == b"four"
    assert [(item.key, item.size) async for item in objects.list(prefix)] == [(key, 4)]
    await objects.delete(key)
    await objects.delete(key)
    assert not await objects.exists(key)


async def test_a_missing_object_is_told_without_its_key(objects, prefix):
    """`ObjectMissing` says nothing that the key may hold."""
    with pytest.raises(ObjectMissing) as missing:
        await objects.get(prefix + "DOE^JANE.dcm")

    assert "DOE" not in str(missing.value)


async def test_one_of_many_concurrent_writers_wins_the_free_key(objects, prefix):
    """`put_if_absent` stores exactly one body, and tells its writer alone."""
    bodies = [str(number).encode() for number in range(20)]
    won = await asyncio.gather(*(objects.put_if_absent(prefix + "winner", body) for body in bodies))

    assert won.count(True) == 1
    assert await objects.get(prefix + "winner") == bodies[won.index(True)]


async def test_a_stale_etag_replaces_nothing(objects, prefix):
    """`put_if_match` is a compare-and-swap; on a missing key it changes nothing either."""
    key = prefix + "lease"
    first = await objects.put(key, b"1")
    second = await objects.put_if_match(key, b"2", first)

    assert second is not None
    assert await objects.put_if_match(key, b"3", first) is None
    assert await objects.get_with_etag(key) == (b"2", second)
    assert await objects.put_if_match(prefix + "nothing", b"1", second) is None


async def test_a_large_file_is_streamed_in_parts_and_comes_back_equal(objects, prefix, tmp_path):
    """A file above one part survives a multipart upload and a streamed download."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(bytes(range(256)) * (PART_BYTES // 256) + b"the second part")
    await objects.upload(source, prefix + "large")
    await objects.download(prefix + "large", copy)

    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("largest", [10, 25], ids=["in parts", "in one"])
async def test_a_copy_is_the_same_object(objects, prefix, monkeypatch, largest):
    """A copy has the bytes and the type of its source, however it is made; of nothing there is none."""
    monkeypatch.setattr("shared.objects.LARGEST_COPY_BYTES", largest * 1024 * 1024)
    monkeypatch.setattr("shared.objects.COPIED_PART_BYTES", 5 * 1024 * 1024)
    await objects.put(prefix + "source.json", bytes(range(256)) * (12 * 4096) + b"the rest")
    await objects.copy(prefix + "source.json", prefix + "copy.json")

    assert await objects.get(prefix + "copy.json") == await objects.get(prefix + "source.json")
    with pytest.raises(ObjectMissing):
        await objects.copy(prefix + "nothing", prefix + "copy.json")


async def test_a_connection_that_breaks_in_a_body_is_unavailable(aws, local_aws, monkeypatch):
    """A truncated object is never taken for the whole, and is no bug: the message comes again."""

    async def answer(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: "x"\r\n\r\n' + bytes(1000))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server, connect(os.environ) as broken:
        with pytest.raises(Unavailable):
            await ObjectStore(broken.s3, local_aws.bucket).get("key")


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "AccessDenied"), (503, "SlowDown")])
async def test_what_others_must_mend_is_unavailable(aws, local_aws, monkeypatch, status, code):
    """Expired credentials, a policy or a throttle never make good work a dead letter."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    async def answer(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            f"HTTP/1.1 {status} No\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server, connect(os.environ) as refusing:
        with pytest.raises(Unavailable, match=code):
            await ObjectStore(refusing.s3, local_aws.bucket).get("key")


async def test_a_full_disk_is_this_machines(aws, objects, prefix, tmp_path):
    """A file that cannot be written is told as this machine's trouble, not as S3's, and is tried again."""
    await objects.put(prefix + "object", b"body")
    with pytest.raises(Unavailable, match="this machine: EISDIR"):
        await objects.download(prefix + "object", tmp_path)


async def test_a_bucket_that_is_not_there_is_unavailable(aws):
    """A missing bucket is no missing object: the message must come again, not be dead-lettered."""
    with pytest.raises(Unavailable):
        await ObjectStore(aws.s3, "no-such-bucket").get("key")


async def test_an_endpoint_that_does_not_answer_is_unavailable(aws, local_aws, monkeypatch, unused_tcp_port):
    """A refused connection is `Unavailable`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_tcp_port}")
    async with connect(os.environ) as nowhere:
        with pytest.raises(Unavailable):
            await ObjectStore(nowhere.s3, local_aws.bucket).get("key")
