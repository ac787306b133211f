"""The child in which a MAP runs; `runner` starts it, in whatever interpreter or container has what the MAP imports.

Theory of operation. The child imports the MAP once and then runs one study per call, each with a new `Application`
object: importing the SDK takes seconds, running an object again after it failed is a segmentation fault, a new object
costs milliseconds. `run()` of the SDK takes over the signals and the root logger, and may hang, crash or end the
process; therefore this process owns no message and nothing that is not made again by the next one.

What an operator raises comes out of `run()` as it was raised. That no series matched has no exception of its own: the
selector emits an empty list, and whatever operator comes next fails in its own way. So the selector is watched.

If a MAP is to have a process per study, the child imports nothing: it starts the MAP's own command, waits for it,
and reads from what it printed how it ended. That is the reference which the warm way must equal.

Each study has a folder: `input`, `output`, `work`, and `log.txt`, which takes all that the MAP prints. Nothing of that
goes anywhere else, for it may name the patient.

The interpreter need not have radqueue's dependencies: the standard library (of Python 3.9 or later) and the MAP's own
SDK are all that is imported here.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from services.inference.serving.protocol import Ended, Ready, RunApplication, RunCommand, Start, read
from shared.child import Json, Progress, die_with_parent, end_if_forked, serve
from shared.errors import place_of

CUDA_RUNTIME = "libcudart.so.13"
STACK_BYTES = 32 * 1024 * 1024
SELECTOR_MODULE = "monai.deploy.operators.dicom_series_selector_operator"
ENTRIES = ("app.py", "__main__.py")
OURS = ("services", "shared")
LOG_TAIL_BYTES = 64 * 1024
"""Bytes at the end of a log that are read to find how a command ended."""
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
"""The words of torch, C++ and the kernel when memory runs out; Python and NumPy raise a MemoryError."""
GPU_MEMORY_WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
GPU_LOST_WORDS = (
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "uncorrectable ECC error",
    "CUDA error: unknown error",
    "CUDA error: initialization error",
    "CUDA error: driver shutting down",
    "CUDA error: system not yet initialized",
    "CUDA error: system has unsupported display driver / cuda driver combination",
    "CUDA driver version is insufficient",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "GPU is lost",
)
"""The words of the CUDA runtime when the device or its driver is gone, whatever the study. Errors that a faulty kernel
brings about as well, such as an illegal memory access, are not among them."""
NOTHING_SELECTED = re.compile(
    r"selected_series\[0\]\s*\n(?:\s+[~^]+\n)?IndexError|Missing expected input 'study_selected_series_list'"
)
"""The pattern of a traceback in which the SDK's operators fail because the selector selected nothing."""
_BEGIN = "Traceback (most recent call last):\n"
_CAUSE = "\nThe above exception was the direct cause of the following exception:\n"
_FRAME = re.compile(r'  File "(?P<path>[^"\n]+)", line (?P<line>\d+)')
_ERROR = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?::|$)", re.MULTILINE)


class NoApplication(Exception):  # noqa: N818 - it states a fact about the MAP
    """The MAP does not define exactly one `Application`."""


class MapHost:
    """Runs studies through the MAP whose program is `application`, a folder or a file; the first call imports it."""

    def __init__(self, application: Path, home: Path) -> None:
        """Remember the program; importing may fail, and that must be answered to a call."""
        self._program = application
        self._application: Any = None
        self._home = home
        """The folder in which the MAP is imported: some fix their paths then, and would write beside this program."""
        self._selected: list[int] = []
        """The number of series that each selector of the running study selected."""

    def __call__(self, request: Start | RunApplication, progress: Progress) -> Ready | Ended:
        """Import the MAP, if that was not done before, and run it on a study if the request names one."""
        del progress
        if self._application is None:
            os.chdir(self._home)
            self._application = import_application(self._program)
            _memoise_models()
            _watch_selectors(self._selected)
            # What is imported stays, and the collection after each study need not walk through it: the SDK and torch
            # alone would take it 0.3 s.
            gc.collect()
            gc.freeze()
        if isinstance(request, Start):
            return Ready(_device())
        return self._run(Path(request.study), request.environment)

    def _run(self, study: Path, environment: dict[str, str]) -> Ended:
        self._selected.clear()
        failure: Json | None = None
        with _printing_to(study / "log.txt"), _working_in(study / "work"), _process_state_kept():
            os.environ.update(environment)
            started = time.perf_counter()
            try:
                self._application().run()
            except BaseException as error:  # noqa: BLE001 - SystemExit of an operator is an outcome, too
                traceback.print_exc()
                failure = _told(list(_chain(error)))
            finally:
                end_if_forked()  # before it empties the folders of a study that runs by then
            duration_s = time.perf_counter() - started
        # An application is a cycle of C++ and Python objects and holds the study's volume until it is collected.
        gc.collect()
        _empty(self._home)
        nothing_selected = bool(self._selected) and not any(self._selected)
        has_output = any(path.is_file() for path in (study / "output").rglob("*"))
        outcome = "ran" if failure is None else failure["outcome"]
        if nothing_selected and (outcome == "application_error" or not has_output):
            outcome, failure = "no_matching_series", None
        ended = {"outcome": outcome, "duration_s": duration_s, "device": _device(), "rss_bytes": _rss_bytes()}
        return Ended(**{**ended, **(failure or {})})


