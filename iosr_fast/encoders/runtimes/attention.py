"""An encoder's graph with ONNX's operator Attention in place of its parts, which TensorRT runs as one kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iosr_fast.utils.require import require

OPSET = 23  # the first with Attention
_KEPT = (0, 1, 3, 2)  # of a transposed key (batch, heads, width, tokens) back to (batch, heads, tokens, width)


def fused_attention(path: Path) -> tuple[bytes, int]:
    """The model of an ONNX file with Attention operators, and their number; weights stay in the file beside it.

    softmax(q k') v in half precision, with casts of the softmax to float32 and back, becomes Attention(q, k, v) with
    scale 1. Left as it is: float32 attention, for which there is no such kernel; that of the last block, which has one
    query per head; and logits with an added term (tokens that stand for several). Raises ImportError without onnx.
    """
    onnx = require("onnx", "cpu")
    model = onnx.load(str(path), load_external_data=False)
    nodes = model.graph.node
    produced = {name: node for node in nodes for name in node.output}
    consumed: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            consumed.setdefault(name, []).append(node)
    count = 0
    for softmax in [node for node in nodes if node.op_type == "Softmax"]:
        parts = _parts(softmax, produced, consumed)
        if parts is None:
            continue
        logits, transpose, mix = parts
        axes = next(attribute.ints for attribute in transpose.attribute if attribute.name == "perm")
        key = f"attention_{count}_key"
        added = [
            onnx.helper.make_node("Transpose", [transpose.input[0]], [key], perm=[axes[axis] for axis in _KEPT]),
            onnx.helper.make_node(
                "Attention",
                [logits.input[0], key, mix.input[1]],
                list(mix.output),
                name=f"attention_{count}",
                scale=1.0,
            ),
        ]
        at = next(i for i, node in enumerate(nodes) if node is mix)
        nodes.remove(mix)
        for offset, node in enumerate(added):
            nodes.insert(at + offset, node)
        count += 1
    _remove_unused(model.graph)
    if count:
        next(entry for entry in model.opset_import if not entry.domain).version = OPSET
    return model.SerializeToString(), count


def _parts(softmax: Any, produced: dict[str, Any], consumed: dict[str, list[Any]]) -> tuple[Any, Any, Any] | None:
    """The product q k', the transposition of k, and the product with v; None if the graph has another form."""
    before, after = produced.get(softmax.input[0]), consumed.get(softmax.output[0], [])
    # Casts to float32 and back: the softmax of float32 attention has none.
    if before is None or before.op_type != "Cast" or len(after) != 1 or after[0].op_type != "Cast":
        return None
    logits, mixes = produced.get(before.input[0]), consumed.get(after[0].output[0], [])
    if logits is None or logits.op_type != "MatMul" or len(mixes) != 1 or mixes[0].op_type != "MatMul":
        return None
    transpose = produced.get(logits.input[1])
    if transpose is None or transpose.op_type != "Transpose":
        return None
    axes: list[int] = next((list(a.ints) for a in transpose.attribute if a.name == "perm"), [])
    return (logits, transpose, mixes[0]) if len(axes) == len(_KEPT) else None


def _remove_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in list(reversed(graph.node)):
        if not used.intersection(node.output):
            graph.node.remove(node)
            used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
