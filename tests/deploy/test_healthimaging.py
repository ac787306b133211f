"""AWS HealthImaging on this machine, through boto3 (which checks answers against its model) and DICOMweb by urllib."""

# ruff: noqa: S310 - every URL opened here is the local endpoint's

import gzip
import json
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import botocore.session
import pytest
from botocore.exceptions import ClientError

BOUNDARY = "a-boundary"
JSON = {"Accept": "application/dicom+json"}


class Archive:
    """A data store of the test's own, spoken to by hand."""

    def __init__(self, aws, imaging, datastore_id):
        self.imaging = imaging
        self.id = datastore_id
        self.url = f"{aws.endpoint_url}/datastore/{datastore_id}"

    def http(self, path, body=None, headers=None):
        """Return status, headers and body, also of an error."""
        request = urllib.request.Request(f"{self.url}/{path}", body, headers or JSON)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def stow(self, *instances, path="studies", part_type="application/dicom"):
        """Store instances in one request; return status and the parsed answer."""
        head = f"--{BOUNDARY}\r\nContent-Type: {part_type}\r\n\r\n".encode()
        body = b"".join(head + instance + b"\r\n" for instance in instances) + f"--{BOUNDARY}--\r\n".encode()
        content_type = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
        status, _, answer = self.http(path, body, {"Content-Type": content_type, **JSON})
        return status, json.loads(answer)

    def qido(self, path):
        """Search; return the list of matches."""
        status, _, answer = self.http(path)
        assert status in {200, 204}
        return json.loads(answer) if answer else []

    def image_sets(self, **criteria):
        """Return the summaries that SearchImageSets finds."""
        extra = {"searchCriteria": criteria} if criteria else {}
        return self.imaging.search_image_sets(datastoreId=self.id, **extra)["imageSetsMetadataSummaries"]

    def metadata(self, image_set_id, **version):
        """Return the metadata document of an image set."""
        answer = self.imaging.get_image_set_metadata(datastoreId=self.id, imageSetId=image_set_id, **version)
        assert answer["contentEncoding"] == "gzip"
        return json.loads(gzip.decompress(answer["imageSetMetadataBlob"].read()))


@pytest.fixture
def archive(local_aws, aws_client):
    imaging = aws_client("medical-imaging")
    return Archive(local_aws, imaging, imaging.create_datastore(datastoreName="test")["datastoreId"])


def values(dataset, tag):
    return dataset[tag]["Value"]


@pytest.fixture
def uid():
    """Make a new UID."""
    return lambda: f"2.25.{uuid.uuid4().int}"


# Data stores.


def test_a_datastore_is_active_and_listed_until_it_is_deleted(archive):
    """Create, get, list and delete agree with each other, page by page."""
    imaging = archive.imaging
    pages = imaging.get_paginator("list_datastores").paginate(
        datastoreStatus="ACTIVE", PaginationConfig={"PageSize": 1}
    )
    listed = [summary["datastoreId"] for page in pages for summary in page["datastoreSummaries"]]
    properties = imaging.get_datastore(datastoreId=archive.id)["datastoreProperties"]
    imaging.delete_datastore(datastoreId=archive.id)

    assert archive.id in listed
    assert len(listed) == len(set(listed)) >= 2
    assert properties["datastoreArn"].endswith(f":datastore/{archive.id}")
    assert imaging.get_datastore(datastoreId=archive.id)["datastoreProperties"]["datastoreStatus"] == "DELETED"
    assert archive.http("studies")[0] == 404


def test_creating_with_the_same_client_token_makes_one_datastore(archive):
    """CreateDatastore is idempotent by its token."""
    token = uuid.uuid4().hex
    first, second = (archive.imaging.create_datastore(clientToken=token)["datastoreId"] for _ in range(2))

    assert first == second


def test_a_datastore_with_image_sets_is_not_deleted(archive, dicom_bytes):
    """DeleteDatastore answers ConflictException until the data store is empty."""
    archive.stow(dicom_bytes())
    with pytest.raises(archive.imaging.exceptions.ConflictException):
        archive.imaging.delete_datastore(datastoreId=archive.id)
    (image_set,) = archive.image_sets()
    archive.imaging.delete_image_set(datastoreId=archive.id, imageSetId=image_set["imageSetId"])

    assert archive.imaging.delete_datastore(datastoreId=archive.id)["datastoreStatus"] == "DELETING"


