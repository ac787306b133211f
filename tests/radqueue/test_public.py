"""What others may import: its names are recorded here, and change only with a line in CHANGELOG.md."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import radqueue
from radqueue import queue
from tests.conftest import ROOT

CALLS = {
    "Document": "key, model",
    "ObjectStore": "s3, bucket",
    "Publisher": "sqs, settings",
    "Unprocessable": "reason_code, detail",
    "consume": "handlers, sqs, queue, settings, stop, metrics",
    "once": "document, work, objects, lease, lease_s, clock",
    "receive_count": "",
    "remaining_s": "",
    "run": "name, settings_class, serve",
    "store": "document, content, objects",
    "store_once": "document, record, objects",
    "stored": "document, objects",
}
"""What is called with which parameters."""
NAMES = {
    *CALLS,
    *("Aws", "Lease", "Leased", "Continue", "CreatedObject", "Event", "Fate", "Handler", "Metrics", "Misconfigured"),
    *("InferenceCompleted", "InferenceFailed", "InferenceRequested", "InferenceSkipped", "InferenceTask"),
    *("MapRejected", "MapUpdated", "ObjectSummary", "ObjectsCreated", "Publish", "ReportRequest"),
    *("SeriesReady", "ServiceSettings", "Stored", "TrainingCompleted", "TrainingFailed", "TrainingRequest"),
    *("TrainingRoundCompleted", "TrainingRequested", "Unavailable", "UploadRejected", "ObjectMissing"),
    "ReportRequested",
}


def test_the_names_of_the_queue_runtime_are_the_recorded_ones():
    assert set(queue.__all__) == NAMES
    assert all(hasattr(queue, name) for name in NAMES)


def test_they_are_called_as_recorded():
    """A parameter that is renamed breaks a service as much as a name that is gone."""
    assert {name: ", ".join(inspect.signature(getattr(queue, name)).parameters) for name in CALLS} == CALLS


def test_each_public_module_says_what_it_offers():
    """Two modules are public, each has `__all__` and a page, and type checkers are told to read their annotations."""
    folder = Path(radqueue.__path__[0])

    assert {path.stem for path in folder.glob("*.py")} == {"__init__", "pipeline", "queue"}
    assert (folder / "py.typed").is_file()
    assert all(importlib.import_module(f"radqueue.{name}").__all__ for name in ("pipeline", "queue"))


def test_the_queue_runtime_needs_no_extra():
    """Whoever writes a service on it need not install a framework of ours."""
    heavy = {"boto3", "cli", "deploy", "holoscan", "monai", "numpy", "pydicom", "services", "torch", "typer"}
    code = "import sys, radqueue.queue; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not heavy & set(loaded)


def test_the_example_imports_only_what_is_public():
    tree = ast.parse((ROOT / "docs" / "examples" / "gan_pipeline.py").read_text("utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert {name for name in modules if name.partition(".")[0] in {"cli", "deploy", "services", "shared"}} == set()
    assert "radqueue.pipeline" in modules