class CommandHost:
    """Runs the MAP's own command, a new process for each study."""

    def __call__(self, request: Start | RunCommand, progress: Progress) -> Ready | Ended:
        """Answer the device, or run the command on a study."""
        del progress
        if isinstance(request, Start):
            return Ready(_driver_device())
        study = Path(request.study)
        started = time.perf_counter()
        with (study / "log.txt").open("ab") as log:
            done = subprocess.run(
                request.command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=study / "work",
                env=_with_cuda_runtime({**os.environ, **request.environment}),
                preexec_fn=_prepared,
            )
        measured: Json = {"duration_s": time.perf_counter() - started, "device": _driver_device()}
        # A container's engine tells a signal as a shell does.
        signalled = -done.returncode if done.returncode < 0 else done.returncode - 128
        if done.returncode == 0:
            return Ended("ran", **measured)
        if signalled in {number.value for number in signal.Signals}:
            return Ended("crashed", error_type=signal.Signals(signalled).name, **measured)
        return Ended(**_told_by_log(study / "log.txt", done.returncode), **measured)


def _prepared() -> None:
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _raise_stack_limit()


class _Raised(NamedTuple):
    """An exception: its type, with those it is derived from, its text, and its place."""

    error_type: str
    types: set[str]
    text: str
    where: str


def _chain(error: BaseException | None) -> Iterator[_Raised]:
    """Yield an exception, and what it was raised from."""
    while error is not None:
        kind = type(error)
        yield _Raised(kind.__name__, {base.__name__ for base in kind.__mro__}, str(error), place_of(error))
        error = error.__cause__


def _told(chain: Sequence[_Raised]) -> Json:
    """Tell an exception, and what it comes of, by type and place; their texts are looked at, and stay here.

    MONAI raises a RuntimeError from whatever a transform raises, also where memory ends.
    """
    last, first = chain[0], chain[-1]
    outcomes = [outcome for one in chain if (outcome := _outcome_of(one.types, one.text)) != "application_error"]
    where = last.where if first is last else f"{last.where}, from {first.error_type} {first.where}"
    return {"outcome": (outcomes or ["application_error"])[0], "error_type": last.error_type, "where": where}


def _outcome_of(type_names: set[str], text: str) -> str:
    """Return what an exception says of a run; torch and CuPy name theirs OutOfMemoryError."""
    if "OutOfMemoryError" in type_names or any(words in text for words in GPU_MEMORY_WORDS):
        return "gpu_out_of_memory"
    if any(words in text for words in GPU_LOST_WORDS):
        return "gpu_lost"
    if "MemoryError" in type_names or any(words in text for words in MEMORY_WORDS):
        return "out_of_memory"
    return "application_error"


