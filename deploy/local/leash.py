"""`python leash.py PARENT_PID PROGRAM ARGUMENT…`: becomes PROGRAM, which the kernel kills when the parent dies.

A program of its own, because code between fork and exec is not safe in a process with threads. The parent is the
*thread* that started it: prctl(2) sends the signal when that thread ends.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, make sure that the parent did not die before that, and become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.execv(program[0], program)  # noqa: S606 - the whole point


if __name__ == "__main__":
    main()
