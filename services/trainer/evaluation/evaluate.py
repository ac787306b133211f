"""The evaluation of a generator: its distance, the numbers beside it, and whether it memorised patients' images."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from services.trainer.evaluation.features import Space, embed
from services.trainer.evaluation.frechet import distance_in
from services.trainer.evaluation.memorisation import find_copies
from services.trainer.evaluation.quality import assess, second_opinion


def evaluate(unseen: Tensor, judged: Tensor, train: Tensor, space: Space, device: torch.device) -> dict[str, Any]:
    """Judge generated images.

    Args:
        unseen: (N, 1, size, size) float32 in [-1, 1], real images kept out of the training.
        judged: (M, 1, size, size), generated ones.
        train: (K, 1, size, size), all that the generator was trained on; other patients than `unseen`.
        space: the feature space in which distances are taken.
        device: the device that compares the images with those trained on.

    Returns:
        The fields of `shared.messages.Evaluation`, and `d`. `docs/metrics.md` says what each number means.
    """
    embedded = embed(space, unseen, judged, train)
    distance = distance_in(embedded)
    generated, real = assess(embedded)
    copies = find_copies(train.to(device), unseen.to(device), judged.to(device))
    doubts = second_opinion(distance.relative_fd, generated, real)
    return {
        **asdict(distance),
        "quality": asdict(generated),
        "real_quality": asdict(real),
        "memorisation": asdict(copies),
        "warnings": [*distance.warnings, *doubts, *(["copies"] if copies.flagged else [])],
    }
