"""Our servers and infinity-emb's: the same ViT-B/32 of random weights and the same pictures.

Our classifiers give both embeddings and score them; our /v1/embeddings and infinity answer the same requests by the
plain embedding, which must be that of our fp32 encoder.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.backbones.adapter import random_adapter, save_adapter
from iosr_fast.backbones.load import load_clip
from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import MissingPackageError
from iosr_fast.images.preprocess import to_pixels
from tools.serving_load.client import Queries, make_queries
from tools.serving_load.contenders import QUERIES, Contender, fit

MODEL, FIRST_ADAPTED_BLOCK, BOTTLENECK, MIN_COSINE = "ViT-B-32", 8, 256, 0.999
VERSION = "0.0.78"
# As its documentation starts it, without BetterTransformer and the warm-up by texts; nothing is downloaded or reported.
OPTIONS = "v2 --engine torch --device cpu --no-bettertransformer --no-model-warmup --host 127.0.0.1"
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
# open_clip's names of the image encoder's weights in those of transformers, replaced one after another.
NAMES = {
    "transformer.resblocks": "encoder.layers", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2", "conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
}  # fmt: skip


def check_installed(environment: Path) -> None:
    """infinity-emb has an environment of its own, because it asks for older versions than ours."""
    if not (environment / "bin/infinity_emb").exists():
        raise MissingPackageError(
            f"infinity-emb is needed in {environment}: python -m venv {environment} && {environment}/bin/pip install "
            f"'infinity-emb[server,torch,vision]=={VERSION}' aiohttp soundfile brings it"
        )


def beside_infinity(folder: Path, environment: Path) -> list[Contender]:
    """Writes the models into `folder`, which takes a minute or two."""
    clip, adapter = load_clip(MODEL, "none"), folder / "adapter.safetensors"
    write_model(clip.model.visual, folder / "clip")
    save_adapter(random_adapter(clip, FIRST_ADAPTED_BLOCK, BOTTLENECK), adapter)
    contenders = []
    for precision in ("int8", "fp32"):
        classifier = Classifier(
            MODEL,
            "none",
            adapter,
            precision=precision,
            method="tip-adapter++",
            tune="none",
        )
        fit(classifier).save(folder / precision)
        queries = make_queries(classifier, QUERIES)
        contenders.append(Contender.of_bundles(f"iosr_fast, {precision}", queries, [[folder / precision]], None))
    plain = classifier.encoder.encode(to_pixels(queries.bodies, classifier.encoder.geometry)).plain  # in fp32
    asked = queries.bodies, np.asarray(plain)
    ours = infinity_queries(*asked, MODEL, "/v1/embeddings")
    contenders.append(Contender.of_bundles("iosr_fast, fp32, embeddings", ours, [[folder / "fp32/engine"]], None))
    command = [str(environment / "bin/infinity_emb"), *OPTIONS.split(), "--model-id", str(folder / "clip")]
    command += ["--served-model-name", "clip"]
    theirs = infinity_queries(*asked, "clip", "/embeddings")
    return [*contenders, Contender(f"infinity-emb {VERSION}", theirs, [command], ready="/health", environment=OFFLINE)]


def write_model(visual: Any, folder: Path) -> None:
    """The image encoder of an open_clip model as a CLIPModel of transformers, with a text side that is never used."""
    from safetensors.torch import save_file

    weights: dict[str, Any] = {}
    for name, tensor in visual.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name == "proj":
            weights["visual_projection.weight"] = tensor.T.contiguous()
        elif "in_proj" in name:  # query, key and value in one
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"vision_model.{name.replace('attn.in_proj_', f'self_attn.{part}_proj.')}"] = rows.contiguous()
        else:
            weights[f"vision_model.{name}"] = tensor
    # open_clip's ViT-B-32 has this activation; the other defaults of transformers are those of ViT-B/32.
    config = {"text_config": {"num_hidden_layers": 1, "vocab_size": 2}, "vision_config": {"hidden_act": "gelu"}}
    files: dict[str, Any] = {
        "config": {"model_type": "clip", "architectures": ["CLIPModel"], **config},
        "preprocessor_config": {"image_processor_type": "CLIPImageProcessor"},
        "tokenizer_config": {"tokenizer_class": "CLIPTokenizer"},
        "vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1},
    }
    folder.mkdir()
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def infinity_queries(images: Sequence[bytes], expected: np.ndarray, model: str, path: str) -> Queries:
    """JPEGs as infinity-emb takes them, a data URI in JSON; `expected` (N, D) are the embeddings, of length 1."""
    texts = [base64.b64encode(image).decode() for image in images]
    asked = [{"model": model, "modality": "image", "input": [f"data:image/jpeg;base64,{text}"]} for text in texts]

    def is_wrong(number: int, answer: Any) -> bool:
        return not float(np.asarray(answer["data"][0]["embedding"], np.float32) @ expected[number]) >= MIN_COSINE

    return Queries([json.dumps(one).encode() for one in asked], is_wrong, "application/json", [path])
