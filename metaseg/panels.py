"""Pictures of predictions, as PNG files and as W&B media (the only file that knows those)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import wandb
from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger

from metaseg.data.source import UInt8
from metaseg.evaluate import Evaluation, Example
from metaseg.metrics import iou
from metaseg.pictures import PREDICTION, TRUTH, overlay
from metaseg.tracking import to_wandb

_LABELS = {0: "background", 1: "object"}


def panel(example: Example) -> Figure:
    """One episode: the support with its masks, the query, the prediction and the truth, row by row."""
    support, support_masks = example.episode.support.numpy()
    query, truth = example.episode.query.numpy()
    prediction = example.prediction.numpy()
    ious = iou(example.score.counts[-1, :, 0], example.score.counts[-1, :, 1])
    rows: list[tuple[str, list[UInt8], list[str]]] = [
        ("support", [overlay(i, m, TRUTH) for i, m in zip(support, support_masks, strict=True)], []),
        ("query", list(query), []),
        (
            "prediction",
            [overlay(i, m, PREDICTION) for i, m in zip(query, prediction, strict=True)],
            [f"IoU {x:.2f}" for x in ious],
        ),
        ("truth", [overlay(i, m, TRUTH) for i, m in zip(query, truth, strict=True)], []),
    ]
    columns = min(max(len(support), len(query)), 8)
    figure = Figure(figsize=(1.3 * columns + 0.4, 1.42 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images, captions) in zip(axes, rows, strict=True):
        for j, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
            if j < len(images):
                ax.imshow(images[j], interpolation="nearest")
            if j < len(captions):
                ax.set_title(captions[j], fontsize=8, pad=2)
        line[0].set_ylabel(name, fontsize=9)
    figure.suptitle(
        f"{example.episode.task}: IoU {example.score.iou_before:.2f} before adaptation, {example.score.iou:.2f} after",
        fontsize=9,
    )
    return figure


def file_name(task: str) -> str:
    """A task's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in task)


def write_panels(examples: Sequence[Example], folder: Path) -> None:
    """Write one PNG an episode, numbered and named by its task, and the predicted masks of all into `predictions.npy`.

    The array has shape (examples, queries, h, w), uint8, {0, 1}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, example in enumerate(examples):
        panel(example).savefig(folder / f"{i:02d}-{file_name(example.episode.task)}.png", dpi=110)
    if examples:
        np.save(folder / "predictions.npy", torch.stack([e.prediction for e in examples]).to(torch.uint8).numpy())


def log_to_wandb(run: "wandb.Run", evaluation: Evaluation, split: str) -> None:
    """Log the per-task table and, with their masks, the examples' query images to a W&B run."""
    rows = evaluation.rows()
    media: dict[str, object] = {
        f"{split}/per_task": wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    }
    if evaluation.examples:
        media[f"{split}/panels"] = [image for example in evaluation.examples for image in _wandb_images(example)]
    run.log(media)


def log_picture(loggers: Sequence[Logger], name: str, path: Path) -> None:
    """Log a picture file to those of the loggers that are W&B's."""
    to_wandb(loggers, lambda run: run.log({name: wandb.Image(str(path))}))


def _wandb_images(example: Example) -> list[wandb.Image]:
    images, truth = example.episode.query.numpy()
    return [
        wandb.Image(
            image,
            caption=f"{example.episode.task}, query {i}",
            masks={
                "prediction": {"mask_data": predicted.astype(np.uint8), "class_labels": _LABELS},
                "truth": {"mask_data": true, "class_labels": _LABELS},
            },
        )
        for i, (image, predicted, true) in enumerate(zip(images, example.prediction.numpy(), truth, strict=True))
    ]
