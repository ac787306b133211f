"""The child process: what it answers, what it dies of, and that nothing of it is left."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.child import Child, ChildFailed, Limits, Request, _marked
from shared.errors import Unprocessable
from tests.conftest import ROOT

FUNCTION = """
import os, signal, subprocess, sys, time
from shared.child import serve
from shared.errors import Unprocessable

REPLIES = os.dup(1)

def work(request, progress):
    what = request["do"]
    if what == "add": return request["a"] + request["b"]
    if what == "print":
        print("noise on standard output", flush=True)
        os.system("echo noise of a grandchild")
        return "quiet"
    if what == "count":
        for i in range(request["n"]): progress({"i": i})
        return request["n"]
    if what == "hang": time.sleep(600)
    if what == "spawn":
        progress({"pid": os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "600"])})
        time.sleep(600)
    if what == "raise": raise KeyError("DOE^JANE")
    if what == "refuse": raise Unprocessable("bad_value", "PatientAge")
    if what == "leave":
        progress({"pid": subprocess.Popen(["sleep", "600"], start_new_session=True).pid})
        if request["then"] == "hang": time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fork":
        while True:
            try:
                if os.fork() == 0: os.setsid()
            except OSError: time.sleep(0.01)
    if what == "half a line":
        os.write(REPLIES, b'{"reply": "DOE')
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit": sys.exit(3)
    if what == "allocate": return len(bytearray(request["n"]))
    if what == "spin":
        while True: pass
    if what == "pid": return os.getpid()
    if what == "say":
        os.write(REPLIES, request["then"].replace("PID", str(os.getpid())).encode() + b"\\n")
        return 1
    if what == "say at length": return "x" * request["n"]
    if what == "fork and return":
        helper = os.fork()
        return helper or os.getpid()
    if what == "fork and raise":
        if os.fork() == 0: raise KeyError
        return 1
    if what == "fork and talk":
        helper = os.fork()
        if helper: return helper
        line = b'{"id": 2, "pid": 1, "reply": 7}\\n'
        while True:
            for number in set(range(3, 20)) - {REPLIES}:
                try: os.write(number, line)
                except OSError: pass
            os.write(1, line)
            time.sleep(0.01)
    if what == "fork twice":
        into, out = os.pipe()
        if os.fork() == 0:
            taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
            if os.fork() == 0:
                os.write(out, b"%d" % sum(os.path.exists(f"/proc/self/fd/{number}") for number in taken))
            os._exit(0)
        return int(os.read(into, 9))
    if what == "start and leave": return subprocess.Popen(["sleep", "600"], close_fds=False).pid
    if what == "talk from outside":
        os.set_inheritable(REPLIES, True)
        return subprocess.Popen(["sh", "-c", f"sleep 0.1; echo outside >&{REPLIES}; sleep 600"], close_fds=False).pid
    if what == "start a reader": return subprocess.run(["cat"], stdout=subprocess.PIPE).stdout.decode()

serve(work, dict)
"""


@dataclass(frozen=True)
class Work(Request[Any]):
    """What the function above is to do."""

    do: str
    a: int = 0
    b: int = 0
    n: int = 0
    then: str = ""
    news = Any


@dataclass(frozen=True)
class Number(Request[int]):
    """The same, where a number is to be replied and nothing to be told on the way."""

    do: str
    then: str = ""
    n: int = 0


@pytest.fixture
async def child(tmp_path):
    children = []

    def make(limits: Limits | None = None) -> Child:
        script = tmp_path / "child.py"
        script.write_text(FUNCTION)
        children.append(Child([sys.executable, str(script)], limits=limits, env={"PYTHONPATH": str(ROOT)}))
        return children[-1]

    yield make
    for made in children:
        await made.stop()


def is_running(pid: int) -> bool:
    """Tell whether `pid` runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - proc
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def open_in(pid: int) -> dict[int, str]:
    """Return what a process has open, by descriptor."""
    return {int(link.name): str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}


async def gone(pid: int) -> None:
    """Return when `pid` does not run any more."""
    async with asyncio.timeout(20):
        while is_running(pid):
            await asyncio.sleep(0.01)


