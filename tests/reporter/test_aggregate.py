from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from services.reporter.aggregate import Report, Tally, month_before
from shared.messages import InferenceCompleted
from tests.reporter.month import (
    MAY,
    inference_completed,
    inference_failed,
    inference_skipped,
    inference_unmatched,
    series_ready,
    training_completed,
    training_failed,
    training_round,
    upload_rejected,
    whole_month,
)

JUNE = datetime(2026, 6, 1, 6, tzinfo=UTC)


def report_of(*events, month="2026-05", at=JUNE) -> Report:
    tally = Tally(month)
    for event in events:
        tally.add(event)
    return tally.report(generated_at=at)


def test_a_repeat_counts_once():
    """An event delivered three times is counted once, and its repeats are told."""
    event = upload_rejected(1, "not_dicom")
    report = report_of(event, event, upload_rejected(2, "not_dicom"), event)

    assert report.rejections_by_reason == {"not_dicom": 2}
    assert (report.n_events, report.n_repeats) == (2, 2)


def test_counts_are_ordered_by_number_then_by_name():
    """The most frequent comes first, and of equals the first by name, whatever the order of the events."""
    rejected = ["truncated", "not_dicom", "too_large", "not_dicom"]
    skipped = ["PT", "MR", "CT", "PT"]
    failed = ["no_output", "deadline", "crashed", "no_output"]
    events = [
        *(upload_rejected(number, reason) for number, reason in enumerate(rejected)),
        *(inference_skipped(number, modality=modality) for number, modality in enumerate(skipped)),
        *(series_ready(number, modality=modality) for number, modality in enumerate(skipped)),
        *(inference_failed(number, reason) for number, reason in enumerate(failed)),
        inference_failed(9, "silent", name="another"),
        inference_completed(10, 1.0),
        *(training_failed(f"t-{number}", reason) for number, reason in enumerate(failed)),
    ]

    for report in (report_of(*events), report_of(*reversed(events))):
        assert list(report.rejections_by_reason.items()) == [("not_dicom", 2), ("too_large", 1), ("truncated", 1)]
        assert list(report.skipped_by_modality.items()) == [("PT", 2), ("CT", 1), ("MR", 1)]
        assert list(report.series.by_modality.items()) == [("PT", 2), ("CT", 1), ("MR", 1)]
        of_map, of_all = report.inference[1], report.failures_by_reason
        assert list(of_map.outcomes.items()) == [("failed", 4), ("completed", 1)]
        assert list(of_map.failures_by_reason.items()) == [("no_output", 2), ("crashed", 1), ("deadline", 1)]
        assert list(of_all["inference"]) == ["no_output", "crashed", "deadline", "silent"]
        assert list(of_all["training"]) == ["no_output", "crashed", "deadline"]


def test_an_event_belongs_to_the_utc_month_of_its_own_time():
    """An event at 01:00 on 1 June in Berlin is one of May."""
    berlin = timezone(timedelta(hours=2))
    in_may = series_ready(1, time=datetime(2026, 6, 1, 1, tzinfo=berlin))
    in_june = series_ready(2, time=datetime(2026, 6, 1, 3, tzinfo=berlin))

    assert report_of(in_may, in_june).series.n_series == 1
    assert report_of(in_may, in_june, month="2026-06").series.n_series == 1


def test_a_month_without_events_has_a_report():
    """Nothing happened: every count is zero, and nothing fails."""
    report = report_of()

    assert (report.n_events, report.training, report.inference, report.rejections_by_reason) == (0, (), (), {})
    assert report.failures_by_reason == {"inference": {}, "training": {}}
    assert report.month_is_over


def test_a_month_that_runs_is_told():
    """A report made within its month says that the month is not over."""
    assert not report_of(at=datetime(2026, 5, 31, 23, 59, tzinfo=UTC)).month_is_over


def test_the_order_of_delivery_does_not_matter():
    """The same events in any order, with repeats, give the same numbers."""
    events = whole_month()
    shuffled = np.random.default_rng(3).permutation(np.array(events, dtype=object))

    assert report_of(*events) == report_of(*shuffled)


