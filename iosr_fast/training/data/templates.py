"""Prompts for class names, `{}` being the name: the one that CoOp uses for each set, and CLIP's seven for ImageNet.

Sources: Zhou et al., CoOp (arXiv 2109.01134), hand-crafted prompts; Radford et al., CLIP (arXiv 2103.00020), the subset
of its 80 ImageNet prompts that its notebook found to do best. CUB, Stanford Dogs and PlantDoc: the paper's.
"""

from __future__ import annotations

IMAGENET_SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
PHOTO = "a photo of a {}."
# Sets that are not named here have PHOTO.
OWN_PROMPT = {
    "cub": "a photo of a {}, a type of bird.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "flowers102": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "ucf101": "a photo of a person doing {}.",
}


def one_prompt(name: str) -> str:
    """The single prompt of an evaluation set."""
    return OWN_PROMPT.get(name, PHOTO)


def templates_for(name: str) -> list[str]:
    """The prompts to average for an evaluation set: the seven for ImageNet and its shifted versions, else the one."""
    return list(IMAGENET_SEVEN) if name.startswith("imagenet") else [one_prompt(name)]
