"""Made events: one of each kind, and a whole month of them."""

import hashlib
import io
from datetime import UTC, datetime, timedelta

import numpy as np
from PIL import Image

from shared.messages import (
    CompletedInference,
    CompletedTraining,
    Evaluation,
    Event,
    FailedInference,
    FailedTraining,
    InferenceCompleted,
    InferenceFailed,
    InferenceOutput,
    InferenceSkipped,
    ReadySeries,
    RejectedUpload,
    SeriesReady,
    SeriesRef,
    SkippedInference,
    TrainingCompleted,
    TrainingFailed,
    TrainingRound,
    TrainingRoundCompleted,
    UploadRejected,
)

MAY = datetime(2026, 5, 1, tzinfo=UTC)
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SPACE = "random-conv-seed0"


def digest(text: object) -> str:
    """Return a hash of the shape that the contract asks for."""
    return hashlib.sha256(str(text).encode()).hexdigest()


def series_ref(number: int) -> SeriesRef:
    """Name the made series of a number."""
    return SeriesRef(study_uid=f"1.2.{number}", series_uid=f"1.2.{number}.1", digest=digest(number), revision_key="r")


def series_ready(number: int, *, modality: str | None = "CT", time: datetime = MAY, **more: object) -> SeriesReady:
    """Tell of a series."""
    told = {"dataset": "thorax", "n_instances": 24, "modality": modality} | more
    data = ReadySeries(**series_ref(number).model_dump() | told)
    return SeriesReady.of(data.series_uid, data, time=time)


def upload_rejected(number: int, reason_code: str, *, time: datetime = MAY) -> UploadRejected:
    """Tell of a refused upload."""
    sha256 = digest(f"upload {number}")
    data = RejectedUpload(
        dataset="thorax",
        upload_key_sha256=sha256,
        object_sha256=sha256,
        reason_code=reason_code,
        quarantine_key=f"quarantine/{sha256}/object",
    )
    return UploadRejected.of(sha256, data, time=time)


def inference_completed(
    number: int, duration_s: float, *, name: str = "ct_tissues", time: datetime = MAY, device: str = "cpu"
) -> InferenceCompleted:
    """Tell of a run with one output."""
    output = InferenceOutput(sop_class_uid=SEG, sop_instance_uid=f"2.25.{number}", series_uid="2.25.1", key="k")
    data = CompletedInference(
        map=name,
        map_digest=digest(name),
        inputs=(series_ref(number),),
        outcome="completed",
        result_key=f"results/{number}/result.json",
        outputs=(output,),
        duration_s=duration_s,
        device=device,
    )
    return InferenceCompleted.of(f"run {name} {number}", data, time=time)


def inference_unmatched(number: int, *, name: str = "ct_tissues", time: datetime = MAY) -> InferenceCompleted:
    """Tell of a run that found no matching series."""
    told = inference_completed(number, 0.01, name=name).data
    data = told.model_copy(update={"outcome": "no_matching_series", "outputs": ()})
    return InferenceCompleted.of(f"run {name} {number}", data, time=time)


def inference_failed(
    number: int, reason_code: str, *, name: str = "ct_tissues", time: datetime = MAY
) -> InferenceFailed:
    """Tell of a run that failed."""
    data = FailedInference(
        map=name,
        map_digest=digest(name),
        inputs=(series_ref(number),),
        attempt=f"attempt-{number}",
        reason_code=reason_code,
        failure_key=f"results/{number}/failure.json",
    )
    return InferenceFailed.of(f"run {name} {number}", data, time=time)


def inference_skipped(number: int, *, modality: str | None = "MR", time: datetime = MAY) -> InferenceSkipped:
    """Tell of a series that no MAP takes."""
    data = SkippedInference(**series_ref(number).model_dump(), modality=modality, reason_code="no_route")
    return InferenceSkipped.of(f"results/{number}/", data, time=time)


def evaluation(relative_fd: float) -> Evaluation:
    """Return a distance over a floor of 3.1."""
    return Evaluation(metric="FD", space=SPACE, n=64, distance=3.1 * relative_fd, floor=3.1, relative_fd=relative_fd)


def training_round(
    request_id: str, number: int, relative_fd: float, *, time: datetime = MAY, **config: float | str | bool
) -> TrainingRoundCompleted:
    """Tell of a round."""
    data = TrainingRound(
        request_id=request_id,
        dataset="thorax",
        round=number,
        steps=400 * number,
        evaluation=evaluation(relative_fd),
        approved=relative_fd <= 2,
        config={"learningRate": 2e-4, "batchSize": 16} | config,
        config_key=f"models/{request_id}/config.js",
        duration_s=41.5,
    )
    return TrainingRoundCompleted.of(f"{request_id}/{number}", data, time=time)