# Image sets.


def test_a_series_is_one_primary_image_set(archive, dicom_bytes, uid):
    """Instances of two series, in two requests, become two image sets that hold all of them."""
    study, first, second = uid(), uid(), uid()
    archive.stow(*(dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=first) for _ in range(2)))
    archive.stow(
        dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=first),
        dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=second),
    )
    sets = {item["DICOMTags"]["DICOMSeriesInstanceUID"]: item for item in archive.image_sets()}

    assert all(item["isPrimary"] for item in sets.values())
    assert sets[first]["DICOMTags"]["DICOMNumberOfStudyRelatedInstances"] == 3
    assert sets[first]["version"] == 2
    assert sets[second]["version"] == 1


def test_the_metadata_nest_patient_study_series_and_instances(archive, dicom_bytes, uid):
    """GetImageSetMetadata is compressed JSON in HealthImaging's layout, without pixel data."""
    sop = uid()
    archive.stow(dicom_bytes(SOPInstanceUID=sop, SliceThickness=2.5, ImageType=["ORIGINAL", "PRIMARY"]))
    (image_set,) = archive.image_sets()
    document = archive.metadata(image_set["imageSetId"])
    ((series_uid, series),) = document["Study"]["Series"].items()
    instance = series["Instances"][sop]["DICOM"]

    assert document["DatastoreID"] == archive.id
    assert document["ImageSetID"] == image_set["imageSetId"]
    assert document["Patient"]["DICOM"]["PatientName"] == "Made^Up"
    assert document["Study"]["DICOM"]["StudyDate"] == "20260102"
    assert series["DICOM"]["SeriesInstanceUID"] == series_uid
    assert instance["SliceThickness"] == 2.5
    assert instance["ImageType"] == ["ORIGINAL", "PRIMARY"]
    assert "PixelData" not in instance


def test_storing_the_same_instance_again_changes_nothing(archive, dicom_bytes):
    """The same bytes twice succeed twice, and the image set stays at version 1."""
    instance = dicom_bytes()
    statuses = [archive.stow(instance)[0], archive.stow(instance, instance)[0]]
    (image_set,) = archive.image_sets()

    assert statuses == [200, 200]
    assert image_set["version"] == 1
    assert image_set["DICOMTags"]["DICOMNumberOfStudyRelatedInstances"] == 1


