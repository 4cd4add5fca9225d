"""Two parquet files in one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.sources.interface import Columns, Damage
from lit_fast.embed.sources.parquet import read_parquet
from lit_fast.embed.sources.parquet_footer import find_second_file


def parquet(first: int, **options: Any) -> bytes:
    rows = range(first, first + 40)
    table = pa.table(
        {
            "image": [{"bytes": b"image %d" % i, "path": None} for i in rows],
            "text": [[f"text {i}", "PAR1"] for i in rows],
            "score": [0.5 if i % 2 else None for i in rows],
            "flag": [i % 3 == 0 for i in rows],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"row_group_size": 1, "write_page_index": True},
    {"compression": "zstd", "use_dictionary": False},
    {"version": "1.0", "data_page_version": "2.0"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_file_is_one_and_of_two_the_second_is_found(options: dict[str, Any], tmp_path: Path) -> None:
    one, two = parquet(0, **options), parquet(100, **options)
    assert find_second_file(io.BytesIO(one)) == 0
    assert find_second_file(io.BytesIO(one + two)) == len(one)
    path = tmp_path / "a.parquet"
    path.write_bytes(one + two)
    assert list(read_parquet(str(path), Columns())) == [
        Damage(f"{path} holds another parquet file from byte {len(one)} on: none of it is read")
    ]


def test_bytes_of_other_programs_before_the_footer_are_no_second_file() -> None:
    data = parquet(0)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert (
        find_second_file(io.BytesIO(data[:footer] + b"PAR1 an index of another program" + data[footer:])) == 0
    )


@pytest.mark.parametrize("field", [b"\x19", b"\x1c"])
def test_a_footer_that_nests_without_end_is_no_second_file(field: bytes) -> None:
    footer = field * 100_000
    data = b"PAR1" * 3 + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    assert find_second_file(io.BytesIO(data)) == 0


def test_a_footer_with_a_list_without_end_is_no_second_file() -> None:
    footer = b"\x49\xf7" + b"\xff" * 8 + b"\x7f"  # field 4: a list of 2**63 - 1 doubles
    data = b"PAR1" * 3 + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    assert find_second_file(io.BytesIO(data)) == 0


ONE = parquet(0, row_group_size=5)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_footer_is_no_second_file(data: st.DataObject) -> None:
    damaged = bytearray(ONE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(len(ONE) // 2, len(ONE) - 9))] = data.draw(st.integers(0, 255))
    assert find_second_file(io.BytesIO(damaged)) == 0