def training_completed(
    request_id: str, rounds: int, relative_fd: float, *, time: datetime = MAY, **config: float | str | bool
) -> TrainingCompleted:
    """Tell of a training's end."""
    data = CompletedTraining(
        request_id=request_id,
        dataset="thorax",
        approved=relative_fd <= 2,
        why_not="" if relative_fd <= 2 else "its relative distance is above 2",
        rounds=rounds,
        evaluation=evaluation(relative_fd),
        config={"learningRate": 2e-4, "batchSize": 16} | config,
        generator_key=f"models/{request_id}/generator.safetensors",
        images_key=f"models/{request_id}/images.png",
        images_array_key=f"models/{request_id}/images.npy",
    )
    return TrainingCompleted.of(request_id, data, time=time)


def training_failed(request_id: str, reason_code: str, *, time: datetime = MAY) -> TrainingFailed:
    """Tell of a training that cannot work."""
    data = FailedTraining(request_id=request_id, dataset="thorax", reason_code=reason_code)
    return TrainingFailed.of(request_id, data, time=time)


def png_grid(seed: int = 0, *, side: int = 4, pixels: int = 32) -> bytes:
    """Return a grid of smooth round shapes as a PNG."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : pixels * 1j, -1 : 1 : pixels * 1j]
    rows = []
    for _ in range(side):
        tiles = []
        for _ in range(side):
            a, b, tilt = random.uniform(0.5, 0.9, 3)
            body = (x / a) ** 2 + (y / b) ** 2 < 1
            lungs = ((np.abs(x) - 0.35 * a) / 0.22) ** 2 + ((y + 0.1 * tilt) / 0.4) ** 2 < 1
            tiles.append(np.where(lungs, 40, np.where(body, 150, 0)) + random.normal(0, 9, x.shape))
        rows.append(np.hstack(tiles))
    image = Image.fromarray(np.clip(np.vstack(rows), 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def whole_month() -> list[Event]:
    """Return a month as a busy research group has it: three trainings, two MAPs, some trouble."""
    random = np.random.default_rng(1)

    def some_time() -> datetime:
        return MAY + timedelta(seconds=float(random.uniform(0, 30 * 86_400)))

    events: list[Event] = []
    for number in range(148):
        modality = str(random.choice(["CT", "MR", "PT", "CR"], p=[0.62, 0.26, 0.08, 0.04]))
        warnings = ("gantry_tilt",) if number % 19 == 0 else ()
        events.append(series_ready(number, modality=modality, time=some_time(), warnings=warnings))
        if modality == "CT":
            seconds = float(random.lognormal(1.0, 0.5))
            events.append(inference_completed(number, seconds, device="cuda", time=some_time()))
        if modality == "MR" and number % 3:
            seconds = float(random.lognormal(2.0, 0.3))
            events.append(inference_completed(number, seconds, name="brain_lesions", device="cuda", time=some_time()))
        elif modality == "MR":
            events.append(inference_unmatched(number, name="brain_lesions", time=some_time()))
        if modality not in {"CT", "MR"}:
            events.append(inference_skipped(number, modality=modality, time=some_time()))
    reasons = ("not_dicom", "not_dicom", "truncated", "not_dicom", "no_pixels", "zip_too_large", "truncated")
    events += [upload_rejected(number, reason, time=some_time()) for number, reason in enumerate(reasons)]
    failures = ("deadline", "application_error", "application_error", "no_output")
    events += [inference_failed(900 + number, reason, time=some_time()) for number, reason in enumerate(failures)]

    thorax = ((1, 9.4, 2e-4), (2, 5.2, 2e-4), (3, 3.05, 1e-4), (4, 1.72, 5e-5))
    events += [
        training_round("thorax-32", number, found, time=MAY + timedelta(hours=number), learningRate=rate)
        for number, found, rate in thorax
    ]
    shown: dict[str, float | str | bool] = {
        "emaDecay": 0.999,
        "r1Weight": 10.0,
        "channels": 64,
        "augment": True,
        "loss": "relativistic-softplus",
    }
    events.append(training_completed("thorax-32", 4, 1.72, time=MAY + timedelta(hours=5), learningRate=5e-5, **shown))
    knee = ((1, 140.0), (2, 61.0), (3, 14.2), (4, 5.9), (5, 4.4))
    events += [
        training_round(
            "knee-mr-first-try", number, found, time=MAY + timedelta(days=9, hours=number), batchSize=8 * number
        )
        for number, found in knee
    ]
    events.append(training_completed("knee-mr-first-try", 5, 4.4, time=MAY + timedelta(days=10), batchSize=40))
    events.append(training_failed("rare-disease", "too_few_images", time=MAY + timedelta(days=12)))
    return [*events, *events[:6]]
