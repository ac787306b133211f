"""A fake SQS over HTTP: `sqsmodel` behind the AWS JSON protocol 1.0, with faults on demand.

In one loop with its clients (`async with FakeSqs.serving() as fake`) it follows the loop's clock, virtual or real. As a
process of its own (`python -m tests.queue.fakesqs`) it prints `ready URL`, and is asked over HTTP besides:
`GET /_fake/log?about=NAME` (of all queues and effects that begin so), `GET /_fake/counts?queue=NAME`, and
`PUT /_fake/effects/KEY` (201 the first time, 200 again), which is in the same log, so that the order is known.

A client that goes away during a long poll may still be handed messages, as on AWS: the poll goes on here without it,
and a message that it takes is hidden for its visibility although nobody got it (`swallowed` in the log).
"""

import argparse
import asyncio
import json
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from aiohttp import web

from tests.queue.sqsmodel import (
    ACCOUNT,
    LONGEST_POLL_S,
    MOST_PER_BATCH,
    MoveTask,
    Refused,
    SqsModel,
    Stored,
    StoredQueue,
    md5,
    seen,
)

Answer = dict[str, Any]
NEVER_S = 10**9
"""Idle connections are closed by clients only, so that no request ever meets a connection that the server closes."""


@dataclass
class Fault:
    """What goes wrong with the next `times` calls of `operation` (`*` is any) that begin before `until`.

    `error`: the call is not carried out, and answers `status` and `code`. `lost_reply`: the call is carried out, then
    the connection is reset. `reset`: the connection is reset at once. `slow`: the call is carried out after `seconds`.
    `slow_reply`: it is carried out at once and answered after `seconds`. `entries`: those entries of a batch, by their
    place, answer an internal error. `duplicate`: every received message is delivered a second time.
    """

    operation: str
    kind: Literal["error", "lost_reply", "reset", "slow", "slow_reply", "entries", "duplicate"]
    times: float = 1
    until: float = float("inf")
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0
    places: tuple[int, ...] = (0,)


def throttled(operation: str, times: float = 1) -> Fault:
    """Return the fault of too many requests."""
    return Fault(operation, "error", times=times, status=400, code="RequestThrottled")


