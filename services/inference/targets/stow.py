"""Storing instances by STOW-RS (PS3.18 section 10.5), in requests that a server takes."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydicom.datadict import keyword_for_tag

from services.inference.targets.target import Instance, PushRejected
from shared.dicomweb import MAX_STORE_BYTES, DicomWeb, DicomWebError, StoreRejected, StoreTooLarge
from shared.errors import Unavailable
from shared.log import get_logger

BATCH_BYTES = MAX_STORE_BYTES * 9 // 10
"""Bytes of the instances in one STOW-RS request; its multipart headers take the rest of what is allowed."""
OURS = {401, 403, 404, 408}
"""HTTP statuses that speak about our permission or our address, not about the instances."""

log = get_logger()


async def stow(web: DicomWeb, instances: Sequence[Instance]) -> None:
    """Store the instances by STOW-RS.

    Raises:
        PushRejected: the server refuses them.
        Unavailable: it does not answer, or does not know us.
    """
    for batch in _batches([one.path for one in instances]):
        try:
            await web.store(batch)
        except StoreRejected as rejected:
            log.warning("push.rejected", failures=len(rejected.result.failures), reasons=str(rejected))
            reasons = [f"0x{one.reason:04X}" for one in rejected.result.failures if one.reason is not None]
            tags = [tag for one in rejected.result.failures for tag in one.tags]
            raise PushRejected(where=[*map(keyword_for_tag, tags), *reasons]) from None
        except StoreTooLarge:
            raise PushRejected from None
        except DicomWebError as error:
            if error.status in OURS:
                raise Unavailable(str(error)) from None
            raise PushRejected from None


def _batches(instances: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in instances:
        if batch and size + path.stat().st_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += path.stat().st_size
    if batch:
        yield batch
