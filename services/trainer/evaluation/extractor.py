"""The feature extractor that the settings name, brought to this machine and checked.

Settings: RADQUEUE_FEATURES_URI, RADQUEUE_FEATURES_SHA256. IAM: s3:GetObject on the object that the first one names.
"""

import asyncio
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from services.trainer.settings import TrainerSettings
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.objects import ObjectMissing, ObjectStore

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

S3 = "s3://"


async def fetch_extractor(settings: TrainerSettings, *, s3: "S3Client") -> Path | None:
    """Return the path of the extractor's file, under its own name; None if the built-in features are used.

    Raises:
        Misconfigured: the file does not exist, cannot be read, or has another hash.
    """
    uri = settings.features_uri
    if uri is None:
        return None
    if uri.startswith(S3):
        bucket, _, key = uri.removeprefix(S3).partition("/")
        path = Path(tempfile.mkdtemp(prefix="extractor-")) / Path(key).name  # goes with the process
        try:
            await ObjectStore(s3, bucket).download(key, path)
        except ObjectMissing:
            raise Misconfigured("RADQUEUE_FEATURES_URI: there is no such object.") from None
        except Unavailable as error:
            raise Misconfigured(f"RADQUEUE_FEATURES_URI: {error}.") from None
    else:
        path = Path(uri)
    try:
        found = hashlib.sha256(await asyncio.to_thread(path.read_bytes)).hexdigest()
    except OSError as error:
        raise Misconfigured(f"RADQUEUE_FEATURES_URI: the file cannot be read ({type(error).__name__}).") from None
    if found != settings.features_sha256:
        raise Misconfigured(f"RADQUEUE_FEATURES_SHA256: the file's hash is {found}.")
    return path
