"""Train the bottleneck adapter of a CLIP: supervised, or self-supervised by DINO; on one process or many.

    python tools/train_adapter.py --out adapter.safetensors                                   # the demo's
    python tools/train_adapter.py --model ViT-B-16 --pretrained openai --data DIR --out adapter.safetensors
    python tools/train_adapter.py ... --data open-images --csv subset.csv --images DIR        # the paper's
    python tools/train_adapter.py ... --objective dino                                        # no labels
    torchrun --nproc-per-node 4 tools/train_adapter.py ...                                    # one process a GPU

The defaults are the paper's, and for the demo the shipped adapter's. A run that was stopped or killed goes on from its
last checkpoint, in the folder beside --out, when it is started again with the same options.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from iosr_fast.offline.adapted_encoder import AdaptedEncoder
from iosr_fast.offline.adapter import init_adapter, save_adapter
from iosr_fast.offline.clip import load_clip
from iosr_fast.offline.dino import local_size
from iosr_fast.offline.processes import make_fabric
from iosr_fast.offline.train import train_adapter
from iosr_fast.offline.train_config import DinoConfig, TrainConfig, dino_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.training.progress import TrainingBar
from tools.training.sources import Sources, open_sources

# Leaves room for random crops: DINO's are taken from pictures this much larger than the encoder's own size.
DINO_MARGIN = 10 / 7


class Goal(StrEnum):
    supervised = "supervised"
    dino = "dino"


def main(
    out: Path = typer.Option(..., help="the adapter file to write (.safetensors)"),
    model: str = typer.Option("demo", help="'demo' or a model of open_clip"),
    pretrained: str = typer.Option(None, help="tag, weights file, or 'none'; not needed for the demo"),
    objective: Goal = typer.Option(Goal.supervised, help="what is trained: with labels, or by DINO without"),
    data: str = typer.Option("demo", help="'demo', a folder of class folders, 'open-images', or .tar shards"),
    csv: Path = typer.Option(None, help="with --data open-images: ImageID,DisplayName,type (open_images_subset.py)"),
    images: Path = typer.Option(None, help="with --data open-images: the folder that holds ImageID.jpg"),
    skip_missing: bool = typer.Option(False, "--skip-missing", help="leave out what the CSV names and isn't there"),
    held_out: float = typer.Option(0.02, min=0, max=0.5, help="share of each class kept for the per-epoch measures"),
    first_adapted_block: int = typer.Option(None, help="blocks from this one on get an adapter [demo: 3, else 0]"),
    bottleneck: int = typer.Option(None, help="[demo: 256, else 64]"),
    scale: float = typer.Option(None, help="[demo and dino: 0.1, else 0.03]"),
    epochs: int = typer.Option(None, help="[demo: 32, dino: 10, else 1]"),
    batch: int = typer.Option(None, help="pictures a step, over all processes [128; dino 120]"),
    accumulate: int = typer.Option(1, help="parts that a process takes its share of a batch in"),
    learning_rate: float = typer.Option(None, help="[8e-3; dino 8e-4 for a batch of 256]"),
    schedule: str = typer.Option(None, help="constant or cosine [demo and dino: cosine, else constant]"),
    augment: bool = typer.Option(None, help="supervised: small affine and colour changes [demo: yes, else no]"),
    normalise: bool = typer.Option(True, help="CLIP's mean and std at training too (the public code leaves them out)"),
    cached_views: int = typer.Option(0, help="supervised: keep the frozen part of this many views on disk; 0: none"),
    kept_precision: str = typer.Option("fp16", help="of what is kept: fp16 or bf16"),
    precision: str = typer.Option("32-true", help="32-true, bf16-mixed or 16-mixed"),
    accelerator: str = typer.Option("auto", help="auto, cpu or cuda"),
    dino_out: int = typer.Option(None, help="dino: prototypes of the projection head [65536; demo 2048]"),
    dino_momentum: float = typer.Option(None, help="dino: of the teacher [0.9998; demo 0.99]"),
    dino_width: int = typer.Option(256, min=1, help="dino: of the vectors that meet the prototypes"),
    local_crops: int = typer.Option(10, min=0, help="dino: small crops of each picture"),
    global_scale: tuple[float, float] = typer.Option((0.25, 1.0), help="dino: share of the picture in a global crop"),
    local_scale: tuple[float, float] = typer.Option((0.05, 0.25), help="dino: share of the picture in a local crop"),
    train_head: bool = typer.Option(True, help="dino: train the projection head too (the public code freezes it)"),
    checkpoint_every: int = typer.Option(0, min=0, help="steps between checkpoints; 0: at an epoch's end only"),
    tensorboard: bool = typer.Option(False, "--tensorboard", help="write TensorBoard events beside the CSV files"),
    workers: int = typer.Option(2, help="processes that decode images"),
    seed: int = typer.Option(0),
) -> None:
    demo, dino = data == "demo", objective is Goal.dino
    try:
        check_out(out)
        clip = load_clip(model, pretrained)
        adapter = init_adapter(
            clip,
            first_adapted_block=first_adapted_block if first_adapted_block is not None else (3 if demo else 0),
            bottleneck=bottleneck or (256 if demo else 64),
            scale=scale or (0.1 if demo or dino else 0.03),
            seed=seed,
        )
        chosen: dict[str, Any] = {
            "epochs": epochs or (32 if demo and not dino else None),
            "batch": batch,
            "learning_rate": learning_rate,
            "schedule": schedule or ("cosine" if demo else None),
            "augment": None if dino else (demo if augment is None else augment),
        }
        common = {
            "accumulate": accumulate,
            "normalise": normalise,
            "kept_precision": kept_precision,
            "precision": precision,
            "cached_views": cached_views,
            "seed": seed,
        }
        given = {name: value for name, value in chosen.items() if value is not None} | common
        config = dino_config(**given) if dino else TrainConfig(**given)
        if dino:
            head = DinoConfig(
                out_dim=dino_out or (2048 if demo else 65536),
                momentum=dino_momentum or (0.99 if demo else 0.9998),
                head_bottleneck=dino_width,
                local_crops=local_crops,
                global_scale=global_scale,
                local_scale=local_scale,
                train_head=train_head,
                mirror=not demo,
            )
            config = replace(config, dino=head)
            local_size(AdaptedEncoder(clip, adapter.config.first_adapted_block), head)
        size = round(clip.image_size * DINO_MARGIN) if dino and not demo else clip.image_size
        found = open_sources(data, size, clip.image_size, held_out, workers, seed, csv, images, skip_missing)
        fabric = make_fabric(precision, accelerator)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    run(out, clip, adapter, config, found, fabric, checkpoint_every, tensorboard)


def check_out(out: Path) -> None:
    """Raise ValueError or OSError where the adapter couldn't be written once it is trained."""
    if out.is_dir():
        raise ValueError(f"expected --out as the file to write, got the folder {out}; add a name to it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"expected a folder to write {out.name} to, got {out.parent}, which can't be written to")


def run(
    out: Path, clip: Any, adapter: Any, config: TrainConfig, found: Sources, fabric: Any, every: int, tensorboard: bool
) -> None:
    folder = out.with_name(out.name + ".training")
    folder.mkdir(parents=True, exist_ok=True)
    bar = TrainingBar(config, len(found.train.labels), shown=fabric.is_global_zero)
    bar.say(
        f"{len(found.train.labels)} pictures of {len(found.train.class_names)} classes, {config.epochs} epochs, "
        f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {fabric.device.type}, logs in {folder}"
    )
    for note in found.notes:
        bar.say(note)
    try:
        with bar:
            trained = train_adapter(
                clip,
                adapter,
                found.train,
                config,
                folder,
                bar.step,
                held_out=found.held_out,
                report_epoch=bar.epoch,
                checkpoint_every=every,
                tensorboard=tensorboard,
                fabric=fabric,
            )
    except KeyboardInterrupt as stopped:
        bar.say(f"{stopped}: the same command goes on from there")
        sys.stdout.flush()
        os._exit(130)  # torchrun's other processes are stopping as well: nothing is left to wait for
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_adapter.py: {error}") from error
    if fabric.is_global_zero:
        save_adapter(trained, out)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "kept", ignore_errors=True)
        bar.say(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {bar.seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
