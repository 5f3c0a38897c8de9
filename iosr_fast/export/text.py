"""A CLIP's text encoder for classifiers, and from it to text.onnx and tokenizer.json, checked against open_clip."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.backbones.demo.pictures import load_index
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.backbones.prompts import DEMO_TEMPLATES, PHOTO_TEMPLATES, Descriptions, default_templates, embed_classes
from iosr_fast.backbones.text_tower import POOLS, TextTower, end_token, pooling, text_transformer
from iosr_fast.backbones.tokenizer import SPECIAL_TOKENS, Clean, Tokenizer
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, WEIGHTS_FILE, TextEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.check import check_rows
from iosr_fast.export.onnx import to_onnx
from iosr_fast.sealed.files import in_cache
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import MANIFEST, SCHEMA, write_manifest
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.utils.require import require

TEXT_KIND = "text-encoder"
TEXT_EXPORT = 2  # increases when export_text writes other files for the same CLIP
PAD = 0  # open_clip's padding, behind the end token
LARGEST_FILE = 2**31 - 2**24  # of one file with its weights: protobuf's limit, minus room for the graph
HARD_TEXTS = (
    "cat",
    "a photo of a cat.",
    "A Photo OF A CAT",
    "  two  spaces\tand\na line ",
    "don't, we're, I've, I'm, they'll, she'd, it's; 'tis rock 'n' roll's",
    "IT'S ST. JOHN'S-WORT (Hypericum perforatum)",
    "rock\N{RIGHT SINGLE QUOTATION MARK}n\N{RIGHT SINGLE QUOTATION MARK}roll \N{LEFT DOUBLE QUOTATION MARK}quoted",
    "'\N{LATIN SMALL LETTER LONG S} \N{LATIN SMALL LETTER LONG S}alt \N{KELVIN SIGN}elvin",
    "Boeing 737-800, 3.14, 1e-5, 100%, \N{SUPERSCRIPT TWO} \N{VULGAR FRACTION ONE HALF} \N{ROMAN NUMERAL FOUR}",
    "!?#$%^*()_+-=[]{}|;:,./~`@\\",
    "...--__!!<<>>",
    "café Straße ÎLE smörgåsbord Ærøskøbing",
    "cafe\N{COMBINING ACUTE ACCENT} x\N{COMBINING GREEK YPOGEGRAMMENI}y ᾳ",
    "İstanbul ΟΔΥΣΣΕΥΣ ﬁﬂﬃ Ǆ",
    "柴犬 の 写真 사진 図書館",
    "собака कुत्ता كلب כלב สุนัข",
    "🐈 👩\N{ZERO WIDTH JOINER}🚀 🇨🇭 👍🏽 \N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}",
    "a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c\N{ZERO WIDTH SPACE}d\N{SOFT HYPHEN}e",
    "Tom &amp; Jerry &amp;amp; &lt;b&gt; &eacute; &#39;s &#x1F408; &nbsp; &EACUTE; &amp;lt;",
    "schÃ¶n â€œbrokenâ€\N{DELETE} \N{BROKEN BAR}",
    "\x1b[31mred\x1b[0m \x00\x07\x1f\x0b end",
    "\ud83d\udc08 \udc08",
    "\N{CJK UNIFIED IDEOGRAPH-3134A}\U00032000 \U000107bb",  # letters that Unicode got late
    "start of text end of text <start_of text>",
    "supercalifragilisticexpialidocious" * 3,
    "word " * 100,
    "1234567890" * 20,
    "",
)


@dataclass(frozen=True)
class ClipText:
    """A TextSource over a loaded CLIP. Exporting takes seconds, so exports are cached."""

    clip: LoadedModel

    def embed_classes(
        self, names: Sequence[str], templates: Sequence[str] | None = None, descriptions: Descriptions | None = None
    ) -> np.ndarray:
        """As backbones.prompts.embed_classes, with this CLIP."""
        return embed_classes(self.clip, names, templates, descriptions)

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Export text encoder and tokenizer into `folder`; None, with a warning, if they can't be exported."""
        export = in_cache("text", self._name())
        if not (export / MANIFEST).is_file():
            try:
                with new_folder(export, TEXT_KIND) as temporary:
                    write_manifest(temporary, TEXT_KIND, {"text": export_text(self.clip, temporary)})
            except (ValueError, ArithmeticError, ImportError, RuntimeError) as error:
                logging.getLogger("iosr_fast").warning("saved without a text encoder: %s", error)
                return None
        source = open_verified(export, TEXT_KIND)
        for name in source.files:
            source.copy(name, folder / name)
        # A CLIP of the same weights under another name has other prompts.
        return {**source.manifest["text"], "templates": list(default_templates(self.clip))}

    def _name(self) -> str:
        """Of the cached export. The CLIP's fingerprint covers its weights, not the files of a tokenizer."""
        tokenizer = self.clip.tokenizer
        tokens = f"-{tokenizer.digest()[:16]}" if isinstance(tokenizer, Tokenizer) else ""
        return f"{self.clip.fingerprint[:16]}{tokens}-v{SCHEMA}.{TEXT_EXPORT}"


