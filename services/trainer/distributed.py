"""Several processes that train together, one per GPU: `python -m services.trainer.distributed N`.

Theory of operation. This starts torchrun, which starts services/trainer/worker.py N times. All have the same weights
and draw the same; each computes the gradients of its share of the batch. Before an optimiser moves the weights, the
gradients are averaged over the processes, with one all-reduce of one flat tensor. All other results of a step are
averaged at its end, or follow from what is the same everywhere. So the processes stay equal, bit for bit, and the
checkpoint of the first is right for all. Only BatchNorm sees that the batch is shared out: it normalises over the
share, and its running statistics are the mean of the processes'.

The first process alone reads the service's calls and answers them. It passes a call of `train` on to the others, which
do the same but save and send nothing; it does all other calls alone. If one process fails, it is unknown how far the
others are, so all are ended: torchrun sees to that, and the service starts anew.

Without torchrun the functions here do nothing: one process has the whole batch.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from shared import child
from shared.child import Json, Message, Progress
from shared.errors import Unprocessable

PATIENCE = timedelta(days=365)
"""How long a process waits for the next call: without limit, in effect. The service's deadline ends one that hangs."""
PORT = 29_500
"""The port of the first machine, where the others meet it; torchrun's own default."""
Answer = Callable[[Any, Progress], Message]


def is_first() -> bool:
    """Tell whether this process is the one that saves and reports; true without torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def n_processes() -> int:
    """Return how many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: Tensor) -> Tensor:
    """Return the columns of (2, n, …) that are this process's part of the batch."""
    return rows.chunk(n_processes(), dim=1)[dist.get_rank()] if dist.is_initialized() else rows


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, all with one all-reduce."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def average_gradients(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Average the gradients over the processes, as a hook before the optimiser's step."""
    weights = (weight for group in optimiser.param_groups for weight in group["params"])
    average([weight.grad for weight in weights if weight.grad is not None])


def agreed(*, wanted: bool) -> bool:
    """Return what the first process wants, in all of them.

    The flag is sent between the CPUs: one among the gradients would make the CPU wait for the GPU.
    """
    if not dist.is_initialized():
        return wanted
    flag = torch.tensor([wanted])
    dist.broadcast(flag, src=0)
    return bool(flag)


def serve(answer: Answer, read: Callable[[Json], Any], *, together: type) -> None:
    """Answer the service's calls until it closes standard input; those of type `together` with all processes."""
    if not dist.is_torchelastic_launched():
        child.serve(answer, read)
    elif os.environ["RANK"] == "0":
        child.serve(lambda request, tell: _lead(answer, request, tell, together), read)
        _join()
        _passed_on(None)
    else:
        child.become_child()
        os.dup2(2, 1)  # the service reads what the first process writes there
        _join()
        while (request := _passed_on(None)) is not None:
            with suppress(Unprocessable):  # the first process answers with it
                _together(answer, request, lambda _: None)
    if dist.is_initialized():
        dist.destroy_process_group()


def _lead(answer: Answer, request: Any, tell: Progress, together: type) -> Message:
    _join()  # not before the first call: gloo prints to standard output, which is the service's until then
    if not isinstance(request, together):
        return answer(request, tell)
    try:
        _passed_on(request)
        return _together(answer, request, tell)
    except Unprocessable:
        raise
    except BaseException:  # noqa: BLE001 - whatever it was, the others may be in the middle of a step
        traceback.print_exc()
        os._exit(1)


def _together(answer: Answer, request: Any, tell: Progress) -> Message:
    """Answer, and wait until all processes have: then the service may delete the files that they read."""
    try:
        reply = answer(request, tell)
    except Unprocessable:  # of the data, so each process meets it
        _wait_for_all()
        raise
    _wait_for_all()
    return reply


def _wait_for_all() -> None:
    dist.all_reduce(torch.zeros(1))  # on the CPU: torch's barrier would wait for the GPU


def _join() -> None:
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def _passed_on(request: Any) -> Any:
    """Return the first process's request, in all of them."""
    requests = [request]
    dist.broadcast_object_list(requests, src=0, device=torch.device("cpu"))
    return requests[0]


def main() -> None:
    """Run torchrun: `N [n_machines number first_machine]`.

    N processes are started on each machine; 0 is one per GPU, or one process if there is no GPU.
    """
    from torch.distributed import run  # noqa: PLC0415 - of no use in the processes

    child.die_with_parent()
    # Some supervisors signal every process of a service at a stop; when the training ends is the service's to decide.
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, signal.SIG_IGN)
    n, *machines = sys.argv[1:]
    where = ["--standalone"]
    if machines:
        n_machines, number, first = machines
        where = [f"--nnodes={n_machines}", f"--node-rank={number}", f"--master-addr={first}", f"--master-port={PORT}"]
    run.main(
        [
            *where,
            f"--nproc-per-node={int(n) or max(1, torch.cuda.device_count())}",
            "--signals-to-handle=SIGHUP,SIGQUIT",
            "-m",
            "services.trainer.worker",
        ]
    )


if __name__ == "__main__":
    main()
