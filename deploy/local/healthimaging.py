"""AWS HealthImaging's API, driven by the service model that botocore ships.

Requests are checked against the model before an operation runs. Operations that the model has and this file has not are
answered with 501 and their name.
Source: botocore/data/medical-imaging/2023-07-19/service-2.json.
"""

# ruff: noqa: N803 - the operations take their parameters under the names that the service model gives them

import gzip
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import botocore.session
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Request, Response

from deploy.local import imagesets
from deploy.local.healthimaging_imports import ImportJobs
from deploy.local.imagesets import Datastore, ImageSet, ImageSetStore
from deploy.local.restjson import ApiError, parameters, routes, seconds_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

DEFAULT_PAGE = 50
"""The model allows at most 50 results per page."""


class HealthImagingApplication:
    """Serve the operations of `OPERATIONS` and `IMPORTS`."""

    def __init__(self, store: ImageSetStore, jobs: ImportJobs) -> None:
        """Read the service model."""
        self._store = store
        self._jobs = jobs
        self._routes = routes(botocore.session.Session().get_service_model("medical-imaging"))

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        try:
            response = self._respond(Request(environ))
        except imagesets.NotFound as error:
            response = _error(ApiError("ResourceNotFoundException", str(error)))
        except imagesets.Conflict as error:
            response = _error(ApiError("ConflictException", str(error)))
        except ApiError as error:
            response = _error(error)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        try:
            operation, in_path = self._routes.bind_to_environ(request).match()
        except HTTPException:
            raise ApiError("UnknownOperationException", "no operation has this method and path", 404) from None
        name = operation.name
        if name in OPERATIONS:
            answer = OPERATIONS[name](self._store, **parameters(operation, request, in_path))
        elif name in IMPORTS:
            answer = IMPORTS[name](self._jobs, **parameters(operation, request, in_path))
        else:
            raise ApiError("NotImplementedException", f"{name} is not implemented by the local AWS", 501)
        if isinstance(answer, bytes):
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            return Response(answer, headers=headers)
        return Response(json.dumps(answer), content_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(
        json.dumps({"message": error.message}),
        status=error.status,
        headers={"x-amzn-ErrorType": error.code},
        content_type="application/json",
    )


# The operations. Each takes the parameters under the model's names.


def create_datastore(
    store: ImageSetStore,
    *,
    clientToken: str,
    datastoreName: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """CreateDatastore; the data store is ACTIVE at the first look."""
    datastore = store.create_datastore(datastoreName, clientToken, options)
    return {"datastoreId": datastore.id, "datastoreStatus": "CREATING"}


def get_datastore(store: ImageSetStore, *, datastoreId: str) -> dict[str, Any]:
    """GetDatastore."""
    return {"datastoreProperties": _datastore_properties(store, store.get_datastore(datastoreId))}


def list_datastores(
    store: ImageSetStore,
    *,
    datastoreStatus: str | None = None,
    nextToken: str | None = None,
    maxResults: int = DEFAULT_PAGE,
) -> dict[str, Any]:
    """ListDatastores."""
    everything = [_datastore_properties(store, datastore) for datastore in store.list_datastores(datastoreStatus)]
    # A summary is what the properties are, less the three options that only GetDatastore tells.
    for properties in everything:
        for name in ("kmsKeyArn", "lambdaAuthorizerArn", "losslessStorageFormat"):
            properties.pop(name, None)
    page, following = _page(everything, nextToken, maxResults)
    return {"datastoreSummaries": page, **following}


def delete_datastore(store: ImageSetStore, *, datastoreId: str) -> dict[str, Any]:
    """DeleteDatastore."""
    store.delete_datastore(datastoreId)
    return {"datastoreId": datastoreId, "datastoreStatus": "DELETING"}


def _datastore_properties(store: ImageSetStore, datastore: Datastore) -> dict[str, Any]:
    options = {name: value for name, value in datastore.options.items() if name != "tags"}
    return {
        "datastoreId": datastore.id,
        "datastoreName": datastore.name,
        "datastoreStatus": datastore.status,
        "datastoreArn": store.arn(datastore.id),
        "createdAt": datastore.created_at,
        "updatedAt": datastore.updated_at,
        "losslessStorageFormat": "HTJ2K",
        **options,
    }


def get_image_set(
    store: ImageSetStore,
    *,
    datastoreId: str,
    imageSetId: str,
    versionId: str | None = None,
) -> dict[str, Any]:
    """GetImageSet."""
    image_set = store.image_set(datastoreId, imageSetId, int(versionId) if versionId else None)
    properties = {
        "datastoreId": image_set.datastore_id,
        "imageSetId": image_set.id,
        "versionId": str(image_set.version),
        "imageSetState": image_set.state,
        "imageSetWorkflowStatus": image_set.workflow_status,
        "imageSetArn": store.arn(image_set.datastore_id, image_set.id),
        "isPrimary": image_set.is_primary,
        "createdAt": image_set.created_at,
        "updatedAt": image_set.updated_at,
        "deletedAt": image_set.deleted_at,
    }
    return {name: value for name, value in properties.items() if value is not None}


def get_image_set_metadata(
    store: ImageSetStore,
    *,
    datastoreId: str,
    imageSetId: str,
    versionId: str | None = None,
) -> bytes:
    """GetImageSetMetadata: the JSON document, compressed."""
    image_set = store.image_set(datastoreId, imageSetId, int(versionId) if versionId else None)
    if image_set.state == "DELETED":
        raise imagesets.NotFound("the image set is deleted")
    from deploy.local import metadata  # noqa: PLC0415 - pydicom would be a fifth of the start-up time

    document = metadata.document(image_set, store.instances(image_set))
    return gzip.compress(json.dumps(document).encode(), mtime=0)


def delete_image_set(store: ImageSetStore, *, datastoreId: str, imageSetId: str) -> dict[str, Any]:
    """DeleteImageSet."""
    store.delete_image_set(datastoreId, imageSetId)
    # AWS answers before it has finished, so this is what its clients expect to read; GetImageSet says DELETED at once.
    return {
        "datastoreId": datastoreId,
        "imageSetId": imageSetId,
        "imageSetState": "LOCKED",
        "imageSetWorkflowStatus": "DELETING",
    }


def search_image_sets(
    store: ImageSetStore,
    *,
    datastoreId: str,
    searchCriteria: dict[str, Any] | None = None,
    maxResults: int = DEFAULT_PAGE,
    nextToken: str | None = None,
) -> dict[str, Any]:
    """SearchImageSets: all filters must hold; newest update first unless another order is asked for."""
    criteria = searchCriteria or {}
    matches = [_matcher(search_filter) for search_filter in criteria.get("filters", [])]
    sort = criteria.get("sort") or {"sortField": "updatedAt", "sortOrder": "DESC"}
    found = [item for item in store.image_sets(datastoreId) if all(matches_filter(item) for matches_filter in matches)]
    found.sort(key=SEARCHABLE[sort["sortField"]], reverse=sort["sortOrder"] == "DESC")
    page, following = _page(found, nextToken, maxResults)
    return {"imageSetsMetadataSummaries": [_summary(store, item) for item in page], "sort": sort, **following}


def _text(tag: str) -> Callable[[ImageSet], Any]:
    return lambda image_set: imagesets.text_of(image_set.summary, tag)


def _study_moment(image_set: ImageSet) -> tuple[str, str]:
    return imagesets.text_of(image_set.summary, "00080020"), imagesets.text_of(image_set.summary, "00080030")


SEARCHABLE: dict[str, Callable[[ImageSet], Any]] = {
    "DICOMPatientId": _text("00100020"),
    "DICOMAccessionNumber": _text("00080050"),
    "DICOMStudyId": _text("00200010"),
    "DICOMStudyInstanceUID": _text("0020000D"),
    "DICOMSeriesInstanceUID": _text("0020000E"),
    "createdAt": lambda image_set: image_set.created_at,
    "updatedAt": lambda image_set: image_set.updated_at,
    "DICOMStudyDateAndTime": _study_moment,
    "isPrimary": lambda image_set: image_set.is_primary,
}
RANGES = {"createdAt", "updatedAt", "DICOMStudyDateAndTime"}
"""The only attributes that BETWEEN is allowed for."""


def _matcher(search_filter: dict[str, Any]) -> Callable[[ImageSet], bool]:
    """Return a filter's predicate. Raises a ValidationException for a combination that has no meaning."""
    names = {name for value in search_filter["values"] for name in value if value[name] is not None}
    bounds = [_bounds(value) for value in search_filter["values"]]
    if len(names) != 1:
        raise ApiError("ValidationException", "the values of a filter are not of one attribute")
    name = names.pop()
    read = SEARCHABLE[name]
    if search_filter["operator"] == "EQUAL":
        if len(bounds) != 1:
            raise ApiError("ValidationException", "EQUAL takes exactly one value")
        lowest, highest = bounds[0]
    else:
        if len(bounds) != 2 or name not in RANGES:  # noqa: PLR2004 - from and to
            raise ApiError("ValidationException", f"BETWEEN takes two values of {', '.join(sorted(RANGES))}")
        lowest, highest = bounds[0][0], bounds[1][1]
        if highest < lowest:
            raise ApiError("ValidationException", "the second value of BETWEEN is before the first")
    return lambda image_set: bool(lowest <= read(image_set) <= highest)


def _bounds(value: dict[str, Any]) -> tuple[Any, Any]:
    """Return the lowest and highest attribute value that a search value stands for."""
    name, wanted = next(iter(value.items()))
    if name == "DICOMStudyDateAndTime":
        date, moment = wanted["DICOMStudyDate"], wanted.get("DICOMStudyTime")
        # A date without a time is the whole day; "~" sorts after every digit.
        return (date, moment or ""), (date, moment or "~")
    if name in {"createdAt", "updatedAt"}:
        # Clients send whole seconds where they send numbers.
        moment = seconds_of(wanted) or 0.0
        return moment, moment + (0.999999 if moment.is_integer() else 0.0)
    return wanted, wanted


def _summary(store: ImageSetStore, image_set: ImageSet) -> dict[str, Any]:
    tags: dict[str, Any] = {
        name: imagesets.text_of(image_set.summary, tag)
        for name, tag in SUMMARY_NAMES.items()
        if tag in image_set.summary
    }
    if "DICOMSeriesNumber" in tags:
        number = tags.pop("DICOMSeriesNumber")
        tags |= {"DICOMSeriesNumber": int(number)} if re.fullmatch(r"[+-]?\d+", number) else {}
    # An image set holds one series.
    tags |= {
        "DICOMNumberOfStudyRelatedSeries": 1,
        "DICOMNumberOfStudyRelatedInstances": store.count_instances(image_set),
    }
    return {
        "imageSetId": image_set.id,
        "version": image_set.version,
        "createdAt": image_set.created_at,
        "updatedAt": image_set.updated_at,
        "isPrimary": image_set.is_primary,
        "DICOMTags": tags,
    }


SUMMARY_NAMES = {
    "DICOMPatientId": "00100020",
    "DICOMPatientName": "00100010",
    "DICOMPatientBirthDate": "00100030",
    "DICOMPatientSex": "00100040",
    "DICOMStudyInstanceUID": "0020000D",
    "DICOMStudyId": "00200010",
    "DICOMStudyDescription": "00081030",
    "DICOMAccessionNumber": "00080050",
    "DICOMSeriesInstanceUID": "0020000E",
    "DICOMSeriesModality": "00080060",
    "DICOMSeriesBodyPart": "00180015",
    "DICOMSeriesNumber": "00200011",
    "DICOMStudyDate": "00080020",
    "DICOMStudyTime": "00080030",
}


OPERATIONS: dict[str, Callable[..., dict[str, Any] | bytes]] = {
    "CreateDatastore": create_datastore,
    "GetDatastore": get_datastore,
    "ListDatastores": list_datastores,
    "DeleteDatastore": delete_datastore,
    "SearchImageSets": search_image_sets,
    "GetImageSet": get_image_set,
    "GetImageSetMetadata": get_image_set_metadata,
    "DeleteImageSet": delete_image_set,
}


def start_dicom_import_job(
    jobs: ImportJobs,
    *,
    clientToken: str,
    datastoreId: str,
    dataAccessRoleArn: str,
    inputS3Uri: str,
    outputS3Uri: str,
    jobName: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """StartDICOMImportJob, of DICOM files."""
    if options:
        raise ApiError("ValidationException", f"not implemented by the local AWS: {', '.join(sorted(options))}")
    told = jobs.start(clientToken, jobName, datastoreId, dataAccessRoleArn, (inputS3Uri, outputS3Uri))
    return {name: told[name] for name in ("datastoreId", "jobId", "jobStatus", "submittedAt")}


def get_dicom_import_job(jobs: ImportJobs, *, datastoreId: str, jobId: str) -> dict[str, Any]:
    """GetDICOMImportJob."""
    return {"jobProperties": jobs.get(datastoreId, jobId).properties()}


def list_dicom_import_jobs(
    jobs: ImportJobs,
    *,
    datastoreId: str,
    jobStatus: str | None = None,
    nextToken: str | None = None,
    maxResults: int = DEFAULT_PAGE,
) -> dict[str, Any]:
    """ListDICOMImportJobs, newest first."""
    summaries = [job.summary() for job in jobs.of(datastoreId, jobStatus)]
    page, following = _page(summaries, nextToken, maxResults)
    return {"jobSummaries": page, **following}


IMPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "StartDICOMImportJob": start_dicom_import_job,
    "GetDICOMImportJob": get_dicom_import_job,
    "ListDICOMImportJobs": list_dicom_import_jobs,
}


def _page(items: list[Any], token: str | None, size: int) -> tuple[list[Any], dict[str, str]]:
    """Return one page of `items` and the token of the next, which is the position where it starts."""
    try:
        start = int(token or 0)
    except ValueError as error:
        raise ApiError("ValidationException", "nextToken is not one that was given out") from error
    end = start + size
    return items[start:end], ({"nextToken": str(end)} if end < len(items) else {})