def test_other_bytes_of_an_instance_make_a_new_version(archive, dicom_bytes, uid):
    """A repeated SOP instance replaces the first; the older version still tells what it was."""
    same = {key: uid() for key in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    first, second = dicom_bytes(**same, ImageComments="one"), dicom_bytes(**same, ImageComments="two")
    archive.stow(first)
    archive.stow(second)
    (image_set,) = archive.image_sets()
    key = image_set["imageSetId"]

    def comment(**version):
        document = archive.metadata(key, **version)
        return document["Study"]["Series"][same["SeriesInstanceUID"]]["Instances"][same["SOPInstanceUID"]]["DICOM"][
            "ImageComments"
        ]

    now = archive.imaging.get_image_set(datastoreId=archive.id, imageSetId=key)
    then = archive.imaging.get_image_set(datastoreId=archive.id, imageSetId=key, versionId="1")
    assert (now["versionId"], then["versionId"]) == ("2", "1")
    assert (now["imageSetWorkflowStatus"], then["imageSetWorkflowStatus"]) == ("UPDATED", "CREATED")
    assert (comment(), comment(versionId="1")) == ("two", "one")
    with pytest.raises(archive.imaging.exceptions.ResourceNotFoundException):
        comment(versionId="3")


@pytest.mark.parametrize(
    "conflict", [{"PatientID": "P-2"}, {"StudyDate": "20260103"}, {"AccessionNumber": "A-2"}, {"StudyID": "S-2"}]
)
def test_conflicting_attributes_make_a_non_primary_image_set(archive, dicom_bytes, uid, conflict):
    """What disagrees with the study's first instance is kept apart, and DICOMweb search never shows it."""
    study, sop = uid(), uid()
    archive.stow(dicom_bytes(StudyInstanceUID=study))
    status, _ = archive.stow(dicom_bytes(StudyInstanceUID=study, SOPInstanceUID=sop, **conflict))
    primary = {item["isPrimary"]: item["imageSetId"] for item in archive.image_sets()}
    (found,) = archive.qido(f"studies?StudyInstanceUID={study}")

    assert status == 200
    assert set(primary) == {True, False}
    assert not archive.imaging.get_image_set(datastoreId=archive.id, imageSetId=primary[False])["isPrimary"]
    assert values(found, "00201208") == [1]
    assert archive.qido(f"instances?SOPInstanceUID={sop}") == []


def test_a_series_under_another_study_makes_a_non_primary_image_set(archive, dicom_bytes, uid):
    """The StudyInstanceUID is one of the attributes that a series must agree on."""
    series, other_study = uid(), uid()
    archive.stow(dicom_bytes(SeriesInstanceUID=series))
    archive.stow(dicom_bytes(SeriesInstanceUID=series, StudyInstanceUID=other_study))

    assert sorted(item["isPrimary"] for item in archive.image_sets()) == [False, True]
    assert archive.qido(f"studies?StudyInstanceUID={other_study}") == []


def test_a_deleted_image_set_is_gone(archive, dicom_bytes, uid):
    """After DeleteImageSet nothing finds it, its state is DELETED, and deleting again is a conflict."""
    study = uid()
    archive.stow(dicom_bytes(StudyInstanceUID=study))
    (image_set,) = archive.image_sets()
    key = {"datastoreId": archive.id, "imageSetId": image_set["imageSetId"]}
    archive.imaging.delete_image_set(**key)

    assert archive.image_sets() == []
    assert archive.qido("studies") == []
    assert archive.imaging.get_image_set(**key)["imageSetState"] == "DELETED"
    with pytest.raises(archive.imaging.exceptions.ResourceNotFoundException):
        archive.imaging.get_image_set_metadata(**key)
    with pytest.raises(archive.imaging.exceptions.ConflictException):
        archive.imaging.delete_image_set(**key)


def test_concurrent_stores_of_one_series_end_in_one_image_set(archive, dicom_bytes, uid):
    """Eight clients that store instances of a new series at the same time meet in one primary image set."""
    study, series = uid(), uid()
    instances = [dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda instance: archive.stow(instance)[0], instances))
    (image_set,) = archive.image_sets()

    assert statuses == [200] * 8
    assert image_set["version"] == 8
    assert len(archive.qido(f"studies/{study}/series/{series}/instances")) == 8


# SearchImageSets.


def _equal(**attribute):
    return {"filters": [{"operator": "EQUAL", "values": [attribute]}]}


def test_search_image_sets_filters_by_each_attribute(archive, dicom_bytes, uid):
    """EQUAL finds by each searchable DICOM attribute, and by nothing else."""
    study, series = uid(), uid()
    archive.stow(
        dicom_bytes(
            StudyInstanceUID=study, SeriesInstanceUID=series, PatientID="me", AccessionNumber="acc", StudyID="id"
        )
    )
    archive.stow(dicom_bytes())
    wanted = {
        "DICOMPatientId": "me",
        "DICOMAccessionNumber": "acc",
        "DICOMStudyId": "id",
        "DICOMStudyInstanceUID": study,
        "DICOMSeriesInstanceUID": series,
    }
    for name, value in wanted.items():
        (found,) = archive.image_sets(**_equal(**{name: value}))
        assert found["DICOMTags"]["DICOMStudyInstanceUID"] == study

    assert archive.image_sets(**_equal(DICOMPatientId="nobody")) == []
    assert len(archive.image_sets(**_equal(isPrimary=True))) == 2


def test_search_image_sets_between_times(archive, dicom_bytes):
    """BETWEEN includes both ends, for the time of the study and for the time of the image set."""
    for date in ("20250101", "20250102", "20250103"):
        archive.stow(dicom_bytes(StudyDate=date))
    dates = [{"DICOMStudyDateAndTime": {"DICOMStudyDate": date}} for date in ("20250101", "20250102")]
    now = datetime.now(UTC)
    past = [{"createdAt": now - timedelta(days=2)}, {"createdAt": now - timedelta(days=1)}]
    recent = [{"createdAt": now - timedelta(days=1)}, {"createdAt": now + timedelta(days=1)}]

    def count(bounds):
        return len(archive.image_sets(filters=[{"operator": "BETWEEN", "values": bounds}]))

    assert [count(dates), count(past), count(recent)] == [2, 0, 3]


