"""The descriptions of a finished model: `generator.json` for programs, `card.md` for people, and `medigan.json`.

The field names of `medigan.json` are those of medigan's `global.json` (github.com/RichardObi/medigan, version 1): a
model's `execution`, `selection` and `description`. Fields that are not known stay empty, as in medigan's template.
"""

from collections.abc import Sequence
from typing import Any

from services.trainer.protocol import Products
from shared.documents.arrays import Units
from shared.documents.training import Manifest, StoredRound
from shared.messages import Evaluation

Json = dict[str, Any]

INTENDED_USE = "research: augmentation, teaching, tests of software; not for clinical use"
LIMITS = (
    "Single slices: neighbouring images belong to no common volume, and pixels have no known size in millimetres.",
    "The images look like the data that the model saw, and share its biases; what was rare there is rarer here.",
    "The test for copies is one of images. It is no proof of privacy, and does not find what it is not made to find.",
    "The distance is of the named feature space, which knows no anatomy: whether an image is plausible, it cannot say.",
)
TEST_FOR_COPIES = "nearest neighbours among the training images, calibrated on held-out real images of other patients"


CALIBRATED_BY = 100
"""Number of held-out images below which their 1 % quantile, the limit of the test for copies, is their minimum."""


def describe(manifest_key: str, chosen: StoredRound, manifest: Manifest, units: Units, made: Products) -> Json:
    """Describe generator.pt: what it is, how good it is, and which data it was trained on.

    Args:
        manifest_key: the key under which the manifest is stored.
        chosen: the round that made the generator.
        manifest: the arrays of the training and their split.
        units: the meaning of the numbers of an image.
        made: the reply of the training process.
    """
    event_data = chosen.told
    config, size = event_data.config, event_data.config["imageSize"]
    groups = {array.held_out: set[str]() for array in manifest.arrays}
    for array in manifest.arrays:
        groups[array.held_out].add(array.group)
    memorisation = event_data.evaluation.memorisation
    return {
        "schema_version": 1,  # of StoredDescription, the part that radqueue reads again
        "request_id": event_data.request_id,
        "file": "generator.pt",
        "sha256": made.sha256,
        "format": "state_dict of services.trainer.gan.networks.Generator, tensors only",
        "input": {"z": ["N", config["latentDim"]], "distribution": "standard normal"},
        "output": {"images": ["N", 1, size, size], "range": [-1, 1]},
        "units": {"modality": units.modality, "window": units.window},
        "classes": manifest.classes,
        "config": config,
        "round": event_data.round,
        "images_seen": made.images_seen,
        "seed": made.seed,
        "trained": chosen.time.isoformat(),
        "approved": event_data.approved,
        "why_not": event_data.why_not,
        "evaluation": event_data.evaluation.model_dump(mode="json"),
        "privacy_test": {
            "test": TEST_FOR_COPIES,
            "result": memorisation.model_dump(mode="json") if memorisation else None,
        },
        "data": {
            "dataset": manifest.dataset,
            "manifest_key": manifest_key,
            "n_series": len(manifest.arrays),
            "n_training_images": manifest.n_images(held_out=False),
            "n_training_patients": len(groups.get(False, ())),
            "n_held_out_images": manifest.n_images(held_out=True),
            "n_held_out_patients": len(groups.get(True, ())),
        },
        "intended_use": INTENDED_USE,
        "limits": LIMITS,
    }