def export_text(clip: LoadedModel, folder: Path) -> dict[str, Any]:
    """Write text.onnx and tokenizer.json into an existing `folder`; returns the facts for `TextEncoder`.

    Weights over 2 GB, the limit of one ONNX file, go to text.weights beside it.

    text.onnx: "tokens" int64 (T, L) -> "embeddings" float32 (T, D), L2-normalised. T is dynamic; L is dynamic too where
    texts may be cut behind their end tokens (`text_tower.end_token`), and the context length elsewhere. Both files are
    compared with open_clip: token ids of every class name of the demo in every template and of texts that are hard to
    split, and embeddings of the latter.

    Every TextTransformer of open_clip can be written, in a CLIP, a CustomTextCLIP or a CoCa, with open_clip's own
    tokenizer or one of `load_tokenizer`.

    Raises ValueError for a text encoder or tokenizer of another kind (before anything is written) and for token ids
    that differ; ArithmeticError for an embedding with an error above 1e-4.
    """
    _check_exportable(clip)
    written = clip.tokenizer if isinstance(clip.tokenizer, Tokenizer) else _convert(clip.tokenizer)
    tower, length, end = TextTower(text_transformer(clip.model)).eval(), written.context_length, end_token(clip)
    axes = {0: torch.export.Dim("texts", min=1)}
    if end is not None:
        axes[1] = torch.export.Dim("length", min=2, max=length)
    tokens = torch.from_numpy(written.encode(["cat", "dog"]))[:, : None if end is None else length - 1]
    large = sum(value.numel() * value.element_size() for value in tower.state_dict().values()) > LARGEST_FILE
    facts: dict[str, Any] = {
        "context_length": length,
        "width": tower(tokens).shape[1],
        "precision": "fp32",
        "clean": written.clean,
        "eot": end,
        "templates": list(default_templates(clip)),
        "clip_fingerprint": clip.fingerprint,
    }
    written.backend.save(str(folder / TOKENIZER_FILE), pretty=False)
    model = to_onnx(tower, tokens, "tokens", ["embeddings"], axes, folder / WEIGHTS_FILE if large else None)
    require("onnx", "cpu").save(model, str(folder / FILE))
    encoder = TextEncoder(folder, facts)
    facts["tokens_checked"] = _check_tokens(clip, encoder)
    with torch.inference_mode():
        expected = clip.model.encode_text(clip.tokenizer(list(HARD_TEXTS)), normalize=True).numpy()
    got = np.concatenate([encoder.embed(HARD_TEXTS[:1]), encoder.embed(HARD_TEXTS[1:])])  # batches of 1 and of more
    return facts | check_rows(f"text embeddings by {FILE}", got, expected, "fp32")


