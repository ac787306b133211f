"""What is stored of uploads that ingest refused."""

from pydantic import AwareDatetime

from shared.documents.document import Stored


class StoredRefusal(Stored):
    """`reason.json`: why an object is in quarantine."""

    reason_code: str
    """One of the codes of services/ingest/reasons.py."""
    place: str
    """The place in the object, such as an element or a member's number; may be empty."""
    upload_key_sha256: str
    """Hash of the upload's key, which itself may hold a name."""
    dataset: str
    time: AwareDatetime
    """The time of the upload."""


class StoredRelease(Stored):
    """`released.json`: the refusal that was answered by giving the object to ingest once more."""

    time: AwareDatetime
    reason: StoredRefusal