def test_percentiles_are_numpys_linear_ones_of_completed_runs():
    """p50 and p95 come from completed runs alone, by device, and say how many there were."""
    runs = [inference_completed(number, float(seconds)) for number, seconds in enumerate((1, 2, 3, 10))]
    gpu = inference_completed(50, 0.5, device="cuda")
    (found,) = report_of(*runs, gpu, inference_unmatched(60), inference_failed(61, "deadline")).inference
    cpu, cuda = found.durations

    assert (cpu.device, cpu.n, cpu.p50_s, cpu.longest_s) == ("cpu", 4, 2.5, 10)
    assert cpu.p95_s == pytest.approx(8.95)
    assert (cuda.device, cuda.n, cuda.p50_s, cuda.p95_s) == ("cuda", 1, 0.5, 0.5)
    assert found.outcomes == {"completed": 5, "failed": 1, "no_matching_series": 1}
    assert found.failures_by_reason == {"deadline": 1}
    assert found.n_outputs == 5


def test_series_that_no_map_takes_are_counted_by_modality():
    """Work that did not happen is told, once per revision, without what a file says in that attribute."""
    skipped = inference_skipped(1)
    report = report_of(skipped, skipped, inference_skipped(2), inference_skipped(3, modality="DOE^JANE"))

    assert report.skipped_by_modality == {"MR": 2, "other": 1}
    assert report.inference == ()


def test_versions_of_a_map_are_kept_apart():
    """Two digests of one MAP are two rows: their durations are not one distribution."""
    old = inference_completed(1, 1.0)
    data = inference_completed(2, 9.0).data.model_copy(update={"map_digest": "f" * 64})
    new = InferenceCompleted.of("new", data, time=MAY)

    assert [row.durations[0].p50_s for row in report_of(new, old).inference] == [1.0, 9.0]


def test_a_training_is_told_by_rounds_and_end():
    """Rounds come in their order with metrics and parameters; the end gives status, model and images."""
    rounds = [training_round("r", number, 8 / number, learningRate=1 / number) for number in (2, 1, 4)]
    (training,) = report_of(*rounds, training_completed("r", 4, 2.0)).training

    assert [done.round for done in training.rounds] == [1, 2, 4]
    assert [done.evaluation.relative_fd for done in training.rounds] == [8, 4, 2]
    assert training.rounds[1].config["learningRate"] == 0.5
    assert (training.status, training.rounds_used) == ("approved", 4)
    assert training.images_key == "models/r/images.png"
    assert training.config == {"learningRate": 2e-4, "batchSize": 16}


def test_a_round_done_again_replaces_the_first_try():
    """After a lost checkpoint a round has two events; the later one counts."""
    first = training_round("r", 1, 9.0)
    again = training_round("r", 1, 7.0, time=MAY + timedelta(hours=1))
    (training,) = report_of(again, first).training

    assert [done.evaluation.relative_fd for done in training.rounds] == [7.0]
    assert training.status == "running"


def test_ends_of_trainings_are_told_apart():
    """Out of rounds and impossible are different ends, and the latter has its reason."""
    report = report_of(training_completed("a", 3, 5.0), training_failed("b", "too_few_images"))

    assert [training.status for training in report.training] == ["rounds_used_up", "failed"]
    assert report.failures_by_reason["training"] == {"too_few_images": 1}


def test_a_new_revision_is_no_new_series():
    """A late instance: two revisions of one series, and the instances of the later."""
    later = series_ready(1, time=MAY + timedelta(hours=1), n_instances=30, warnings=("gantry_tilt",))
    series = report_of(later, series_ready(1, n_instances=24)).series

    assert (series.n_series, series.n_revisions, series.n_instances, series.n_with_warnings) == (1, 2, 30, 1)


def test_a_modality_from_a_file_is_not_repeated():
    """Only DICOM's defined terms are told: a file may hold anything in that attribute, a name too."""
    report = report_of(series_ready(1), series_ready(2, modality="DOE^JANE"), series_ready(3, modality=None))

    assert report.series.by_modality == {"CT": 1, "none": 1, "other": 1}


def test_unreadable_lines_are_counted_and_passed_over():
    """A torn line, an unknown type and a stray notification cost nothing but themselves."""
    tally = Tally("2026-05")
    good = series_ready(1).body().encode()
    unknown = good.replace(b"series.ready.v1", b"series.ready.v9")
    tally.add_lines(
        b"\n".join([good, good[:40], unknown, b'{"Records": []}', b"\xff", series_ready(2).body().encode()])
    )
    report = tally.report(generated_at=JUNE)

    assert (report.series.n_series, report.n_unreadable) == (2, 4)


def test_the_report_survives_json():
    """What is written as JSON reads back as the same report."""
    report = report_of(*whole_month())

    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(("day", "month"), [((2026, 1, 31), "2025-12"), ((2026, 3, 31), "2026-02")])
def test_month_before(day, month):
    """The month before is right at the year's start and after short months."""
    assert month_before(datetime(*day, tzinfo=UTC)) == month
