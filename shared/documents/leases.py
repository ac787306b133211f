"""The lease of the worker that works on a record; `shared/idempotency.py` says what it guarantees."""

from pydantic import AwareDatetime

from shared.documents.document import Stored


class Lease(Stored):
    """`lease.json`, `claim.json`: who works, and until when unless it is renewed."""

    owner: str
    epoch: int
    """The number of the owner, one higher with each."""
    ends: AwareDatetime
