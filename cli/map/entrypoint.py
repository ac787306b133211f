#!/usr/bin/env -S python3 -I
"""The entrypoint of a MAP image: runs the command of `app.json`, or tells what the image holds.

`radqueue map build` copies this file into the image as /var/holoscan/tools; it needs Python's standard library alone.
Without an argument, or with arguments that it does not know, it runs the application with these, passes signals on to
it, and exits with its exit code: 128 and the signal's number where a signal ended it, 124 where HOLOSCAN_TIMEOUT did.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

EXPORT = Path("/var/run/holoscan/export")
MANIFESTS = {"app": "HOLOSCAN_APP_MANIFEST_PATH", "pkg": "HOLOSCAN_PKG_MANIFEST_PATH"}
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_TIMEOUT, EXIT_USAGE, EXIT_SIGNAL = 124, 2, 128
GRACE_S = 10
"""Seconds between SIGTERM and SIGKILL after the timeout."""
USAGE = f"""Usage: show [app|pkg] | env | extract | help | [arguments of the application]
  show      print app.json and pkg.json
  env       print the environment
  extract   copy app, models, config and docs to {EXPORT}, or those of them that are mounted there
Anything else runs the application."""


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    match arguments:
        case ["show", *which]:
            return show(which)
        case ["env"]:
            say("\n".join(f"{name}={value}" for name, value in sorted(os.environ.items())))
        case ["extract"]:
            return extract()
        case ["help"]:
            say(USAGE)
        case _:
            return run([*command(), *arguments], float(os.environ.get("HOLOSCAN_TIMEOUT") or 0))
    return 0


def show(which: list[str]) -> int:
    """Print the manifests, or the one that is named."""
    if set(which) - set(MANIFESTS):
        fail(USAGE)
        return EXIT_USAGE
    for name in which or MANIFESTS:
        if len(which) != 1:
            say(f" {name}.json ".center(70, "="))
        say(json.dumps(json.loads(manifest(name)), indent=2))
    return 0


def extract() -> int:
    """Copy what the image holds to the mounted folders."""
    if not EXPORT.is_dir():
        fail(f"Mount a folder that user {os.getuid()} may write to at {EXPORT}.")
        return EXIT_USAGE
    parts = ("app", "models", "docs", "config")
    for part in [part for part in parts if (EXPORT / part).is_dir()] or parts:
        target = EXPORT / part
        if part == "config":
            target.mkdir(exist_ok=True)
            for name, variable in (*MANIFESTS.items(), ("", "HOLOSCAN_CONFIG_PATH")):
                source = Path(os.environ[variable])
                if source.is_file():
                    shutil.copyfile(source, target / (f"{name}.json" if name else source.name))
        elif (source := Path(f"/opt/holoscan/{part}")).is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    return 0


def manifest(name: str) -> str:
    """Return the text of a manifest."""
    return Path(os.environ[MANIFESTS[name]]).read_text("utf-8")


def command() -> list[str]:
    """Return the command of `app.json`, a list in a string."""
    words = json.loads(manifest("app"))["command"]
    with contextlib.suppress(json.JSONDecodeError):
        return list(json.loads(words))
    return shlex.split(words)


def run(argv: list[str], timeout_s: float) -> int:
    """Run the application to its end, or to its timeout where that is above 0."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    process = subprocess.Popen(argv)
    for came in early:
        process.send_signal(came)
    try:
        code = process.wait(timeout_s or None)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        process.kill()
        process.wait()
        fail(f"The application was ended after {timeout_s:g} s.")
        return EXIT_TIMEOUT
    return EXIT_SIGNAL - code if code < 0 else code


def say(text: str) -> None:
    """Print an answer."""
    sys.stdout.write(text + "\n")


def fail(text: str) -> None:
    """Print why it did not work."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
