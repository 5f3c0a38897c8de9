"""Runs in the environment of the peer: writes a CLIP of random weights that infinity-emb opens, and embeds pictures.

python peer_model.py FOLDER VOCABULARY PICTURE...

FOLDER gets a ViT-B/32 of transformers with tokenizer and image processor, and reference.npy: the (N, 512) float32
embeddings, of length 1, that transformers itself computes for the pictures. VOCABULARY is open_clip's gzipped list of
merges of the CLIP tokenizer.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

_MERGES = 49152 - 256 - 2  # those that CLIP uses of the list
_START, _END = "<|startoftext|>", "<|endoftext|>"


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def write_vocabulary(merges_gz: Path, folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt, the two files of a CLIPTokenizer of transformers."""
    merges = gzip.decompress(merges_gz.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, _START, _END])}
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    files[1].write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return files


def main(folder: Path, merges_gz: Path, pictures: list[Path]) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = write_vocabulary(merges_gz, folder)
    tokenizer = CLIPTokenizerFast(str(vocabulary), str(merges), model_max_length=77)
    # open_clip's ViT-B-32 has this activation; all else are the defaults of transformers, which are ViT-B/32.
    config = CLIPConfig(text_config={"hidden_act": "gelu"}, vision_config={"hidden_act": "gelu"})
    model, processor = CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessor(), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rows = []
    with torch.inference_mode():
        for picture in pictures:
            pixels = processor(images=Image.open(picture, formats=("JPEG",)), return_tensors="pt")["pixel_values"]
            features = model.get_image_features(pixel_values=pixels)
            rows.append(torch.nn.functional.normalize(features, dim=-1).numpy()[0])
    np.save(folder / "reference.npy", np.stack(rows).astype(np.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
