"""What a MAP's own interpreter has: `preflight` runs this there, on this machine or in the MAP's container.

It prints a JSON document per line, `{"begin": STEP}` before each step and `{"end": STEP, …}` after it: if one of
them ends the process, the step begun last is to blame. It needs the standard library (of Python 3.9 or later) and
`services.inference.serving.maphost`, with which it imports the MAP as the worker will.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from services.inference.serving.maphost import CUDA_RUNTIME, cuda_runtime, import_application

PACKAGES = (
    "monai-deploy-app-sdk",
    "holoscan-cu13",
    "holoscan-cu12",
    "holoscan",
    "monai",
    "torch",
    "pydicom",
    "highdicom",
)
STEPS = ("interpreter", "requirements", "cuda_runtime", "application", "models", "gpu")
"""The steps that a probe can be asked for, in this order."""

Step = Callable[[], "dict[str, Any]"]


def main(arguments: Sequence[str]) -> None:
    """Probe the MAP whose program and models (or an empty text) are named, in the steps that are named after them."""
    program, models = Path(arguments[0]), arguments[1]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the MAP prints on import does not belong to our answers
    steps: dict[str, Step] = {
        "interpreter": _interpreter,
        "requirements": lambda: _requirements(program),
        "cuda_runtime": _cuda_runtime,
        "application": lambda: {"name": import_application(program).__name__},
        "models": lambda: _models(models),
        "gpu": _gpu,
    }
    for name in arguments[2:]:
        _say(answers, {"begin": name})
        try:
            found = steps[name]()
        except BaseException as error:  # noqa: BLE001 - SystemExit of a module is an outcome, too
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = {"error": f"{type(error).__name__}: {error}", "where": f"{last.filename}:{last.lineno}"}
        _say(answers, {"end": name, **found})


def _say(answers: TextIO, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


def _interpreter() -> dict[str, Any]:
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "python": sys.version.split()[0],
        "path": sys.executable,
        "packages": {name: version for name, version in versions.items() if version is not None},
    }


def _requirements(program: Path) -> dict[str, Any]:
    """Tell what `requirements.txt` says, and all that it is compared with: packages, and PEP 508's environment."""
    file = (program if program.is_dir() else program.parent) / "requirements.txt"
    implementation = sys.implementation.version
    environment = {
        "implementation_name": sys.implementation.name,
        "implementation_version": ".".join(map(str, implementation[:3])),
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    }
    named = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return {
        "text": file.read_text("utf-8", errors="replace") if file.is_file() else None,
        "installed": {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in named if name},
        "environment": environment,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_runtime() -> dict[str, Any]:
    library = cuda_runtime()
    ctypes.CDLL(str(library or CUDA_RUNTIME), mode=ctypes.RTLD_GLOBAL)
    return {"path": str(library or CUDA_RUNTIME)}


def _models(root: str) -> dict[str, Any]:
    """Load every model as the SDK does at its first use."""
    if not root or not Path(root).exists():
        return {"models": []}
    factory: Any = importlib.import_module("monai.deploy.core.models").ModelFactory
    made = factory.create(os.path.abspath(root))  # noqa: PTH100 - as the SDK does
    known = list(made.items()) if made is not None else []
    if not known:
        return {"models": [], "unknown": any(path.is_file() for path in Path(root).rglob("*"))}
    found = []
    for name, model in known:
        answer = {"name": name, "kind": type(model).__name__}
        try:
            loaded = model.predictor
        except Exception as error:  # noqa: BLE001 - whatever it is that the file does
            answer["error"] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
        else:
            answer["loaded"] = type(loaded).__name__
        found.append(answer)
    return {"models": found}


def _gpu() -> dict[str, Any]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"devices": []}
    devices = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        devices.append({"name": torch.cuda.get_device_name(number), "free_bytes": free, "total_bytes": total})
    return {"devices": devices}
