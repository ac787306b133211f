"""Training requests, as the options of `radqueue train` make them."""

import asyncio
import json
import secrets
from collections.abc import Iterable

from pydantic import ValidationError

from cli.bridge import Bucket, publish_of
from cli.client import Client, now
from cli.names import name
from services.trainer.check import fault_of, parameters
from shared.messages import TrainingRequest
from shared.operations import trainings
from shared.operations.refused import WrongUsage

Value = int | float | str | bool


def training_request(
    dataset: str,
    *,
    request_id: str | None = None,
    threshold: float | None = None,
    max_rounds: int | None = None,
    n_images: int | None = None,
    overrides: dict[str, Value] | None = None,
    data_uri: str | None = None,
    classes: dict[str, str] | None = None,
    metric: str | None = None,
    min_coverage: float | None = None,
    strategy: str | None = None,
) -> TrainingRequest:
    """Make a request; what is None is left to the contract's defaults.

    Raises:
        WrongUsage: a value is not allowed.
    """
    for named in (dataset, request_id, *(classes or {}), *(classes or {}).values()):
        if named is not None:
            name(named)
    if metric not in {None, "relative_fd"} and threshold is None:
        raise WrongUsage(f"--metric {metric} needs --threshold: without one, it is that of relative_fd")
    if overrides:
        _check_overrides(overrides)
    identity = request_id or f"{dataset}-{now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    asked: dict[str, object] = {"threshold": threshold, "max_rounds": max_rounds, "n_images": n_images}
    asked |= {"overrides": overrides, "data_uri": data_uri, "classes": classes}
    asked |= {"metric": metric, "min_coverage": min_coverage, "strategy": strategy}
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return TrainingRequest.model_validate({"request_id": identity, "dataset": dataset, **given})
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise WrongUsage("; ".join(reasons)) from None


def _check_overrides(overrides: dict[str, Value]) -> None:
    """Check them as the trainer will, on top of the shipped config.js. Raises `WrongUsage`."""
    if (fault := fault_of(overrides)) is not None:
        known = ", ".join(f"{name}={json.dumps(value)}" for name, value in parameters().items())
        raise WrongUsage(f"--set {fault}. The parameters and their defaults: {known}")


def parse_override(text: str) -> tuple[str, Value]:
    """Read `name=value`: a number, true or false, or text. Raises `WrongUsage`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise WrongUsage(f"--set {text}: write name=value, such as --set steps=800")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, int | float | bool | str) else value


def parse_classes(texts: Iterable[str]) -> dict[str, str]:
    """Read `name=dataset`, or a name alone, which is both. Raises `WrongUsage` if a class is given twice."""
    classes: dict[str, str] = {}
    for text in texts:
        name, _, dataset = text.partition("=")
        if name in classes:
            raise WrongUsage(f"--class {name} is given twice; a class has one dataset")
        classes[name] = dataset or name
    return classes


def send_training(client: Client, request: TrainingRequest) -> None:
    """Send a training request."""
    asyncio.run(trainings.ask(request, publish=publish_of(client), now=now()))


def check(client: Client, request: TrainingRequest) -> None:
    """Make sure that the request is no other one's, and has data. Raises `Refused`."""
    asyncio.run(trainings.check(request, objects=Bucket(client)))
