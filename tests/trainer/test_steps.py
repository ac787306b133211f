import asyncio
import io
import json
import os
import re
import signal
import sys

import torch

from services.trainer.steps import perform
from shared.messages import TrainingCompleted, TrainingRoundCompleted
from tests.conftest import ROOT
from tests.trainer.trainers import TINY, WITHIN_S, document, requested

MACHINE = json.loads((ROOT / "deploy/stepfunctions/training.asl.json").read_text(encoding="utf-8"))
ARGUMENT = re.compile(r"'([^']*)'|States\.JsonToString\(\$\.(\w+)\)|\$\.(\w+)\.(\w+)")


async def test_the_state_machine_drives_the_loop(objects, start, dataset):
    """Followed state by state, the definition for Step Functions leads through two rounds to a model."""
    trainer, asked = start(objects), requested(dataset).data.model_dump(mode="json")
    visited, name, replies = [], MACHINE["StartAt"], {}
    while name:
        visited.append(name)
        state = MACHINE["States"][name]
        name = state.get("Next")
        if state["Type"] == "Choice":
            (choice,) = state["Choices"]
            name = choice["Next"] if replies["next"] == choice["StringEquals"] else state["Default"]
        elif state["Resource"].endswith("getObject"):
            replies = await document(objects, f"models/{asked['request_id']}/step.json")
        else:
            code, _ = await perform(*arguments_of(state, {"request": asked}), ports=trainer.ports())

            assert code == 0
    rounds = ["Train", "Evaluate", "Modify", "Read the reply", "Another round?"]

    assert visited == ["Load", *rounds[2:], *rounds, *rounds, "Generate", "Report"]
    assert set(visited) == set(MACHINE["States"])
    assert trainer.worker.asked == ["train", "evaluate", "train", "evaluate", "generate"]
    assert [type(event) for event in trainer.published] == [*[TrainingRoundCompleted] * 2, TrainingCompleted]


def arguments_of(state, given) -> tuple[str, str, dict | None]:
    """Return step, id and request of the command that a state runs."""
    made = state["Parameters"]["ContainerOverrides"]["Command.$"].removeprefix("States.Array(").removesuffix(")")
    command = []
    for text, whole, outer, inner in ARGUMENT.findall(made):
        command.append(json.dumps(given[whole]) if whole else given[outer][inner] if outer else text)
    options = dict(zip(command[4::2], command[5::2], strict=True))

    assert command[:3] == ["python", "-m", "services.trainer.steps"]
    return command[3], options["--request"], json.loads(options["--asked"]) if "--asked" in options else None


async def test_a_step_says_what_comes_next_whenever_it_is_run(objects, start, dataset):
    """In whatever order and however often steps are run, each says what there is to do, and does nothing twice."""
    trainer, asked = start(objects), requested(dataset, max_rounds=1).data
    given = asked.model_dump(mode="json")
    said = []
    for step in (
        "report",
        "generate",
        "evaluate",
        "train",
        "train",
        "evaluate",
        "evaluate",
        "train",
        "generate",
        "load",
    ):
        code, reply = await perform(step, asked.request_id, given, ports=trainer.ports())
        said.append(reply["next"])

        assert code == 0

    assert said == [
        "modify",
        "train",
        "modify",
        "evaluate",
        "evaluate",
        "modify",
        "modify",
        "generate",
        "report",
        "report",
    ]
    assert trainer.worker.asked == ["train", "evaluate", "generate"]
    assert len(set(trainer.ids(TrainingRoundCompleted))) == 1


