"""Small Hugging Face tokenizers in the formats of those that SigLIP, SigLIP 2, CLIPA and XLM-V load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
CORPUS = (
    "a photo of a cat. a drawing of two dogs! don't, we're; rock 'n' roll's 1234567890 3.14",
    "Zürich's Grossmünster, café Straße ÎLE; İstanbul ΟΔΥΣΣΕΥΣ собака 柴犬 の 写真 كلب",
    "the quick brown fox jumps over the lazy dog; a small red house on a hill, an icon of a tree",
    "This is a picture of something very large: St. John's-wort (Hypericum perforatum)",
)


def siglip(folder: Path, vocabulary: int = 300) -> Path:
    """As timm/ViT-B-16-SigLIP: a SentencePiece unigram model of T5, padded with its end token."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), SPACE),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(CORPUS, _unigram(["<pad>", "</s>", "<unk>"], vocabulary))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(made, folder, "T5Tokenizer", **tokens, extra_ids=0, legacy=False)


def siglip2(folder: Path, vocabulary: int = 500) -> Path:
    """As timm/ViT-B-16-SigLIP2-256: Gemma's byte-pair encoding with bytes for unknown characters."""
    special, unknown_bytes = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{i:02X}>" for i in range(256)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer, space = normalizers.Replace(" ", SPACE), pre_tokenizers.Split(" ", "merged_with_previous")
    trained.pre_tokenizer = space
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocabulary - 260, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = [*special, *unknown_bytes, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    bpe = models.BPE(
        {word: i for i, word in enumerate(words)},
        [tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(bpe)
    made.normalizer, made.pre_tokenizer = trained.normalizer, space
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    made.add_tokens([AddedToken("<h1>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="$A:0 <eos>:0", special_tokens=[("<eos>", 1)])
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return _save(
        made, folder, "GemmaTokenizer", **tokens, add_bos_token=False, add_eos_token=True, padding_side="right"
    )


def bert(folder: Path, vocabulary: int = 200) -> Path:
    """As bert-base-uncased, of whose special tokens tokenizer_config.json says nothing."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _save(made, folder, "BertTokenizer", do_lower_case=True, model_max_length=512)


def xlm_v(folder: Path, vocabulary: int = 300) -> Path:
    """As facebook/xlm-v-base: a SentencePiece unigram model between <s> and </s>, padded with <pad>, number 1."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.train_from_iterator(CORPUS, _unigram(["<s>", "<pad>", "</s>", "<unk>"], vocabulary))
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"}
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False}
    return _save(made, folder, "XLMRobertaTokenizer", **tokens, pad_token="<pad>", mask_token=mask)


def _unigram(special: list[str], vocabulary: int) -> Any:
    return trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False
    )


def _save(made: Any, folder: Path, kind: str, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind}))
    return folder
