"""The targets that the settings of a worker name, opened."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from services.inference.routing import TargetName
from services.inference.settings import InferenceSettings
from services.inference.targets.dicomweb import DicomWebTarget
from services.inference.targets.healthimaging import HealthImaging
from services.inference.targets.import_job import ImportJobs
from services.inference.targets.s3_only import S3Only
from services.inference.targets.target import NEEDED, Target, Targets
from shared.aws import Aws
from shared.aws_errors import AWS_ERRORS, code_of, is_answer
from shared.config import Misconfigured
from shared.dicomweb import Auth, Basic, Bearer, DicomWeb, SigV4, base_url
from shared.objects import ObjectStore


@asynccontextmanager
async def open_targets(settings: InferenceSettings, aws: Aws, objects: ObjectStore) -> AsyncIterator[Targets]:
    """Open the targets that the settings name.

    Raises:
        Misconfigured: the one that takes results by default is not named, or the data store does not answer.
    """
    default = settings.push_to or ("dicomweb" if settings.dicomweb_url else "healthimaging")
    async with aiohttp.ClientSession() as session:
        by_name: dict[TargetName, Target] = {"s3": S3Only()}
        if settings.dicomweb_url:
            web = DicomWeb(settings.dicomweb_url, session=session, auth=_dicomweb_auth(settings))
            by_name["dicomweb"] = DicomWebTarget(web)
        if settings.datastore_id:
            await _datastore_answers(settings, aws)
            url = base_url(endpoint_url=aws.endpoint_url, region=aws.region, datastore_id=settings.datastore_id)
            web = DicomWeb(url, session=session, auth=SigV4(aws.credentials, aws.region))
            place = aws.medical_imaging, settings.datastore_id
            by_name["healthimaging"] = HealthImaging(web, *place)
            if settings.import_role_arn:
                imports = ImportJobs(web, *place, objects=objects, role_arn=settings.import_role_arn)
                by_name["healthimaging-import"] = imports
        if default not in by_name:
            raise Misconfigured(f"{NEEDED[default]}: not set. {default} takes the results, as RADQUEUE_PUSH_TO has it.")
        yield Targets(by_name, default, originals=settings.push_originals)


def _dicomweb_auth(settings: InferenceSettings) -> Auth | None:
    if token := settings.dicomweb_token.get_secret_value():
        return Bearer(token)
    password = settings.dicomweb_password.get_secret_value()
    return Basic(settings.dicomweb_username, password) if settings.dicomweb_username else None


async def _datastore_answers(settings: InferenceSettings, aws: Aws) -> None:
    try:
        await aws.medical_imaging.get_datastore(datastoreId=settings.datastore_id)
    except AWS_ERRORS as error:
        says = f"answers {code_of(error)} for this data store" if is_answer(error) else f"fails with {code_of(error)}"
        raise Misconfigured(f"RADQUEUE_DATASTORE_ID: HealthImaging {says}.") from None