async def test_calls_are_answered_by_one_warm_process(child):
    """Two calls run in the same process, and both are answered."""
    warm = child()

    first = await warm.call(Work("pid"), deadline_s=30)
    assert await warm.call(Work("add", a=2, b=3), deadline_s=30) == 5
    assert await warm.call(Work("pid"), deadline_s=30) == first == warm.pid
    assert warm.calls == 3


async def test_a_library_that_prints_does_not_break_the_protocol(child):
    """What the function and its own children print goes to standard error."""
    noisy = child()

    assert await noisy.call(Work("print"), deadline_s=30) == "quiet"
    await noisy.stop()
    assert b"noise on standard output" in noisy.stderr_tail()
    assert b"noise of a grandchild" in noisy.stderr_tail()


async def test_progress_arrives_in_order_before_the_reply(child):
    """Every progress document is delivered."""
    seen = []

    assert await child().call(Work("count", n=5), deadline_s=30, on_progress=seen.append) == 5
    assert seen == [{"i": i} for i in range(5)]


@pytest.mark.parametrize(
    ("request_", "limits", "reason_code", "error_type"),
    [
        (Work("raise"), None, "raised", "KeyError"),
        (Work("segfault"), None, "crashed", "SIGSEGV"),
        (Work("exit"), None, "raised", "SystemExit"),
        (Work("allocate", n=4 << 30), Limits(memory_bytes=1 << 30), "out_of_memory", "MemoryError"),
        (Work("spin"), Limits(cpu_s=1), "cpu_limit", ""),
    ],
)
async def test_a_failure_is_told_by_its_reason_and_the_next_call_works(
    child, request_, limits, reason_code, error_type
):
    """Each way to fail has its own reason code, and a new process answers the next call."""
    failing = child(limits)

    with pytest.raises(ChildFailed) as failed:
        await failing.call(request_, deadline_s=60)
    assert (failed.value.reason_code, failed.value.error_type) == (reason_code, error_type)
    assert "DOE" not in str(failed.value)
    assert await failing.call(Work("add", a=1, b=1), deadline_s=30) == 2


@pytest.mark.parametrize(("then", "reason_code"), [("hang", "deadline"), ("die", "crashed")])
async def test_what_left_the_group_and_holds_the_pipes_delays_nothing_and_is_killed(child, then, reason_code):
    """A process that the child started in a session of its own keeps neither the deadline nor the death unseen."""
    leaving, pids = child(), []
    await leaving.call(Work("pid"), deadline_s=30)
    async with asyncio.timeout(20):
        with pytest.raises(ChildFailed, match=reason_code):
            await leaving.call(
                Work("leave", then=then),
                deadline_s=3 if then == "hang" else 600,
                on_progress=lambda progress: pids.append(progress["pid"]),
            )

    assert len(pids) == 1
    await gone(pids[0])
    assert await leaving.call(Work("add", a=1, b=1), deadline_s=30) == 2


async def test_a_fork_bomb_is_bounded_and_gone_at_the_deadline(child, tmp_path):
    """Processes that fork without end reach the limit of their user, and none is left, also of those that left."""
    bomb = child(Limits(processes=40))
    if os.getuid() == 0:  # root has no limit of processes
        bomb._argv = ("setpriv", "--reuid=64321", "--clear-groups", "--inh-caps=-all", *bomb._argv)
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(0o755)
    seen = []

    async def watch():
        while True:
            seen.append(len(await asyncio.to_thread(_marked, bomb._mark)))

    watching = asyncio.create_task(watch())
    with pytest.raises(ChildFailed, match="deadline"):
        await bomb.call(Work("fork"), deadline_s=3)
    watching.cancel()

    assert 10 < max(seen) <= 60
    assert _marked(bomb._mark) == set()


async def test_a_child_killed_while_it_writes_has_crashed(child):
    """Half a line is no reply, and no bug of the parent's."""
    dying = child()

    with pytest.raises(ChildFailed, match="crashed"):
        await dying.call(Work("half a line"), deadline_s=30)


async def test_a_stop_signal_to_the_whole_service_leaves_the_child_to_its_parent(child):
    """A supervisor may send SIGTERM and SIGINT to every process; the child goes on until its parent ends it."""
    working = child()
    await working.call(Work("pid"), deadline_s=30)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(working.pid, number)

    assert await working.call(Work("add", a=2, b=2), deadline_s=30) == 4