def model_card(described: Json, rounds: Sequence[StoredRound]) -> str:
    """Return the description as Markdown."""
    evaluation = Evaluation.model_validate(described["evaluation"])
    data, units, copies = described["data"], described["units"], evaluation.memorisation
    size = described["output"]["images"][-1]
    verdict = "approved" if described["approved"] else "not approved"
    window = f"; -1 and 1 stand for {units['window'][0]:g} and {units['window'][1]:g}" if units["window"] else ""
    lines = [
        f"# {described['request_id']}",
        "",
        f"A generator of {size} x {size} images, trained on the dataset `{data['dataset']}`: **{verdict}**.",
        *([f"Not approved, because {described['why_not']}.", ""] if described["why_not"] else []),
        f"Modality: {units['modality'] or 'mixed or unknown'}{window}."
        + (f" Classes: {', '.join(described['classes'])}." if described["classes"] else ""),
        "",
        f"- Weights: `generator.pt`, sha256 `{described['sha256']}`, round {described['round']} of {len(rounds)},",
        f"  {described['images_seen']} images seen",
        f"- Intended use: {described['intended_use']}",
        "",
        "## Data",
        "",
        "| | images | patients |",
        "|---|---|---|",
        f"| trained on | {data['n_training_images']} | {data['n_training_patients']} |",
        f"| held out, to judge by | {data['n_held_out_images']} | {data['n_held_out_patients']} |",
        "",
        f"Of {data['n_series']} series, listed with the split in `{data['manifest_key']}`. A series without a patient",
        "counts as a patient of its own.",
        "",
        "## Metrics",
        "",
        f"In the space `{evaluation.space}`, with n = {evaluation.n} images on each side.",
        "",
        "| number | generated | other real images |",
        "|---|---|---|",
        f"| {evaluation.metric} | {evaluation.distance:.4g} | {evaluation.floor:.4g} |",
        f"| relative distance | {evaluation.relative_fd:.3f} | 1 |",
    ]

    # Quality.
    if evaluation.quality and evaluation.real_quality:
        real = evaluation.real_quality.model_dump()
        generated = evaluation.quality.model_dump()
        lines += [f"| {name} | {value:.4g} | {real[name]:.4g} |" for name, value in generated.items()]

    # Warnings, and privacy test.
    lines += ["", f"Warnings: {', '.join(evaluation.warnings) or 'none'}.", "", "## Privacy test", ""]
    if copies is None:
        lines.append("Not made.")
    else:
        lines += [
            f"**{'Copies found' if copies.flagged else 'No copies found'}.** {TEST_FOR_COPIES.capitalize()}.",
            f"Share of {copies.n} generated images nearer to a training image than 99 % of {copies.n_held_out}",
            f"held-out ones are: {copies.copied_share:.4f}; nearer than half of the nearest one's distance:",
            f"{copies.far_nearer_share:.4f}.",
        ]
        if copies.n_held_out < CALIBRATED_BY:
            lines += ["", f"With fewer than {CALIBRATED_BY} held-out images only plain copies are found."]

    # Rounds and limits.
    lines += ["", "## Rounds", "", "| round | steps | relative distance | rule | approved |", "|---|---|---|---|---|"]
    lines += [
        f"| {done.told.round} | {done.told.steps} | {done.told.evaluation.relative_fd:.3f} | {done.told.rule} "
        f"| {'yes' if done.told.approved else 'no'} |"
        for done in rounds
    ]
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in described["limits"]), ""]
    return "\n".join(lines)


def medigan(described: Json) -> Json:
    """Return the description under medigan's names.

    `package_link` is empty: medigan runs what it downloads there, and we publish nothing.
    """
    data, evaluation = described["data"], described["evaluation"]
    size, modality = described["output"]["images"][-1], described["units"]["modality"]
    flagged = (described["privacy_test"]["result"] or {}).get("flagged")
    privacy = {None: None, True: "copies of training images found", False: "no copies found"}[flagged]
    distance = {evaluation["metric"]: evaluation["distance"]}
    return {
        described["request_id"]: {
            "execution": {
                "package_name": described["request_id"],
                "package_link": "",
                "model_name": "generator",
                "extension": ".pt",
                "image_size": [size, size],
                "dependencies": ["numpy", "torch"],
                "generate_method": {
                    "name": "generate",
                    "args": {"base": ["model_file", "num_samples", "output_path", "save_images"], "custom": {}},
                    "input_latent_vector_size": described["input"]["z"][-1],
                },
            },
            "selection": {
                "performance": {"FID": None, **distance, "relative_fd": evaluation["relative_fd"], "turing_test": None},
                "use_cases": ["data augmentation"],
                "organ": [],
                "modality": [modality] if modality else [],
                "vendors": [],
                "centres": [],
                "function": ["noise to image", "image generation"]
                + (["conditional generation"] if described["classes"] else ["unconditional generation"]),
                "condition": [],
                "dataset": [data["dataset"]],
                "augmentations": [],
                "generates": described["classes"],
                "height": size,
                "width": size,
                "depth": None,
                "type": "GAN",
                "license": "",
                "dataset_type": "private",
                "privacy_preservation": privacy,
                "tags": [f"{size}x{size}", *([modality] if modality else [])],
                "year": described["trained"][:4],
            },
            "description": {
                "title": f"Generator of {size} x {size} images trained on {data['dataset']}",
                "provided_date": described["trained"][:10],
                "trained_date": described["trained"][:10],
                "provided_after_epoch": None,
                "version": described["sha256"][:16],
                "publication": None,
                "doi": [],
                "inputs": [],
                "comment": f"{described['intended_use']}. {' '.join(described['limits'])}",
            },
        }
    }
