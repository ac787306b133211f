"""Whether a MAP will work here: what can be found out before the first patient's study, each with its remedy.

The MAP is read, imported and run as the worker does it: by the same reader, the same runner, in the same interpreter or
container, and what it writes is checked by the same rules.
"""

import asyncio
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.inference import outputs
from services.inference.outputs import OutputRefused
from services.inference.package.engine import EngineFailed, run
from services.inference.package.manifests import RESOURCES
from services.inference.package.maps import Map
from services.inference.package.requirements import compare
from services.inference.reasons import explained, several
from services.inference.serving import gpus, hostfiles
from services.inference.serving.bounds import bounds_of
from services.inference.serving.probe import STEPS
from services.inference.serving.runner import Bounds, MapRunner, Run, Serving, Study
from services.inference.settings import InferenceSettings
from shared.child import ChildFailed
from shared.errors import Unavailable

PROBE_S = 600
"""Seconds that a MAP gets to be imported and to load its models."""
PROBE = "services/inference/serving/probe.py"
START = (
    "import sys; sys.path[0] = sys.argv.pop(1); from services.inference.serving.probe import main; main(sys.argv[1:])"
)
GIB = 1 << 30

Answer = dict[str, Any]
Level = Literal["ok", "warning", "error"]
NO_SERIES = "no series of the study is one that it takes", "Give another study, or mend the selection rules."
SDK = "monai-deploy-app-sdk"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """How a MAP is run here: as the worker with these settings would, by these words of the routing table."""

    settings: InferenceSettings
    isolation: Literal["warm", "process"] = "warm"
    deadline_s: float | None = None

    @property
    def serving(self) -> Serving:
        """How the runner is to run the MAP."""
        return Serving(isolation=self.isolation, deadline_s=self.deadline_s)

    @property
    def bounds(self) -> Bounds:
        """What the MAP may use."""
        return bounds_of(self.settings)


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of a study."""

    run: Run
    files: tuple[Path, ...] = ()
    """The files that it wrote, relative to the output folder."""


def examine(found: Map, *, way: Way, say: Callable[[str], None]) -> list[Finding]:
    """Return what is known of a MAP before it is run on a study: its manifests, its GPUs, and what it imports."""
    devices = gpus.installed()
    findings = [*check_manifests(found, deadline_s=way.deadline_s), *check_gpu(found, devices)]
    say("importing it")
    return findings + probe(found, gpu=bool(devices and found.needs.gpu), warm=way.isolation == "warm")


def check_manifests(found: Map, *, deadline_s: float | None = None) -> Iterator[Finding]:
    """Compare what the MAP asks for with what this machine has; `deadline_s` goes before its own timeout."""
    needs = found.needs
    file = "app.yaml, under `application:`" if found.manifests is None else "app.json"
    asks = {
        "cpu": f"{needs.cpu:g}" if needs.cpu is not None else None,
        "memory": _size(needs.memory_bytes),
        "gpu": str(needs.gpu) if needs.gpu else None,
        "GPU memory": _size(needs.gpu_memory_bytes),
        "timeout": f"{needs.timeout_s:g} s" if needs.timeout_s else None,
    }
    said = ", ".join(f"{key} {value}" for key, value in asks.items() if value is not None)
    yield Finding("manifests", "ok", f"digest {found.digest}; asks for {said or 'nothing'}")
    if needs.unknown:
        remedy = f"Correct the spelling; of resources there are {', '.join(RESOURCES)}."
        yield Finding("manifests", "warning", f"keys that mean nothing: {'; '.join(needs.unknown)}", remedy)
    if needs.timeout_s is None and deadline_s is None:
        remedy = f"Set timeout in {file}, or deadline_s in maps.yaml; until then it is RADQUEUE_DEADLINE_S."
        yield Finding("manifests", "warning", "no timeout is set", remedy)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needs.memory_bytes or 0) > there:
        text = f"asks for {_size(needs.memory_bytes)} of memory, and this machine has {_size(there)}"
        yield Finding("manifests", "error", text, "Use a larger machine, or ask for less.")
    if (needs.cpu or 0) > (os.cpu_count() or 1):
        text = f"asks for {needs.cpu:g} processors, and this machine has {os.cpu_count()}"
        yield Finding("manifests", "warning", text, "It will run, and take longer.")
    if found.models is None:
        yield Finding(
            "manifests", "warning", "it has no models", "If it needs them, put them into a folder models, or name them."
        )
    if found.image is not None and found.image.inspected.user.partition(":")[0] in {"", "0", "root"}:
        text = f"the image is made to run as root; here it runs as {found.image.engine.user}"
        yield Finding(
            "manifests", "warning", text, "Let it write to its work folder alone, and build it with USER 1000:1000."
        )


def check_gpu(found: Map, devices: Sequence[gpus.Gpu]) -> Iterator[Finding]:
    """Compare the GPUs that the MAP asks for with those of this machine."""
    needs = found.needs
    if not needs.gpu:
        return
    size = f" with {_size(needs.gpu_memory_bytes)} each" if needs.gpu_memory_bytes else ""
    asked = f"asks for {several(needs.gpu, 'GPU')}{size}"
    if not devices:
        remedy = "It runs on the processor where its code allows that; for a GPU, install the NVIDIA driver."
        yield Finding("gpu", "warning", f"{asked}, and this machine has none", remedy)
        return
    fitting = [one for one in devices if one.memory_bytes >= (needs.gpu_memory_bytes or 0)]
    text = f"{asked}; there is " + ", ".join(f"GPU {one.index} with {_size(one.memory_bytes)}" for one in devices)
    if len(fitting) < needs.gpu:
        yield Finding("gpu", "error", text, "Use a machine with more or larger GPUs, or ask for less.")
    else:
        yield Finding("gpu", "ok", text)


def probe(found: Map, *, gpu: bool = False, warm: bool = True) -> list[Finding]:
    """Import the MAP in its own interpreter, and load its models; `gpu` says that it is to have one.

    Where it is not to be `warm`, it is a program like any other: nothing of it is imported, and it may lack the SDK.
    """
    with tempfile.TemporaryDirectory(prefix="probe-") as work:
        answers, code, errors = _answers(found, Path(work), gpu=gpu, steps=STEPS if warm else STEPS[:2])
    if not gpu:
        answers.pop("gpu", None)
    interpreter = answers.get("interpreter")
    if warm and interpreter and SDK not in interpreter["packages"]:
        # Of what comes next everything would fail, for that reason alone.
        text = "the MONAI Deploy App SDK is not installed there"
        remedy = (
            f"{_install(found, SDK)} A program that does not use it needs `isolation: process` (--isolation process)."
        )
        answers = {step: answers[step] for step in STEPS[:2] if step in answers}
        code = 0
        missing = [Finding("interpreter", "error", text, remedy)]
    else:
        missing = []
    findings = [one for step, answer in answers.items() if answer is not None for one in READERS[step](answer, found)]
    findings += missing
    begun = next((step for step, answer in answers.items() if answer is None), None)
    if begun is not None or not answers:
        text = f"{found.python} ended (exit {code}) at: {begun or 'start'}" + (f"; {errors}" if errors else "")
        remedy = (
            f"See whether `{found.python} --version` works, and what importing the application says there."
            if found.image is None
            else "The image needs a python3 of its own (3.9 or later), which its command or its PATH names."
        )
        findings.append(Finding(begun or "interpreter", "error", text, remedy))
    return findings


async def try_study(found: Map, source: Path, output: Path, *, way: Way, log: Path | None = None) -> Tried:
    """Run the MAP once on the files of `source`, as the worker does; `output`, a folder, gets what it writes.

    Raises:
        ChildFailed: the MAP cannot be imported.
        Unavailable: it cannot be run here.
    """
    runner = MapRunner([found], serving={found.name: way.serving}, bounds=way.bounds)
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        study = Study.make(Path(folder, "study"))
        await asyncio.to_thread(_lay, source, study.input)
        try:
            await runner.start(found.name)
            done = await runner.run(found.name, study)
        finally:
            await runner.stop()
            await asyncio.to_thread(study.mend)
            if log is not None and (Path(study.folder, "log.txt")).exists():
                await asyncio.to_thread(shutil.copyfile, study.folder / "log.txt", log)
        await asyncio.to_thread(shutil.copytree, study.output, output, dirs_exist_ok=True, ignore=_links)
        files = tuple(path.relative_to(study.output) for path in outputs.files(study.output))
    return Tried(done, files)


async def check_study(
    found: Map,
    source: Path,
    *,
    way: Way,
    least: Mapping[str, int] | None = None,
    log: Path | None = None,
) -> list[Finding]:
    """Run the MAP on a study, and check what it writes; `least` is as `outputs` of `maps.yaml`."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        output = Path(folder, "output")
        try:
            tried = await try_study(found, source, output, way=way, log=log)
        except ChildFailed as failed:
            remedy = (
                "Mend the import of the application at that place, or install what it needs. A program that does its "
                "work when it is imported needs `isolation: process` (--isolation process)."
            )
            return [Finding("study", "error", f"it does not start: {failed}", remedy)]
        except Unavailable as reason:
            return [Finding("study", "error", str(reason), "Run the check again.")]
        done = tried.run
        if done.outcome != "ran":
            what, remedy = NO_SERIES if done.outcome == "no_matching_series" else explained(done.outcome)
            deadline_s = way.deadline_s or found.needs.timeout_s or way.bounds.deadline_s
            where = f"{deadline_s:g} s" if done.outcome == "deadline" else done.where
            return [Finding("study", "error", at(what, done.error_type, where), remedy + _how_to_log(log))]
        resident = f", {_size(done.rss_bytes)} resident" if done.rss_bytes else ""
        ran = Finding("study", "ok", f"ran in {done.duration_s:.1f} s on {done.device}{resident}")
        return [ran, *await asyncio.to_thread(_check_output, output, source, least, log)]


