import base64
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

from services.reporter.aggregate import Tally
from services.reporter.page import page
from shared.messages import Memorisation, Quality, TrainingCompleted, TrainingRoundCompleted
from tests.reporter.month import (
    evaluation,
    inference_completed,
    inference_failed,
    inference_skipped,
    png_grid,
    training_completed,
    training_round,
    upload_rejected,
    whole_month,
)

JUNE = datetime(2026, 6, 1, 6, tzinfo=UTC)
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=https://example.org/x onerror=alert(2)>"


class Parsed(HTMLParser):
    """The page's elements and texts, not the space between; remembers every tag that does not close the last opened."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.open, self.misnested, self.elements, self.texts = [], [], [], []
        self.feed(html.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data)

    def of(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(*events, images=None) -> Parsed:
    tally = Tally("2026-05")
    for event in events:
        tally.add(event)
    return Parsed(page(tally.report(generated_at=JUNE), images or {}))


def test_a_whole_month_is_well_formed():
    """Every element is closed in its turn, in the full page and in the empty one."""
    for parsed in (rendered(*whole_month(), images={"thorax-32": png_grid()}), rendered()):
        assert parsed.open == []
        assert parsed.misnested == []


def test_an_empty_month_is_still_a_page():
    """With no events, each section says so."""
    texts = "".join(rendered().texts)

    assert "May 2026" in texts
    for said in ("No training in this month", "No AI run", "No series settled", "No upload was rejected"):
        assert said in texts


def test_series_that_no_map_takes_are_shown():
    """They stand on the page, whether or not there was any run."""
    for events in ([inference_skipped(1)], [inference_skipped(1), inference_completed(2, 1.0)]):
        texts = rendered(*events).texts

        assert texts[texts.index("Revisions of series that no application takes, by modality") :][4:6] == ["MR", "1"]


def test_images_are_embedded():
    """The grid of each completed training stands in the page itself, byte for byte."""
    png = png_grid(7)
    parsed = rendered(training_round("r", 1, 1.5), training_completed("r", 1, 1.5), images={"r": png})
    (image,) = parsed.of("img")
    kind, _, body = image["src"].partition(",")

    assert kind == "data:image/png;base64"
    assert base64.b64decode(body) == png
    assert (image["width"], image["height"]) == ("128", "128")


def test_an_image_that_is_gone_is_named():
    """Without the image, or with something else under its key, the page names the key and stands."""
    for images in ({}, {"r": b"<svg onload=alert(1)>"}):
        parsed = rendered(training_completed("r", 1, 1.5), images=images)

        assert parsed.of("img") == []
        assert "models/r/images.png" in parsed.texts


def test_coverage_and_copies_stand_beside_the_distance():
    """A round that was tested for them tells coverage and copies, and whether it was flagged; an older one does not."""
    old, new = training_round("r", 1, 3.0), training_round("r", 2, 1.5)
    values = {"kid": 0.1, "kid_spread": 0.1, "precision": 0.9, "recall": 0.8, "density": 1.0, "sliced_wasserstein": 0.1}
    quality = Quality(coverage=0.74, **values)
    copies = Memorisation(n=100, n_held_out=50, copied_share=0.12, far_nearer_share=0.1, flagged=True)
    reachable = Quality(coverage=0.9, **values)
    told = {"quality": quality, "real_quality": reachable, "memorisation": copies}
    judged = new.data.evaluation.model_copy(update=told)
    new = TrainingRoundCompleted.of("r/2", new.data.model_copy(update={"evaluation": judged}), time=new.time)
    texts = rendered(old, new).texts
    first, second = (texts.index(steps) for steps in ("400", "800"))

    assert texts[first + 5 : first + 7] == ["-", "-"]
    assert texts[second + 5 : second + 8] == [" ✓", "0.74 of 0.90", "12% flagged"]


def test_why_a_model_is_not_approved_stands_beside_it():
    """Only a training that used up its rounds says why."""
    why = "Its relative distance is above 2."

    assert why in rendered(training_round("r", 1, 3.0), training_completed("r", 1, 3.0)).texts
    assert why not in rendered(training_round("r", 1, 1.5), training_completed("r", 1, 1.5)).texts


def test_nothing_comes_from_outside():
    """No element refers to anything but data in the page and the JSON beside it, and there is no script."""
    parsed = rendered(*whole_month(), images={"thorax-32": png_grid()})
    referred = [
        value for _, attributes in parsed.elements for name, value in attributes.items() if name in {"src", "href"}
    ]

    assert {value for value in referred if not value.startswith("data:image/png;base64,")} == {"2026-05.json"}
    assert not parsed.of("script")
    assert not parsed.of("link")
    assert "url(" not in "".join(parsed.texts)
    assert "@import" not in "".join(parsed.texts)


def test_hostile_text_stays_text():
    """Markup in a reason, a parameter, a metric or a key is shown, not obeyed."""
    judged = evaluation(1.5).model_copy(update={"metric": HOSTILE, "space": HOSTILE})
    data = training_completed("r", 1, 1.5, **{HOSTILE: HOSTILE}).data
    data = data.model_copy(update={"evaluation": judged, "images_key": HOSTILE})
    parsed = rendered(
        upload_rejected(1, HOSTILE),
        inference_failed(1, HOSTILE),
        inference_completed(2, 1.0, device=HOSTILE),
        training_round("r", 1, 3.0),
        training_round("r", 2, 1.5, **{HOSTILE: HOSTILE}),
        TrainingCompleted.of("r", data, time=JUNE.replace(month=5)),
    )

    assert not parsed.of("script")
    assert not parsed.of("img")
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "".join(parsed.texts).count(HOSTILE) >= 8


def test_odd_numbers_are_drawn():
    """One round, zero, a tiny, a huge and a negative distance: every coordinate is a finite number."""
    for distances in ([1.2], [0.0, 0.0], [1e-9, 1e9], [-0.3, 2.0], [5.0] * 60):
        rounds = [training_round("r", number + 1, value) for number, value in enumerate(distances)]
        parsed = rendered(*rounds, inference_completed(1, 0.0))
        drawn = [value for tag in ("circle", "line", "text") for mark in parsed.of(tag) for value in mark.values()]

        assert len(parsed.of("circle")) == len(distances) + 2
        assert not [value for value in drawn if value and re.search("nan|inf", value.removesuffix("inference"))]


def test_each_plot_has_its_table():
    """The numbers of every plot stand in the page as text too."""
    texts = rendered(training_round("r", 1, 7.25), inference_completed(1, 3.5)).texts

    assert "7.25" in texts
    assert "3.5 s" in texts