def test_search_image_sets_sorts_and_pages(archive, dicom_bytes):
    """The pages together are the whole, in the order that was asked for."""
    days = ["20250103", "20250101", "20250102"]
    for date in days:
        archive.stow(dicom_bytes(StudyDate=date))
    sort = {"sortField": "DICOMStudyDateAndTime", "sortOrder": "ASC"}
    pages = archive.imaging.get_paginator("search_image_sets").paginate(
        datastoreId=archive.id, searchCriteria={"sort": sort}, PaginationConfig={"PageSize": 1}
    )
    found = [item["DICOMTags"]["DICOMStudyDate"] for page in pages for item in page["imageSetsMetadataSummaries"]]

    assert found == sorted(days)
    assert [item["DICOMTags"]["DICOMStudyDate"] for item in archive.image_sets()] == days[::-1]


# Errors.


@pytest.mark.parametrize(
    "filters",
    [
        [{"operator": "BETWEEN", "values": [{"DICOMPatientId": "a"}, {"DICOMPatientId": "b"}]}],
        [{"operator": "EQUAL", "values": [{"DICOMPatientId": "a"}, {"DICOMPatientId": "b"}]}],
        [{"operator": "LIKE", "values": [{"DICOMPatientId": "a"}]}],
        [{"operator": "EQUAL", "values": [{"DICOMStudyInstanceUID": "no uid"}]}],
    ],
)
def test_a_search_that_breaks_the_model_is_refused_without_an_echo(archive, filters):
    """ValidationException names the place and never the value."""
    with pytest.raises(archive.imaging.exceptions.ValidationException) as caught:
        archive.image_sets(filters=filters)

    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert "no uid" not in str(caught.value)


def test_unknown_identifiers_are_not_found(archive):
    """Data stores and image sets that are not there answer ResourceNotFoundException."""
    for call in (
        lambda: archive.imaging.get_datastore(datastoreId="0" * 32),
        lambda: archive.imaging.get_image_set(datastoreId=archive.id, imageSetId="0" * 32),
        lambda: archive.imaging.search_image_sets(datastoreId="0" * 32),
    ):
        with pytest.raises(archive.imaging.exceptions.ResourceNotFoundException) as caught:
            call()
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 404


def test_a_malformed_identifier_is_invalid(archive):
    """The model's patterns are checked."""
    with pytest.raises(archive.imaging.exceptions.ValidationException):
        archive.imaging.get_datastore(datastoreId="not-an-id")


SERVED = {
    "CreateDatastore",
    "GetDatastore",
    "ListDatastores",
    "DeleteDatastore",
    "SearchImageSets",
    "GetImageSet",
    "GetImageSetMetadata",
    "DeleteImageSet",
    "StartDICOMImportJob",
    "GetDICOMImportJob",
    "ListDICOMImportJobs",
}
MODEL = botocore.session.get_session().get_service_model("medical-imaging")
SAMPLES = {
    "datastoreId": "0" * 32,
    "sourceImageSetId": "0" * 32,
    "imageSetId": "0" * 32,
    "jobId": "0",
    "resourceArn": f"arn:aws:medical-imaging:us-east-1:123456789012:datastore/{'0' * 32}",
    "copyImageSetInformation": {"sourceImageSet": {"latestVersionId": "1"}},
    "imageFrameInformation": {"imageFrameId": "0" * 32},
    "dataAccessRoleArn": "arn:aws:iam::123456789012:role/importer",
    "inputS3Uri": "s3://radqueue/in/",
    "outputS3Uri": "s3://radqueue/out/",
    "tags": {"key": "value"},
    "tagKeys": ["key"],
    "latestVersionId": "1",
    "updateImageSetMetadataUpdates": {"revertToVersionId": "1"},
}


