"""The end of a training: the products of its best round, stored under `models/<request id>/`.

generator.pt        the weights, tensors only; generator.json says what they are, card.md the same for people
medigan.json        the same under the names of medigan's catalogue
images.npy          (n, H, W) float32 in [-1, 1]; images.png shows the first of them
images.png.zip      one PNG per image; images.dicom.zip one Secondary Capture per image
interpolation.png   walks through the latent space
curves.png          losses, distance and quality over the steps
tensorboard/…       the same for TensorBoard, if RADQUEUE_TENSORBOARD is set
"""

import asyncio
import json
from collections.abc import Sequence

from services.trainer.products import card, curves
from services.trainer.protocol import Generate
from services.trainer.run import Run
from shared.documents.arrays import Units
from shared.documents.training import StoredCompletion, StoredRound
from shared.messages import CompletedTraining


async def complete(run: Run, rounds: Sequence[StoredRound], best: int) -> StoredCompletion:
    """Make and store the products of round number `best`, from 1; returns the content of completed.json."""
    # Load.
    request, keys, objects, chosen = run.request, run.keys, run.ports.objects, rounds[best - 1]
    manifest = keys.manifest.parse(await objects.get(keys.manifest.key))
    units = Units.common(Units(modality=array.modality, window=array.window) for array in manifest.arrays)
    out = run.work_dir / "products"
    out.mkdir()
    (out / "config.js").write_bytes(await objects.get(chosen.told.config_key))
    await objects.download(chosen.checkpoint_key, out / "checkpoint.pt")
    history = [done.model_dump(mode="json") for done in rounds]
    (out / "rounds.json").write_text(json.dumps(history), encoding="utf-8")

    # Make.
    settings = run.ports.settings
    asked = Generate(
        config=str(out / "config.js"),
        checkpoint=str(out / "checkpoint.pt"),
        n_images=request.n_images,
        out=str(out),
        rounds=str(out / "rounds.json") if settings.tensorboard else None,
        units=units,
        classes=manifest.classes,
        device=settings.device,
        threads=settings.threads,
    )
    made = await run.ask(len(rounds) + 1, asked)
    described = card.describe(keys.manifest.key, chosen, manifest, units, made)
    (out / "generator.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    (out / "card.md").write_text(card.model_card(described, rounds), encoding="utf-8")
    (out / "medigan.json").write_text(json.dumps(card.medigan(described), indent=1), encoding="utf-8")
    threshold = request.threshold if request.metric == "relative_fd" else None
    await asyncio.to_thread(lambda: curves.draw(history, threshold).save(out / "curves.png"))

    # Store.
    for name in [*made.files, "curves.png", "card.md", "medigan.json", "generator.json"]:
        await objects.upload(out / name, keys.product(name))
    told = CompletedTraining(
        request_id=request.request_id,
        dataset=request.dataset,
        approved=chosen.told.approved,
        why_not=chosen.told.why_not,
        rounds=len(rounds),
        evaluation=chosen.told.evaluation,
        config=chosen.told.config,
        generator_key=keys.generator,
        images_key=keys.images,
        images_array_key=keys.images_array,
    )
    return StoredCompletion(told=told, time=run.ports.clock(), best_round=best)
