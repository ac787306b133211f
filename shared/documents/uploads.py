"""What is stored of uploads that ingest refused."""

from pydantic import AwareDatetime

from shared.documents.document import Stored


class StoredRefusal(Stored):
    """`reason.json`: why an object is in quarantine."""

    reason_code: str
    """See services/ingest/reasons.py."""
    place: str
    """An element, a member's number: where in the object; may be empty."""
    upload_key_sha256: str
    """Upload keys may hold names, so they are told by their hash."""
    dataset: str
    time: AwareDatetime
    """When it was uploaded."""


class StoredRelease(Stored):
    """`released.json`: the refusal that was answered by giving the object to ingest once more."""

    time: AwareDatetime
    reason: StoredRefusal
