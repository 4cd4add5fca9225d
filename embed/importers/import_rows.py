"""Make a dataset of rows that a program yields: keys, vectors of any encoder, captions.

The rows are stored first (`lit_fast.embed.importers.rows`), since the number of rows is known at their end only. Then
index and features are written as for imported files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import Row
from lit_fast.data.features import Features, open_features, stored_towers
from lit_fast.embed.extract import check_store_name
from lit_fast.embed.importers.import_features import imported_provenance, write_index, write_store
from lit_fast.embed.importers.rows import RowStore, StoredRow
from lit_fast.embed.importers.vectors import is_float
from lit_fast.embed.index import check_output_directory
from lit_fast.embed.locks import lock_rows
from lit_fast.embed.sources.columns import NO_TEXT, parse_key, parse_row
from lit_fast.embed.sources.interface import Columns, is_utf8
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import exists, remove_tree
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import StrPath, join
from lit_fast.utils.output import result, status

_CHECKED_ROWS = 1024  # after which this process checks that it still has the lock

Rows = Iterable[tuple[str | int, Any, str | Sequence[str] | None]]


def import_rows(
    rows: Rows | Callable[[int], Rows],
    out: StrPath,
    *,
    tower: str,
    width: int | None = None,
    source: str = "rows",
) -> Dataset:
    """Make a dataset with features at `out`; see `lit_fast.embed.import_rows`."""
    name, out = check_store_name(tower), os.fspath(out)
    if not is_utf8(f"{out}{source}"):
        raise UserError(f"the name {out!a} or {source!a} is not UTF-8; choose another")
    if not exists(join(out, "dataset.json")):
        check_output_directory(out)
    with lock_rows(out) as lock:
        return _import_rows(rows, out, name, width, source, lock)


def _import_rows(
    rows: Rows | Callable[[int], Rows], out: str, name: str, width: int | None, source: str, lock: Lock
) -> Dataset:
    """Make a dataset at `out`, which this process has locked."""
    sources = [Source(f"rows:{source}", 0, "features")]
    directory = join(out, "rows.tmp")
    store = RowStore(directory)
    if exists(join(out, "dataset.json")):
        dataset = open_dataset(out)
        if dataset.sources != tuple(sources):
            raise UserError(f"{out} is already a dataset, of other sources; choose another directory")
        if stored_towers(dataset) == [name]:
            features = open_features(dataset, name)
            if len(features.finished()) == dataset.shards:
                remove_tree(directory)
                result(f"{out} is complete: {dataset.rows:,} rows; the given rows were not read")
                return dataset
        if not store.ended:
            raise UserError(f"{out} is already a dataset, without features {name}; choose another directory")
    else:
        check_output_directory(out)
        if not store.ended:
            _store_rows(rows, store, width, out, lock)
        dataset = write_index(_index_rows(store), sources, out, lock)
    digest = hashlib.sha256()
    for array in store.arrays():
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    imported = {"format": "rows", "sources": [f"rows:{source}"], "files": [[source, digest.hexdigest()]]}
    provenance = imported_provenance(name, store.width, store.dtype, imported)
    write_store(Features(dataset, name, provenance), lambda _: store, lock)
    remove_tree(directory)
    return dataset


def _store_rows(
    rows: Rows | Callable[[int], Rows], store: RowStore, width: int | None, out: str, lock: Lock
) -> None:
    """Store the rows that are not stored yet; whatever stops it, the rows before are kept."""
    if width is not None and store.rows and store.width != width:
        raise UserError(f"{out} holds unfinished rows of width {store.width}, not {width}; delete it")
    given = _new_rows(rows, store, out)
    number = store.rows
    if number:
        status(f"import continues after {number:,} rows")
    try:
        for number, item in enumerate(given, store.rows):
            if number % _CHECKED_ROWS == 0:
                lock.check()
            key, vector, captions = _unpack(item, number)
            store.add(_parse(key, captions), _parse_vector(vector, store.width or width, number, key))
    except BaseException:
        store.flush()
        raise
    store.end()


def _new_rows(rows: Rows | Callable[[int], Rows], store: RowStore, out: str) -> Iterator[Any]:
    """Return the rows after the stored ones; check that the earlier ones have the stored keys."""
    if not callable(rows):
        given = iter(rows)
        for number, known in enumerate(store):
            _check_repeated(next(given, None), known.key, number, out)
        return given
    if not store.rows:
        return iter(rows(0))
    given = iter(rows(store.rows - 1))
    _check_repeated(next(given, None), store.last_key(), store.rows - 1, out)
    return given


def _check_repeated(item: Any, key: str, number: int, out: str) -> None:
    found = "absent" if item is None else repr(_key(_unpack(item, number)[0]))[:80]
    if item is None or found != repr(key)[:80]:
        raise UserError(
            f"row {number} of the unfinished import {out} has the key {key[:80]!r}, but is now {found}; give the same "
            f"rows in the same order, or delete {out}"
        )


def _unpack(item: Any, number: int) -> tuple[Any, Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 3:
        raise UserError(f"row {number} is not a tuple of key, vector and captions; yield these three")
    key, vector, captions = item
    return key, vector, captions


def _key(key: Any) -> str:
    return parse_key(key)[0].encode("utf-8", "replace").decode()


def _parse(key: Any, captions: Any) -> StoredRow:
    texts = [captions] if isinstance(captions, str | bytes) else list(captions or ())
    parsed = parse_row({"captions": texts}, Columns(captions=(("", "captions"),)))
    problem = "" if parsed.problem == NO_TEXT else parsed.problem
    return StoredRow(_key(key), list(parsed.captions), parse_key(key)[1] or problem)


def _parse_vector(vector: Any, width: int | None, number: int, key: Any) -> np.ndarray:
    named = f"row {number} ({str(key)[:80]!r})"
    try:
        array = np.asarray(vector)
    except Exception as error:  # of NumPy, of the library of the array
        raise UserError(
            f"{named} has a vector of {type(vector).__name__} that is not an array ({first_line(error)}); for PyTorch "
            "give vector.detach().float().cpu()"
        ) from None
    if array.ndim != 1 or not len(array) or not is_float(array.dtype):
        raise UserError(f"{named} has a vector of {array.dtype} {list(array.shape)}; give floats [width]")
    if width is not None and len(array) != width:
        raise UserError(f"{named} has a vector of width {len(array)}, not {width}; give vectors of one tower")
    return array


def _index_rows(store: RowStore) -> Iterator[tuple[Row, str]]:
    rows = iter(store)
    if (first := next(rows, None)) is None:
        return
    for number, row in enumerate(chain([first], rows)):
        yield Row(row.key, 0, number, 0, tuple(row.captions)), row.problem
