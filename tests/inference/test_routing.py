from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.inference import routing
from services.inference.routing import Route, read
from services.inference.settings import InferenceSettings
from shared.config import Misconfigured
from shared.documents.revisions import Revision, StoredInstance
from shared.messages import Geometry


def revision(n_instances=3, geometry=None, **attributes):
    instances = tuple(
        StoredInstance(sop_instance_uid=f"1.{index}", sha="0" * 16, key=f"k{index}") for index in range(n_instances)
    )
    return Revision(
        dataset="d",
        study_uid="1.2",
        series_uid="1.3",
        digest="a" * 32,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        instances=instances,
        attributes=attributes,
        geometry=geometry,
    )


def takes(condition, **attributes):
    (keyword,) = [*(key for key in attributes if key != "n_instances"), "n_instances"][:1]
    return Route(name="m", source="m", when={keyword: condition}).takes(revision(**attributes))


@pytest.mark.parametrize(
    ("condition", "attributes"),
    [
        ("CT", {"Modality": "CT"}),
        (["MR", "CT"], {"Modality": "CT"}),
        ({"regex": "(?i)lung"}, {"SeriesDescription": "thin LUNG"}),
        ({"max": 5}, {"SliceThickness": "5.0"}),
        ({"min": 1, "max": 5}, {"SliceThickness": 1}),
        (5, {"SliceThickness": 5.0}),
        ("5", {"SliceThickness": 5}),
        ("AXIAL", {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}),
        ({"min": 0.6}, {"PixelSpacing": [0.5, 0.7]}),
        ({"min": 3}, {"n_instances": 3}),
    ],
)
def test_a_condition_holds(condition, attributes):
    """Each form of a condition takes what it names, whether DICOM gave a number as a number or as text."""
    assert takes(condition, **attributes)


