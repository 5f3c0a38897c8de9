"""Instructions of a kernel's machine code: those of a step along the channels, and the others of a tile.

The text is what `nvdisasm -c` prints. Counts are of instructions of a warp, in the code that one program executes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# Kinds by the beginning of the opcode; the first match counts, and what matches none is "other".
KINDS = {
    "tensor": r"[HIQ]G?MMA|UTC[A-Z]*MMA|OMMA",
    "load": r"LDG|LDGSTS|UTMALDG|UBLKCP",
    "shared": r"LDS|STS|LDSM|STSM|LDT|STT|LDTM|STTM",
    "move": r"U?MOV|IMAD\.MOV|U?PRMT|SHFL|R2UR|MOVM|F2F|F2I|I2F|I2I|I2IP|HADD2\.F32|VOTE",
    "special": r"MUFU",
    "spill": r"LDL|STL",
}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_SHAPE = re.compile(r"^[HIQ](G?)MMA\.(\d+x\d+x\d+|\d{4,5})")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


@dataclass
class Block:
    """Instructions without a branch between them, and the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """Instructions by kind. `step`: of those that every iteration of the innermost loop with tensor-core instructions
    executes; `tile`: of all others in the loop over tiles, or, without one, in the kernel. multiplied: multiply-adds of
    tensor cores of a step, by one warp (mma.sync) or a quarter of a warpgroup's (wgmma); 0 where the code doesn't say
    (tcgen05). Without a loop, `step` is everything from the first to the last tensor-core instruction."""

    step: dict[str, int]
    tile: dict[str, int]
    multiplied: int


def kind_of(opcode: str) -> str:
    """The kind of an opcode, "other" for none of KINDS.

    >>> [kind_of(name) for name in ("HGMMA.64x256x16.F32", "UTMALDG.2D", "IMAD.MOV.U32", "FFMA")]
    ['tensor', 'load', 'move', 'other']
    """
    return next((kind for kind, pattern in KINDS.items() if re.match(rf"(?:{pattern})(?:\.|$)", opcode)), "other")


def count(sass: str) -> Counts:
    """The instructions of a step and of a tile."""
    blocks = list(_blocks(sass))
    loops = sorted(_loops(blocks), key=len)
    with_product = [loop for loop in loops if any(_is_product(blocks[i]) for i in loop)]
    if not with_product:
        opcodes = [opcode for block in blocks for opcode in block.opcodes]
        products = [at for at, opcode in enumerate(opcodes) if kind_of(opcode) == "tensor"]
        inside = opcodes[products[0] : products[-1] + 1] if products else []
        return Counts(_by_kind(inside), _subtract(_by_kind(opcodes), _by_kind(inside)), _multiplied(inside))
    # The product with the most work is that of queries and keys; a loop over tiles has it and all others.
    products = [i for i, block in enumerate(blocks) if _is_product(block)]
    innermost = [loop for loop in with_product if not any(other < loop for other in with_product)]
    inner = max(innermost, key=lambda loop: _work(blocks, loop))
    outer = with_product[-1]
    step = [opcode for i in _always(blocks, inner) for opcode in blocks[i].opcodes]
    tiles = outer.issuperset(products) and (outer != inner or len(step) < sum(len(blocks[i].opcodes) for i in inner))
    around = outer if tiles else range(len(blocks))
    whole = [opcode for i in around for opcode in blocks[i].opcodes]
    return Counts(_by_kind(step), _subtract(_by_kind(whole), _by_kind(step)), _multiplied(step))


def _blocks(sass: str) -> Iterator[Block]:
    """The code's blocks, in order; only what can be reached."""
    blocks, labels, targets = [Block()], {}, []
    conditional = True
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].opcodes or not conditional:
                blocks.append(Block())
                if conditional:
                    blocks[-2].following.append(len(blocks) - 1)
            labels[label[1]] = len(blocks) - 1
            conditional = True
        elif match := _INSTRUCTION.match(line):
            opcode, rest = match[3], match[4]
            if opcode == "NOP":
                continue
            blocks[-1].opcodes.append(opcode)
            target = _TARGET.search(rest) if opcode.startswith(("BRA", "JMP")) else None
            if target is None and not opcode.startswith(_ENDS):
                continue
            if target is not None:
                targets.append((len(blocks) - 1, target[1]))
            conditional = match[2] is not None or re.match(r"\s*!?U?P\d", rest) is not None
            blocks.append(Block())
            if conditional:
                blocks[-2].following.append(len(blocks) - 1)
    for source, label_name in targets:
        if label_name in labels:
            blocks[source].following.append(labels[label_name])
    yield from blocks


def _loops(blocks: list[Block]) -> Iterator[frozenset[int]]:
    """The natural loop of each branch backwards; loops with one header are one."""
    before: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for after in block.following:
            before.setdefault(after, set()).add(i)
    headers: dict[int, set[int]] = {}
    for source, block in enumerate(blocks):
        for header in block.following:
            if header > source:
                continue
            body, left = {header}, [source]
            while left:
                i = left.pop()
                if i not in body:
                    body.add(i)
                    left += before.get(i, ())
            if 0 in body and header != 0:  # the way back from code that stands out of line, no loop
                continue
            headers.setdefault(header, set()).update(body)
    yield from (frozenset(body) for body in headers.values())


def _always(blocks: list[Block], loop: frozenset[int]) -> list[int]:
    """The blocks of a loop that every iteration executes: without one of them its header isn't reached again."""
    header = min(loop)
    always = []
    for left_out in sorted(loop):
        reached, left = set(), [header] if left_out != header else []
        again = False
        while left:
            i = left.pop()
            reached.add(i)
            for after in blocks[i].following:
                again = again or after == header
                if after in loop and after not in reached and after != left_out:
                    left.append(after)
        if not again:
            always.append(left_out)
    return always


def _work(blocks: list[Block], loop: frozenset[int]) -> int:
    return sum(_multiplied(blocks[i].opcodes) for i in loop)


def _is_product(block: Block) -> bool:
    return any(kind_of(opcode) == "tensor" for opcode in block.opcodes)


def _by_kind(opcodes: Iterable[str]) -> dict[str, int]:
    counts = dict.fromkeys((*KINDS, "other"), 0)
    for opcode in opcodes:
        counts[kind_of(opcode)] += 1
    return counts | {"all": sum(counts.values())}


def _subtract(whole: dict[str, int], part: dict[str, int]) -> dict[str, int]:
    return {kind: whole[kind] - part[kind] for kind in whole}


def _multiplied(opcodes: Iterable[str]) -> int:
    total = 0
    for opcode in opcodes:
        match = _SHAPE.match(opcode)
        if match is None:
            continue
        if "x" in match[2]:
            m, n, k = map(int, match[2].split("x"))
        else:  # 16816, 1688, 16832
            m, n, k = int(match[2][:2]), int(match[2][2]), int(match[2][3:])
        total += m * n * k // (4 if match[1] else 1)
    return total
