"""The store of HealthImaging: data stores, image sets, their versions, and the instances in them.

Theory of operation. An image set holds the instances of one series that agree on the patient and study attributes of
`CONSISTENT_ATTRIBUTES`. The first image set of a study fixes those attributes; what agrees joins the series' one
primary image set, what does not gets a non-primary image set of its own. An image set's versions are kept as
intervals: an instance belongs to every version from `added_version` up to, and not including, `removed_version`.

The index is one SQLite file, written in transactions under one lock; the Part 10 files lie beside it under their
SHA-256, moved into place within the same lock, so that a deletion cannot take a file that a store is about to name.
Source: AWS HealthImaging developer guide, "Understanding image sets".
"""

import contextlib
import json
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCOUNT_ID = "123456789012"
CONSISTENT_ATTRIBUTES = ("0020000D", "00100020", "00080020", "00080050", "00200010")
"""StudyInstanceUID, PatientID, StudyDate, AccessionNumber, StudyID."""

SUMMARY_TAGS = (
    "00080020",
    "00080030",
    "00080050",
    "00080060",
    "00081030",
    "00100010",
    "00100020",
    "00100030",
    "00100040",
    "00180015",
    "0020000D",
    "0020000E",
    "00200010",
    "00200011",
)
"""What a search tells about an image set: the study's and series' attributes, kept as DICOM JSON beside it."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS datastore (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, client_token TEXT NOT NULL, options TEXT NOT NULL,
    created_at REAL NOT NULL, updated_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS image_set (
    position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, datastore_id TEXT NOT NULL,
    study_uid TEXT NOT NULL, series_uid TEXT NOT NULL, agreement TEXT NOT NULL, summary TEXT NOT NULL,
    is_primary INTEGER NOT NULL,
    version INTEGER NOT NULL, state TEXT NOT NULL, workflow_status TEXT NOT NULL,
    created_at REAL NOT NULL, updated_at REAL NOT NULL, deleted_at REAL
);
CREATE INDEX IF NOT EXISTS image_set_by_study ON image_set (datastore_id, study_uid);
CREATE INDEX IF NOT EXISTS image_set_by_series ON image_set (datastore_id, series_uid);
CREATE TABLE IF NOT EXISTS version (
    image_set_id TEXT NOT NULL, version INTEGER NOT NULL, workflow_status TEXT NOT NULL, created_at REAL NOT NULL,
    PRIMARY KEY (image_set_id, version)
);
CREATE TABLE IF NOT EXISTS instance (
    position INTEGER PRIMARY KEY AUTOINCREMENT, image_set_id TEXT NOT NULL, sop_instance_uid TEXT NOT NULL,
    sha256 TEXT NOT NULL, transfer_syntax_uid TEXT NOT NULL, attributes TEXT NOT NULL,
    added_version INTEGER NOT NULL, removed_version INTEGER
);
CREATE INDEX IF NOT EXISTS instance_by_image_set ON instance (image_set_id, sop_instance_uid);
CREATE INDEX IF NOT EXISTS instance_by_sop ON instance (sop_instance_uid);
CREATE INDEX IF NOT EXISTS instance_by_file ON instance (sha256);
"""


class NotFound(LookupError):  # noqa: N818 - it states a fact about an identifier
    """No such data store, image set or version."""


class Conflict(RuntimeError):  # noqa: N818 - as above
    """The resource's state does not allow the operation."""


@dataclass(frozen=True, slots=True)
class Datastore:
    """One data store; times in seconds since the epoch, `options` as CreateDatastore got them."""

    id: str
    name: str
    status: str
    options: dict[str, Any]
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class ImageSet:
    """One image set at one version; times in seconds since the epoch, `summary` is DICOM JSON of `SUMMARY_TAGS`."""

    id: str
    datastore_id: str
    study_uid: str
    series_uid: str
    summary: dict[str, Any]
    is_primary: bool
    version: int
    state: str
    workflow_status: str
    created_at: float
    updated_at: float
    deleted_at: float | None


