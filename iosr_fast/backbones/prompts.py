"""The texts of a class, prompts for its name and descriptions, and the mean of their embeddings."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iosr_fast.backbones.load_tokenizer import load_tokenizer
from iosr_fast.backbones.tokenizer import count_tokens
from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel

Descriptions: TypeAlias = Mapping[str, Sequence[str]]  # texts of classes, by name, beside the prompts
PHOTO_TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.")
MAX_TEXTS = 1000  # templates, or descriptions of a class
MAX_LENGTH = 2000  # characters of one; the tokenizers of most CLIPs cut a text after about 300
_BATCH = 32  # texts of a run
# The demo's CLIP was trained with these (tools/demo/train_clip.py).
DEMO_TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}", "an icon of {}")


def default_templates(clip: LoadedModel) -> tuple[str, ...]:
    """The templates that the demo's CLIP was trained with, or PHOTO_TEMPLATES for every other CLIP.

    SigLIP's authors evaluate it with CLIP's prompts, too (big_vision, discriminative_classifier.py, "clip_paper").
    """
    return DEMO_TEMPLATES if clip.name == "demo" else PHOTO_TEMPLATES


def text_fault(text: Any) -> str | None:
    """Why this can't be a template or a description, or None. Tokenizers read tabs and line ends as spaces.

    >>> text_fault("a photo\\0 of a cat"), text_fault("a photo of a cat")
    ('which has control characters or is no valid Unicode', None)
    """
    if not isinstance(text, str):
        return "which is no text"
    if not text.strip():
        return "which is blank"
    if len(text) > MAX_LENGTH:
        return f"which has more than {MAX_LENGTH:,} characters"
    if any(unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r" for char in text):
        return "which has control characters or is no valid Unicode"
    return None


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple. Raises ValueError for too many, one that is no text (text_fault), and one without a
    `{}` for the class name."""
    if not isinstance(templates, Sequence) or isinstance(templates, str) or len(templates) > MAX_TEXTS:
        shown = f"{len(templates):,}" if isinstance(templates, Sequence) and len(templates) > 9 else repr(templates)
        raise IosrFastError(f"expected a list of at most {MAX_TEXTS:,} templates, got {shown:.80}")
    for template in templates:
        fault = text_fault(template)
        if fault or "{}" not in template:
            got = f"{template!r:.80}{', ' * bool(fault)}{fault or ''}"
            raise IosrFastError(f"expected templates with {{}} where the class name goes, got {got}")
    return tuple(templates)


def class_texts(
    tokenizer: Any, names: Sequence[str], templates: Sequence[str], descriptions: Descriptions | None
) -> list[list[str]]:
    """The texts of each class: its name in each of the templates, then its descriptions, if it has any.

    Raises ValueError for no names, and for a text that is none (text_fault) or that the tokenizer drops, cuts or takes
    for a special token.
    """
    if isinstance(names, str) or not len(names):
        raise IosrFastError(f"expected a list of at least one class name, got {names!r}")
    texts, empty, most = [], count_tokens(tokenizer, ""), tokenizer.context_length
    for name in names:
        own = list((descriptions or {}).get(name, ()))
        for text in (name, *own):
            if fault := text_fault(text):
                raise IosrFastError(f"expected names and descriptions that are texts, got {text!r:.80}, {fault}")
        texts.append([*(template.replace("{}", name) for template in templates), *own])
        for text in (name, *texts[-1]):
            if (count := count_tokens(tokenizer, text)) > most:
                what = f"texts of at most {most} tokens, start and end included"
                fix = "description" if text in own else 'name, or the prompts (templates=["{}"], --template "{}")'
                raise IosrFastError(f"this CLIP reads {what}, got {count} tokens: {text[:100]!r}; shorten the {fix}")
            if count == empty:
                raise IosrFastError(f"expected names and descriptions that the tokenizer does not drop, got {text!r}")
    return texts


def check_texts(
    model: str,
    config: Mapping[str, Any],
    names: Sequence[str],
    templates: Sequence[str] | None,
    descriptions: Descriptions,
) -> None:
    """`class_texts` of a CLIP that is not loaded yet: its tokenizer is small beside the weights that it saves."""
    prompts = PHOTO_TEMPLATES if templates is None else templates
    class_texts(load_tokenizer(model, config), names, prompts, descriptions)


def embed_classes(
    clip: LoadedModel,
    class_names: Sequence[str],
    templates: Sequence[str] | None = None,
    descriptions: Descriptions | None = None,
) -> np.ndarray:
    """(C, D) float32, L2-normalised: the mean of the unit embeddings of each class's texts (`class_texts`).

    `templates` default to `default_templates`. Raises ValueError as `check_templates` and `class_texts` do. Source:
    Radford et al. 2021, section 3.1.4; descriptions, Pratt et al. 2023 (CuPL).
    """
    import torch

    from iosr_fast.backbones.text_tower import encode_tokens

    templates = default_templates(clip) if templates is None else check_templates(templates)
    texts = class_texts(clip.tokenizer, class_names, templates, descriptions)
    flat = [text for own in texts for text in own]
    with torch.inference_mode():
        parts = [encode_tokens(clip, clip.tokenizer(flat[i : i + _BATCH])) for i in range(0, len(flat), _BATCH)]
        means = torch.stack([rows.mean(0) for rows in torch.cat(parts).split([len(own) for own in texts])])
        return (means / means.norm(dim=1, keepdim=True)).numpy()