def _check_output(output: Path, source: Path, least: Mapping[str, int] | None, log: Path | None) -> list[Finding]:
    sources = dicom_in(source)
    others = outputs.other_files(output)
    other_text = f"{several(len(others), 'file')} ({', '.join(sorted({one.media_type for one in others}))})"
    if not sources and any(outputs.claims_dicom(path) for path in outputs.files(output)):
        text = f"it wrote DICOM, and the input has none that {', '.join(outputs.COPIED)} could be compared with"
        return [Finding("outputs", "error", text, "Give a DICOM study: a worker gives it nothing else.")]
    try:
        made = outputs.check(output, sources, least)
    except OutputRefused as refused:
        if refused.reason_code == "no_output" and others and least is None:
            remedy = "Say `outputs: {}` in maps.yaml (--outputs any), and they stay in results/."
            return [Finding("outputs", "warning", f"wrote {other_text}, and no DICOM", remedy)]
        what, remedy = explained(refused.reason_code)
        return [Finding("outputs", "error", at(what, "", refused.where), remedy + _how_to_log(log))]
    if not made:
        return [Finding("outputs", "ok", f"wrote {other_text}, and no DICOM")]
    modalities = ", ".join(sorted({one.modality or "no Modality" for one in made}))
    text = f"{several(len(made), 'DICOM instance')} ({modalities}) with the study's attributes"
    return [Finding("outputs", "ok", f"{text}, and {other_text}" if others else text)]


