"""The container engine of this machine, docker, podman or nerdctl: what images hold, and how a MAP runs in a container.

Everything here is a command line: starting a process and waiting for it blocks, so an event loop calls it in a thread.
`run_command` starts nothing; the runner gives it to `shared.child`.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.inference.package.manifests import Needs
from shared.config import Misconfigured

Kind = Literal["docker", "podman", "nerdctl"]
ENGINES: tuple[Kind, ...] = ("docker", "podman", "nerdctl")
ANSWER_S, PULL_S = 120, 3600
"""Seconds that an engine gets to answer, and those to pull an image or copy its files."""
NOBODY = 1000
"""The user and group of a MAP if this process is root: packagers give their images the user 1000."""
PROCESSES = 4096
"""The most processes and threads of a MAP: torch starts some per core, a fork bomb wants all."""
_ECR = re.compile(r"(?P<account>\d{12})\.dkr\.ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?(?=/)")


class EngineFailed(Misconfigured):
    """The engine did not do what it was asked to; the text holds its last line."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What the engine knows of an image on this machine."""

    id: str
    """The digest of the image's configuration: 64 hex digits."""
    digests: tuple[str, ...]
    """The image's names `REPOSITORY@sha256:…`, one for each registry that it came from or went to."""
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: str = ""
    working_directory: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def pinned(self, reference: str) -> str | None:
        """Return `REPOSITORY@sha256:…` of the repository that `reference` names; None if it has none."""
        repository = repository_of(reference)
        # A short name stands for one of localhost, or of the registry that the engine looks into first.
        return next((one for one in self.digests if f"/{one.partition('@')[0]}".endswith(f"/{repository}")), None)


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder of this machine that a container sees."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that answers."""

    kind: Kind
    program: str
    arguments: tuple[str, ...] = ()
    """Additional arguments of `run` and `create`, such as `--runtime runc`."""

    @classmethod
    def find(cls, kind: str | None = None, arguments: Sequence[str] = ()) -> "Engine":
        """Return the engine of this machine, or the one that is named.

        Raises:
            EngineFailed: no engine is installed, or none answers.
        """
        if kind is not None and kind not in ENGINES:
            raise EngineFailed(f"{kind} is no container engine that is known here; there are {', '.join(ENGINES)}.")
        silent = []
        for one in ENGINES:
            program = shutil.which(one)
            if program is None or kind not in (None, one):
                continue
            engine = cls(one, program, tuple(arguments))
            if engine.answers():
                return engine
            silent.append(one)
        if silent:
            raise EngineFailed(
                f"{' and '.join(silent)} does not answer: is its daemon running, and may this user use it?"
            )
        raise EngineFailed(f"no {kind or 'container engine'} was found: install docker, podman or nerdctl.")

    def answers(self) -> bool:
        """Tell whether the engine works: a docker without its daemon does not."""
        try:
            return self._run("info", check=False).returncode == 0
        except EngineFailed:
            return False

    def inspect(self, reference: str) -> Inspected | None:
        """Return what is known of the image; None if this machine does not have it."""
        done = self._run("image", "inspect", reference, check=False)
        if done.returncode != 0:
            return None
        found = json.loads(done.stdout)[0]
        config = found.get("Config") or {}
        # What podman builds it stores uncompressed, and calls it by the digest of that; registries know another one.
        of_this_machine = f"@{found.get('Digest')}"
        return Inspected(
            id=found["Id"].removeprefix("sha256:"),
            digests=tuple(sorted(found.get("RepoDigests") or (), key=lambda one: one.endswith(of_this_machine))),
            environment=dict(pair.partition("=")[::2] for pair in config.get("Env") or ()),
            entrypoint=_words(config.get("Entrypoint")),
            command=_words(config.get("Cmd")),
            user=config.get("User") or "",
            working_directory=config.get("WorkingDir") or "",
            labels=config.get("Labels") or {},
        )

    def pull(self, reference: str, *, authorization: str | None = None) -> None:
        """Get the image from its registry; `authorization` is what ECR's GetAuthorizationToken returns.

        Raises:
            EngineFailed: it cannot be had.
        """
        with _signed_in(reference, authorization) as environ:
            self._run("pull", "--quiet", reference, timeout_s=PULL_S, environ=environ)

    def push(self, reference: str, *, authorization: str | None = None) -> str:
        """Put the image into its registry, and return the digest that it has there, `sha256:…`.

        Raises:
            EngineFailed: it does not take it.
        """
        with _signed_in(reference, authorization) as environ, tempfile.TemporaryDirectory(prefix="radqueue-") as folder:
            if self.kind == "podman":
                file = Path(folder, "digest")
                self._run("push", "--digestfile", str(file), reference, timeout_s=PULL_S, environ=environ)
                digest = file.read_text("ascii").strip()
                # So that it, too, knows the image by the digest that other machines find in the registry.
                pinned = f"{repository_of(reference)}@{digest}"
                self._run("pull", "--quiet", pinned, timeout_s=PULL_S, environ=environ)
                return digest
            self._run("push", reference, timeout_s=PULL_S, environ=environ)
        inspected = self.inspect(reference)
        return (inspected.pinned(reference) or "").rpartition("@")[2] if inspected is not None else ""

    def read(self, reference: str, path: str) -> bytes | None:
        """Return the content of one file of the image; None if it has no file at that path."""
        with self._container(reference) as container:
            return self._read(container, path)

    def read_all(self, reference: str, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the content of those files that the image has."""
        with self._container(reference) as container:
            found = {path: self._read(container, path) for path in paths}
        return {path: content for path, content in found.items() if content is not None}

    def extract(self, reference: str, folders: Mapping[str, Path]) -> list[str]:
        """Copy the content of folders of the image to this machine; return the paths that the image does not have."""
        missing = []
        with self._container(reference) as container:
            for path, target in folders.items():
                target.mkdir(parents=True, exist_ok=True)
                copied = self._run("cp", f"{container}:{path}/.", str(target), check=False, timeout_s=PULL_S)
                if copied.returncode != 0:
                    target.rmdir()
                    missing.append(path)
        return missing

    def run_command(
        self,
        reference: str,
        argv: Sequence[str] = (),
        *,
        name: str,
        mounts: Sequence[Mount] = (),
        environment: Mapping[str, str] | None = None,
        needs: Needs | None = None,
        gpus: Sequence[str] = (),
        own_entrypoint: bool = False,
    ) -> list[str]:
        """Return the command line that runs `argv` in a new container of the image, connected by pipes.

        `name` is what `kill_command` ends it by. `gpus` are numbers or UUIDs of the devices that it may use; `needs`
        sets the limits. The image's entrypoint is replaced by `argv`, unless `own_entrypoint` is set.
        """
        # Shut it in: no network, no rights, and a file system to read only.
        needs = needs or Needs()
        run = [
            self.program,
            "run",
            "--rm",
            "--interactive",
            "--init",
            "--name",
            name,
            "--network",
            "none",
            "--read-only",
        ]
        run += ["--tmpfs", "/tmp:rw,nosuid,nodev,mode=1777"]  # noqa: S108 - inside the container
        run += ["--user", self.user, "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        run += ["--pids-limit", str(PROCESSES)]
        # What it prints goes through the pipes alone, for it may name the patient.
        run += ["--log-driver", "none"]
        if self.kind == "podman" and os.geteuid() != 0:
            run += ["--userns", "keep-id"]  # so that it is the same user who owns the mounted folder
        # Limit what it may use.
        if needs.cpu is not None:
            run += ["--cpus", f"{min(needs.cpu, os.cpu_count() or 1):g}"]
        if needs.memory_bytes is not None:
            run += ["--memory", str(needs.memory_bytes)]
        if needs.shared_memory_bytes is not None:
            run += ["--shm-size", str(needs.shared_memory_bytes)]
        run += self._gpu_arguments(gpus)
        # Give it its folders and variables, then what it runs.
        for mount in mounts:
            access = "" if mount.writable else ",readonly"
            run += ["--mount", f"type=bind,source={mount.source},target={mount.target}{access}"]
        for key, value in sorted({"HOME": "/tmp", **(environment or {})}.items()):  # noqa: S108 - inside the container
            run += ["--env", f"{key}={value}"]
        run += self.arguments
        if own_entrypoint or not argv:
            return [*run, reference, *argv]
        return [*run, "--entrypoint", argv[0], reference, *argv[1:]]

    @property
    def user(self) -> str:
        """`UID:GID` that a MAP runs as; what it writes to must belong to it. Never root."""
        return f"{NOBODY}:{NOBODY}" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"

    def kill_command(self, name: str) -> list[str]:
        """Return the command line that ends a running container at once: killing the one that runs it does not."""
        return [self.program, "kill", name]

    def remove(self, name: str) -> None:
        """End the container at once, if it runs, and forget it."""
        grace = ["--time", "0"] if self.kind == "podman" else []
        self._run("rm", "--force", "--volumes", *grace, name, check=False)

    def _gpu_arguments(self, gpus: Sequence[str]) -> list[str]:
        if not gpus:
            return []
        if self.kind == "podman":  # by the Container Device Interface, which `nvidia-ctk cdi generate` describes
            return [word for gpu in gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]
        return ["--gpus", f'"device={",".join(gpus)}"']

    @contextmanager
    def _container(self, reference: str) -> Iterator[str]:
        """Give the name of a container of the image, which is never started: its files can be copied out of it."""
        name = f"radqueue-{uuid.uuid4().hex}"
        self._run("create", "--name", name, "--network", "none", *self.arguments, "--entrypoint", "/", reference)
        try:
            yield name
        finally:
            self.remove(name)

    def _read(self, container: str, path: str) -> bytes | None:
        done = self._run("cp", f"{container}:{path}", "-", check=False)
        if done.returncode != 0:
            return None
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            members = [member for member in archive if member.isfile()]
            file = archive.extractfile(members[0]) if len(members) == 1 else None
            return file.read() if file is not None else None

    def _run(
        self, *argv: str, check: bool = True, timeout_s: float = ANSWER_S, environ: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        return run([self.program, *argv], check=check, timeout_s=timeout_s, environ=environ)


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout_s: float = ANSWER_S,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a tool to its end; `environ` is added to this process's environment, `folder` is the one it works in.

    Raises:
        EngineFailed: with the last line that it printed, if it fails and `check` is set.
    """
    try:
        done = subprocess.run(
            argv, check=False, capture_output=True, timeout=timeout_s, env={**os.environ, **(environ or {})}, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise EngineFailed(f"{Path(argv[0]).name} {argv[1]}: no end after {timeout_s:g} s.") from None
    if check and done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise EngineFailed(f"{Path(argv[0]).name} {argv[1]}: {lines[-1] if lines else f'exit {done.returncode}'}")
    return done


def repository_of(reference: str) -> str:
    """Return an image's name without its tag or digest; a registry's port is not a tag."""
    place, slash, last = reference.partition("@")[0].rpartition("/")
    return f"{place}{slash}{last.partition(':')[0]}"


def ecr_of(reference: str) -> tuple[str, str] | None:
    """Return the account and the region of the ECR registry that the image is named in; None for other registries."""
    match = _ECR.match(reference)
    return (match["account"], match["region"]) if match else None


async def ecr_authorization(ecr: Any) -> str:
    """Return what signs in to this account's registry for 12 hours; `ecr` is an open client of the registry's region.

    Needs the action ecr:GetAuthorizationToken; to pull, ecr:BatchGetImage and ecr:GetDownloadUrlForLayer.
    """
    answer = await ecr.get_authorization_token()
    return str(answer["authorizationData"][0]["authorizationToken"])


@contextmanager
def _signed_in(reference: str, authorization: str | None) -> Iterator[Mapping[str, str]]:
    """Give the environment in which an engine is signed in to the image's registry; nothing of it stays."""
    if authorization is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="radqueue-") as folder:
        file = Path(folder, "config.json")
        file.touch(mode=0o600)
        file.write_text(json.dumps({"auths": {reference.partition("/")[0]: {"auth": authorization}}}), "utf-8")
        yield {"DOCKER_CONFIG": folder, "REGISTRY_AUTH_FILE": str(file)}


def _words(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