@dataclass(frozen=True, slots=True)
class Instance:
    """One stored instance; `attributes` is the DICOM JSON model without bulk data (PS3.18 annex F)."""

    image_set_id: str
    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sha256: str
    transfer_syntax_uid: str
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A Part 10 file that was read and may be stored; `path` is moved into the store."""

    path: Path
    sha256: str
    transfer_syntax_uid: str
    attributes: dict[str, Any]

    @property
    def study_uid(self) -> str:
        """Return the StudyInstanceUID."""
        return text_of(self.attributes, "0020000D")

    @property
    def series_uid(self) -> str:
        """Return the SeriesInstanceUID."""
        return text_of(self.attributes, "0020000E")

    @property
    def sop_instance_uid(self) -> str:
        """Return the SOPInstanceUID."""
        return text_of(self.attributes, "00080018")

    @property
    def agreement(self) -> str:
        """Return what all image sets of a study must agree on, as one comparable text."""
        return json.dumps([text_of(self.attributes, tag) for tag in CONSISTENT_ATTRIBUTES])

    @property
    def summary(self) -> dict[str, Any]:
        """Return the attributes that a search for image sets tells."""
        return {tag: self.attributes[tag] for tag in SUMMARY_TAGS if tag in self.attributes}


def text_of(attributes: dict[str, Any], tag: str) -> str:
    """Return the first value of an element of the DICOM JSON model as text; empty if there is none."""
    values = attributes.get(tag, {}).get("Value", [])
    first = values[0] if values else ""
    if isinstance(first, dict):
        first = first.get("Alphabetic", "")
    return "" if first is None else str(first).strip()


class ImageSetStore:
    """All of HealthImaging's state, in one folder."""

    def __init__(self, root: Path, *, region: str) -> None:
        """Open the store in `root`, or make it."""
        self._region = region
        self._files = root / "files"
        self.incoming = root / "incoming"
        # Uploads that were cut off by the end of the last process belong to nobody.
        shutil.rmtree(self.incoming, ignore_errors=True)
        for folder in (self._files, self.incoming):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Autocommit, so that each transaction is written down where it begins.
        self._db = sqlite3.connect(root / "index.sqlite", check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the index."""
        with self._lock:
            self._db.close()

    def arn(self, datastore_id: str, image_set_id: str | None = None) -> str:
        """Return the ARN of a data store or of an image set."""
        arn = f"arn:aws:medical-imaging:{self._region}:{ACCOUNT_ID}:datastore/{datastore_id}"
        return f"{arn}/imageset/{image_set_id}" if image_set_id else arn

    # Data stores.

    def create_datastore(self, name: str | None, client_token: str, options: dict[str, Any]) -> Datastore:
        """Create a data store; the same client token again returns the one it made."""
        now = time.time()
        with self._transaction() as db:
            row = db.execute("SELECT * FROM datastore WHERE client_token = ?", (client_token,)).fetchone()
            if row is None:
                key = uuid.uuid4().hex
                db.execute(
                    "INSERT INTO datastore VALUES (?, ?, 'ACTIVE', ?, ?, ?, ?)",
                    (key, name or key, client_token, json.dumps(options), now, now),
                )
                row = db.execute("SELECT * FROM datastore WHERE id = ?", (key,)).fetchone()
        return _datastore(row)

    def get_datastore(self, datastore_id: str) -> Datastore:
        """Return one data store, also a deleted one. Raises `NotFound`."""
        with self._lock:
            row = self._db.execute("SELECT * FROM datastore WHERE id = ?", (datastore_id,)).fetchone()
        if row is None:
            raise NotFound("no such data store")
        return _datastore(row)

    def require_active(self, datastore_id: str) -> Datastore:
        """Return a data store that can be read and written. Raises `NotFound`."""
        datastore = self.get_datastore(datastore_id)
        if datastore.status != "ACTIVE":
            raise NotFound("the data store is deleted")
        return datastore

    def list_datastores(self, status: str | None) -> list[Datastore]:
        """Return the data stores of one status, or all, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM datastore WHERE ? IS NULL OR status = ? ORDER BY created_at, id", (status, status)
            ).fetchall()
        return [_datastore(row) for row in rows]

    def delete_datastore(self, datastore_id: str) -> None:
        """Delete an empty data store. Raises `NotFound` and `Conflict`."""
        self.require_active(datastore_id)
        with self._transaction() as db:
            held = db.execute(
                "SELECT 1 FROM image_set WHERE datastore_id = ? AND state != 'DELETED' LIMIT 1", (datastore_id,)
            ).fetchone()
            if held:
                raise Conflict("the data store still holds image sets")
            db.execute(
                "UPDATE datastore SET status = 'DELETED', updated_at = ? WHERE id = ?", (time.time(), datastore_id)
            )

    # Storing.

    def store(self, datastore_id: str, arrivals: Sequence[Arrival]) -> list[ImageSet]:
        """Store instances that came in one request: each image set they change gets one new version.

        Returns the image set of each. Storing the same bytes again changes nothing. Raises `NotFound`.
        """
        self.require_active(datastore_id)
        now = time.time()
        with self._transaction() as db:
            touched: dict[str, int] = {}
            ids: list[str] = []
            for arrival in arrivals:
                image_set = self._image_set_for(db, datastore_id, arrival, now)
                self._put_instance(db, image_set, arrival, touched)
                ids.append(image_set["id"])
            for image_set_id, version in touched.items():
                self._finish_version(db, image_set_id, version, now)
        stored = {image_set_id: self.image_set(datastore_id, image_set_id) for image_set_id in set(ids)}
        return [stored[image_set_id] for image_set_id in ids]

    def _image_set_for(self, db: sqlite3.Connection, datastore_id: str, arrival: Arrival, now: float) -> sqlite3.Row:
        """Find or make the image set that an instance belongs to; a new one starts at version 0."""
        is_primary = self._agrees(db, datastore_id, arrival)
        find = (
            "SELECT * FROM image_set WHERE datastore_id = ? AND study_uid = ? AND series_uid = ? AND agreement = ?"
            " AND is_primary = ? AND state = 'ACTIVE'"
        )
        key = (datastore_id, arrival.study_uid, arrival.series_uid, arrival.agreement, is_primary)
        row: sqlite3.Row | None = db.execute(find, key).fetchone()
        if row is None:
            db.execute(
                "INSERT INTO image_set (datastore_id, study_uid, series_uid, agreement, is_primary, id, summary,"
                " version, state, workflow_status, created_at, updated_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, 0, 'ACTIVE', 'CREATED', ?, ?)",
                (*key, uuid.uuid4().hex, json.dumps(arrival.summary), now, now),
            )
            row = db.execute(find, key).fetchone()
        if row is None:
            raise RuntimeError("an image set vanished within its own transaction")
        return row

    def _agrees(self, db: sqlite3.Connection, datastore_id: str, arrival: Arrival) -> bool:
        """Tell whether an instance agrees with the primary image sets of its study, and its series with its study."""
        primary = (
            "SELECT {} FROM image_set WHERE datastore_id = ? AND is_primary AND state = 'ACTIVE' AND {} = ? LIMIT 1"
        )
        study = db.execute(primary.format("agreement", "study_uid"), (datastore_id, arrival.study_uid)).fetchone()
        series = db.execute(primary.format("study_uid", "series_uid"), (datastore_id, arrival.series_uid)).fetchone()
        return (study is None or study["agreement"] == arrival.agreement) and (
            series is None or series["study_uid"] == arrival.study_uid
        )

    def _put_instance(
        self, db: sqlite3.Connection, image_set: sqlite3.Row, arrival: Arrival, touched: dict[str, int]
    ) -> None:
        identity = (image_set["id"], arrival.sop_instance_uid)
        current = db.execute(
            "SELECT position, sha256 FROM instance"
            " WHERE image_set_id = ? AND sop_instance_uid = ? AND removed_version IS NULL",
            identity,
        ).fetchone()
        if current is not None and current["sha256"] == arrival.sha256:
            return
        version = touched.setdefault(image_set["id"], image_set["version"] + 1)
        if current is not None:
            db.execute("UPDATE instance SET removed_version = ? WHERE position = ?", (version, current["position"]))
        self._keep_file(arrival)
        db.execute(
            "INSERT INTO instance (image_set_id, sop_instance_uid, sha256, transfer_syntax_uid, attributes,"
            " added_version) VALUES (?, ?, ?, ?, ?, ?)",
            (*identity, arrival.sha256, arrival.transfer_syntax_uid, json.dumps(arrival.attributes), version),
        )

    @staticmethod
    def _finish_version(db: sqlite3.Connection, image_set_id: str, version: int, now: float) -> None:
        workflow_status = "CREATED" if version == 1 else "UPDATED"
        db.execute("INSERT INTO version VALUES (?, ?, ?, ?)", (image_set_id, version, workflow_status, now))
        db.execute(
            "UPDATE image_set SET version = ?, workflow_status = ?, updated_at = ? WHERE id = ?",
            (version, workflow_status, now, image_set_id),
        )

    def _keep_file(self, arrival: Arrival) -> None:
        target = self.path_of(arrival.sha256)
        target.parent.mkdir(exist_ok=True)
        if arrival.path.exists():
            arrival.path.replace(target)

    def path_of(self, sha256: str) -> Path:
        """Return where the Part 10 file of that digest lies."""
        return self._files / sha256[:2] / f"{sha256}.dcm"

    # Image sets.

    def image_sets(self, datastore_id: str) -> list[ImageSet]:
        """Return all image sets that are not deleted, oldest first. Raises `NotFound`."""
        self.require_active(datastore_id)
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM image_set WHERE datastore_id = ? AND state != 'DELETED' ORDER BY position",
                (datastore_id,),
            ).fetchall()
        return [_image_set(row) for row in rows]

    def image_set(self, datastore_id: str, image_set_id: str, version: int | None = None) -> ImageSet:
        """Return an image set, as it is or as it was at a version. Raises `NotFound`."""
        self.require_active(datastore_id)
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM image_set WHERE id = ? AND datastore_id = ?", (image_set_id, datastore_id)
            ).fetchone()
            if row is None:
                raise NotFound("no such image set")
            if version is None or version == row["version"]:
                return _image_set(row)
            past = self._db.execute(
                "SELECT * FROM version WHERE image_set_id = ? AND version = ?", (image_set_id, version)
            ).fetchone()
        if past is None:
            raise NotFound("no such version of the image set")
        changes = {key: past[key] for key in ("version", "workflow_status")}
        return _image_set({**dict(row), **changes, "updated_at": past["created_at"]})

    def delete_image_set(self, datastore_id: str, image_set_id: str) -> ImageSet:
        """Delete all versions of an image set. Raises `NotFound` and `Conflict`."""
        image_set = self.image_set(datastore_id, image_set_id)
        with self._transaction() as db:
            now = time.time()
            changed = db.execute(
                "UPDATE image_set SET state = 'DELETED', workflow_status = 'DELETED', deleted_at = ?, updated_at = ?"
                " WHERE id = ? AND state = 'ACTIVE'",
                (now, now, image_set_id),
            ).rowcount
            if not changed:
                raise Conflict("the image set is deleted already")
            digests = db.execute(
                "SELECT DISTINCT sha256 FROM instance WHERE image_set_id = ?", (image_set_id,)
            ).fetchall()
            db.execute("DELETE FROM instance WHERE image_set_id = ?", (image_set_id,))
            db.execute("DELETE FROM version WHERE image_set_id = ?", (image_set_id,))
            for row in digests:
                if db.execute("SELECT 1 FROM instance WHERE sha256 = ? LIMIT 1", tuple(row)).fetchone() is None:
                    self.path_of(row["sha256"]).unlink(missing_ok=True)
        return image_set

    def count_instances(self, image_set: ImageSet) -> int:
        """Return how many instances an image set has now."""
        with self._lock:
            row = self._db.execute(
                "SELECT COUNT(*) FROM instance WHERE image_set_id = ? AND removed_version IS NULL", (image_set.id,)
            ).fetchone()
        return int(row[0])

    def instances(self, image_set: ImageSet) -> list[Instance]:
        """Return the instances of an image set at its version, in the order in which they came."""
        with self._lock:
            rows = self._db.execute(
                _SELECT_INSTANCE + " WHERE i.image_set_id = ? AND i.added_version <= ?"
                " AND (i.removed_version IS NULL OR i.removed_version > ?) ORDER BY i.position",
                (image_set.id, image_set.version, image_set.version),
            ).fetchall()
        return [_instance(row) for row in rows]

    def primary_instances(
        self, datastore_id: str, *, study: str = "", series: str = "", sop: str = ""
    ) -> list[Instance]:
        """Return the current instances of the primary image sets, narrowed by UID where given. Raises `NotFound`."""
        self.require_active(datastore_id)
        conditions = {"s.datastore_id": datastore_id, "s.study_uid": study, "s.series_uid": series}
        conditions["i.sop_instance_uid"] = sop
        given = {column: value for column, value in conditions.items() if value}
        with self._lock:
            rows = self._db.execute(
                _SELECT_INSTANCE
                + " WHERE s.is_primary AND s.state = 'ACTIVE' AND i.removed_version IS NULL AND "
                + " AND ".join(f"{column} = ?" for column in given)
                + " ORDER BY i.position",
                tuple(given.values()),
            ).fetchall()
        return [_instance(row) for row in rows]

    def read(self, instance: Instance) -> bytes:
        """Return the stored Part 10 file, byte for byte."""
        return self.path_of(instance.sha256).read_bytes()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


_SELECT_INSTANCE = "SELECT i.*, s.study_uid, s.series_uid FROM instance i JOIN image_set s ON s.id = i.image_set_id"


def _datastore(row: sqlite3.Row) -> Datastore:
    return Datastore(
        row["id"], row["name"], row["status"], json.loads(row["options"]), row["created_at"], row["updated_at"]
    )


def _image_set(row: sqlite3.Row | dict[str, Any]) -> ImageSet:
    converted = {"is_primary": bool(row["is_primary"]), "summary": json.loads(row["summary"])}
    return ImageSet(**converted, **{name: row[name] for name in ImageSet.__slots__ if name not in converted})


def _instance(row: sqlite3.Row) -> Instance:
    names = [name for name in Instance.__slots__ if name != "attributes"]
    return Instance(attributes=json.loads(row["attributes"]), **{name: row[name] for name in names})


def discard(paths: Iterable[Path]) -> None:
    """Remove the uploads that were not moved into the store."""
    for path in paths:
        path.unlink(missing_ok=True)
