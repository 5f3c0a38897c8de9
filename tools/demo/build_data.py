"""Convert npm's emoji packages to the demo's data: one lossless WebP sheet per style, and an index.

    python tools/demo/build_data.py --out iosr_fast/backbones/demo/data

A *concept* (a class) is an emoji as Unicode defines it; a *style* (a domain) is the font that draws it. Concepts with
at least four of the seven styles are included, without skin tones, flags and letters that are half of a flag. A fixed
seed splits them into `generic` (training of CLIP and adapter) and `held-out` (few-shot evaluation only). Needs npm, and
`pip install resvg-py pillow numpy typer`.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
import typer
from PIL import Image

from iosr_fast.cli.command import run

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
NAMES = "emojibase-data@17.0.0"
LICENCES = "spdx-license-list@6.12.0"
LEFT_OUT_SUBGROUPS = {"skin-tone", "flag", "country-flag", "subdivision-flag"}
TILE, COLUMNS, MIN_STYLES, GENERIC, SPLIT_SEED = 64, 40, 4, 1000, 0


def fetch_package(spec: str, folder: Path) -> Path:
    """Download one npm package and return the folder with its files."""
    done = subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True)
    target = folder / re.sub(r"\W+", "-", spec)
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def plain_code(code: str) -> str:
    """A code point sequence without joiners and variation selectors, on which the packages differ."""
    return "-".join(part for part in code.lower().split("-") if part not in ("fe0f", "200d"))


def squeeze(name: str) -> str:
    """A name without case and hyphens, on which the packages differ."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def match_icons(packages: dict[str, Path], emoji: dict[str, dict]) -> dict[str, dict[str, str]]:
    """For each emoji its icon in each style, by code point if the package has one, else by name."""
    by_name = {squeeze(entry["label"]): code for code, entry in reversed(list(emoji.items()))}
    chars = {style: read_json(folder / "chars.json") for style, folder in packages.items()}
    for table in chars.values():
        for code, name in table.items():
            if plain_code(code) in emoji:
                by_name.setdefault(squeeze(name), plain_code(code))
    icons_of: dict[str, dict[str, str]] = {code: {} for code in emoji}
    for style, folder in packages.items():
        icons = read_json(folder / "icons.json")
        aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
        for code, name in chars[style].items():
            if plain_code(code) in emoji and name in icons["icons"]:
                icons_of[plain_code(code)].setdefault(style, name)
        for name in [*icons["icons"], *aliases]:
            code = by_name.get(squeeze(name))
            if code is not None:
                icons_of[code].setdefault(style, aliases.get(name, name))
    return icons_of


def render(icons: dict, name: str) -> np.ndarray:
    """One icon on white, (TILE, TILE, 3) uint8."""
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=TILE, height=TILE))
    picture = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGBA")
    canvas = Image.new("RGBA", (TILE, TILE), "white")
    canvas.alpha_composite(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def choose_concepts(icons_of: dict[str, dict[str, str]], emoji: dict[str, dict], subgroups: dict) -> list[dict]:
    """The included concepts in Unicode's order, each with its split."""
    concepts = []
    for code, entry in emoji.items():
        subgroup = subgroups.get(str(entry.get("subgroup")))
        if len(icons_of[code]) >= MIN_STYLES and subgroup is not None and subgroup not in LEFT_OUT_SUBGROUPS:
            concepts.append(
                {
                    "name": entry["label"].lower(),
                    "code": code,
                    "subgroup": subgroup.replace("-", " "),
                    "keywords": [tag.lower() for tag in entry.get("tags", [])],
                    "styles": [style for style in STYLES if style in icons_of[code]],
                }
            )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(concepts))
    generic = set(order[:GENERIC].tolist())
    for position, concept in enumerate(concepts):
        concept["split"] = "generic" if position in generic else "held-out"
    return concepts


def write_licences(out: Path, packages: dict[str, Path], licences: Path, names: Path) -> dict[str, dict]:
    """Write the licence texts beside the data; returns the index entry of each style."""
    styles = {}
    for style, folder in packages.items():
        info = read_json(folder / "info.json")
        styles[style] = {
            "title": info["name"],
            "package": STYLES[style],
            "author": info["author"]["name"],
            "source": info["author"]["url"],
            "licence": info["license"]["spdx"],
        }
    for spdx in sorted({entry["licence"] for entry in styles.values()}):
        text = read_json(licences / "licenses" / f"{spdx}.json")["licenseText"]
        text = text.replace("<year> <copyright holders>", "Microsoft Corporation.")  # SPDX's MIT text is a template
        holders = "\n".join(
            f"  {entry['title']}, {entry['author']}, {entry['source']} ({style}.webp)"
            for style, entry in styles.items()
            if entry["licence"] == spdx
        )
        changed = "rendered to 64x64 pixels on white from the vector drawings of the npm packages in index.json"
        (out / f"LICENSE-{spdx}.txt").write_text(
            f"This licence holds for these pictures ({changed}):\n{holders}\n\n{text.strip()}\n", encoding="utf-8"
        )
    (out / "LICENSE-emojibase.txt").write_text(
        "This licence holds for the names, keywords and subgroups in index.json.\n\n"
        + (names / "LICENSE").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    return styles


def main(out: Path = typer.Option(..., help="the folder to write the sheets, index.json and the licences to")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packages = {style: fetch_package(spec, folder) for style, spec in STYLES.items()}
        names, licences = fetch_package(NAMES, folder), fetch_package(LICENCES, folder)
        emoji = {plain_code(e["hexcode"]): e for e in read_json(names / "en" / "data.json")}
        subgroups = read_json(names / "meta" / "groups.json")["subgroups"]
        icons_of = match_icons(packages, emoji)
        concepts = choose_concepts(icons_of, emoji, subgroups)
        styles = write_licences(out, packages, licences, names)
        rows = -(-len(concepts) // COLUMNS)
        for style, package in packages.items():
            icons = read_json(package / "icons.json")
            sheet = np.full((rows * TILE, COLUMNS * TILE, 3), 255, np.uint8)
            for i, concept in enumerate(concepts):
                if style in concept["styles"]:
                    y, x = i // COLUMNS * TILE, i % COLUMNS * TILE
                    sheet[y : y + TILE, x : x + TILE] = render(icons, icons_of[concept["code"]][style])
            path = out / f"{style}.webp"
            Image.fromarray(sheet).save(path, lossless=True, quality=100, method=6)
            print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    index = {"tile": TILE, "columns": COLUMNS, "names": NAMES, "styles": styles, "concepts": concepts}
    (out / "index.json").write_text(json.dumps(index, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    pictures = sum(len(concept["styles"]) for concept in concepts)
    held_out = sum(concept["split"] == "held-out" for concept in concepts)
    print(f"{len(concepts)} concepts ({held_out} held out), {pictures} pictures")


if __name__ == "__main__":
    run(main)
