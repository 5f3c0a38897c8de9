"""Train the bottleneck adapter of a CLIP: supervised, or self-supervised by DINO; on one process or many.

    python tools/train_adapter.py --out adapter.safetensors                                   # the demo's
    python tools/train_adapter.py --model ViT-B-16 --pretrained openai --data DIR --out adapter.safetensors
    python tools/train_adapter.py ... --data open-images --csv subset.csv --images DIR        # the paper's
    python tools/train_adapter.py ... --objective dino                                        # no labels
    torchrun --nproc-per-node 4 tools/train_adapter.py ...                                    # one process a GPU

The defaults are the paper's, and for the demo the shipped adapter's. A run that was stopped or killed resumes from its
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
from safetensors import SafetensorError

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils import command
from iosr_fast.utils.require import require_installed

with command.one_line_errors("iosr-fast"):
    require_installed("torch", "train")
    from iosr_fast.clip.adapter import init_adapter, load_adapter, save_adapter
    from iosr_fast.clip.architecture import check_architecture
    from iosr_fast.clip.load import load_clip
    from iosr_fast.training import train as training
    from iosr_fast.training.adapted_encoder import AdaptedEncoder
    from iosr_fast.training.dino import local_size
    from iosr_fast.training.processes import make_fabric
    from iosr_fast.training.progress import TrainingBar
    from iosr_fast.training.sources import Sources, open_sources
    from iosr_fast.training.train_config import DinoConfig, TrainConfig, dino_config

# DINO takes its random crops from pictures this much larger than the encoder's own size.
DINO_MARGIN = 10 / 7


class Goal(StrEnum):
    supervised = "supervised"
    dino = "dino"


def train_adapter(
    out: Path = typer.Option(..., help="the adapter file to write (.safetensors)"),
    model: str = typer.Option("demo", help="'demo' or a model of open_clip"),
    pretrained: str = typer.Option(None, help="tag, weights file, or 'none'; not needed for the demo"),
    objective: Goal = typer.Option(Goal.supervised, help="supervised with labels, or DINO without"),
    data: str = typer.Option("demo", help="'demo', a folder of class folders, 'open-images', or .tar shards"),
    csv: Path = typer.Option(None, help="with --data open-images: ImageID,DisplayName,type (open_images_subset.py)"),
    images: Path = typer.Option(None, help="with --data open-images: the folder that holds ImageID.jpg"),
    skip_missing: bool = typer.Option(False, "--skip-missing", help="leave out listed pictures that have no file"),
    held_out: float = typer.Option(0.02, min=0, max=0.5, help="share of each class to measure on after each epoch"),
    first_adapted_block: int = typer.Option(None, help="blocks from this one on get an adapter [demo: 3, else 0]"),
    bottleneck: int = typer.Option(None, help="[demo: 256, else 64]"),
    scale: float = typer.Option(None, help="[demo and dino: 0.1, else 0.03]"),
    epochs: int = typer.Option(None, help="[demo: 32, dino: 10, else 1]"),
    batch: int = typer.Option(None, help="pictures a step, over all processes [128; dino 120]"),
    accumulate: int = typer.Option(1, help="micro-batches into which a process splits its share of a batch"),
    learning_rate: float = typer.Option(None, help="[8e-3; dino 8e-4 for a batch of 256]"),
    schedule: str = typer.Option(None, help="constant or cosine [demo and dino: cosine, else constant]"),
    augment: bool = typer.Option(None, help="supervised: small affine and colour changes [demo: yes, else no]"),
    normalise: bool = typer.Option(True, help="CLIP's mean and std at training too (the public code leaves them out)"),
    cached_views: int = typer.Option(0, help="supervised: views whose frozen activations are cached on disk"),
    kept_precision: str = typer.Option("fp16", help="of the cached activations: fp16 or bf16"),
    precision: str = typer.Option("32-true", help="32-true, bf16-mixed or 16-mixed"),
    accelerator: str = typer.Option("auto", help="auto, cpu or cuda"),
    dino_out: int = typer.Option(None, help="dino: prototypes of the projection head [65536; demo 2048]"),
    dino_momentum: float = typer.Option(None, help="dino: of the teacher [0.9998; demo 0.99]"),
    dino_width: int = typer.Option(256, min=1, help="dino: of the vectors that are compared with the prototypes"),
    local_crops: int = typer.Option(10, min=0, help="dino: small crops of each picture"),
    global_scale: tuple[float, float] = typer.Option((0.25, 1.0), help="dino: share of the picture in a global crop"),
    local_scale: tuple[float, float] = typer.Option((0.05, 0.25), help="dino: share of the picture in a local crop"),
    train_head: bool = typer.Option(True, help="dino: train the projection head too (the public code freezes it)"),
    checkpoint_every: int = typer.Option(0, min=0, help="steps between checkpoints; 0: no further ones"),
    checkpoint_minutes: float = typer.Option(10, min=0, help="minutes between them; 0: at the end of epochs only"),
    tensorboard: bool = typer.Option(False, "--tensorboard", help="write TensorBoard events beside the CSV files"),
    workers: int = typer.Option(2, help="processes that decode images"),
    seed: int = typer.Option(0),
) -> None:
    demo, dino = data == "demo", objective is Goal.dino
    check_out(out)
    check_architecture(model)
    clip = load_clip(model, pretrained)
    adapter = init_adapter(
        clip,
        first_adapted_block=or_default(first_adapted_block, 3 if demo else 0),
        bottleneck=or_default(bottleneck, 256 if demo else 64),
        scale=or_default(scale, 0.1 if demo or dino else 0.03),
        seed=seed,
    )
    # None: the default of the objective's config.
    options = {
        "epochs": or_default(epochs, 32 if demo and not dino else None),
        "batch": batch,
        "learning_rate": learning_rate,
        "schedule": schedule or ("cosine" if demo else None),
        "augment": or_default(augment, demo and not dino),
        "accumulate": accumulate,
        "normalise": normalise,
        "cache_precision": kept_precision,
        "precision": precision,
        "cached_views": cached_views,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    config = dino_config(**settings) if dino else TrainConfig(**settings)
    if dino:
        head = DinoConfig(
            out_dim=or_default(dino_out, 2048 if demo else 65536),
            momentum=or_default(dino_momentum, 0.99 if demo else 0.9998),
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
    sources = open_sources(data, size, clip.image_size, held_out, workers, seed, csv, images, skip_missing)
    fabric = make_fabric(precision, accelerator)
    checkpoints = {"checkpoint_every": checkpoint_every, "checkpoint_minutes": checkpoint_minutes}
    run(out, clip, adapter, config, sources, fabric, checkpoints, tensorboard)


def or_default(value: Any, default: Any) -> Any:
    """The default for None only: 0 and False are passed on, to be refused where they are invalid."""
    return default if value is None else value


def training_folder(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def check_out(out: Path) -> None:
    """Raise ValueError or OSError if the trained adapter couldn't be written, or would replace a file that is none."""
    if out.is_dir():
        raise IosrFastError(f"expected --out as the file to write, got the folder {out}; add a name to it")
    if out.exists():
        try:
            load_adapter(out)
        except Exception as error:
            raise IosrFastError(
                f"{out} exists and is no adapter, which training would replace; choose another name"
            ) from error
    if training_folder(out).is_file():
        raise FileExistsError(f"expected room for the folder {training_folder(out)}, got a file of that name; move it")
    training_folder(out).mkdir(parents=True, exist_ok=True)
    for folder in (out.parent, training_folder(out)):
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"expected a folder to write {out.name} to, got {folder}, which can't be written to")