def at(what: str, error_type: str, where: str) -> str:
    """Return what happened, with its place if there is one."""
    place = " ".join(part for part in (error_type, where) if part)
    return f"{what} ({place})" if place else what


def dicom_in(source: Path) -> list[Path]:
    """Return the DICOM files of a study that somebody names, sorted."""
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    return [path for path in paths if outputs.claims_dicom(path)]


def _how_to_log(log: Path | None) -> str:
    return f" What it printed is in {log}." if log is not None else " --log FILE writes what it prints."


def _install(found: Map, package: str) -> str:
    """Say how the MAP gets a package."""
    if found.image is not None:
        return f"Add {package} to requirements.txt, and build the image again."
    how = "or name the interpreter that has it: --python, `python:` in maps.yaml."
    return f"{found.python} -m pip install {package}, {how}"


def _answers(found: Map, work: Path, *, gpu: bool, steps: Sequence[str]) -> tuple[dict[str, Answer | None], int, str]:
    """Return what the probe told of each step, None for one that it did not end, its exit code and its last line."""
    asked = [found.application, found.models or "", *steps]
    name = f"radqueue-{uuid.uuid4().hex}"
    if found.image is None:
        argv = [found.python, "-c", START, str(hostfiles.lay_out(work / "host", PROBE)), *asked]
        environment: Mapping[str, str] = found.own_environment
    else:
        argv = found.image.engine.run_command(
            found.image.id,
            [found.python, "-c", START, hostfiles.CONTAINER_ROOT, *asked],
            name=name,
            mounts=hostfiles.mounts(PROBE),
            environment=found.own_environment,
            needs=found.needs,
            gpus=("all",) if gpu else (),
        )
        environment = {}
    try:
        done = run(argv, check=False, timeout_s=PROBE_S, environ=environment, folder=work)
    except OSError as error:
        return {}, -1, f"{type(error).__name__}: {found.python}"
    except EngineFailed as failed:
        if found.image is not None:
            found.image.engine.remove(name)
        return {}, -1, str(failed)
    answers: dict[str, Answer | None] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        answer = json.loads(line)
        answers[answer.get("begin") or answer["end"]] = answer if "end" in answer else None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return answers, done.returncode, lines[-1] if lines else ""


