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
    """How many tokens each block merges: `merged`, at most half of its tokens beside CLS, and none in the last block,
    whose output is used at CLS only.

    >>> merged_per_block(patches=16, blocks=6, merged=5)
    [5, 5, 3, 1, 1, 0]
    """
    counts = []
    for _ in range(blocks - 1):
        counts.append(min(merged, patches // 2))
        patches -= counts[-1]
    return [*counts, 0]


def merge_tokens(
    x: torch.Tensor, sizes: torch.Tensor | None, keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, L, W) -> (N, L - count, W), and the sizes (N, L - count) float32: how many patches a token stands for.

    sizes  (N, L) of the tokens before; None: all 1
    keys   (N, heads, L, d) of the block's attention, whose mean over heads is compared by cosine

    Tokens 2, 4, ... look for the nearest of tokens 1, 3, ...; the `count` nearest are merged, by means weighted with
    sizes. CLS, token 0, is never merged. The result is CLS, the tokens 2, 4, ... that stay, in order, then 1, 3, ....
    """
    if sizes is None:
        sizes = torch.ones_like(x[:, :, 0], dtype=torch.float32)
    metric = keys.float().mean(1)
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
    nearest, to = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = nearest.topk(nearest.shape[1]).indices
    moved, stay = order[:, :count], order[:, count:].sort(-1).values
    targets = torch.arange(x.shape[1] // 2, device=x.device)
    joins = (to.gather(1, moved)[:, None] == targets[:, None]).float()  # (N, targets, count), one 1 a column

    source, size = _take(x, moved).float(), _take(sizes[..., None], moved)
    target, old = x[:, 1::2].float(), sizes[:, 1::2, None]
    new = old + joins @ size
    mean = ((target * old + joins @ (source * size)) / new).to(x.dtype)
    if not stay.shape[1]:  # a reshape of no rows is ambiguous
        return torch.cat([x[:, :1], mean], dim=1), torch.cat([sizes[:, :1], new[..., 0]], dim=1)
    kept = torch.cat([x[:, :1], _take(x, stay), mean], dim=1)
    return kept, torch.cat([sizes[:, :1], _take(sizes[..., None], stay)[..., 0], new[..., 0]], dim=1)


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (N, L, W), rows (N, k) of tokens 2, 4, ... -> (N, k, W), by one Gather of whole rows."""
    length, width = x.shape[1:]
    # 0, L, 2 L, ...: where each picture begins, by a sum instead of a size.
    begins = ((rows[:, :1] * 0 + length).cumsum(0)) - length
    return x.reshape(-1, width).index_select(0, (2 * rows + 2 + begins).reshape(-1)).reshape(-1, rows.shape[1], width)
