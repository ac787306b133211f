"""The objects of the bucket: their keys, what they hold, and who writes them."""

from typing import NamedTuple


class Place(NamedTuple):
    """One kind of object in the bucket."""

    pattern: str
    """Its key; what stands in angle brackets changes from one to the next."""
    holds: str
    writer: str


RESULT = "results/<StudyUID>/<SeriesUID or study>/<digest>/<map>@<map digest>"
MODEL = "models/<request id>"

LAYOUT = (
    Place("incoming/<dataset>/<…>", "an upload: a DICOM file, or an archive of them", "a sender"),
    Place("incoming/<dataset>/<…>/_COMPLETE", "a marker: this folder is complete", "a sender"),
    Place("studies/<StudyUID>/<SeriesUID>/<SOPUID>.<sha>.dcm", "a normalised instance, which a MAP reads", "ingest"),
    Place(
        "studies/<StudyUID>/<SeriesUID>/revisions/<digest>.json", "a series as it stood when it was stable", "ingest"
    ),
    Place("settling/<dataset>/<StudyUID>/<SeriesUID>/<second>", "a marker: a message looks at the series", "ingest"),
    Place("settling/_claims/<StudyUID>/<SeriesUID>.json", "the lease of a series' revision", "ingest"),
    Place("settling/_studies/<StudyUID>/<second>", "a marker: a message looks at the study", "inference"),
    Place("datasets/<dataset>/<series>.<digest>.<config hash>.npy", "slices, (N, H, W) float32 in [-1, 1]", "ingest"),
    Place("datasets/<dataset>/<series>.<digest>.<config hash>.json", "what the array was made of, and how", "ingest"),
    Place("datasets/<dataset>/window.<Modality>.<config hash>.json", "the dataset's window", "ingest"),
    Place("quarantine/<sha256>/object", "what was refused", "ingest"),
    Place("quarantine/<sha256>/reason.json", "why it was refused", "ingest"),
    Place("quarantine/<sha256>/released.json", "the refusal that was answered", "the command line"),
    Place("results/<StudyUID>/<SeriesUID or study>/<digest>/routing.json", "the MAPs that are to run", "inference"),
    Place(f"{RESULT}/claim.json", "the lease of computing", "inference"),
    Place(f"{RESULT}/attempts/<attempt>/<…>", "what one run of the MAP made and printed", "inference"),
    Place(f"{RESULT}/outputs.json", "the attempt that counts", "inference"),
    Place(f"{RESULT}/result.json", "the result, and what the target has of it", "inference"),
    Place(f"{RESULT}/failure.json", "why there is no result", "inference"),
    Place("imports/<hash>/<…>", "what an import job of HealthImaging reads and writes", "inference"),
    Place("maps/<map>/serving.json", "the version that serves", "inference"),
    Place("maps/<map>/rejected/<digest>.json", "a version that is not tried again", "inference"),
    Place(f"{MODEL}/options.json", "what was asked for", "trainer"),
    Place(f"{MODEL}/lease.json", "the lease of the training", "trainer"),
    Place(f"{MODEL}/manifest.json", "the arrays and their split", "trainer"),
    Place(f"{MODEL}/config.js", "the parameters of the round that runs, or to start with", "trainer, a person"),
    Place(f"{MODEL}/rounds/<round>/<…>", "plan, checkpoints and evaluation of a round", "trainer"),
    Place(f"{MODEL}/progress.json", "how far the round that runs is, for people", "trainer"),
    Place(f"{MODEL}/sagemaker/<…>", "what SageMaker jobs read and write", "trainer, SageMaker"),
    Place(f"{MODEL}/completed.json", "the end of the training", "trainer"),
    Place(f"{MODEL}/failure.json", "why it cannot work", "trainer"),
    Place(f"{MODEL}/<…>", "the products, see docs/models.md", "trainer"),
    Place("events/date=<YYYY-MM-DD>/<uuid>.jsonl", "events, one per line, as they were sent", "reporter"),
    Place("reports/<YYYY-MM>.json", "the report of a month", "reporter"),
    Place("reports/<YYYY-MM>.html", "its page", "reporter"),
)