def _check_exportable(clip: LoadedModel) -> None:
    """Raise ValueError for a text encoder or a tokenizer that can't be written."""
    open_clip = require("open_clip", "cpu")
    tokenizer: Any = clip.tokenizer
    text = text_transformer(clip.model)
    if text is None or type(tokenizer) not in (open_clip.SimpleTokenizer, Tokenizer):
        got = getattr(clip.model, "text", clip.model) if text is None else tokenizer
        raise IosrFastError(
            f"the text encoder of {clip.name} can't be exported: expected open_clip's TextTransformer with its "
            f"SimpleTokenizer or a tokenizer.json, got {type(got).__name__}, which runs where it was loaded only"
        )
    length, pool = text.context_length, pooling(text)[0]
    refused = {
        f"{pool!r} pooling; expected one of {POOLS}": pool not in POOLS,
        f"a context of {length} for rows of {tokenizer.context_length}": length != tokenizer.context_length,
    }
    if not isinstance(tokenizer, Tokenizer):  # load_tokenizer has checked one of a tokenizer.json
        few = text.vocab_size < tokenizer.vocab_size
        special = tuple(tokenizer.decoder[i] for i in tokenizer.all_special_ids)
        other = tokenizer.reduction_fn is not None or _clean_of(tokenizer) is None
        refused |= {
            f"a vocabulary of {text.vocab_size} for {tokenizer.vocab_size} tokens": few,
            "special tokens of its own": special != SPECIAL_TOKENS,
            "a tokenizer that does not lower the case, or drops tokens": other,
        }
    for reason, applies in refused.items():
        if applies:
            raise IosrFastError(f"the text encoder of {clip.name} can't be exported: it has {reason}")


def _clean_of(tokenizer: Any) -> Clean | None:
    """How a SimpleTokenizer cleans texts, if it lowers the case."""
    functions = require("open_clip", "cpu").tokenizer.get_clean_fn
    kinds: tuple[Clean, ...] = ("lower", "canonicalize")
    return next((kind for kind in kinds if tokenizer.clean_fn is functions(kind)), None)


def _convert(tokenizer: Any) -> Tokenizer:
    """open_clip's SimpleTokenizer as a tokenizer of the `tokenizers` package.

    Character classes are written out as ranges: the two packages' regular expressions use different versions of
    Unicode, and open_clip's ignores case, which excludes U+0345 (a mark whose upper case is a letter).
    """
    tokenizers = require("tokenizers", "serve")
    letters, numbers, others = (_character_ranges(kind) for kind in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
    # For lower-case text, ignoring case adds only the long s to the contractions.
    pattern = f"'[s\N{LATIN SMALL LETTER LONG S}]|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{numbers}]|[{others}]+"
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    converted = tokenizers.Tokenizer(tokenizers.models.BPE(tokenizer.encoder, merges, end_of_word_suffix="</w>"))
    converted.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = SPECIAL_TOKENS
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.encoder[token]) for token in SPECIAL_TOKENS]
    )
    converted.enable_truncation(tokenizer.context_length)
    converted.enable_padding(length=tokenizer.context_length, pad_id=PAD, pad_token=tokenizer.decoder[PAD])
    clean = _clean_of(tokenizer)
    assert clean is not None
    return Tokenizer(converted, clean)


def _character_ranges(kind: str) -> str:
    """The characters that match `kind` in open_clip's regular expressions, as ranges for [...]."""
    regex = require("regex", "cpu")
    characters = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF)
    spans = (match.group() for match in regex.finditer(f"{kind}+", characters, regex.IGNORECASE))
    return "".join(f"\\x{{{ord(span[0]):x}}}-\\x{{{ord(span[-1]):x}}}" for span in spans)


def _check_tokens(clip: LoadedModel, encoder: TextEncoder) -> int:
    """The number of compared texts. Raises ValueError with the first that differs.

    Other tokenizers than its SimpleTokenizer are open_clip's where transformers is installed, which it needs for them.
    """
    tokenizer: Any = clip.tokenizer
    if isinstance(tokenizer, Tokenizer) and tokenizer.reference and importlib.util.find_spec("transformers"):
        tokenizer = tokenizer.reference()
    names = [concept["name"] for concept in load_index()["concepts"]]
    templates = dict.fromkeys((*default_templates(clip), *DEMO_TEMPLATES, *PHOTO_TEMPLATES))
    texts = [template.replace("{}", name) for template in templates for name in names] + list(HARD_TEXTS)
    expected, got = tokenizer(texts).numpy(), encoder.tokenize(texts)
    for row in np.flatnonzero((expected != got).any(1))[:1]:
        wrong, right = (ids[row].tolist() for ids in (got, expected))
        raise IosrFastError(f"expected {TOKENIZER_FILE} to encode {texts[row]!r} as open_clip's {right}, got {wrong}")
    return len(texts)
