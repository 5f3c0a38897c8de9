"""Train the bottleneck adapter of a CLIP, on the demo's generic concepts or on any folder with one sub-folder a class.

    python tools/train_adapter.py --model demo --first-adapted-block 3 --bottleneck 256 --out adapter.safetensors
    python tools/train_adapter.py --model ViT-B-16 --pretrained openai --data DIR --out adapter.safetensors

The defaults are the paper's for a folder (one epoch, scale 0.03, no augmentation) and the shipped adapter's for the
demo. A run that was stopped goes on from its last epoch when it is started again with the same options.
"""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from iosr_fast.offline.adapter import init_adapter, save_adapter
from iosr_fast.offline.clip import load_clip
from iosr_fast.offline.data import FolderPictures, PictureSource, demo_pictures
from iosr_fast.offline.train import Progress as Step
from iosr_fast.offline.train import TrainConfig, train_adapter


def main(
    out: Path = typer.Option(..., help="the adapter file to write (.safetensors)"),
    model: str = typer.Option("demo", help="'demo' or a model of open_clip"),
    pretrained: str = typer.Option(None, help="tag, weights file, or 'none'; not needed for the demo"),
    data: str = typer.Option("demo", help="a folder with one sub-folder a class, or 'demo'"),
    first_adapted_block: int = typer.Option(None, help="blocks from this one on get an adapter [demo: 3, else 0]"),
    bottleneck: int = typer.Option(None, help="[demo: 256, else 64]"),
    scale: float = typer.Option(None, help="[demo: 0.1, else 0.03]"),
    epochs: int = typer.Option(None, help="[demo: 32, else 1]"),
    batch: int = typer.Option(128),
    learning_rate: float = typer.Option(8e-3),
    schedule: str = typer.Option(None, help="constant or cosine [demo: cosine, else constant]"),
    augment: bool = typer.Option(None, help="small affine and colour changes [demo: yes, else no]"),
    normalise: bool = typer.Option(True, help="CLIP's mean and std at training too (the public code leaves them out)"),
    cached_views: int = typer.Option(0, help="compute the frozen part once for this many views; 0: anew each time"),
    workers: int = typer.Option(2, help="processes that decode a folder's images"),
    seed: int = typer.Option(0),
) -> None:
    if schedule not in (None, "constant", "cosine"):
        raise typer.BadParameter(f"expected --schedule constant or cosine, got {schedule}")
    demo = data == "demo"
    try:
        clip = load_clip(model, pretrained)
        source: PictureSource = (
            demo_pictures(clip.image_size) if demo else FolderPictures(data, clip.image_size, workers)
        )
        adapter = init_adapter(
            clip,
            first_adapted_block=first_adapted_block if first_adapted_block is not None else (3 if demo else 0),
            bottleneck=bottleneck or (256 if demo else 64),
            scale=scale or (0.1 if demo else 0.03),
            seed=seed,
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    config = TrainConfig(
        epochs=epochs or (32 if demo else 1),
        batch=batch,
        learning_rate=learning_rate,
        schedule="cosine" if (schedule or ("cosine" if demo else "constant")) == "cosine" else "constant",
        augment=demo if augment is None else augment,
        normalise=normalise,
        cached_views=cached_views,
        seed=seed,
    )
    checkpoint = out.with_name(out.name + ".checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(source.labels)} pictures of {len(source.class_names)} classes, {config.epochs} epochs")
    if checkpoint.exists():
        print(f"going on from {checkpoint}")
    started = time.perf_counter()
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("train", total=None, epoch=0, said="computing the frozen part" if cached_views else "")

        def report(step: Step) -> None:
            bar.update(
                task,
                total=config.epochs * step.steps_an_epoch,
                completed=(step.epoch - 1) * step.steps_an_epoch + step.step,
                epoch=step.epoch,
                said=f"loss {step.loss:.2f}, {100 * step.accuracy:.0f}% right",
            )

        train_adapter(clip, adapter, source, config, checkpoint, report)
    save_adapter(adapter, out)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
