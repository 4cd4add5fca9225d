"""The largest batch that devices have room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax

from lit_fast.config import Config, TextConfig
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.models.two_towers import text_tower
from lit_fast.runtime import make_mesh
from lit_fast.train.cost.aot import Compiled, batch_shapes
from lit_fast.train.cost.flops import program_flops
from lit_fast.train.cost.hlo import Collective, totals
from lit_fast.train.cost.memory import SHARE, Build, Needs, candidates, fit, try_compile
from lit_fast.train.input_pipeline.packing import foreseen_row_tokens
from lit_fast.train.inputs import check_batch
from lit_fast.train.plan.data import Data, known_data
from lit_fast.train.plan.target import Target
from lit_fast.train.step import abstract_training, make_step
from lit_fast.utils.format import format_duration

# Ways to use the devices' memory: what each takes, by the compiler or by estimate, and the search for the fastest.


COMPILES = 6  # of a search at most; each takes about a minute on two cores
_ROW_TOKENS = 128  # of a matrix unit
Say = Callable[[str], None]


class Way(NamedTuple):
    """One way to use the memory, and what it takes; bytes and FLOPs are of one device."""

    text: TextConfig
    bytes: int
    fits: bool
    flops: float  # executed in a step
    cycle_seconds: float | None  # a step's by the compiler's estimate; None: it gives none
    collectives: dict[str, Collective]
    compiled: Compiled | None


class Planner:
    """What all figures of one plan are computed from."""

    def __init__(self, config: Config, target: Target, mfu: float, say: Say) -> None:
        check_batch(config, target.devices)
        self.target, self.mfu, self.say = target, mfu, say
        self.data: Data = known_data(config)
        self.texts = config.stream.global_batch * config.stream.captions_per_image // target.devices
        self.config = dataclasses.replace(config, text=self.laid_out(config.text, config.text.pack))
        # Only its sizes are asked for.
        tokenizer = cast(Tokenizer, self.data.vocabulary)
        self.build: Build = partial(text_tower, tokenizer=tokenizer, out_dim=self.data.width)
        self._optimizer, self._state = abstract_training(self.build(self.config.text), self.config)
        self._needs: dict[tuple[int, int], Needs] = {}
        self.room = SHARE * target.chip.memory
        self.compiles = 0
        self._traced: dict[TextConfig, float] = {}

    def laid_out(self, text: TextConfig, pack: int) -> TextConfig:
        """With so many captions in a row, and rows as long as is given or as they need."""
        if pack == text.pack and text.row_tokens:
            return text
        text = dataclasses.replace(text, pack=pack, row_tokens=0)
        if not text.packed:
            return text
        return dataclasses.replace(text, row_tokens=foreseen_row_tokens(self.data.lengths, pack, self.texts))

    def needs(self, text: TextConfig) -> Needs:
        """Bytes by shapes, with as many captions in a row."""
        rows = text.pack, text.row_tokens
        if rows not in self._needs:
            config = dataclasses.replace(self.config, text=text)
            self._needs[rows] = Needs(config, self.build, self.target.devices, self._state)
        return self._needs[rows]

    def chosen(self) -> Way:
        """The way that the config takes by itself."""
        text, mesh, chip = self.config.text, self.target.mesh, self.target.chip
        if text.keep != "auto":
            return self.measure(text)
        if mesh is not None:
            if self.target.platform != "cpu":
                self.say(f"compiling for {self.target.topology}: about a minute on two cores")
            found = fit(self.config, self.build, mesh, self._optimizer, self._state, int(chip.memory))
            self.compiles += 1
            return self.way(found.text, found.compiled) if found.compiled else self.measure(found.text)
        ways = candidates(self.config, self.target.devices, False)
        for text in ways:
            if self.needs(text).estimate(text) <= self.room:
                return self.measure(text)
        raise UserError(
            f"stream.global_batch {self.config.stream.global_batch} does not fit: it is estimated to need "
            f"{self.needs(text).estimate(text) / 2**30:.3g} GiB a device, of {self.room / 2**30:.3g} that a run may "
            "take; choose a smaller batch, a smaller tower or more devices"
        )

    def measure(self, text: TextConfig) -> Way:
        """One way, compiled where that can be done."""
        if self.target.mesh is None:
            return self.way(text, None)
        self.compiles += 1
        made = try_compile(self.config, text, self.build, self.target.mesh, self._optimizer, self._state)
        return self.way(text, made)

    def way(self, text: TextConfig, made: Compiled | None) -> Way:
        """What the compiler says of it; `made` None: it was not asked, or refused."""
        if made is None:
            need = self.needs(text).estimate(text)
            refused = self.target.mesh is not None
            fits = need <= self.room and not refused
            need = max(need, int(self.target.chip.memory)) if refused else need
            return Way(text, need, fits, self.traced(text), None, self.collectives(), None)
        need = made.argument_bytes + made.temporary_bytes
        program = totals(made.text)
        if program.unknown_loops:
            self.say(
                f"{program.unknown_loops} loops of unknown length count once: operations and times are too low"
            )
        # A GPU's compiler hides products in calls of libraries.
        flops = self.traced(text) if self.target.platform == "gpu" else program.flops
        clock = self.target.chip.clock
        seconds = program.cycles / clock if clock else None
        sent = program.collectives if self.target.devices > 1 else {}  # one device only copies
        return Way(text, need, need <= self.room, flops, seconds, sent, made)

    def traced(self, text: TextConfig) -> float:
        """FLOPs of a device in the step as it is given to the compiler."""
        key = dataclasses.replace(text, microbatches=1)
        if key not in self._traced:
            config = dataclasses.replace(self.config, text=key)
            model = self.build(key)
            # One device that does all of it: the products are the same.
            step = make_step(model, self._optimizer, config, make_mesh(jax.devices("cpu")[:1]))
            program = jax.make_jaxpr(step)(self._state, batch_shapes(model, config))
            self._traced[key] = program_flops(program.jaxpr) / self.target.devices
        return self._traced[key]

    def collectives(self) -> dict[str, Collective]:
        """By arithmetic: gradients are summed, image embeddings and row numbers go round the ring."""
        if self.target.devices == 1:
            return {}
        images = self.config.stream.global_batch // self.target.devices
        ring = self.target.devices * images * 4 * (self.data.width + 1)
        return {
            "all-reduce": Collective(1, self.needs(self.config.text).gradients),
            "collective-permute": Collective(2 * self.target.devices, ring),
        }

    def seconds(self, way: Way) -> float:
        """A step's, which ways are ranked by: the compiler's estimate where there is one."""
        if way.cycle_seconds is not None:
            return way.cycle_seconds
        return self.guess(way.text)

    def guess(self, text: TextConfig) -> float:
        """A step's seconds before it is compiled: its products at the stated MFU."""
        return self.traced(text) / (self.target.chip.flops * self.mfu)


