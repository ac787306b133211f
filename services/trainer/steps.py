"""The workflow steps of a training: commands for a workflow runner that drives the loop instead of the queue.

    python -m services.trainer.steps load --request ID --asked '{"dataset": "chest", "threshold": 2}'
    python -m services.trainer.steps train|evaluate|modify|generate|report --request ID

A workflow step works on the records that the service works on, under the same lease, so either can go on where the
other ended. A workflow step that is run again goes on where it was, or finds that there is nothing left to do. Its
reply is a JSON object, printed with `--json` and stored as `models/<id>/step.json` for runners that see no output. The
field `next` of the reply names the next workflow step; it is null after the last:

    load -> modify -> train -> evaluate -> modify -> … -> generate -> report

| exit code | meaning |
|---|---|
| 0 | done, or nothing to do |
| 2 | a setting or an argument is wrong |
| 65 | the training cannot work: `reason` says why |
| 75 | run it again: `reason` says why; what was trained is stored |
| 1 | a bug, in the log |
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence

from pydantic import ValidationError

from services.trainer.__main__ import ports_of
from services.trainer.data.loading import loaded
from services.trainer.handler import accept, announce_completion, generate, under_lease
from services.trainer.rounds import announce, evaluate, first_config, modify, train, trained_of
from services.trainer.run import Ports, Run
from services.trainer.settings import TrainerSettings
from shared.aws import Aws
from shared.child import Json
from shared.concurrency import heed
from shared.documents.training import StoredCompletion, StoredStep
from shared.errors import Continue, Unavailable, Unprocessable
from shared.idempotency import store, stored
from shared.keys import TrainingKeys
from shared.messages import TrainingRequest
from shared.metrics import Metrics
from shared.service import run as run_service

Step = Callable[[Run], Awaitable[StoredCompletion | Json]]


async def perform(step: str, request_id: str, asked: Json | None, *, ports: Ports) -> tuple[int, Json]:
    """Do a workflow step; returns the exit code and the reply. `asked` holds the fields of a new request."""
    try:
        reply = await _perform(step, request_id, asked, ports=ports)
    except Unprocessable as refused:
        return os.EX_DATAERR, {"step": step, "reason": refused.reason_code, "fields": refused.detail}
    except (Continue, Unavailable) as error:
        return os.EX_TEMPFAIL, {"step": step, "reason": str(error) or "stopped"}
    reply = {"step": step, **reply}
    await store(TrainingKeys(request_id).step, StoredStep.model_validate(reply), objects=ports.objects)
    return os.EX_DATAERR if "reason" in reply else os.EX_OK, reply


async def _perform(step: str, request_id: str, asked: Json | None, *, ports: Ports) -> Json:
    keys = TrainingKeys(request_id)

    # Accept a new request.
    if asked is not None:
        if (
            unknown := asked.keys() - TrainingRequest.model_fields.keys()
        ):  # a message of a later version may have more fields
            raise Unprocessable("invalid_request", ", ".join(sorted(unknown)))
        try:
            request = TrainingRequest.model_validate({**asked, "request_id": request_id})
        except ValidationError as error:
            fields = {str(detail["loc"][0]) for detail in error.errors()}
            raise Unprocessable("invalid_request", ", ".join(sorted(fields))) from None
        await accept(request, asked_at=ports.clock(), ports=ports)

    # Do the workflow step.
    options = await stored(keys.options, objects=ports.objects)
    if options is None:
        raise Unprocessable("unknown_request")
    done = await under_lease(options.request, STEPS[step], asked_at=options.time or ports.clock(), ports=ports)

    # Reply.
    if done is None:
        failure = await stored(keys.failure, objects=ports.objects)
        return {"next": None, "reason": failure.told.reason_code if failure else "failed"}
    if not isinstance(done, StoredCompletion):
        return done
    if step != "report":
        return {"next": "report"}
    await announce_completion(done, ports=ports)
    return {"next": None, **done.told.model_dump(mode="json", include={"approved", "rounds", "generator_key"})}


async def _load(run: Run) -> Json:
    await first_config(run)
    async with loaded(run.request, run.keys.manifest, run.ports.settings, objects=run.ports.objects):
        return {"next": "modify"}


async def _modify(run: Run) -> Json:
    plan = await modify(run)
    if plan is None:
        return {"next": "generate"}
    return {"next": "train", "round": plan.round, "rule": plan.rule, "changes": plan.changes}


async def _train(run: Run) -> Json:
    plan = await modify(run)
    if plan is None:
        return {"next": "generate"}
    async with loaded(run.request, run.keys.manifest, run.ports.settings, objects=run.ports.objects) as images:
        trained = await train(run, plan, images)
    if trained is None:
        return {"next": "modify", "round": plan.round, "diverged": True}
    return {"next": "evaluate", "round": plan.round, "steps": trained.step}


async def _evaluate(run: Run) -> Json:
    plan = await modify(run)
    trained = await trained_of(run, plan) if plan is not None else None
    if plan is None or trained is None:  # this was done before, but perhaps not announced
        for done in (await run.rounds())[-1:]:
            await announce(run, done)
        return {"next": "modify"}
    async with loaded(run.request, run.keys.manifest, run.ports.settings, objects=run.ports.objects) as images:
        judged = await evaluate(run, plan, trained, images)
    if judged is None:
        return {"next": "modify", "round": plan.round, "diverged": True}
    told = judged.told
    return {
        "next": "modify",
        "round": plan.round,
        "relative_fd": told.evaluation.relative_fd,
        "approved": told.approved,
    }


async def _generate(run: Run) -> StoredCompletion | Json:
    return {"next": "train"} if await modify(run) is not None else await generate(run)


async def _report(_: Run) -> Json:
    return {"next": "modify"}  # there is no end to report yet


STEPS: dict[str, Step] = {
    "load": _load,
    "train": _train,
    "evaluate": _evaluate,
    "modify": _modify,
    "generate": _generate,
    "report": _report,
}


def _fields(text: str) -> Json:
    try:
        fields: Json | None = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return fields


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the workflow step that the command line names, and exit."""
    parser = argparse.ArgumentParser(prog="python -m services.trainer.steps", description="One step of a training.")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--request", required=True, metavar="ID", help="the training's id")
    parser.add_argument("--asked", type=_fields, metavar="JSON", help="what to train, for the first step")
    parser.add_argument("--json", action="store_true", help="print the reply as JSON")
    given = parser.parse_args(arguments)
    code = os.EX_SOFTWARE

    async def serve(settings: TrainerSettings, aws: Aws, _: Metrics, stop: asyncio.Event) -> None:
        nonlocal code
        async with ports_of(settings, stop, aws=aws) as ports:
            heed(stop)
            code, reply = await perform(given.step, given.request, given.asked, ports=ports)
        outcome = reply.get("reason") or (f"next is {reply['next']}" if reply["next"] else "the end")
        outcome += f" ({reply['fields']})" if reply.get("fields") else ""
        sys.stdout.write(json.dumps(reply) + "\n" if given.json else f"{given.step}: {outcome}\n")

    run_service("trainer", TrainerSettings, serve)
    sys.exit(code)


if __name__ == "__main__":
    main()