def run(
    out: Path,
    clip: Any,
    adapter: Any,
    config: TrainConfig,
    sources: Sources,
    fabric: Any,
    checkpoints: dict[str, Any],
    tensorboard: bool,
) -> None:
    """Train, with the bar, and write `out`. `checkpoints` are arguments of `train_adapter`."""
    folder = training_folder(out)
    bar = TrainingBar(config, len(sources.train.labels), shown=fabric.is_global_zero)
    bar.say(
        f"{len(sources.train.labels)} pictures of {len(sources.train.class_names)} classes, {config.epochs} epochs, "
        f"{fabric.world_size} process{'es' * (fabric.world_size > 1)} on {fabric.device.type}, logs in {folder}"
    )
    if out.exists():
        bar.say(f"{out} exists and is replaced when this training ends")
    for note in sources.notes:
        bar.say(note)
    try:
        with bar:
            trained = training.train_adapter(
                clip,
                adapter,
                sources.train,
                config,
                folder,
                bar.step,
                held_out=sources.held_out,
                report_epoch=bar.epoch,
                tensorboard=tensorboard,
                fabric=fabric,
                **checkpoints,
            )
        if fabric.is_global_zero:
            write(trained, out)
    except KeyboardInterrupt as stopped:
        message = f"{stopped}: the same command resumes from there"
        bar.say(message if str(stopped) else "stopped at once: the same command resumes from the last checkpoint")
        sys.stdout.flush()
        os._exit(130)  # torchrun's other processes stop as well: nothing to wait for
    if fabric.is_global_zero:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "activations", ignore_errors=True)
        bar.say(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) after {bar.seconds:.0f} s")


def write(trained: Any, out: Path) -> None:
    """Raises OSError if the disk is full; nothing is lost, because the last checkpoint holds the same."""
    try:
        save_adapter(trained, out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"can't write {out} ({error}); fix that, and the same command writes it at once") from error
