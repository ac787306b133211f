"""The contract: what is accepted, what is refused and how, and that an event announced twice is the same event."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Unprocessable
from shared.messages import EVENT_TYPES, Message, ObjectsCreated, ReadySeries, SeriesReady, decode

CONTRACTS = Path(__file__).parent.parent / "contracts"
RECORDED = sorted(path for path in CONTRACTS.rglob("*.json") if "documents" not in path.parts)
"""Of messages; those of stored documents are beside them."""
TIME = datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC)
READY = ReadySeries(
    study_uid="1.2.3",
    series_uid="1.2.3.4",
    digest="ab" * 16,
    revision_key="studies/1.2.3/1.2.3.4/revisions/x.json",
    dataset="chest",
    n_instances=24,
)
REQUEST = {"specversion": "1.0", "type": "radqueue.training.requested.v1"}
EVENT = SeriesReady.of("studies/1.2.3/1.2.3.4", READY, time=TIME)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: str(path.relative_to(CONTRACTS)))
def test_every_recorded_body_parses_for_ever(path):
    """A body of any version ever released is accepted, keeps its id and its type, and survives a round trip."""
    body = path.read_text()
    decoded = decode(body)

    assert decoded.id == json.loads(body)["id"]
    assert decoded.type == json.loads(body)["type"] == path.stem
    assert decode(decoded.body()) == decoded


def test_every_event_type_has_a_recorded_body():
    """No event type is released without a record of how it looks."""
    types = {event.model_fields["type"].default for event in EVENT_TYPES}

    assert types == {path.stem for path in RECORDED}


def test_an_event_announced_twice_is_the_same_event():
    """The id depends on type, subject and data, and on nothing else."""
    later = SeriesReady.of("studies/1.2.3/1.2.3.4", READY, time=datetime.now(UTC))
    other = SeriesReady.of("studies/1.2.3/1.2.3.4", READY.model_copy(update={"n_instances": 25}), time=TIME)

    assert later.id == EVENT.id
    assert other.id != EVENT.id


def test_a_trace_context_that_is_none_is_left_out():
    """A broken traceparent costs the trace, not the message, and never reaches a log."""
    document = json.loads(EVENT.body()) | {"traceparent": "00-DOE^JANE-1-01"}

    assert decode(json.dumps(document)) == EVENT


def test_an_unknown_additional_field_is_accepted():
    """A newer producer may say more than we know."""
    document = json.loads(EVENT.body())
    document["partitionkey"] = "x"
    document["data"]["colour"] = "blue"

    assert decode(json.dumps(document)) == EVENT


@pytest.mark.parametrize(
    ("body", "reason_code"),
    [
        ("", "not_json"),
        ("DOE^JANE", "not_json"),
        ('"DOE^JANE"', "unknown_message"),
        ('{"name": "DOE^JANE"}', "unknown_message"),
        ('{"specversion": "1.0", "type": "DOE^JANE"}', "unknown_type"),
        (
            '{"specversion": "1.0", "type": "radqueue.series.ready.v1", "data": {"study_uid": "DOE^JANE"}}',
            "invalid_message",
        ),
        ('{"Records": [{"eventName": "ObjectCreated:Put", "s3": "DOE^JANE"}]}', "invalid_message"),
        ('{"Records": {"DOE^JANE": 1}}', "invalid_message"),
        (json.dumps(REQUEST | {"data": {"overrides": {"DOE^JANE": []}}}), "invalid_message"),
        (json.dumps(REQUEST | {"id": "DOE^JANE"}), "invalid_message"),
        ("[" * 200_000, "not_json"),
        ('{"name": "\\ud800"}', "unknown_message"),
        (EVENT.model_copy(update={"time": datetime.min.replace(tzinfo=UTC)}).body(), "invalid_message"),
        ('{"detail-type": "Object Created", "detail": {"bucket": "DOE^JANE"}}', "invalid_message"),
    ],
)
def test_a_bad_body_is_refused_by_reason_without_its_values(body, reason_code):
    """The error names reason and place, and echoes nothing that may name a patient."""
    with pytest.raises(Unprocessable) as refused:
        decode(body)

    assert refused.value.reason_code == reason_code
    assert "DOE" not in str(refused.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "Records",
                        "specversion",
                        "detail-type",
                        "detail",
                        "s3",
                        "Type",
                        "Message",
                        "Event",
                        "data",
                        "type",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_no_document_makes_decode_raise_anything_else(document):
    """Whatever JSON comes, decode returns a message or raises `Unprocessable`."""
    try:
        decoded = decode(json.dumps(document))
    except Unprocessable:
        return

    assert isinstance(decoded, Message)


def s3_record(key: str, event_name: str = "ObjectCreated:Put") -> dict:
    """A record as S3 sends it; `key` is already form-encoded."""
    return {
        "eventVersion": "2.3",
        "eventName": event_name,
        "eventTime": "2026-11-02T03:04:05.000Z",
        "s3": {"bucket": {"name": "radqueue"}, "object": {"key": key, "size": 1}},
    }


RAW = {"Records": [s3_record("incoming/chest/a+b%2Bc.dcm"), s3_record("incoming/chest/d.dcm", "ObjectRemoved:Delete")]}
EVENT_BRIDGE = {
    "detail-type": "Object Created",
    "time": "2026-11-02T03:04:05Z",
    "detail": {"bucket": {"name": "radqueue"}, "object": {"key": "incoming/chest/a b+c.dcm"}},
}


@pytest.mark.parametrize(
    "body",
    [json.dumps(RAW), json.dumps({"Type": "Notification", "Message": json.dumps(RAW)}), json.dumps(EVENT_BRIDGE)],
    ids=["raw", "sns", "eventbridge"],
)
def test_every_form_of_an_s3_event_names_the_same_object(body):
    """Raw and SNS keys are form-encoded, EventBridge's are not; what is not a creation is left out."""
    decoded = decode(body)

    assert isinstance(decoded, ObjectsCreated)
    assert [(created.bucket, created.key, created.time) for created in decoded.objects] == [
        ("radqueue", "incoming/chest/a b+c.dcm", TIME)
    ]


def test_the_test_event_of_s3_is_acknowledged():
    """`s3:TestEvent` decodes to a notification of no objects."""
    assert decode('{"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "radqueue"}') == ObjectsCreated(
        objects=()
    )
