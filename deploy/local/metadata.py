"""An image set's metadata as HealthImaging writes it: DICOM by keyword, nested patient, study, series, instance.

Source: AWS HealthImaging developer guide, "Getting image set metadata". The list of image frames is left out: frames
are not served here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pydicom.datadict import keyword_for_tag

from deploy.local.imagesets import ImageSet, Instance

SCHEMA_VERSION = "1.1"
PATIENT_KEYWORDS = frozenset(
    [
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "TypeOfPatientID",
        "PatientBirthDate",
        "PatientBirthTime",
        "PatientSex",
        "OtherPatientIDs",
        "OtherPatientNames",
        "OtherPatientIDsSequence",
        "EthnicGroup",
        "PatientComments",
        "PatientSpeciesDescription",
        "ResponsiblePerson",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
    ]
)
STUDY_KEYWORDS = frozenset(
    [
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "ReferringPhysicianName",
        "StudyID",
        "AccessionNumber",
        "IssuerOfAccessionNumberSequence",
        "StudyDescription",
        "PhysiciansOfRecord",
        "NameOfPhysiciansReadingStudy",
        "ReferencedStudySequence",
        "ProcedureCodeSequence",
        "AdmittingDiagnosesDescription",
        "PatientAge",
        "PatientSize",
        "PatientWeight",
        "Occupation",
        "AdditionalPatientHistory",
        "PregnancyStatus",
        "MedicalAlerts",
        "Allergies",
    ]
)
SERIES_KEYWORDS = frozenset(
    [
        "SeriesInstanceUID",
        "Modality",
        "SeriesNumber",
        "SeriesDate",
        "SeriesTime",
        "SeriesDescription",
        "Laterality",
        "BodyPartExamined",
        "PatientPosition",
        "ProtocolName",
        "OperatorsName",
        "PerformingPhysicianName",
        "SeriesDescriptionCodeSequence",
        "ReferencedPerformedProcedureStepSequence",
        "RequestAttributesSequence",
        "PerformedProcedureStepID",
        "PerformedProcedureStepStartDate",
        "PerformedProcedureStepStartTime",
        "PerformedProcedureStepDescription",
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
        "Manufacturer",
        "InstitutionName",
        "InstitutionAddress",
        "StationName",
        "InstitutionalDepartmentName",
        "ManufacturerModelName",
        "DeviceSerialNumber",
        "SoftwareVersions",
        "SpatialResolution",
        "DateOfLastCalibration",
    ]
)
HIGHER_LEVELS = PATIENT_KEYWORDS | STUDY_KEYWORDS | SERIES_KEYWORDS


def document(image_set: ImageSet, instances: Sequence[Instance]) -> dict[str, Any]:
    """Return the metadata document; patient, study and series are told by the first instance."""
    first = by_keyword(instances[0].attributes) if instances else {}
    series = {
        "DICOM": _only(first, SERIES_KEYWORDS),
        "Instances": {instance.sop_instance_uid: _instance(instance) for instance in instances},
    }
    return {
        "SchemaVersion": SCHEMA_VERSION,
        "DatastoreID": image_set.datastore_id,
        "ImageSetID": image_set.id,
        "Patient": {"DICOM": _only(first, PATIENT_KEYWORDS)},
        "Study": {"DICOM": _only(first, STUDY_KEYWORDS), "Series": {image_set.series_uid: series}},
    }


def _instance(instance: Instance) -> dict[str, Any]:
    values = by_keyword(instance.attributes)
    unnamed = {tag: element["vr"] for tag, element in instance.attributes.items() if not keyword_for_tag(tag)}
    return {
        "DICOM": {name: value for name, value in values.items() if name not in HIGHER_LEVELS},
        "DICOMVRs": unnamed,
        "StoredTransferSyntaxUID": instance.transfer_syntax_uid,
    }


def by_keyword(attributes: dict[str, Any]) -> dict[str, Any]:
    """Turn the DICOM JSON model into keyword and value; a private attribute keeps its tag as its name."""
    return {keyword_for_tag(tag) or tag: _value(element) for tag, element in attributes.items()}


def _value(element: dict[str, Any]) -> Any:
    if "InlineBinary" in element:
        return element["InlineBinary"]
    values = element.get("Value", [])
    if element["vr"] == "SQ":
        return [by_keyword(item) for item in values]
    if element["vr"] == "PN":
        values = [_name(value) for value in values]
    if len(values) > 1:
        return values
    return values[0] if values else None


def _name(value: Any) -> Any:
    # The three groups of a person name are alphabetic, ideographic and phonetic, joined as the value itself is.
    if not isinstance(value, dict):
        return value
    return "=".join(value.get(group, "") for group in ("Alphabetic", "Ideographic", "Phonetic")).rstrip("=")


def _only(values: dict[str, Any], keywords: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in keywords}
