"""Train the demo's small CLIP from scratch on the generic concepts (about 12 minutes on 2 cores).

    python tools/demo/train_clip.py --out iosr_fast/backbones/demo/data/clip.safetensors

An open_clip model with CLIP's contrastive loss. Captions are loose, like those of web-trained CLIPs: most contain a
keyword or the group of the pictured thing, few its exact name. Neither tower sees held-out concepts.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import typer

from iosr_fast.backbones.demo.pictures import FOLDER, load_index, load_pictures
from iosr_fast.backbones.prompts import DEMO_TEMPLATES
from iosr_fast.cli.command import new_file, one_line_errors, run
from iosr_fast.utils.require import require

with one_line_errors():
    torch, open_clip = require("torch", "cpu"), require("open_clip", "cpu")
    from safetensors.torch import save_file

    from iosr_fast.backbones.load import DEMO_NAME
    from iosr_fast.training.augment import augment_batch, draw_augmentation


def sample_caption(concept: dict, rng: random.Random) -> str:
    """The concept's subgroup (20%), one or two of its keywords (65%) or its name (15%), in a template."""
    draw = rng.random()
    if draw < 0.20:
        words = concept["subgroup"]
    elif draw < 0.85 and concept["keywords"]:
        words = " ".join(rng.sample(concept["keywords"], min(rng.choice([1, 2]), len(concept["keywords"]))))
    else:
        words = concept["name"]
    return rng.choice(DEMO_TEMPLATES).format(words)


def main(
    out: Path = typer.Option(..., callback=new_file, help="the safetensors file to write (fp16)"),
    epochs: int = typer.Option(16),
    batch: int = typer.Option(128),
    learning_rate: float = typer.Option(1e-3),
    weight_decay: float = typer.Option(0.1),
    seed: int = typer.Option(0),
) -> None:
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    open_clip.add_model_config(FOLDER / f"{DEMO_NAME}.json")
    model = open_clip.create_model(DEMO_NAME).train()
    tokenizer = open_clip.get_tokenizer(DEMO_NAME)
    pictures = load_pictures("generic")
    concepts = [c for c in load_index()["concepts"] if c["split"] == "generic"]
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    steps_an_epoch = len(images) // batch
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps_an_epoch, pct_start=0.05
    )
    loss_function = open_clip.ClipLoss()
    started = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator)[: steps_an_epoch * batch].split(batch):
            pixels = (augment_batch(images[rows].float() / 255, draw_augmentation(len(rows), generator)) - mean) / std
            captions = [sample_caption(concepts[c], rng) for c in pictures.concepts[rows.numpy()]]
            image_features, text_features, logit_scale = model(pixels, tokenizer(captions))
            loss = loss_function(image_features, text_features, logit_scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)  # exp is at most 100, as in CLIP
            total += loss.item()
        minutes = (time.perf_counter() - started) / 60
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps_an_epoch:.3f} {minutes:.1f} min", flush=True)
        if (epoch + 1) % 4 == 0 or epoch + 1 == epochs:
            state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
            save_file(state, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
