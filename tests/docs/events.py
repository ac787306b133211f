"""The contract for people who write other programs: an AsyncAPI 3 document, and the reference of `docs/events.md`."""

import json
import re
from functools import cache
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from deploy.topology import Topology
from shared.messages import EVENT_TYPES, Event
from tests.docs.markdown import ROOT, table

CONTRACTS = ROOT / "tests" / "contracts"
SERVICES = ("ingest", "inference", "trainer", "reporter")
ALWAYS = ["specversion", "type"]
"""Attributes that have a default in Python, and that a body must have all the same."""
NOTIFICATION = {
    "Records": [
        {
            "eventVersion": "2.3",
            "eventSource": "aws:s3",
            "eventName": "ObjectCreated:Put",
            "eventTime": "2026-11-02T03:04:05.000Z",
            "s3": {"bucket": {"name": "radqueue"}, "object": {"key": "incoming/chest/a+b.dcm", "size": 526336}},
        }
    ]
}


class _Schema(GenerateJsonSchema):
    """Without the titles that only repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def type_of(event: type[Event]) -> str:
    """Return the event's type."""
    name: str = event.model_fields["type"].default
    return name


def first_sentence(event: type[Event]) -> str:
    """Return what the event means."""
    return (event.__doc__ or "").partition("\n")[0]


def recorded(event: type[Event]) -> list[dict[str, Any]]:
    """Return the recorded bodies of an event, the oldest form first."""
    paths = CONTRACTS.rglob(f"{type_of(event)}.json")
    return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: (len(path.parts), path))]


def receivers() -> dict[str, str]:
    """Return by queue the service that consumes it, as its composition root says."""
    found = {}
    for service in SERVICES:
        root = (ROOT / "services" / service / "__main__.py").read_text()
        (queue,) = set(re.findall(r"settings\.(\w+)_queue, settings=", root))
        found[queue] = service
    return found


def sender(event: type[Event]) -> str:
    """Return who sends an event: a service, or `cli`, which stands for people and schedules, too."""
    return event.producer.removeprefix("radqueue/")


@cache
def schemas() -> dict[str, Any]:
    """Return the JSON schemas of all events and of what they are made of, by name."""
    made = models_json_schema(
        [(event, "validation") for event in EVENT_TYPES],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schema,
    )[1]["$defs"]
    for event in EVENT_TYPES:
        schema = made[event.__name__]
        schema["required"] = [name for name in schema["properties"] if name in {*schema["required"], *ALWAYS}]
    return dict(sorted(made.items()))


def asyncapi() -> str:
    """Return the AsyncAPI document."""
    topology = Topology.load()
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "radqueue",
            "version": "1",
            "description": "The messages of radqueue's queues: CloudEvents 1.0 in JSON. Each has its version at the "
            "end of its type. Made from shared/messages.py and deploy/topology.json by `make docs`; docs/events.md is "
            "the guide.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "aws": {
                "host": "sqs.{region}.amazonaws.com",
                "protocol": "sqs",
                "description": "SQS; on one machine, what AWS_ENDPOINT_URL names.",
                "variables": {"region": {"default": topology.region}},
            }
        },
        "channels": {queue: _channel(queue, topology) for queue in topology.queues},
        "operations": _operations(),
        "components": {
            "messages": {event.__name__: _message(event) for event in EVENT_TYPES}
            | {"S3Notification": _notification()},
            "schemas": schemas(),
        },
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=116)


def _events_of(queue: str) -> list[str]:
    notified = ["S3Notification"] if queue in {one.queue for one in Topology.load().bucket.notifications} else []
    return notified + [event.__name__ for event in EVENT_TYPES if queue in event.queues]


def _channel(queue: str, topology: Topology) -> dict[str, Any]:
    name, defaults = topology.queues[queue].name, topology.queue_defaults
    dead_letters = name + defaults.dead_letter_suffix
    return {
        "address": name,
        "description": f"The queue that the {receivers()[queue]} service consumes.",
        "messages": {event: {"$ref": f"#/components/messages/{event}"} for event in _events_of(queue)},
        "bindings": {
            "sqs": {
                "queue": {
                    "name": name,
                    "fifoQueue": False,
                    "visibilityTimeout": defaults.visibility_timeout_s,
                    "messageRetentionPeriod": defaults.retention_s,
                    "redrivePolicy": {
                        "deadLetterQueue": {"name": dead_letters},
                        "maxReceiveCount": defaults.max_receive_count,
                    },
                },
                "deadLetterQueue": {
                    "name": dead_letters,
                    "fifoQueue": False,
                    "messageRetentionPeriod": defaults.dead_letter_retention_s,
                },
                "bindingVersion": "0.2.0",
            }
        },
    }


