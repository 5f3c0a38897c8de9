"""Our server beside infinity-emb: the same ViT-B/32 of random weights, pictures and clients, in turns in one run.

python benchmarks/peer_infinity.py --json build/serving-peer.json

Our classifiers give both embeddings and score them, our /v1/embeddings and infinity answer the same requests by the
plain embedding, which must be that of our fp32 encoder.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.torch import save_file

from benchmarks.show import lines_of, origin
from iosr_fast.backbones.adapter import random_adapter, save_adapter
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.backbones.load import load_clip
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import new_file, run
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.evaluation.table import facts
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.preprocess import to_pixels
from tools.load_test import PACKAGES as OURS
from tools.load_test import Contender, capacity, lone, make_rows, turns
from tools.serving_load.client import Queries, make_queries, run_alone
from tools.serving_load.rows import problems_of
from tools.serving_load.server import ServerProcess

MODEL, FIRST_ADAPTED_BLOCK, BOTTLENECK = "ViT-B-32", 8, 256
CLASSES, SHOTS, QUERIES, ROUNDS, SECONDS, MIN_COSINE = 10, 2, 64, 3, 8.0, 0.999
INFINITY = "infinity-emb 0.0.78"
PACKAGES = ("infinity-emb[server,torch,vision]==0.0.78", "aiohttp", "soundfile")
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


def make_environment(folder: Path) -> Path:
    """infinity-emb's program in a virtual environment; made once, in minutes. CalledProcessError of pip."""
    program = folder / "bin" / "infinity_emb"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", *PACKAGES], check=True)
    return program


def write_model(visual: Any, folder: Path) -> None:
    """The image encoder of an open_clip model as a CLIPModel of transformers, with a text side that is never used."""
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
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_models(folder: Path) -> dict[str, Path]:
    """Two classifiers of the CLIP that is written beside them, by precision; made once, in a minute or two."""
    bundles = {precision: folder / f"classifier-{precision}" for precision in ("fp32", "int8")}
    if all((bundle / "manifest.json").exists() for bundle in bundles.values()):
        return bundles
    engines = {precision: folder / f"engine-{precision}" for precision in bundles}
    clip = load_clip(MODEL, "none")
    write_model(clip.model.visual, folder / "clip")
    saved, adapter = folder / "adapter.safetensors", random_adapter(clip, FIRST_ADAPTED_BLOCK, BOTTLENECK)
    save_adapter(adapter, saved)
    pictures = list(load_pictures("held-out").images[: CLASSES * SHOTS])
    write_engine(source_of(clip, adapter), engines["fp32"])
    write_engine(
        EngineSource(engines["fp32"]), engines["int8"], "auto", "int8", pictures=to_pixels(pictures, clip.geometry)
    )
    for precision, bundle in bundles.items():
        classifier = Classifier(MODEL, "none", saved, engine=engines[precision], method="tip-adapter++", tune="none")
        classifier.fit(pictures, [f"class {number // SHOTS}" for number in range(len(pictures))]).save(bundle)
    return bundles


def infinity_queries(images: list[bytes], expected: np.ndarray, model: str, path: str) -> Queries:
    """JPEGs as infinity-emb takes them, a data URI in JSON; `expected` (N, D) are the embeddings, of length 1."""
    texts = [base64.b64encode(image).decode() for image in images]
    asked = [{"model": model, "modality": "image", "input": [f"data:image/jpeg;base64,{text}"]} for text in texts]

    def is_wrong(number: int, answer: Any) -> bool:
        return not float(np.asarray(answer["data"][0]["embedding"], np.float32) @ expected[number]) >= MIN_COSINE

    return Queries([json.dumps(one).encode() for one in asked], is_wrong, "application/json", path)


def main(
    json_path: Annotated[Path, typer.Option("--json", callback=new_file, help="Write the rows here.")],
    folder: Annotated[Path, typer.Option(help="For infinity's environment and the models.")] = Path("build/peer"),
) -> None:
    """Load the servers in turns and print a table with the ratios. Exit code 2 for a wrong answer."""
    program, bundles = make_environment(folder / "infinity"), make_models(folder)
    with ExitStack() as stack:
        servers: dict[str, tuple[ServerProcess, Queries]] = {}
        for precision, bundle in reversed(bundles.items()):
            queries = make_queries(classifier := Classifier.load(bundle), QUERIES)
            servers[f"iosr_fast, {precision}"] = stack.enter_context(ServerProcess.of_bundle(bundle)), queries
        plain = classifier.encoder.encode(to_pixels(queries.bodies, classifier.encoder.geometry)).plain  # in fp32
        command = [str(program), *OPTIONS.split(), "--model-id", str(folder / "clip"), "--served-model-name", "clip"]
        server = stack.enter_context(ServerProcess(command, "/health", OFFLINE))
        asked = queries.bodies, np.asarray(plain)
        embedding = stack.enter_context(ServerProcess.of_bundle(folder / "engine-fp32"))
        servers["iosr_fast, fp32, embeddings"] = embedding, infinity_queries(*asked, MODEL, "/v1/embeddings")
        servers[INFINITY] = server, infinity_queries(*asked, "clip", "/embeddings")  # the last one is the rival
        contenders = [Contender(name) for name in servers]

        async def measure() -> None:
            for each in turns(contenders, ROUNDS):
                await lone(each, *servers[each.name], count=10)
                await capacity(each, *servers[each.name], SECONDS)

        run_alone(measure())
    rows = [row | facts(OURS) | {"bench": "serving-peer", "model": MODEL} for row in make_rows(contenders, 60_000)]
    write_rows(json_path, rows)
    print("\n".join([*lines_of(rows), "", origin("serving-peer", rows)]))
    if any(map(problems_of, rows)):
        raise RuntimeError("; ".join(map(problems_of, rows)))


if __name__ == "__main__":
    run(main)
