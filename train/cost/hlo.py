"""What a compiled program does, read from the compiler's text of it (HLO): products, collectives, its own estimate.

The text lists computations. A loop's body stands there once and counts as often as the loop goes round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
}
_SIZES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_PLACED = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Collective(NamedTuple):
    """All of one kind in a step."""

    calls: float
    bytes: float  # of one device's operands


class Totals(NamedTuple):
    """Of one device and one step, each instruction as often as it runs."""

    flops: float  # of the matrix products, two operations per multiply-add
    cycles: float  # of the TensorCore by the compiler's estimate; 0 where it gives none
    collectives: dict[str, Collective]
    unknown_loops: int  # loops whose number of rounds could not be read, counted once


def totals(text: str) -> Totals:
    """Add up a program.

    Args:
      text: `compiled.as_text()`, after all optimisations.
    """
    computations, entry = parse(text)
    flops = cycles = 0.0
    unknown = 0
    found: dict[str, Collective] = {}
    for name, times, fused in _visits(computations, entry):
        instructions = computations[name]
        shapes = {i.name: i.shape for i in instructions}
        for instruction in instructions:
            flops += times * _flops(instruction, shapes)
            if instruction.opcode == "while" and trip_count(instruction, computations) is None:
                unknown += 1
            if fused:
                continue
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
                cycles += times * int(estimate[1])
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                before = found.get(kind, Collective(0, 0))
                size = sum(_bytes(shapes[operand]) for operand in instruction.operands)
                found[kind] = Collective(before.calls + times, before.bytes + times * size)
    return Totals(flops, cycles, found, unknown)


def largest_buffers(text: str, count: int = 3) -> list[dict[str, Any]]:
    """The largest arrays in a device's memory: their shape, bytes and the operation that makes them.

    Arrays of one shape are named once; they may or may not lie in the same place.
    """
    computations, entry = parse(text)
    found: dict[str, tuple[float, str]] = {}
    for name, _, fused in _visits(computations, entry):
        for instruction in () if fused else computations[name]:
            if instruction.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
                continue
            operation = re.search(r'op_name="([^"]*)"', instruction.attributes)
            for kind, sizes, layout in _PLACED.findall(instruction.shape):
                if "S(" not in layout:  # another memory than the large one
                    shape = f"{kind}[{sizes}]"
                    found.setdefault(shape, (_bytes(shape), operation[1] if operation else ""))
    largest = sorted(found.items(), key=lambda item: -item[1][0])[:count]
    return [{"shape": shape, "bytes": int(size), "operation": made} for shape, (size, made) in largest]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations by name, and the name of the one that is run; raises ValueError where there is none."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            current = computations.setdefault(head[2], []) if head else None
            entry = head[2] if head and head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[2], match[3], bool(match[1])))
    if not entry:
        raise ValueError("the text of a program has an ENTRY computation; this has none")
    return computations, entry


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop goes round: what the compiler says, else the constant that its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = computations.get(_named(loop.attributes, "condition"), [])
    by_name = {i.name: i for i in condition}
    for instruction in condition:
        if instruction.root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            bound = by_name[instruction.operands[1]]
            if bound.opcode == "constant":
                return int(bound.operands[0])
    return None


def _visits(computations: dict[str, list[Instruction]], entry: str) -> Iterator[tuple[str, int, bool]]:
    """Every computation that is run: its name, how often, and whether it is the inside of one kernel."""
    stack = [(entry, 1, False)]
    while stack:
        name, times, fused = stack.pop()
        yield name, times, fused
        for i in computations[name]:
            if i.opcode == "while":
                rounds = trip_count(i, computations) or 1
                stack.append((_named(i.attributes, "body"), times * rounds, fused))
            elif i.opcode in ("fusion", "call", "async-start"):
                inner = _named(i.attributes, "calls") or _named(i.attributes, "to_apply")
                stack.append((inner, times, fused or i.opcode == "fusion"))
            elif i.opcode == "conditional":
                branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes)
                if several := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
                    branches += [b.strip().lstrip("%") for b in several[1].split(",")]
                stack += [(b, times, fused) for b in branches]


def _named(attributes: str, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", attributes)
    return match[1] if match else ""


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = tuple(o.split()[-1].lstrip("%") for o in _split(rest[:end]))
    return Instruction(name, shape, opcode, operands, rest[end + 1 :], root)


def _closing(text: str) -> int:
    """Index of the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            return place
    return len(text)


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [p.strip() for p in [*parts, part] if p.strip()]


def _dimensions(shape: str) -> list[int]:
    match = _ARRAY.search(shape)
    return [int(d) for d in match[2].split(",") if d] if match else []


def _bytes(shape: str) -> float:
    return sum(
        _SIZES.get(kind, 4) * float(np.prod([int(d) for d in sizes.split(",") if d]))
        for kind, sizes in _ARRAY.findall(shape)
    )


def _flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        left = _dimensions(shapes[instruction.operands[0]])
        inner = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * float(np.prod(_dimensions(instruction.shape))) * float(np.prod(inner))
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, shapes)
    return 0.0


def _convolution_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """The TPU's compiler writes matrix products as convolutions: a batch may be a window that moves on by its size.

    As in XLA's HloCostAnalysis: multiplications with padding and with the holes of a dilation do not count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution without dim_labels: {instruction}")
    left, right, out = (
        dict(zip(label, _dimensions(shape), strict=True))
        for label, shape in zip(
            labels.groups(), (*(shapes[o] for o in instruction.operands), instruction.shape), strict=True
        )
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}

    def setting(key: str, place: int, default: str) -> str:
        return settings[key].split("x")[place] if key in settings else default

    pairs = 1
    for place, dimension in enumerate(d for d in sorted(right) if d.isdigit()):
        low, _, _ = setting("pad", place, "0_0").partition("_")
        pairs *= _valid_pairs(
            left[dimension],
            right[dimension],
            out[dimension],
            int(setting("stride", place, "1")),
            int(low),
            int(setting("lhs_dilate", place, "1")),
            int(setting("rhs_dilate", place, "1")),
        )
    return 2.0 * out["b"] * out["f"] * right["i"] * pairs


@cache
def _valid_pairs(
    size: int, window: int, out: int, stride: int, low: int, dilate: int, window_dilate: int
) -> int:
    """Pairs of an output position and a window position that meet an element of the input."""
    at = np.arange(out)[:, None] * stride - low + np.arange(window) * window_dilate
    return int(((at >= 0) & (at % dilate == 0) & (at // dilate < size)).sum())