def _told_by_log(log: Path, returncode: int) -> Json:
    """Tell how a command failed by the last traceback that it printed."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        _, *tracebacks = file.read().decode(errors="replace").split(_BEGIN)
    chain = list(_printed_chain(tracebacks))
    if not chain:
        return {"outcome": "application_error", "error_type": f"exit {returncode}", "where": ""}
    return {"outcome": "no_matching_series"} if NOTHING_SELECTED.search(tracebacks[-1]) else _told(chain)


def _printed_chain(tracebacks: Sequence[str]) -> Iterator[_Raised]:
    """Yield the last exception, and what it was raised from, which is printed before it."""
    for index, printed in enumerate(reversed(tracebacks)):
        frames = list(_FRAME.finditer(printed))
        if not frames or (index and _CAUSE not in printed):
            return
        error = _ERROR.search(printed, frames[-1].end())
        name = error["type"].rpartition(".")[2] if error else ""
        name = "MemoryError" if name == "_ArrayMemoryError" else name
        text = printed[error.start() :] if error else ""
        yield _Raised(name, {name}, text, f"{Path(frames[-1]['path']).name}:{frames[-1]['line']}")


def import_application(program: Path) -> Any:
    """Import the program, and return its one `Application` that no other one is derived from.

    Raises:
        NoApplication: the module defines none, or more than one.
    """
    # Before anything can import the SDK.
    _raise_stack_limit()
    library = cuda_runtime()
    if library is not None:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    entry = _entry_of(program)
    # The SDK parses sys.argv in any application that does not say otherwise.
    sys.argv = [str(entry)]
    sys.path.insert(0, str(entry.parent))
    _silence_pydicom()
    module = _import_module(entry)
    application: Any = importlib.import_module("monai.deploy.core").Application
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, application) and value is not application
    ]
    leaves = {cls for cls in found if not any(other is not cls and issubclass(other, cls) for other in found)}
    if len(leaves) != 1:
        raise NoApplication(f"the entry names {len(leaves)} applications")
    return leaves.pop()


def _entry_of(program: Path) -> Path:
    """Return the file that defines or imports the `Application`."""
    if program.is_file():
        return program
    named = [program / entry for entry in ENTRIES if (program / entry).is_file()]
    candidates = named[:1] or [path for path in program.glob("*.py") if b"Application" in path.read_bytes()]
    if len(candidates) != 1:
        raise NoApplication("the folder has no entry")
    return candidates[0]


def _import_module(entry: Path) -> ModuleType:
    """Import the MAP's entry, under a name that does not make it run at once."""
    if entry.stem != "__main__":
        return importlib.import_module(entry.stem)
    spec = importlib.util.spec_from_file_location("map_main", entry)
    if spec is None or spec.loader is None:
        raise NoApplication("the entry is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _silence_pydicom() -> None:
    """Read values as they are: a value that the standard forbids must not lose an image, nor be printed."""
    if importlib.util.find_spec("pydicom") is None:
        return
    config: Any = importlib.import_module("pydicom.config")
    if hasattr(config, "settings"):  # not in pydicom 2.2 and before
        config.settings.reading_validation_mode = config.IGNORE
    logger = logging.getLogger("pydicom")
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    logger.setLevel(logging.CRITICAL)


def _raise_stack_limit() -> None:
    """Give this process the stack that Holoscan asks for; with less it warns of segmentation faults."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def cuda_runtime() -> Path | None:
    """Return the CUDA runtime of the `nvidia-cuda-runtime` package, which the SDK's core is linked to.

    Where the package is missing, the one of an installed toolkit may do; the import of the SDK says if it does not.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for library in sorted(Path(place).glob(f"*/lib/{CUDA_RUNTIME}")):
            return library
    return None


def _with_cuda_runtime(environment: dict[str, str]) -> dict[str, str]:
    library = cuda_runtime()
    if library is None:
        return environment
    places = [str(library.parent), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return {**environment, "LD_LIBRARY_PATH": ":".join(places)}


def _memoise_models() -> None:
    """Keep models between studies: the SDK loads them again for each application, which costs time and leaks."""
    factory: Any = importlib.import_module("monai.deploy.core.models").ModelFactory
    create, kept = factory.create, {}

    def memoised(path: Path | str, name: str = "", model_type: str = "") -> Any:
        files = [Path(path), *sorted(Path(path).rglob("*"))]
        stamp = tuple((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())
        key = (str(path), name, model_type, stamp)
        if key not in kept:
            kept[key] = create(path, name, model_type)
        return kept[key]

    factory.create = staticmethod(memoised)


def _watch_selectors(selected: list[int]) -> None:
    """Record how many series each selector emits; applications override `filter`, so the watch is at the output."""
    selector: Any = importlib.import_module(SELECTOR_MODULE).DICOMSeriesSelectorOperator
    compute = selector.compute

    def watched(self: Any, op_input: Any, op_output: Any, context: Any) -> None:
        compute(self, op_input, _WatchedOutput(op_output, selected), context)

    selector.compute = watched


class _WatchedOutput:
    """The SDK's OutputContext, seen through a counter."""

    def __init__(self, output: Any, selected: list[int]) -> None:
        self._output = output
        self._selected = selected

    def emit(self, data: Any, *args: Any, **kwargs: Any) -> None:
        self._selected.append(sum(len(study.selected_series) for study in data or []))
        self._output.emit(data, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send all that this process prints, in Python or C++, to the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


def _empty(folder: Path) -> None:
    """Remove what a study left there: the next one must not find it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    kept = os.getcwd()  # noqa: PTH109 - a string is all that is needed
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        os.chdir(kept)


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Let the MAP log, and undo what a run does to the environment, the signals and the root logger."""
    root = logging.getLogger()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    environment = dict(os.environ)
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)


def _device() -> str:
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def _driver_device() -> str:
    """Return the device as far as it can be told without importing anything."""
    return (
        "cuda" if Path("/proc/driver/nvidia/gpus").is_dir() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"
    )


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


def _end_with(requests: int) -> None:
    """End this process when the pipe can be written to no more: in a container, its parent is not our process."""
    watched = select.poll()
    watched.register(requests, 0)  # poll reports the end of a pipe even if it is asked for nothing
    watched.poll()
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """Serve; the one argument is `{"application": PATH, "home": PATH}`, or `{}` to run commands.

    With `"container"`, it runs in a container, and needs no `"home"`.
    """
    (said,) = arguments
    asked = json.loads(said)
    # The MAP's own modules may have our names.
    sys.path.pop(0)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    faulthandler.enable()
    if asked.get("container"):
        threading.Thread(target=_end_with, args=[os.dup(0)], daemon=True).start()
    if "application" not in asked:
        serve(CommandHost(), read)
        return
    # A container's temporary folder goes with it.
    serve(MapHost(Path(asked["application"]), Path(asked.get("home") or tempfile.mkdtemp())), read)
