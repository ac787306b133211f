"""The child process: what it answers, what it dies of, and that nothing of it is left."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from shared.child import Child, ChildFailed, Limits, _marked
from shared.errors import Unprocessable
from tests.conftest import ROOT

FUNCTION = """
import os, signal, sys, time
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
        import subprocess
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
    if what == "allocate": return len(bytearray(request["bytes"]))
    if what == "spin":
        while True: pass
    if what == "pid": return os.getpid()

serve(work)
"""


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


async def gone(pid: int) -> None:
    """Return when `pid` does not run any more."""
    async with asyncio.timeout(20):
        while is_running(pid):
            await asyncio.sleep(0.01)


async def test_calls_are_answered_by_one_warm_process(child):
    """Two calls run in the same process, and both are answered."""
    warm = child()

    first = await warm.call({"do": "pid"}, deadline_s=30)
    assert await warm.call({"do": "add", "a": 2, "b": 3}, deadline_s=30) == 5
    assert await warm.call({"do": "pid"}, deadline_s=30) == first == warm.pid
    assert warm.calls == 3


async def test_a_library_that_prints_does_not_break_the_protocol(child):
    """What the function and its own children print goes to standard error."""
    noisy = child()

    assert await noisy.call({"do": "print"}, deadline_s=30) == "quiet"
    await noisy.stop()
    assert b"noise on standard output" in noisy.stderr_tail()
    assert b"noise of a grandchild" in noisy.stderr_tail()


async def test_progress_arrives_in_order_before_the_reply(child):
    """Every progress document is delivered."""
    seen = []

    assert await child().call({"do": "count", "n": 5}, deadline_s=30, on_progress=seen.append) == 5
    assert seen == [{"i": i} for i in range(5)]


@pytest.mark.parametrize(
    ("request_", "limits", "reason_code", "error_type"),
    [
        ({"do": "raise"}, None, "raised", "KeyError"),
        ({"do": "segfault"}, None, "crashed", "SIGSEGV"),
        ({"do": "exit"}, None, "raised", "SystemExit"),
        ({"do": "allocate", "bytes": 4 << 30}, Limits(memory_bytes=1 << 30), "out_of_memory", "MemoryError"),
        ({"do": "spin"}, Limits(cpu_s=1), "cpu_limit", ""),
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
    assert await failing.call({"do": "add", "a": 1, "b": 1}, deadline_s=30) == 2


@pytest.mark.parametrize(("then", "reason_code"), [("hang", "deadline"), ("die", "crashed")])
async def test_what_left_the_group_and_holds_the_pipes_delays_nothing_and_is_killed(child, then, reason_code):
    """A process that the child started in a session of its own keeps neither the deadline nor the death unseen."""
    leaving, pids = child(), []
    await leaving.call({"do": "pid"}, deadline_s=30)
    async with asyncio.timeout(20):
        with pytest.raises(ChildFailed, match=reason_code):
            await leaving.call(
                {"do": "leave", "then": then},
                deadline_s=3 if then == "hang" else 600,
                on_progress=lambda progress: pids.append(progress["pid"]),
            )

    assert len(pids) == 1
    await gone(pids[0])
    assert await leaving.call({"do": "add", "a": 1, "b": 1}, deadline_s=30) == 2


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
        await bomb.call({"do": "fork"}, deadline_s=3)
    watching.cancel()

    assert 10 < max(seen) <= 60
    assert _marked(bomb._mark) == set()


async def test_a_child_killed_while_it_writes_has_crashed(child):
    """Half a line is no reply, and no bug of the parent's."""
    dying = child()

    with pytest.raises(ChildFailed, match="crashed"):
        await dying.call({"do": "half a line"}, deadline_s=30)


async def test_a_stop_signal_to_the_whole_service_leaves_the_child_to_its_parent(child):
    """A supervisor may send SIGTERM and SIGINT to every process; the child goes on until its parent ends it."""
    working = child()
    await working.call({"do": "pid"}, deadline_s=30)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(working.pid, number)

    assert await working.call({"do": "add", "a": 2, "b": 2}, deadline_s=30) == 4


async def test_what_the_function_refuses_is_unprocessable_here_too(child):
    """`Unprocessable` crosses the pipe with its reason code and place."""
    with pytest.raises(Unprocessable) as refused:
        await child().call({"do": "refuse"}, deadline_s=30)

    assert (refused.value.reason_code, refused.value.detail) == ("bad_value", "PatientAge")


async def test_the_deadline_kills_the_child_with_what_it_started(child):
    """After the deadline neither the child nor its grandchild runs."""
    pids = []
    hanging = child()
    await hanging.call({"do": "pid"}, deadline_s=30)
    pids.append(hanging.pid)

    with pytest.raises(ChildFailed, match="deadline"):
        await hanging.call({"do": "spawn"}, deadline_s=1, on_progress=lambda progress: pids.append(progress["pid"]))
    assert len(pids) == 2
    for pid in pids:
        await gone(pid)


async def test_a_cancelled_call_kills_the_child(child):
    """A cancelled call leaves nothing computing."""
    hanging = child()
    await hanging.call({"do": "pid"}, deadline_s=30)
    pid = hanging.pid
    call = asyncio.create_task(hanging.call({"do": "hang"}, deadline_s=600))
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
        async def main():
            child = Child([sys.executable, {str(tmp_path / "child.py")!r}])
            print(await child.call({{"do": "pid"}}, deadline_s=30), flush=True)
            await child.call({{"do": "spin"}}, deadline_s=600)
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
    pid = await stopped.call({"do": "pid"}, deadline_s=30)
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
    pid = await made.call({"do": "pid"}, deadline_s=30)
    await made.stop(kill=True, grace_s=2)

    assert not is_running(pid)
    assert not is_running(int(told.read_text()))