def _read_interpreter(answer: Answer, _: Map) -> Iterator[Finding]:
    packages = ", ".join(f"{name} {version}" for name, version in answer["packages"].items())
    version = f"Python {answer['python']} ({answer['path']}): {packages or 'none of the usual packages'}"
    yield Finding("interpreter", "ok", version)


def _read_requirements(answer: Answer, found: Map) -> Iterator[Finding]:
    if answer["text"] is None:
        return
    compared = compare(answer["text"], answer["installed"], answer["environment"])
    remedy = (
        f"{found.python} -m pip install -r requirements.txt"
        if found.image is None
        else "Build the image again, and let it install requirements.txt."
    )
    for what, lines in (("not installed", compared.missing), ("other versions", compared.differing)):
        if lines:
            # What a requirement is for, only the import and a run can tell.
            yield Finding("requirements", "warning", f"{what}: {', '.join(lines)}", remedy)
    if compared.unread:
        remedy = "See for yourself: options, files and addresses are not compared."
        yield Finding("requirements", "warning", f"not compared: {', '.join(compared.unread)}", remedy)
    if not compared.missing and not compared.differing:
        yield Finding("requirements", "ok", f"{several(len(compared.met), 'requirement')} met")


def _read_cuda_runtime(answer: Answer, found: Map) -> Iterator[Finding]:
    if "error" in answer:
        remedy = f"{_install(found, 'nvidia-cuda-runtime')} The SDK's core is linked to it, also where there is no GPU."
        yield Finding("libcudart", "error", f"libcudart.so.13 cannot be loaded ({answer['error']})", remedy)
    else:
        yield Finding("libcudart", "ok", answer["path"])


def _read_application(answer: Answer, _: Map) -> Iterator[Finding]:
    if "error" in answer:
        remedy = "Mend what the line says, or install what is missing."
        if answer["error"].startswith("NoApplication"):
            remedy = "Name one Application in its entry; what has none is checked, and served, with isolation process."
        yield Finding("application", "error", f"{answer['error']} ({answer['where']})", remedy)
    else:
        yield Finding("application", "ok", f"imports, and defines {answer['name']}")


def _read_gpu(answer: Answer, _: Map) -> Iterator[Finding]:
    devices = ", ".join(f"{one['name']}, {_size(one['free_bytes'])} free" for one in answer.get("devices", ()))
    if devices:
        yield Finding("gpu", "ok", f"its torch uses {devices}")
    else:
        remedy = "It computes on the processor. Install a torch that is built for CUDA, if there is a GPU."
        yield Finding("gpu", "warning", "its torch uses no GPU", remedy)


def _read_models(answer: Answer, found: Map) -> Iterator[Finding]:
    if "error" in answer:
        remedy = "One folder per model under the models folder, with the model's one file in it."
        yield Finding("models", "error", f"{answer['error']} ({answer['where']})", remedy)
        return
    if answer.get("unknown"):
        remedy = "Export it as TorchScript, a folder per model; or the application loads it by itself."
        yield Finding("models", "warning", f"the SDK knows no model in {found.models}", remedy)
    for model in answer["models"]:
        if "Triton" in model["kind"]:
            remedy = "TRITON_SERVER_NETLOC names its server. A container has no network: serve such a MAP as a folder."
            yield Finding("models", "warning", f"{model['name']} is served by Triton, elsewhere", remedy)
        elif "error" in model:
            remedy = (
                "Export it again with the torch that the interpreter has; a bundle is a .ts file of `monai.bundle`."
            )
            yield Finding("models", "error", f"{model['name']} cannot be loaded: {model['error']}", remedy)
        else:
            yield Finding("models", "ok", f"{model['name']} is a {model['kind']}, and loads as {model['loaded']}")


READERS: Mapping[str, Callable[[Answer, Map], Iterator[Finding]]] = {
    "interpreter": _read_interpreter,
    "requirements": _read_requirements,
    "cuda_runtime": _read_cuda_runtime,
    "application": _read_application,
    "models": _read_models,
    "gpu": _read_gpu,
}
"""The function that reads the probe's answer to each step into findings."""


def _lay(source: Path, target: Path) -> None:
    """Copy the files of a study as they lie; a container gets them as its own, so links would change the originals."""
    if source.is_file():
        shutil.copyfile(source, target / source.name)
    else:
        shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _links(folder: str, names: Sequence[str]) -> set[str]:
    """Return those of the names that are links: a MAP may have made them, to what is not its own."""
    return {name for name in names if Path(folder, name).is_symlink()}


def _size(n_bytes: int | None) -> str | None:
    return f"{n_bytes / GIB:.3g} GiB" if n_bytes is not None else None
