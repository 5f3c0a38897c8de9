"""The command `iosr-fast models`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from iosr_fast.cli.options import argument, option

if TYPE_CHECKING:
    from iosr_fast.backbones.support import ModelSupport


KINDS = {
    "photographs": "a small network trained on ImageNet, installed with iosr_fast; without texts",
    "timm/NAME[.TAG]": "an image encoder of timm, like timm/vit_small_patch14_dinov2; without texts",
    "FILE.onnx": "an image encoder of your own, with its geometry in encoder.json beside it; without texts",
    "hf-hub:OWNER/NAME": "a CLIP of the Hugging Face hub, in open_clip's format",
    "local-dir:FOLDER": "the same in a folder",
    "demo": "a toy CLIP, to try the commands",
    "NAME": "a CLIP of open_clip, with one of its tags as --pretrained:",
}


def models(
    name: Annotated[str | None, argument("NAME", "One model, of any kind but FILE.onnx.")] = None,
    as_json: Annotated[bool, option("Print JSON.", "--json")] = False,
) -> None:
    """List the kinds of models, and the models of open_clip that have published weights with what is supported of each.

    Every image encoder becomes an engine, for the methods without ++. dual: it is fused with an adapter, for the
    methods with ++, too. text: its text encoder is exported, so that a saved classifier needs no PyTorch to add
    classes. Image encoders are built of shapes alone, which takes 10 s for all; no weights are downloaded.

    \b
    iosr-fast models
    iosr-fast models ViT-B-16-SigLIP2
    iosr-fast models timm/vit_small_patch14_dinov2
    """
    from iosr_fast.backbones.support import describe_model, list_models

    listed = list_models() if name is None else [describe_model(name)]
    if as_json:
        keys = ("name", "tags", "family", "dual", "text")
        rows = [{key: value for key, value in dataclasses.asdict(one).items() if key in keys} for one in listed]
        typer.echo(json.dumps(rows if name is None else rows[0], indent=2))
    else:
        if name is None:
            typer.echo("\n".join(f"{kind:<19}{text}" for kind, text in KINDS.items()) + "\n")
        typer.echo(format_table(listed))
        if name is not None:
            typer.echo(f"tags  {', '.join(listed[0].tags) or 'none: the weights are its own'}")


def format_table(listed: list[ModelSupport]) -> str:
    """A line a model, and below them the totals."""
    width = max(len(one.name) for one in listed)
    family = max(12, *(len(one.family) for one in listed))
    lines = [f"{'model':<{width}}  {'family':<{family}}  image  width  tags  dual  text"]
    for one in listed:
        dual, text = ("yes" if value else "no" for value in (one.dual, one.text))
        numbers = f"{one.image_size:>5}  {one.width:>5}  {len(one.tags):>4}"
        needs = "  needs transformers" if one.text is False else ""
        lines.append(f"{one.name:<{width}}  {one.family:<{family}}  {numbers}  {dual:<4}  {text:<4}{needs}".rstrip())
    with_dual, with_text = (sum(bool(getattr(one, key)) for one in listed) for key in ("dual", "text"))
    return "\n".join([*lines, f"{len(listed)} models: {with_dual} dual, {with_text} text"])