@pytest.mark.parametrize("operation", sorted(set(MODEL.operation_names) - SERVED))
def test_what_is_not_implemented_says_so_by_name(archive, operation):
    """Every other operation of the model answers 501 with its name."""
    required = MODEL.operation_model(operation).input_shape.required_members
    parameters = {name: SAMPLES[name] for name in required if name in SAMPLES}
    with pytest.raises(ClientError) as caught:
        archive.imaging._make_api_call(operation, parameters)

    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 501
    assert operation in caught.value.response["Error"]["Message"]


# DICOMweb, by hand.


def test_a_store_answers_with_what_was_referenced(archive, dicom_bytes, uid):
    """The answer names each stored instance by class and UID, and where to retrieve it."""
    study, series, sop = uid(), uid(), uid()
    instance = dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop)
    status, answer = archive.stow(instance)
    (item,) = values(answer, "00081199")
    retrieved = urllib.request.Request(values(item, "00081190")[0], headers={"Accept": "application/dicom"})
    with urllib.request.urlopen(retrieved) as response:
        content = response.read()

    assert status == 200
    assert values(item, "00081155") == [sop]
    assert values(item, "00081150") == ["1.2.840.10008.5.1.4.1.1.2"]
    assert content == instance


def test_a_store_with_unreadable_parts_is_partly_done(archive, dicom_bytes):
    """Good instances are stored (202); with none, nothing is (409); the reason is `cannot understand`."""
    mixed, answer = archive.stow(dicom_bytes(), b"not DICOM")
    none, refused = archive.stow(b"not DICOM")

    assert (mixed, none) == (202, 409)
    assert len(values(answer, "00081199")) == 1
    assert values(values(answer, "0008119A")[0], "00081197") == [0xC000]
    assert "00081199" not in refused
    assert len(archive.image_sets()) == 1


def test_a_part_of_another_media_type_is_refused(archive, dicom_bytes, local_aws):
    """What is not declared to be DICOM is not stored, and no upload stays behind."""
    status, answer = archive.stow(dicom_bytes(), part_type="text/plain")

    assert status == 409
    assert values(values(answer, "0008119A")[0], "00081197") == [0xC000]
    assert list((local_aws.directory / "healthimaging" / "incoming").iterdir()) == []


def test_a_store_to_another_study_is_refused(archive, dicom_bytes, uid):
    """`/studies/{uid}` takes that study's instances alone."""
    study, sop = uid(), uid()
    right, _ = archive.stow(dicom_bytes(StudyInstanceUID=study), path=f"studies/{study}")
    wrong, answer = archive.stow(dicom_bytes(SOPInstanceUID=sop), path=f"studies/{study}")
    (failed,) = values(answer, "00081198")

    assert (right, wrong) == (200, 409)
    assert values(failed, "00081155") == [sop]
    assert values(failed, "00081197") == [0xA900]


def test_a_single_part_body_is_stored_too(archive, dicom_bytes):
    """`Content-Type: application/dicom` carries one instance without multipart framing."""
    status, _, _ = archive.http("studies", dicom_bytes(), {"Content-Type": "application/dicom", **JSON})

    assert status == 200
    assert len(archive.image_sets()) == 1


def test_a_boundary_within_the_pixels_does_not_split_an_instance(archive, dicom_bytes, uid):
    """Line ends, hyphens and the boundary's beginning inside an instance are content."""
    study, series, sop = uid(), uid(), uid()
    tricky = f"\r\n\r\n--{BOUNDARY[:-1]}\r\n--\r\n".encode().ljust(128, b"-")
    instance = dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop, PixelData=tricky)
    archive.stow(instance)
    path = f"studies/{study}/series/{series}/instances/{sop}"
    _, headers, content = archive.http(path, headers={"Accept": 'multipart/related; type="application/dicom"'})
    boundary = headers["Content-Type"].rpartition("boundary=")[2].encode()

    assert content.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n--" + boundary + b"--\r\n") == instance


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/json", b"{}", 415),
        ('multipart/related; type="application/dicom"', b"", 400),
        ('multipart/related; type="application/dicom"; boundary=x', b"--x--\r\n", 400),
        ('multipart/related; type="application/dicom"; boundary=x', b"--x\r\n\r\ncut off", 400),
    ],
)
def test_a_body_that_is_no_store_request_is_refused(archive, content_type, body, expected):
    """Wrong media types and broken framing have their own statuses, and leave nothing behind."""
    status, _, _ = archive.http("studies", body, {"Content-Type": content_type})

    assert status == expected
    assert archive.image_sets() == []


