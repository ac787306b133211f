"""The child in which a MAP runs: `python -m services.inference.maphost FOLDER`, started by `runner`.

Theory of operation. The child imports the MAP once and then runs one study per call, each with a new `Application`
object: importing the SDK takes seconds, running an object again after it failed is a segmentation fault, a new object
costs milliseconds. `run()` of the SDK takes over the signals and the root logger, and may hang, crash or end the
process; therefore this process owns no message and nothing that is not made again by the next one.

What an operator raises comes out of `run()` as it was raised. That no series matched has no exception of its own: the
selector emits an empty list, and whatever operator comes next fails in its own way. So the selector is watched.

Each study has a folder: `input`, `output`, `work`, and `log.txt`, which takes all that the MAP prints. Nothing of that
goes anywhere else, for it may name the patient.
"""

import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from services.inference.maps import entry_of, models_of
from shared.child import Json, Progress, serve
from shared.dicom import silence
from shared.errors import place_of

CUDA_RUNTIME = "libcudart.so.13"
STACK_BYTES = 32 * 1024 * 1024
SELECTOR_MODULE = "monai.deploy.operators.dicom_series_selector_operator"
OUT_OF_MEMORY_TYPES = {"OutOfMemoryError"}
"""Torch's and CuPy's; Python's and NumPy's is a MemoryError."""
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "std::bad_alloc")
"""What torch says on a CPU, where it raises a plain RuntimeError."""


class NoApplication(Exception):  # noqa: N818 - it states a fact about the MAP
    """The MAP does not define exactly one `Application`."""


class MapHost:
    """Runs studies through the MAP in `folder`, which is imported at the first call."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder; importing may fail, and that must be answered to a call."""
        self._folder = folder
        self._application: Any = None
        self._selected: list[int] = []
        """How many series each selector of the running study selected."""

    def __call__(self, request: Json, progress: Progress) -> Json:
        """Answer `{}` when the MAP is imported, or `{"study": PATH}` when it was run on that study."""
        del progress
        if self._application is None:
            self._application = _import_application(self._folder)
            _memoise_models()
            _watch_selectors(self._selected)
            # What is imported stays, and the collection after each study need not walk through it: the SDK and torch
            # alone would take it 0.3 s.
            gc.collect()
            gc.freeze()
        if "study" not in request:
            return {"device": _device()}
        return self._run(Path(request["study"]))

    def _run(self, study: Path) -> Json:
        self._selected.clear()
        paths = {"INPUT_PATH": study / "input", "OUTPUT_PATH": study / "output", "WORKDIR": study / "work"}
        os.environ.update({f"HOLOSCAN_{name}": str(path) for name, path in paths.items()})
        models = models_of(self._folder)
        if models is not None:
            os.environ["HOLOSCAN_MODEL_PATH"] = str(models)
        failure: Json | None = None
        with _printing_to(study / "log.txt"), _working_in(study / "work"), _signals_and_logging_kept():
            started = time.perf_counter()
            try:
                self._application().run()
            except BaseException as error:  # noqa: BLE001 - SystemExit of an operator is an outcome, too
                traceback.print_exc()
                failure = _told(error)
            duration_s = time.perf_counter() - started
        # An application is a cycle of C++ and Python objects and holds the study's volume until it is collected.
        gc.collect()
        nothing_selected = bool(self._selected) and not any(self._selected)
        has_output = any(path.is_file() for path in (study / "output").rglob("*"))
        outcome = "ran" if failure is None else failure["outcome"]
        if nothing_selected and (outcome == "application_error" or not has_output):
            outcome, failure = "no_matching_series", None
        return {"outcome": outcome, "duration_s": duration_s, "device": _device(), **(failure or {})}


def _told(error: BaseException) -> Json:
    """Tell an exception by type and place; its text is looked at, and stays here."""
    out_of_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ in OUT_OF_MEMORY_TYPES
        or any(word in str(error) for word in OUT_OF_MEMORY_WORDS)
    )
    return {
        "outcome": "out_of_memory" if out_of_memory else "application_error",
        "error_type": type(error).__name__,
        "where": place_of(error),
    }


def _import_application(folder: Path) -> Any:
    # Before anything can import the SDK.
    _raise_stack_limit()
    _load_cuda_runtime()
    # The SDK parses sys.argv in any application that does not say otherwise.
    entry = entry_of(folder)
    if entry is None:
        raise NoApplication("the folder has no entry")
    sys.argv = [str(entry)]
    sys.path.insert(0, str(folder))
    silence()
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


def _raise_stack_limit() -> None:
    """Give this process the stack that Holoscan asks for; with less it warns of segmentation faults."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def _load_cuda_runtime() -> None:
    """Load the CUDA runtime of the `nvidia-cuda-runtime` package, which the SDK's core is linked to.

    Where the package is missing, the one of an installed toolkit may do; the import of the SDK says if it does not.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for library in sorted(Path(place).glob(f"*/lib/{CUDA_RUNTIME}")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


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


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    kept = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(kept)


@contextmanager
def _signals_and_logging_kept() -> Iterator[None]:
    """Let the MAP log, and undo what `run()` does to this process's signals and to the root logger."""
    root = logging.getLogger()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _device() -> str:
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    faulthandler.enable()
    serve(MapHost(Path(sys.argv[1]).resolve()))