@dataclass(eq=False)
class FakeSqs:
    """The server. Tests read `model.log`, and append to `faults`."""

    model: SqsModel
    faults: list[Fault] = field(default_factory=list)
    effects: set[str] = field(default_factory=set)
    url: str = ""
    polls: int = 0
    """Polls that are waiting now."""

    def __post_init__(self) -> None:
        """Wake polls whenever something happened."""
        self._changed = asyncio.Event()
        self.model.listeners.append(lambda _: self._wake())

    @classmethod
    @asynccontextmanager
    async def serving(cls, port: int = 0) -> AsyncIterator[Self]:
        """Serve on loopback, by the clock of the running loop, until the block ends."""
        loop = asyncio.get_running_loop()
        fake = cls(SqsModel(loop.time, epoch=time.time() - loop.time()))
        app = web.Application(client_max_size=2**22)
        app.router.add_post("/{tail:.*}", fake._post)
        app.router.add_get("/_fake/log", fake._get_log)
        app.router.add_get("/_fake/counts", fake._get_counts)
        app.router.add_put("/_fake/effects/{key:.+}", fake._put_effect)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=NEVER_S, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        try:
            await site.start()
            fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield fake
        finally:
            await runner.cleanup()

    # What tests ask for directly.

    def create(self, name: str, *, max_receives: int = 50, **settings: str) -> StoredQueue:
        """Create a queue with its dead-letter queue, `NAME-dlq`."""
        dlq = self.model.create_queue(f"{name}-dlq")
        policy = json.dumps({"deadLetterTargetArn": dlq.arn, "maxReceiveCount": max_receives})
        return self.model.create_queue(name, {"RedrivePolicy": policy} | settings)

    def counts(self, name: str) -> tuple[int, int]:
        """Return how many messages of a queue are visible, and how many are hidden."""
        found = self.model.attributes_of(self.model.queue(name))
        hidden = int(found["ApproximateNumberOfMessagesNotVisible"]) + int(found["ApproximateNumberOfMessagesDelayed"])
        return int(found["ApproximateNumberOfMessages"]), hidden

    # HTTP.

    async def _post(self, request: web.Request) -> web.StreamResponse:
        operation = request.headers.get("X-Amz-Target", "").removeprefix("AmazonSQS.")
        asked = json.loads(await request.text() or "{}")
        call = uuid.uuid4().hex[:12]
        queue = asked.get("QueueUrl", "").rsplit("/", 1)[-1] or asked.get("QueueName")
        self.model.record("call", queue, call=call, operation=operation, asked=asked)
        fault = self._fault(operation)
        if fault is not None:
            self.model.record("fault", queue, call=call, operation=operation, kind=fault.kind)
            if fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
        if fault is not None and fault.kind == "reset":
            return _reset(request)
        try:
            if fault is not None and fault.kind == "error":
                raise Refused(fault.code, "A fault on demand.", status=fault.status)
            status, answer, headers = 200, await self._carry_out(operation, asked, request, fault), {}
        except Refused as refused:
            status = refused.status
            answer = {"__type": refused.shape, "message": str(refused)}
            headers = {"x-amzn-query-error": f"{refused.code};{'Sender' if status < 500 else 'Receiver'}"}
        if fault is not None and fault.kind == "slow_reply":
            await asyncio.sleep(fault.seconds)
        self.model.record("reply", queue, call=call, operation=operation, status=status, code=answer.get("__type"))
        if fault is not None and fault.kind == "lost_reply":
            return _reset(request)
        return web.Response(
            status=status,
            text=json.dumps(answer),
            content_type="application/x-amz-json-1.0",
            headers=headers | {"x-amzn-RequestId": call},
        )

    def _fault(self, operation: str) -> Fault | None:
        for fault in self.faults:
            if fault.operation in ("*", operation) and fault.times > 0 and self.model.now() < fault.until:
                fault.times -= 1
                return fault
        return None

    async def _carry_out(self, operation: str, asked: Answer, request: web.Request, fault: Fault | None) -> Answer:
        if operation == "ReceiveMessage":
            return await self._receive_message(asked, request, fault)
        method = _OPERATIONS.get(operation)
        if method is not None:
            return method(self, asked)
        entry = _BATCHES.get(operation)
        if entry is not None:
            return self._batch(asked, lambda one: _OPERATIONS[entry](self, one), fault)
        raise Refused("InvalidAction", f"The action {operation} is not valid for this endpoint.")

    def _queue(self, asked: Answer) -> StoredQueue:
        return self.model.queue(asked["QueueUrl"].rsplit("/", 1)[-1])

    def _url(self, queue: StoredQueue) -> Answer:
        return {"QueueUrl": f"{self.url}/{ACCOUNT}/{queue.name}"}

    def _create_queue(self, asked: Answer) -> Answer:
        return self._url(self.model.create_queue(asked["QueueName"], asked.get("Attributes")))

    def _get_queue_url(self, asked: Answer) -> Answer:
        return self._url(self.model.queue(asked["QueueName"]))

    def _get_queue_attributes(self, asked: Answer) -> Answer:
        found = self.model.attributes_of(self._queue(asked))
        wanted = asked.get("AttributeNames", [])
        return {"Attributes": found if "All" in wanted else {name: found[name] for name in wanted if name in found}}

    def _set_queue_attributes(self, asked: Answer) -> Answer:
        self._queue(asked).settings.update(asked["Attributes"])
        return {}

    def _list_queues(self, asked: Answer) -> Answer:
        prefix = asked.get("QueueNamePrefix", "")
        return {
            "QueueUrls": [
                self._url(queue)["QueueUrl"] for queue in self.model.queues.values() if queue.name.startswith(prefix)
            ]
        }

    def _send_message(self, asked: Answer) -> Answer:
        message = self.model.send(
            self._queue(asked), asked["MessageBody"], asked.get("MessageAttributes"), asked.get("DelaySeconds")
        )
        return {"MessageId": message.message_id, "MD5OfMessageBody": md5(message.body)}

    def _delete_message(self, asked: Answer) -> Answer:
        self.model.delete(self._queue(asked), asked["ReceiptHandle"])
        return {}

    def _change_message_visibility(self, asked: Answer) -> Answer:
        self.model.change_visibility(self._queue(asked), asked["ReceiptHandle"], asked["VisibilityTimeout"])
        return {}

    def _start_message_move_task(self, asked: Answer) -> Answer:
        task = self.model.start_move(
            asked["SourceArn"], asked.get("DestinationArn"), asked.get("MaxNumberOfMessagesPerSecond")
        )
        return {"TaskHandle": task.handle}

    def _list_message_move_tasks(self, asked: Answer) -> Answer:
        tasks = self.model.tasks_of(asked["SourceArn"])[: asked.get("MaxResults", 1)]
        return {"Results": [self._task(task) for task in tasks]}

    def _task(self, task: MoveTask) -> Answer:
        optional = {"DestinationArn": task.destination_arn, "FailureReason": task.failure}
        running = {"TaskHandle": task.handle} if task.status == "RUNNING" else {}
        return (
            running
            | {name: value for name, value in optional.items() if value is not None}
            | {
                "Status": task.status,
                "SourceArn": task.source.arn,
                "ApproximateNumberOfMessagesMoved": task.moved,
                "ApproximateNumberOfMessagesToMove": task.to_move,
                "StartedTimestamp": round((self.model.epoch + task.started_at) * 1000),
            }
        )

    def _batch(self, asked: Answer, carry_out: Callable[[Answer], Answer], fault: Fault | None) -> Answer:
        entries = asked.get("Entries", [])
        if not entries:
            raise Refused(
                "AWS.SimpleQueueService.EmptyBatchRequest", "There should be at least one entry in the request."
            )
        if len(entries) > MOST_PER_BATCH:
            raise Refused(
                "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
                f"Maximum number of entries per request are {MOST_PER_BATCH}. You have sent {len(entries)}.",
            )
        if len({entry["Id"] for entry in entries}) < len(entries):
            raise Refused(
                "AWS.SimpleQueueService.BatchEntryIdsNotDistinct", "Two or more batch entries have the same Id."
            )
        self._queue(asked)
        done, failed = [], []
        for place, entry in enumerate(entries):
            try:
                if fault is not None and fault.kind == "entries" and place in fault.places:
                    raise Refused("InternalError", "A fault on demand.", status=500)
                done.append({"Id": entry["Id"]} | carry_out(entry | {"QueueUrl": asked["QueueUrl"]}))
            except Refused as refused:
                fault_of_sender = refused.status < 500
                code = refused.code.rsplit(".", 1)[-1]
                self.model.record("entry_refused", asked["QueueUrl"].rsplit("/", 1)[-1], code=code, entry=entry["Id"])
                failed.append(
                    {"Id": entry["Id"], "SenderFault": fault_of_sender, "Code": code, "Message": str(refused)}
                )
        return {"Successful": done} | ({"Failed": failed} if failed else {})

    # Long polls.

    async def _receive_message(self, asked: Answer, request: web.Request, fault: Fault | None) -> Answer:
        queue = self._queue(asked)
        wait_s = asked.get("WaitTimeSeconds", int(queue.settings.get("ReceiveMessageWaitTimeSeconds", 0)))
        if not 0 <= wait_s <= LONGEST_POLL_S:
            raise Refused("InvalidParameterValue", f"Value {wait_s} for parameter WaitTimeSeconds is invalid.")
        deadline = self.model.now() + wait_s
        self.polls += 1
        try:
            taken = await self._poll(queue, asked, deadline)
        finally:
            self.polls -= 1
        for message, _ in taken:
            if request.transport is None or request.transport.is_closing():
                self.model.record("swallowed", queue.name, message.message_id, serial=message.serial)
            if fault is not None and fault.kind == "duplicate":
                self.model.duplicate(queue, message.message_id)
        return {"Messages": [self._as_received(message, handle, asked) for message, handle in taken]} if taken else {}

    async def _poll(self, queue: StoredQueue, asked: Answer, deadline: float) -> list[tuple[Stored, str]]:
        while True:
            self.model.queue(queue.name)
            taken = self.model.receive(queue, asked.get("MaxNumberOfMessages", 1), asked.get("VisibilityTimeout"))
            now = self.model.now()
            if taken or now >= deadline:
                return taken
            until = min(deadline, self.model.next_change(queue) or deadline)
            changed = self._changed
            try:
                async with asyncio.timeout(until - now):
                    await changed.wait()
            except TimeoutError:
                continue

    def _as_received(self, message: Stored, handle: str, asked: Answer) -> Answer:
        found = seen(message, self.model.epoch)
        wanted = asked.get("MessageSystemAttributeNames", []) + asked.get("AttributeNames", [])
        named = asked.get("MessageAttributeNames", [])
        shown = {k: v for k, v in message.attributes.items() if k in named or "All" in named or ".*" in named}
        answer = {
            "MessageId": message.message_id,
            "ReceiptHandle": handle,
            "Body": message.body,
            "MD5OfBody": md5(message.body),
        }
        system = found if "All" in wanted else {name: found[name] for name in wanted if name in found}
        return answer | ({"Attributes": system} if system else {}) | ({"MessageAttributes": shown} if shown else {})

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # Asked by tests from outside.

    async def _get_log(self, request: web.Request) -> web.Response:
        about = request.query.get("about", "")
        wanted = (e for e in self.model.log if (e.queue or e.details.get("key", "")).startswith(about))
        return web.json_response([asdict(entry) for entry in wanted])

    async def _get_counts(self, request: web.Request) -> web.Response:
        return web.json_response(self.counts(request.query["queue"]))

    async def _put_effect(self, request: web.Request) -> web.Response:
        key = request.match_info["key"]
        first = key not in self.effects
        self.effects.add(key)
        self.model.record("effect" if first else "effect_again", key=key)
        return web.Response(status=201 if first else 200)


