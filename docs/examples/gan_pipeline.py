# ruff: noqa: INP001, T201 - a script, which prints
"""A small GAN study on a folder of DICOM files, step by step, in one process.

    python docs/examples/gan_pipeline.py FOLDER --bucket BUCKET --out study

Load, preprocess, upload to S3, build, train, measure, change parameters while the distance is too large, train on,
generate, report. The training service does the same over a queue, resumes after a crash, looks for copies and decides
by more than one number: this is the idea of it on one page. AWS credentials are taken from the environment.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from radqueue.pipeline import (
    DEFAULT_CONFIG,
    Round,
    build_gan_model,
    calculate_fid,
    generate_images,
    generate_report,
    load_dicom_images,
    modify_config_file,
    preprocess_images,
    read_config,
    train_gan,
    upload_to_s3,
)

HELD_OUT_EVERY = 4
"""Every fourth patient is kept out of the training, to measure against."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the study; returns the path of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--config", type=Path, help="a config.js; without it, the trainer's")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=2.0, help="the relative distance that is good enough")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with networks this small, threads wait for one another longer than they compute

    # The images: whole patients are held out, since slices of one patient resemble each other.
    pictures = load_dicom_images(asked.folder)
    images = preprocess_images(pictures, size=asked.size)
    held_out = sorted({picture.patient for picture in pictures})[::HELD_OUT_EVERY]
    is_held_out = np.isin([picture.patient for picture in pictures], held_out)
    train, unseen = images[~is_held_out], images[is_held_out]
    if not len(train):
        parser.error("images of at least two patients are needed: some to train on, and others to judge by")
    np.save(asked.out / "images.npy", images)
    print("uploaded", upload_to_s3(asked.out / "images.npy", asked.bucket, "notebook/images.npy"))

    # The model, and its parameters in a file of our own.
    config = asked.out / "config.js"
    config.write_text((asked.config or DEFAULT_CONFIG).read_text("utf-8"), "utf-8")
    modify_config_file(config, imageSize=asked.size)
    model = build_gan_model(config)

    # Train, measure, modify, train on.
    rounds: list[Round] = []
    while len(rounds) < asked.rounds:
        began = time.monotonic()
        train_gan(model, train, config)
        distance = calculate_fid(unseen, generate_images(model, 4 * len(unseen), seed=1), train)
        as_it_was = shutil.copyfile(config, asked.out / f"config.{len(rounds) + 1}.js")
        rounds.append(Round(distance, as_it_was, time.monotonic() - began))
        print(f"round {len(rounds)}: {distance.metric} {distance.distance:.2f}, relative {distance.relative_fd:.2f}")
        if distance.relative_fd <= asked.threshold:
            break
        if len(rounds) > 1 and distance.relative_fd > rounds[-2].distance.relative_fd:
            rate = read_config(config.read_text("utf-8"))["learningRate"]
            modify_config_file(config, learningRate=rate / 2)

    # What came of it.
    generated = generate_images(model, asked.images)
    np.save(asked.out / "generated.npy", generated)
    report = generate_report(rounds, generated, asked.out, threshold=asked.threshold)
    print("report", report)
    return report


if __name__ == "__main__":
    main()