async def test_what_the_function_refuses_is_unprocessable_here_too(child):
    """`Unprocessable` crosses the pipe with its reason code and place."""
    with pytest.raises(Unprocessable) as refused:
        await child().call(Work("refuse"), deadline_s=30)

    assert (refused.value.reason_code, refused.value.detail) == ("bad_value", "PatientAge")


async def test_the_deadline_kills_the_child_with_what_it_started(child):
    """After the deadline neither the child nor its grandchild runs."""
    pids = []
    hanging = child()
    await hanging.call(Work("pid"), deadline_s=30)
    pids.append(hanging.pid)

    with pytest.raises(ChildFailed, match="deadline"):
        await hanging.call(Work("spawn"), deadline_s=1, on_progress=lambda progress: pids.append(progress["pid"]))
    assert len(pids) == 2
    for pid in pids:
        await gone(pid)


async def test_a_cancelled_call_kills_the_child(child):
    """A cancelled call leaves nothing computing."""
    hanging = child()
    await hanging.call(Work("pid"), deadline_s=30)
    pid = hanging.pid
    call = asyncio.create_task(hanging.call(Work("hang"), deadline_s=600))
    await asyncio.sleep(0)
    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    await gone(pid)


async def test_a_killed_parent_leaves_no_child(tmp_path):
    """When the parent gets SIGKILL in the middle of a call, the kernel ends the child too."""
    (tmp_path / "child.py").write_text(FUNCTION)
    parent_code = textwrap.dedent(f"""
        import asyncio, sys
        from shared.child import Child
        from tests.shared.test_child import Work
        async def main():
            child = Child([sys.executable, {str(tmp_path / "child.py")!r}])
            print(await child.call(Work("pid"), deadline_s=30), flush=True)
            await child.call(Work("spin"), deadline_s=600)
        asyncio.run(main())
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    pid = int(parent.stdout.readline())
    running = is_running(pid)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()

    assert running
    await gone(pid)


async def test_a_stop_that_is_cancelled_ends_the_process_all_the_same(child):
    """Who cancels twice leaves nothing running; the next stop waits for the end."""
    stopped = child()
    pid = await stopped.call(Work("pid"), deadline_s=30)
    for _ in range(2):
        stopping = asyncio.create_task(stopped.stop(kill=True))
        await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait([stopping])
    await stopped.stop()

    assert not is_running(pid)


async def test_an_engine_that_hangs_does_not_keep_a_child_from_ending(tmp_path):
    """The command that ends a container is given up after the grace, and nothing of it is left."""
    script, told = tmp_path / "child.py", tmp_path / "pid"
    script.write_text(FUNCTION)
    kill = ("sh", "-c", f"echo $$ > {told}; exec sleep 600")
    made = Child([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, kill_argv=kill)
    pid = await made.call(Work("pid"), deadline_s=30)
    await made.stop(kill=True, grace_s=2)

    assert not is_running(pid)
    assert not is_running(int(told.read_text()))


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 1, "pid": PID, "reply": 1}',
        '{"id": 3, "pid": PID, "reply": 1}',
        '{"id": 2, "pid": 1, "reply": 1}',
        '{"id": 2, "pid": PID, "reply": "1"}',
        '{"id": 2, "pid": PID, "reply": null}',
        '{"id": 2, "pid": PID, "reply": 1, "progress": 1}',
        '{"id": 2, "pid": PID, "progress": 1}',
        '{"id": 2, "pid": PID, "error": {"text": "DOE^JANE"}}',
        '{"id": 2, "pid": PID, "answer": 1}',
        '{"reply": 1}',
        '{"serves": PID}',
        "null",
        "DOE^JANE",
        "",
    ],
)
async def test_whatever_is_no_answer_to_the_call_ends_the_child(child, line):
    """Another id, process or shape, and no document at all, break the protocol; a fresh process answers again."""
    heard = child()
    first = await heard.call(Number("pid"), deadline_s=30)
    with pytest.raises(ChildFailed) as failed:
        await heard.call(Number("say", then=line), deadline_s=30)
    again = await heard.call(Number("pid"), deadline_s=30)

    assert failed.value.broke_protocol
    assert str(failed.value) == "crashed protocol"
    assert again != first
    await gone(first)


async def test_a_second_reply_does_not_answer_the_next_call(child):
    """What one call left in the pipe is heard by the next one, whose child is ended; the one after that is right."""
    doubled = child()
    assert await doubled.call(Number("say", then='{"id": 1, "pid": PID, "reply": 9}'), deadline_s=30) == 9
    with pytest.raises(ChildFailed) as failed:
        await doubled.call(Number("pid"), deadline_s=30)

    assert failed.value.broke_protocol
    assert await doubled.call(Number("pid"), deadline_s=30) == doubled.pid


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_a_call_that_was_given_up_is_never_answered(child, how):
    """The call after one that ran out of time, or was cancelled, is answered by a process that never heard of it."""
    late = child()
    first = await late.call(Number("pid"), deadline_s=30)
    call = asyncio.create_task(late.call(Number("hang"), deadline_s=0.1 if how == "deadline" else 600))
    if how == "cancelled":
        await asyncio.sleep(0.1)
        call.cancel()
    await asyncio.wait([call])
    again = [await late.call(Number("pid"), deadline_s=30) for _ in range(2)]

    assert again == [late.pid] * 2
    assert late.pid != first


async def test_a_reply_above_the_limit_ends_the_child(child, monkeypatch):
    """A line that is too long is not kept in memory, and is no answer; one below the limit is."""
    monkeypatch.setattr("shared.child.LINE_LIMIT_BYTES", 100_000)
    talking = child()
    assert len(await talking.call(Work("say at length", n=99_000), deadline_s=30)) == 99_000
    with pytest.raises(ChildFailed) as failed:
        await talking.call(Work("say at length", n=1_000_000), deadline_s=30)

    assert failed.value.broke_protocol
    assert await talking.call(Number("pid"), deadline_s=30) == talking.pid


async def test_a_process_that_forks_and_returns_stays_one(child):
    """Both come back from the function: the child answers, and its fork ends there."""
    forking = child()
    helper = await forking.call(Number("fork and return"), deadline_s=30)
    raised = await forking.call(Number("fork and raise"), deadline_s=30)
    pids = [await forking.call(Number("pid"), deadline_s=30) for _ in range(3)]

    assert raised == 1
    assert pids == [forking.pid] * 3
    assert helper != forking.pid
    await gone(helper)


async def test_a_fork_that_lives_on_has_neither_pipe(child):
    """Whatever it writes, and wherever, is no answer, while the child that it comes from answers."""
    forking = child()
    helper = await forking.call(Number("fork and talk"), deadline_s=30)
    pids = []
    for _ in range(20):
        pids.append(await forking.call(Number("pid"), deadline_s=30))
        await asyncio.sleep(0.01)

    assert pids == [forking.pid] * 20
    assert is_running(helper)
    await forking.stop(kill=True)
    await gone(helper)


async def test_a_fork_of_a_fork_keeps_what_it_opened(child):
    """The pipes are closed once: their numbers may be those of something else by then."""
    assert await child().call(Number("fork twice"), deadline_s=30) == 8


async def test_a_program_that_the_child_starts_has_neither_pipe(child):
    """Also one that inherits all that can be inherited; it reads nothing, and so takes no call away."""
    starting = child()
    pid = await starting.call(Number("start and leave"), deadline_s=30)
    own, given = open_in(starting.pid), open_in(pid)

    assert given[0] == os.devnull
    assert set(given.values()) == {os.devnull, given[2]}, "nothing but standard error, also as its standard output"
    assert len({end for end in own.values() if end.startswith("pipe:")}) == 3
    assert await starting.call(Work("start a reader"), deadline_s=30) == ""
    assert await starting.call(Number("pid"), deadline_s=30) == starting.pid


async def test_a_program_that_has_got_hold_of_the_pipe_is_not_believed(child):
    """What it writes ends the child, and itself."""
    starting = child()
    pid = await starting.call(Number("talk from outside"), deadline_s=30)
    first = starting.pid
    with pytest.raises(ChildFailed) as failed:
        await starting.call(Number("hang"), deadline_s=30)

    assert failed.value.broke_protocol
    assert await starting.call(Number("pid"), deadline_s=30) != first
    await gone(pid)
