"""Read compiled HLO: collectives, estimated cycles, kernels and the largest buffers.

The text lists computations. The body of a loop is in it once and is counted as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that only name, arrange or control; what their computations run is counted there.
_NO_WORK = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
}  # fmt: skip
_NO_WORK_CALLS = {
    "ConcatBitcast",
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
}  # targets of custom calls on TPUs
_PRODUCTS = {"convolution", "dot"}
_ROW_MOVES = ("scatter", "gather", "sort")
ASYNC_COPY = "asynchronous copy"  # of a buffer or slice to the chip's own memory, while products are computed
_ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")  # dtype, dimensions, layout
_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")  # innermost


class Instruction(NamedTuple):
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Collective(NamedTuple):
    """All collectives of one kind in a step."""

    calls: float
    bytes: float  # of the operands, per device


class Unestimated(NamedTuple):
    """All runs of an instruction for which the compiler estimates no cycles."""

    calls: float
    bytes: float  # of the results


class ProgramCost(NamedTuple):
    """Cost of one step on one device; loop bodies count as often as they run."""

    cycles: float  # of the TensorCore, as the compiler estimates them, with those of custom kernels; 0: no estimate
    half_cycles: (
        float  # those of them without a matrix product on 16-bit numbers, which are overstated up to twofold
    )
    custom: dict[str, float]  # runs of custom kernels whose cycles are counted, by name
    unestimated: dict[
        str, Unestimated
    ]  # by opcode, of fusions the one that costs most, or `custom-call NAME`
    kernels: float  # instructions that run; on a GPU each starts a kernel or a copy
    collectives: dict[str, Collective]
    unknown_loops: int  # loops without a readable trip count; they are counted once


# From the name of a custom kernel and the shapes of its operands, such as "bf16[512,3072,128]", to its cycles.
KernelCycles = Callable[[str, Sequence[str]], float | None]


def program_cost(text: str, kernel_cycles: KernelCycles = lambda name, shapes: None) -> ProgramCost:
    """Sum the cost of a program over all instructions that run.

    Args:
      text: `compiled.as_text()`, the program after all optimizations.
      kernel_cycles: returns the cycles of one run of a custom kernel; None: unknown.
    """
    computations, entry = parse(text)
    cycles, half, kernels, unknown = 0.0, 0.0, 0.0, 0
    custom: dict[str, float] = {}
    unestimated: dict[str, Unestimated] = {}
    collectives: dict[str, Collective] = {}
    for name, times, fused in _executions(computations, entry):
        shapes = {i.name: i.shape for i in computations[name]}
        for instruction in computations[name]:
            opcode = instruction.opcode
            if opcode == "while" and trip_count(instruction, computations) is None:
                unknown += 1
            if fused or opcode in _NO_WORK or opcode.endswith("-done"):
                continue
            kernel = _kernel_name(instruction) if opcode == "custom-call" else ""
            if kernel in _NO_WORK_CALLS:
                continue
            kernels += times
            label, estimate = _label(instruction, kernel, computations), _estimated_cycles(instruction)
            operands = [shape for o in instruction.operands for shape in _array_shapes(shapes[o])]
            if kernel and estimate is None and (estimate := kernel_cycles(kernel, operands)) is not None:
                custom[kernel] = custom.get(kernel, 0) + times
            if estimate is None:
                calls, size = unestimated.get(label, Unestimated(0, 0))
                unestimated[label] = Unestimated(calls + times, size + times * _bytes(instruction.shape))
            else:
                cycles += times * estimate
                narrow = any("16[" in shape for shape in (*_array_shapes(instruction.shape), *operands))
                if narrow and not kernel and not _PRODUCTS & _opcodes(instruction, computations):
                    half += times * estimate
            if label in COLLECTIVES:
                calls, size = collectives.get(label, Collective(0, 0))
                size += times * sum(_bytes(shape) for shape in operands)
                collectives[label] = Collective(calls + times, size)
    return ProgramCost(cycles, half, custom, unestimated, kernels, collectives, unknown)


def _estimated_cycles(instruction: Instruction) -> float | None:
    match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return float(match[1]) if match else None


def _kernel_name(call: Instruction) -> str:
    """Return the name of a Pallas kernel, or the target of another custom call."""
    if named := re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"', call.attributes):
        return named[1]
    target = re.search(r'custom_call_target="([^"]+)"', call.attributes)
    return target[1] if target else call.name


def _label(instruction: Instruction, kernel: str, computations: dict[str, list[Instruction]]) -> str:
    """Return the name of an instruction for a list of what has no estimate."""
    if kernel:
        return f"custom-call {kernel}"
    if instruction.opcode in ("copy-start", "slice-start"):
        return ASYNC_COPY
    inner = _opcodes(instruction, computations)
    return next(
        (opcode for opcode in _ROW_MOVES if opcode in inner), instruction.opcode.removesuffix("-start")
    )


def _opcodes(instruction: Instruction, computations: dict[str, list[Instruction]]) -> set[str]:
    """Return the opcodes of an instruction and of all that it fuses."""
    fused = computations.get(_attribute(instruction, "calls"), [])
    return {instruction.opcode}.union(*(_opcodes(i, computations) for i in fused))


def largest_buffers(text: str, count: int = 3) -> list[dict[str, Any]]:
    """Return shape, bytes and producing operation of the largest arrays in device memory.

    Arrays of one shape are listed once; the compiler may or may not share their memory.
    """
    computations, entry = parse(text)
    found: dict[str, tuple[float, str]] = {}
    for name, _, fused in _executions(computations, entry):
        for instruction in () if fused else computations[name]:
            if instruction.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
                continue
            operation = re.search(r'op_name="([^"]*)"', instruction.attributes)
            for dtype, dimensions, layout in _ARRAY.findall(instruction.shape):
                if "S(" not in layout:  # S(n): not in the device's main memory
                    shape = f"{dtype}[{dimensions}]"
                    found.setdefault(shape, (_bytes(shape), operation[1] if operation else ""))
    largest = sorted(found.items(), key=lambda item: -item[1][0])[:count]
    return [
        {"shape": shape, "bytes": int(size), "operation": operation} for shape, (size, operation) in largest
    ]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the computations by name, and the name of the entry computation.

    Raises:
      ValueError: the text has no entry computation.
    """
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
    """Return the trip count of a loop: the compiler's, or the bound of its counter."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = computations.get(_attribute(loop, "condition"), [])
    by_name = {i.name: i for i in condition}
    for instruction in condition:
        if instruction.root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            bound = by_name[instruction.operands[1]]
            if bound.opcode == "constant":
                return int(bound.operands[0])
    return None


def _executions(computations: dict[str, list[Instruction]], entry: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, number of runs, whether fused) of each computation that runs."""
    stack = [(entry, 1, False)]
    while stack:
        name, times, fused = stack.pop()
        yield name, times, fused
        for i in computations[name]:
            if i.opcode == "while":
                stack.append((_attribute(i, "body"), times * (trip_count(i, computations) or 1), fused))
            elif i.opcode in ("fusion", "call", "async-start"):
                called = _attribute(i, "calls") or _attribute(i, "to_apply")
                stack.append((called, times, fused or i.opcode == "fusion"))
            elif i.opcode == "conditional":
                branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes)
                if several := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
                    branches += [b.strip().lstrip("%") for b in several[1].split(",")]
                stack += [(b, times, fused) for b in branches]


def _attribute(instruction: Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing_bracket(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing_bracket("(" + rest) - 1
    inner = rest[:end]
    while (plain := _BRACKETS.sub("", inner)) != inner:  # the commas that remain separate the operands
        inner = plain
    operands = tuple(operand.split()[-1].lstrip("%") for operand in inner.split(",") if operand.strip())
    return Instruction(name, shape, opcode, operands, rest[end + 1 :], root)


def _closing_bracket(text: str) -> int:
    """Return the index of the bracket that closes the first one."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            return index
    return len(text)


def _array_shapes(shape: str) -> list[str]:
    """Return the arrays of a shape, without their layouts."""
    return [f"{dtype}[{dimensions}]" for dtype, dimensions, _ in _ARRAY.findall(shape)]


def _bytes(shape: str) -> float:
    return sum(
        _ITEM_BYTES.get(dtype, 4) * math.prod(int(d) for d in dimensions.split(",") if d)
        for dtype, dimensions, _ in _ARRAY.findall(shape)
    )