async def test_what_a_step_cannot_do_is_told_by_its_exit_code(objects, start):
    """A request that is unknown, is another one's or cannot be trained is told by code 65 and its reason."""
    trainer, asked = start(objects), requested("nothing-here").data
    given = asked.model_dump(mode="json")
    unknown = await perform("load", asked.request_id, None, ports=trainer.ports())
    wrong = await perform("load", asked.request_id, {"dataset": "../secret"}, ports=trainer.ports())
    mistyped = await perform("load", asked.request_id, given | {"treshold": 1}, ports=trainer.ports())
    empty = await perform("load", asked.request_id, given, ports=trainer.ports())
    taken = await perform("load", asked.request_id, given | {"n_images": 7}, ports=trainer.ports())

    assert [code for code, _ in (unknown, wrong, mistyped, empty, taken)] == [os.EX_DATAERR] * 5
    assert (wrong[1]["fields"], mistyped[1]["fields"]) == ("dataset", "treshold")
    assert [reply["reason"] for _, reply in (unknown, wrong, mistyped, empty, taken)] == [
        "unknown_request",
        "invalid_request",
        "invalid_request",
        "no_data",
        "request_id_taken",
    ]


async def test_a_step_that_is_killed_or_stopped_is_gone_on_with(objects, start, dataset, local_aws, tmp_path):
    """A command killed with SIGKILL, one stopped with SIGTERM, and a third that ends: as if it had been one."""
    asked = requested(dataset, max_rounds=1, overrides=TINY | {"steps": 100}).data
    given, trainer = asked.model_dump(mode="json"), start(objects)
    whole = given | {"request_id": f"{asked.request_id}-whole"}
    for request in (whole, given):
        await perform("load", request["request_id"], request, ports=trainer.ports())
    await perform("train", whole["request_id"], None, ports=trainer.ports())
    codes, steps = [], []
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        code, step = await interrupted(objects, asked.request_id, number, local_aws, tmp_path, after=steps[-1:])
        codes.append(code)
        steps.append(step)
    _, reply = await perform("train", asked.request_id, None, ports=trainer.ports())

    assert codes == [-signal.SIGKILL, os.EX_TEMPFAIL, os.EX_OK]
    assert steps[0] < steps[1] < 100
    assert reply["next"] == "evaluate"
    (one, whole_record), (other, record) = [await trained(objects, done["request_id"]) for done in (whole, given)]
    assert one["step"] == other["step"] == 100
    assert all(torch.equal(one["average"][name], other["average"][name]) for name in one["average"])
    assert [whole_record["losses"], whole_record["margin"]] == [record["losses"], record["margin"]]


async def interrupted(objects, request_id, number, aws, work_dir, *, after) -> tuple[int, int]:
    """Run the command until it has a new checkpoint, and signal it; returns exit code and step of the checkpoint."""
    key = f"models/{request_id}/rounds/1/partial.0.json"
    environ = aws.process_environ | {"RADQUEUE_WORK_DIR": str(work_dir), "RADQUEUE_MIN_IMAGES": "8"}
    environ |= {"RADQUEUE_THREADS": "1", "RADQUEUE_DEVICE": "cpu", "RADQUEUE_LEASE_S": "1"}
    environ |= {"RADQUEUE_CHECKPOINT_S": "0.01" if number else "60"}
    command = (sys.executable, "-m", "services.trainer.steps", "train", "--request", request_id, "--json")
    async with asyncio.timeout(2 * WITHIN_S):
        while True:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE
            )
            while number and process.returncode is None:
                if await objects.exists(key) and (await document(objects, key))["step"] > max(after, default=0):
                    process.send_signal(number)
                    break
                await asyncio.sleep(0.01)
            out, _ = await process.communicate()
            if process.returncode != os.EX_TEMPFAIL or "stopped" in json.loads(out)["reason"]:
                break  # and not a lease that has not ended yet
    return process.returncode, (await document(objects, key))["step"]


async def trained(objects, request_id) -> tuple[dict, dict]:
    """Return a round's last checkpoint and the record that names it."""
    record = await document(objects, f"models/{request_id}/rounds/1/trained.0.json")
    return torch.load(io.BytesIO(await objects.get(record["checkpoint_key"])), weights_only=True), record