@pytest.mark.parametrize(
    ("condition", "attributes"),
    [
        ("CT", {"Modality": "MR"}),
        ("CT", {"Modality": "ct"}),
        ("CT", {"Modality": None}),
        (["MR", "CT"], {"Modality": "US"}),
        ({"regex": "^lung"}, {"SeriesDescription": "thin lung"}),
        ({"max": 5}, {"SliceThickness": 5.1}),
        ({"max": 5}, {"SeriesDescription": "no number"}),
        (5, {"SeriesDescription": "no number"}),
        ("AXIAL", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ({"min": 3}, {"n_instances": 2}),
    ],
)
def test_a_condition_does_not_hold(condition, attributes):
    """Each form of a condition leaves what it does not name."""
    assert not takes(condition, **attributes)


def test_a_missing_attribute_satisfies_nothing():
    """A condition on an attribute that the series does not have is not met, whatever it allows."""
    route = Route(name="m", source="m", when={"BodyPartExamined": {"regex": ".*"}})

    assert not route.takes(revision(Modality="CT"))


@pytest.mark.parametrize(
    ("missing", "attributes", "taken"),
    [
        (True, {}, True),
        (True, {"ContrastBolusAgent": None}, True),
        (True, {"ContrastBolusAgent": ""}, True),
        (True, {"ContrastBolusAgent": []}, True),
        (True, {"ContrastBolusAgent": "IODINE"}, False),
        (False, {"ContrastBolusAgent": "IODINE"}, True),
        (False, {}, False),
    ],
)
def test_an_attribute_may_have_to_be_missing_or_there(missing, attributes, taken):
    """An attribute without a value says as little as none."""
    route = Route(name="m", source="m", when={"ContrastBolusAgent": {"missing": missing}})

    assert route.takes(revision(**attributes)) == taken


def test_geometry_can_be_a_condition():
    """What ingest found of how the slices lie is compared like an attribute; a series without geometry has none."""
    route = Route(name="m", source="m", when={"geometry.verdict": "regular", "geometry.spacing_mm": {"max": 3}})
    lies = Geometry(verdict="regular", n_slices=9, n_positions=9, spacing_mm=2.5)

    assert route.takes(revision(geometry=lies))
    assert not route.takes(revision(geometry=lies.model_copy(update={"verdict": "irregular"})))
    assert not route.takes(revision(geometry=lies.model_copy(update={"spacing_mm": 5.0})))
    assert not route.takes(revision())


def test_what_is_not_met_is_told_with_what_the_series_has():
    """A dry run can say which conditions keep a series from a MAP."""
    route = Route(name="m", source="m", when={"Modality": "CT", "BodyPartExamined": "CHEST", "n_instances": 3})

    assert route.unmet(revision(Modality="MR")) == {"Modality": "MR", "BodyPartExamined": None}


def test_every_condition_must_hold():
    """One condition that is not met is enough to leave a series."""
    route = Route(name="m", source="m", when={"Modality": "CT", "n_instances": {"min": 3}})

    assert route.takes(revision(Modality="CT"))
    assert not route.takes(revision(n_instances=1, Modality="CT"))
    assert not route.takes(revision(Modality="MR"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("maps: [", "maps.yaml: line 1, column 8: not YAML."),
        ("- a", "maps.yaml: the document: expected `maps:` with a list of MAPs"),
        ("", "maps.yaml: maps: is missing; expected `maps:` with"),
        ("maps: {name: a}", "maps.yaml: maps: expected `maps:` with"),
        ("maps: [a]", "maps.yaml: maps.0: expected `maps:` with"),
        ("map: []", "maps.yaml: map: expected `maps:` with"),
        ("maps: [{name: a b, source: x, when: {Modality: CT}}]", "maps.yaml: maps.0.name: expected letters, digits"),
        ("maps: [{name: a, when: {Modality: CT}}]", "maps.yaml: maps.0.source: is missing; expected a folder"),
        ("maps: [{nam: a, source: x, when: {Rows: 1}}]", "maps.0.nam: there is no such key; there are name, source,"),
        ("maps: [{name: a, source: x, when: {}}]", "maps.yaml: maps.0.when: expected at least one condition"),
        ("maps: [{name: a, source: x, when: {Modallity: CT}}]", "maps.0.when.Modallity: neither a DICOM keyword"),
        ("maps: [{name: a, source: x, when: {PatientName: {missing: true}}}]", "not among what ingest tells"),
        ("maps: [{name: a, source: x, when: {Modality: {regexp: CT}}}]", "maps.0.when.Modality: expected a value"),
        ("maps: [{name: a, source: x, when: {Modality: {regex: '('}}}]", "not a regular expression"),
        ("maps: [{name: a, source: x, when: {Rows: {min: 2, max: 1}}}]", "min is above max"),
        ("maps: [{name: a, source: x, when: {geometry.shape: CT}}]", "maps.0.when.geometry.shape: neither a DICOM"),
        ("maps: [{name: a, source: x, when: {Rows: 1}, level: patient}]", "maps.0.level: expected series or study."),
        ("maps: [{name: a, source: x, when: {Rows: 1}, push: pacs}]", "maps.0.push: expected healthimaging, "),
        ("maps: [{name: a, source: x, when: {Rows: 1}, outputs: {SEG: 0}}]", "outputs.SEG: expected the least number"),
        (
            "maps: [{name: a, source: x, when: {Rows: 1}}, {name: a, source: x, when: {Rows: 1}}]",
            "more than one MAP is named a",
        ),
    ],
)
def test_a_mistake_in_the_table_is_told_with_its_place(text, line):
    """Whoever writes maps.yaml reads what is wrong and where."""
    with pytest.raises(Misconfigured) as caught:
        read(text)
    with pytest.raises(Misconfigured, match=r"^table\.yaml: ") as of_another_file:
        read(text, "table.yaml")

    assert line in str(caught.value)
    assert "Input should" not in str(caught.value)
    assert "maps.yaml" not in str(of_another_file.value)


def test_the_table_of_this_repository_takes_ct_and_nothing_else():
    """What ships routes CT, a single slice too; the application itself leaves localizers out."""
    (route,) = read(Path(InferenceSettings().maps_file).read_text()).maps

    assert route.takes(revision(n_instances=3, Modality="CT"))
    assert route.takes(revision(n_instances=1, Modality="CT"))
    assert not route.takes(revision(n_instances=30, Modality="MR"))


def test_a_route_needs_a_condition():
    """A MAP that would take everything is a mistake."""
    with pytest.raises(ValidationError):
        routing.Route(name="m", source="m", when={})