def search(planner: Planner, chosen: Way) -> list[Way]:
    """Other ways beside the chosen one, the fastest first.

    Every `text.keep` that is estimated to fit is tried; then, if they can be compiled, rows of several captions, and
    more and fewer parts of the best. What these change, an estimate cannot tell.
    """
    config, target, ways = planner.config, planner.target, [chosen]

    def first(pack: int, keep: str = "") -> list[TextConfig]:
        text = planner.laid_out(dataclasses.replace(config.text, keep="auto", microbatches=1), pack)
        found: dict[str, TextConfig] = {}
        for way in candidates(dataclasses.replace(config, text=text), target.devices, False):
            if keep in ("", way.keep) and planner.needs(way).estimate(way) <= planner.room:
                found.setdefault(way.keep, way)
        return sorted(found.values(), key=planner.guess)

    kinds = first(config.text.pack)
    # Room for the rows of several captions and other parts is left over.
    for text in kinds[: None if target.mesh is None else COMPILES - 3]:
        _try(planner, text, ways)
    if target.mesh is None:
        return sorted(ways, key=lambda way: (not way.fits, planner.seconds(way)))
    if best := fastest(planner, ways):
        pack = _full_row(planner)
        for text in first(pack, best.text.keep) if pack > 1 else []:
            _try(planner, text, ways)
    if best := fastest(planner, ways):
        for parts in (2 * best.text.microbatches, max(best.text.microbatches // 2, 1)):
            text = dataclasses.replace(best.text, microbatches=parts)
            fits = planner.needs(text).estimate(text) <= planner.room
            if planner.texts % (parts * text.pack) == 0 and fits:
                _try(planner, text, ways)
    return sorted(ways, key=lambda way: (not way.fits, planner.seconds(way)))


def fastest(planner: Planner, ways: list[Way]) -> Way | None:
    """Of those that fit."""
    return min((way for way in ways if way.fits), key=planner.seconds, default=None)


def _full_row(planner: Planner) -> int:
    """Captions that fill a row of a matrix unit, a power of two; 1 where they may not share one."""
    text, data = planner.config.text, planner.data
    if text.dropout and not text.mask_padding:
        return 1
    tokens = data.lengths.mean() if text.mask_padding else data.vocabulary.max_length
    pack = 1
    while 2 * pack * tokens <= _ROW_TOKENS and planner.texts % (2 * pack) == 0:
        pack *= 2
    return pack


def _try(planner: Planner, text: TextConfig, ways: list[Way]) -> None:
    """Measure a way that is new, while compiles are left."""
    if any(text == way.text for way in ways) or planner.compiles >= COMPILES:
        return
    if planner.target.mesh is not None:
        took = max((way.compiled.seconds for way in ways if way.compiled), default=60)
        left = format_duration((COMPILES - planner.compiles) * took)
        count = f"{planner.compiles + 1} of at most {COMPILES}"
        planner.say(f"compiling {described(text)}, {count}; at most about {left} left")
    ways.append(planner.measure(text))


def described(text: TextConfig) -> str:
    """`hidden, 16 parts`."""
    rows = f", {text.pack} captions a row" if text.pack > 1 else ""
    return f"{text.keep}, {text.microbatches} part{'s' * (text.microbatches > 1)}{rows}"


def overrides(text: TextConfig) -> str:
    """What to write after `lit-fast train CONFIG` for it."""
    return f"--text.keep {text.keep} --text.microbatches {text.microbatches} --text.pack {text.pack}"


_FIRST = 2048  # rows of captions of a device, which are several parts already
_BOUND = 2**30


def largest_batch(config: Config, target: Target, say: Say) -> dict[str, Any]:
    """The largest that fits when a part keeps its embeddings alone: a power of two, devices and captions of a row.

    What a step needs is nearly linear in its batch, so two estimates say where to begin; where there is a compiler,
    it has the last word.

    Raises:
      UserError: not even a small batch fits.
    """
    unit = target.devices * config.text.pack
    smallest = unit * _FIRST
    low, high = (_planner(config, target, batch, say) for batch in (smallest, 2 * smallest))
    base = _estimate(low)
    slope = _estimate(high) - base
    batch = smallest
    while 2 * batch < _BOUND and base + (2 * batch / smallest - 1) * slope <= low.room:
        batch *= 2
    tried: dict[int, Way] = {}

    def at(batch: int) -> Way:
        if batch not in tried:
            planner = _planner(config, target, batch, say)
            text = _leanest(planner)
            if target.mesh is not None:
                say(f"compiling a batch of {batch:,}, {described(text)}")
            tried[batch] = planner.measure(text)
        return tried[batch]

    while not at(batch).fits and batch > unit:
        batch //= 2
    while 2 * batch < _BOUND and 2 * batch not in tried and at(2 * batch).fits:
        batch *= 2
    way = at(batch)
    if not way.fits:
        raise UserError(
            f"not even a batch of {batch} fits: it needs {way.bytes / 2**30:.3g} GiB a device, of "
            f"{low.room / 2**30:.3g} that a run may take; choose a smaller tower"
        )
    by = "compiler" if way.compiled else "estimate"
    return {"global_batch": batch, "bytes": way.bytes, "overrides": overrides(way.text), "by": by}


def _planner(config: Config, target: Target, batch: int, say: Say) -> Planner:
    """For the batch, whatever the config says of parts, which need not divide it."""
    return Planner(
        dataclasses.replace(
            config,
            stream=dataclasses.replace(config.stream, global_batch=batch),
            text=dataclasses.replace(config.text, keep="auto", microbatches=1),
        ),
        target,
        1.0,
        say,
    )


def _estimate(planner: Planner) -> int:
    text = _leanest(planner)
    return planner.needs(text).estimate(text)


def _leanest(planner: Planner) -> TextConfig:
    target = planner.target
    ways = candidates(planner.config, target.devices, target.platform == "cpu")
    return next(text for text in ways if text.keep == "embeddings")
