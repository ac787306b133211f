"""Why a training cannot work, and what to do about it."""

REASONS = {
    # Of the data.
    "no_data": "There are no arrays with a sidecar. Upload images to the dataset first, or correct data_uri or the "
    "folders of classes; docs/training-data.md says what an array of your own needs.",
    "too_little_data": "Found {n_patients} patients: {n_training} images to train on, and {n_held_out} of other ones "
    "to judge by; {min_images} of each are needed. Upload images of more patients to the dataset.",
    "class_on_one_side": "Class {class_number} of {n_classes}, in alphabetical order, has {n_patients} patients only: "
    "some are needed to train on, and others to judge by. Upload images of more patients, or leave the class out.",
    "class_missing": "{n_without} of {n_arrays} arrays have no class. Write `class` into the sidecar of each, or of "
    "none.",
    "array_gone": "An array that the training began with was deleted. Ask anew, under another request id.",
    "array_changed": "An array that the training began with was replaced. Ask anew, under another request id.",
    "invalid_array": "An array is damaged, or holds no slices (n, rows, columns) of numbers. Make it again.",
    "invalid_sidecar": "The sidecar of an array is not of the form that docs/training-data.md describes. Correct it.",
    "not_normalised": "An array has values outside -1 to 1. Scale it: -1 is the darkest, 1 the brightest.",
    "images_too_small": "The images are smaller than imageSize. Ask with a smaller one: --set imageSize=…",
    # Of its address.
    "data_uri_not_allowed": "The trainer does not read from there. Its owner can allow it in RADQUEUE_DATA_URIS.",
    "data_uri_not_installed": "The trainer has no library for such addresses. Install it: the extra `gcs` for gs://.",
    "data_uri_unreadable": "Nothing is there, or the trainer may not read it. Correct data_uri, or grant it the right.",
    # Of the parameters.
    "unknown_parameter": "config.js has no such parameter. `radqueue train --set x=1` lists those that there are.",
    "invalid_parameter": "A parameter of config.js has a value that it cannot have. Correct it.",
    "batch_not_divisible": "batchSize is no multiple of the number of processes that train. Correct either of them.",
    "search_not_installed": "The trainer has no Optuna. Install it (the extra `search`), or ask for `rules`.",
    # Of the work.
    "diverged": "The losses went to infinity in every try. Begin with a smaller learningRate, or with more images.",
    "deadline": "A round took longer than RADQUEUE_ROUND_DEADLINE_S. Raise it, or ask for fewer steps.",
    "out_of_memory": "A round took more memory than there is. Ask for a smaller batchSize or imageSize.",
    "crashed": "The process that trained died several times, perhaps for memory. The trainer's log says where.",
    "raised": "The process that trained failed several times. The trainer's log names the place; report it.",
}
"""The explanation of each reason code of `training.failed`; `{…}` stand for the numbers that come with the code."""

METRICS = {"relative_fd": "relative distance", "distance": "distance", "kid": "KID"}
"""The names, for people, of the metrics that can approve a model."""


class CannotTrain(Exception):  # noqa: N818 - it states an outcome
    """The training cannot work as asked. This is an outcome, stored and announced, and not an error of the message."""

    def __init__(self, reason_code: str, **numbers: int) -> None:
        """State the reason, and numbers that explain it."""
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.numbers = numbers


def explained(reason_code: str, numbers: dict[str, int]) -> str:
    """Return the reason in words; the code itself if this version does not know it, or its numbers are other ones."""
    try:
        return REASONS.get(reason_code, reason_code).format(**numbers)
    except KeyError:
        return reason_code