def _operations() -> dict[str, Any]:
    made = {}
    for service in (*SERVICES, "cli"):
        for queue in Topology.load().queues:
            sent = [event.__name__ for event in EVENT_TYPES if sender(event) == service and queue in event.queues]
            if sent:
                made[f"{service}_sends_to_{queue}"] = _operation("send", service, queue, sent)
            if receivers()[queue] == service:
                made[f"{service}_receives"] = _operation("receive", service, queue, _events_of(queue))
    return made


def _operation(action: str, service: str, queue: str, events: list[str]) -> dict[str, Any]:
    who = "A person, the command line or a schedule" if service == "cli" else f"The {service} service"
    return {
        "action": action,
        "title": f"{who} {action}s",
        "channel": {"$ref": f"#/channels/{queue}"},
        "messages": [{"$ref": f"#/channels/{queue}/messages/{event}"} for event in events],
    }


def _message(event: type[Event]) -> dict[str, Any]:
    return {
        "name": type_of(event),
        "title": event.__name__,
        "summary": first_sentence(event),
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{event.__name__}"},
        "examples": [{"payload": body} for body in recorded(event)],
    }


def _notification() -> dict[str, Any]:
    return {
        "name": "s3:ObjectCreated",
        "title": "S3Notification",
        "summary": "Objects were created: as S3 sends it, wrapped by SNS, or from EventBridge.",
        "contentType": "application/json",
        "payload": {"type": "object"},
        "examples": [{"payload": NOTIFICATION}],
    }


# The blocks of docs/events.md and docs/architecture.md.


def messages() -> str:
    """Return the table of all messages: who sends each, and into which queues."""
    rows = [
        (f"[`{type_of(event)}`](events.md#{_anchor(event)})", _who(event), _queues(event), first_sentence(event))
        for event in EVENT_TYPES
    ]
    return table(("message", "sent by", "to the queues", "what it means"), rows)


def queues() -> str:
    """Return the table of the queues: who consumes each, and what it holds."""
    topology = Topology.load()
    names = {event.__name__: f"`{type_of(event)}`" for event in EVENT_TYPES} | {"S3Notification": "S3's notifications"}
    rows = [
        (f"`{found.name}`", receivers()[queue], ", ".join(names[event] for event in _events_of(queue)))
        for queue, found in topology.queues.items()
    ]
    return table(("queue", "consumed by", "messages"), rows)


def reference() -> str:
    """Return a section for each event: its meaning, the fields of its data, and a recorded body."""
    return "\n".join(_section(event) for event in EVENT_TYPES)


def parts() -> str:
    """Return a section for each object that stands inside the data of an event."""
    events = {event.__name__ for event in EVENT_TYPES}
    return "\n".join(
        f"### {name}\n\n{schema['description'].partition(chr(10))[0]}\n\n{_fields(name)}"
        for name, schema in schemas().items()
        if name not in events and name not in {_data(event) for event in EVENT_TYPES}
    )


def _section(event: type[Event]) -> str:
    body = json.dumps(recorded(event)[-1], indent=2, ensure_ascii=False)
    return (
        f"### {type_of(event)}\n\n{first_sentence(event)} Sent by {_who(event)}, to {_queues(event)}.\n\n"
        f"{_fields(_data(event))}\n```json\n{body}\n```\n"
    )


def _data(event: type[Event]) -> str:
    """Return the name of the event's data."""
    name: str = schemas()[event.__name__]["properties"]["data"]["$ref"]
    return name.rpartition("/")[2]


def _fields(schema_name: str) -> str:
    schema = schemas()[schema_name]
    rows = [
        (f"`{name}`", _kind(field), "yes" if name in schema.get("required", ()) else "", field.get("description", ""))
        for name, field in schema["properties"].items()
    ]
    return table(("field", "type", "always there", "meaning"), rows)


def _who(event: type[Event]) -> str:
    return "a person, the command line or a schedule" if sender(event) == "cli" else sender(event)


def _queues(event: type[Event]) -> str:
    topology = Topology.load()
    return " and ".join(f"`{topology.queues[queue].name}`" for queue in event.queues)


def _anchor(event: type[Event]) -> str:
    return type_of(event).replace(".", "")


def _kind(field: dict[str, Any]) -> str:
    """Return the type of a field in a word or two."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"] if one.get("type") != "null")
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    if field["type"] == "object":
        return f"object of {_kind(field['additionalProperties'])}" if "additionalProperties" in field else "object"
    return str(field.get("format", field["type"]))
