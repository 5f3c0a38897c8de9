"""The affine terms of a plan, tau * plain @ text' + feature @ linear' + bias, by float16 products of two parts.

For many queries affine_kernel writes them; for few cache_kernel computes them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from iosr_fast.kernels.cache_kernels import affine_kernel, parts_kernel
from iosr_fast.kernels.device import float16_parts, gpu_name, pointer
from iosr_fast.kernels.launch import Config, config_for, load_of
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.torch_scorer import add_linear_term

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

# affine_arguments() of a kernel that leaves the terms out, beside any tensors.
NO_AFFINE_TERMS = {
    "text_scale": 1.0,
    "linear_scale": 1.0,
    "PITCH": 0,
    "QUERY_PARTS": 1,
    "HAS_TEXT": False,
    "HAS_LINEAR": False,
    "HAS_BIAS": False,
}


def affine_terms(plan: DevicePlan, plain: Tensor, adapted: Tensor | None, config: Config | None = None) -> Tensor:
    """tau * plain @ text' + feature @ linear' + bias without missing terms: (B, C) float32."""
    n_queries, n_classes = len(plain), plan.n_classes
    if not n_queries or (plan.text is None and plan.linear is None and plan.bias is None):
        return torch.zeros((n_queries, n_classes), dtype=torch.float32, device=plan.device)
    logits = torch.empty((n_queries, n_classes), dtype=torch.float32, device=plan.device)
    config = config or config_for(gpu_name(plan.device), "affine", "fp32", load_of(n_queries))
    arguments = affine_arguments(plan, plain, adapted, logits, few=load_of(n_queries) == "few")
    affine_kernel[triton.cdiv(n_queries, config.block_b) * triton.cdiv(n_classes, config.block_n),](
        logits=logits, n_queries=n_queries, n_classes=n_classes, WIDTH=plan.width, **arguments, **config.meta()
    )
    if plan.linear is not None and plan.feature not in EMBEDDINGS:
        add_linear_term(plan, plain, adapted, logits)
    return logits


def affine_arguments(
    plan: DevicePlan, plain: Tensor, adapted: Tensor | None, unread: Tensor, *, few: bool
) -> dict[str, Any]:
    """The kernels' arguments for the affine terms, without a linear term over another feature than one embedding.

    Many float32 queries become float16 parts here, few in the kernels."""
    linear = plan.linear if plan.feature in EMBEDDINGS else None
    plain = contiguous(plain)
    feature = plain if linear is None else contiguous(plan.feature_rows(plain, adapted))
    if {plain.dtype, feature.dtype} != {torch.float16}:
        same = feature is plain
        plain, feature = plain.float(), feature.float()
        if not few:
            plain = parts(plain)
            feature = plain if same else parts(feature)
    text_parts, text_scale = (unread, 1.0) if plan.text is None else float16_parts(plan.text)
    linear_parts, linear_scale = (unread, 1.0) if linear is None else float16_parts(linear)
    return {
        "plain": plain,
        "text": text_parts,
        "feature": feature,
        "linear": linear_parts,
        "bias": pointer(plan.bias, unread),
        "text_scale": plan.tau * text_scale,
        "linear_scale": linear_scale,
        "PITCH": text_parts.shape[1] if linear is None else linear_parts.shape[1],
        "QUERY_PARTS": plain.shape[1] // plan.width,
        "HAS_TEXT": plan.text is not None,
        "HAS_LINEAR": linear is not None,
        "HAS_BIAS": plan.bias is not None,
    }


def contiguous(rows: Tensor) -> Tensor:
    """bfloat16 rows become float32, which the kernels split into two float16 numbers."""
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).contiguous()


def parts(query: Tensor) -> Tensor:
    """(B, 2 D) float16: the high and the low part of float32 queries (parts_kernel)."""
    n_queries, width = query.shape
    both = torch.empty((n_queries, 2 * width), dtype=torch.float16, device=query.device)
    parts_kernel[n_queries,](query, both, WIDTH=width, BLOCK_D=triton.next_power_of_2(width))
    return both