def test_searches_tell_and_filter_by_level(archive, dicom_bytes, uid):
    """Studies, series and instances are found by UID, name, date range and modality, and counted."""
    study, ct, mr = uid(), uid(), uid()
    for number in (1, 2):
        archive.stow(dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=ct, InstanceNumber=number))
    archive.stow(dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=mr, Modality="MR"))
    archive.stow(dicom_bytes(PatientName="Other^One", StudyDate="20200101"))
    (found,) = archive.qido("studies?PatientName=made*&StudyDate=20260101-20261231")

    assert values(found, "0020000D") == [study]
    assert values(found, "00080061") == ["CT", "MR"]
    assert (values(found, "00201206"), values(found, "00201208")) == ([2], [3])
    assert len(archive.qido("studies")) == 2
    assert len(archive.qido("studies?limit=1&offset=1")) == 1
    assert values(archive.qido(f"studies/{study}/series?Modality=MR")[0], "0020000E") == [mr]
    assert [values(i, "00200013") for i in archive.qido(f"studies/{study}/series/{ct}/instances")] == [[1], [2]]
    assert len(archive.qido(f"instances?SeriesInstanceUID={ct},{mr}")) == 3
    assert "00180050" not in archive.qido(f"studies/{study}/instances")[0]
    assert archive.http("studies?NoSuchKeyword=1")[0] == 400


def test_an_instance_is_not_transcoded(archive, dicom_bytes, uid):
    """Another transfer syntax than the stored one is not acceptable (406); an unknown instance is not found."""
    study, series, sop = uid(), uid(), uid()
    archive.stow(dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop))
    path = f"studies/{study}/series/{series}/instances"
    jpeg = {"Accept": "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.50"}

    assert archive.http(f"{path}/{sop}", headers=jpeg)[0] == 406
    assert archive.http(f"{path}/1.2.3", headers={"Accept": "application/dicom"})[0] == 404


def test_an_instance_of_a_non_primary_image_set_is_retrieved_by_its_id(archive, dicom_bytes, uid):
    """`imageSetId` reaches what DICOMweb otherwise hides."""
    study, series, sop = uid(), uid(), uid()
    hidden = dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop, PatientID="P-2")
    archive.stow(dicom_bytes(StudyInstanceUID=study))
    archive.stow(hidden)
    (image_set,) = archive.image_sets(**_equal(isPrimary=False))
    path, accept = f"studies/{study}/series/{series}/instances/{sop}", {"Accept": "application/dicom"}

    assert archive.http(path, headers=accept)[0] == 404
    assert archive.http(f"{path}?imageSetId={image_set['imageSetId']}", headers=accept)[2] == hidden


def test_frames_are_not_implemented_and_say_so(archive):
    """A DICOMweb transaction that is not served answers 501."""
    status, _, _ = archive.http("studies/1/series/2/instances/3/frames/1")

    assert status == 501


# The disk.


def test_a_restart_finds_everything(start_aws, aws_client, dicom_bytes, uid, tmp_path):
    """A new process on the same folder has the same data store, image sets and instances, and no leftovers."""
    study, series, sop = uid(), uid(), uid()
    instance = dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop)
    first = start_aws(tmp_path)
    before = Archive(first, aws_client("medical-imaging", first), first.datastore_id)
    before.stow(instance, b"not DICOM")
    (image_set,) = before.image_sets()
    leftovers = list((tmp_path / "healthimaging" / "incoming").iterdir())
    first.process.kill()
    first.stop()
    second = start_aws(tmp_path)
    after = Archive(second, aws_client("medical-imaging", second), second.datastore_id)
    path = f"studies/{study}/series/{series}/instances/{sop}"

    assert leftovers == []
    assert second.datastore_id == first.datastore_id
    assert after.image_sets() == [image_set]
    assert after.http(path, headers={"Accept": "application/dicom"})[2] == instance