_OPERATIONS: dict[str, Callable[[FakeSqs, Answer], Answer]] = {
    "CreateQueue": FakeSqs._create_queue,
    "GetQueueUrl": FakeSqs._get_queue_url,
    "GetQueueAttributes": FakeSqs._get_queue_attributes,
    "SetQueueAttributes": FakeSqs._set_queue_attributes,
    "ListQueues": FakeSqs._list_queues,
    "SendMessage": FakeSqs._send_message,
    "DeleteMessage": FakeSqs._delete_message,
    "ChangeMessageVisibility": FakeSqs._change_message_visibility,
    "StartMessageMoveTask": FakeSqs._start_message_move_task,
    "ListMessageMoveTasks": FakeSqs._list_message_move_tasks,
}
_BATCHES = {
    "SendMessageBatch": "SendMessage",
    "DeleteMessageBatch": "DeleteMessage",
    "ChangeMessageVisibilityBatch": "ChangeMessageVisibility",
}


def _reset(request: web.Request) -> web.Response:
    """Reset the connection: the peer sees ECONNRESET, not an orderly end."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


async def _main(port: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with FakeSqs.serving(port) as fake:
        sys.stdout.write(f"ready {fake.url}\n")
        sys.stdout.flush()
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(_main(parser.parse_args().port))
