"""Token merging: a transformer block averages its r most similar pairs of tokens (ToMe, Bolya et al., ICLR 2023).

ToMe (arXiv 2210.09461) matches tokens in two sets, so that a token is merged at most once in a block. The number r is
fixed, so shapes are static but for the batch. The form here exports to ONNX as TopK, Gather, CumSum and one product; it
computes no size from the batch, and treats each picture of a batch, and so each stream of a dual encoder, alone.
"""

from __future__ import annotations

from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402


def merged_per_block(patches: int, blocks: int, merged: int) -> list[int]:
    """How many tokens each block merges: `merged`, at most half of its patches, and none in the last block, of which
    most encoders use the CLS token only.

    >>> merged_per_block(patches=16, blocks=6, merged=5)
    [5, 5, 3, 1, 1, 0]
    """
    counts = []
    for _ in range(blocks - 1):
        counts.append(min(merged, patches // 2))
        patches -= counts[-1]
    return [*counts, 0]


def merge_tokens(
    x: torch.Tensor, sizes: torch.Tensor | None, keys: torch.Tensor, count: int, prefix: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, L, W) -> (N, L - count, W), and the sizes (N, L - count) float32: how many patches a token stands for.

    sizes  (N, L) of the tokens before; None: all 1
    keys   (N, heads, L, d) of the block's attention, whose mean over heads is compared by cosine
    prefix tokens (CLS, registers) come first and are never merged

    Patches 1, 3, ... (from 0) look for the nearest of patches 0, 2, ...; the `count` nearest are merged, by means
    weighted with sizes. The result is the prefix, the patches 1, 3, ... that stay, in order, then 0, 2, ....
    """
    if sizes is None:
        sizes = torch.ones_like(x[:, :, 0], dtype=torch.float32)
    metric = keys.float().mean(1)
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
    nearest, to = (metric[:, prefix + 1 :: 2] @ metric[:, prefix::2].transpose(1, 2)).max(-1)
    order = nearest.topk(nearest.shape[1]).indices
    moved, stay = order[:, :count], order[:, count:].sort(-1).values
    targets = torch.arange((x.shape[1] - prefix + 1) // 2, device=x.device)
    joins = (to.gather(1, moved)[:, None] == targets[:, None]).float()  # (N, targets, count), one 1 a column

    source, size = _take(x, moved, prefix).float(), _take(sizes[..., None], moved, prefix)
    target, old = x[:, prefix::2].float(), sizes[:, prefix::2, None]
    new = old + joins @ size
    mean = ((target * old + joins @ (source * size)) / new).to(x.dtype)
    # Parts without tokens are left out: the exporter can't reshape them.
    tokens, counts = [mean], [new]
    if stay.shape[1]:
        tokens, counts = [_take(x, stay, prefix), mean], [_take(sizes[..., None], stay, prefix), new]
    if prefix:
        tokens, counts = [x[:, :prefix], *tokens], [sizes[:, :prefix, None], *counts]
    return torch.cat(tokens, dim=1), torch.cat(counts, dim=1)[..., 0]


def _take(x: torch.Tensor, rows: torch.Tensor, prefix: int) -> torch.Tensor:
    """x (N, L, W), rows (N, k) of patches 1, 3, ... -> (N, k, W), by one Gather of whole rows."""
    length, width = x.shape[1:]
    # 0, L, 2 L, ...: where each picture begins, by a sum instead of a size.
    begins = ((rows[:, :1] * 0 + length).cumsum(0)) - length
    chosen = (2 * rows + prefix + 1 + begins).reshape(-1)
    return x.reshape(-1, width).index_select(0, chosen).reshape(-1, rows.shape[1], width)
