"""Torch's files: the same numbers as torch saved, and nothing that a pickle asks for is done."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.importers.torch_file import read_torch_file
from lit_fast.errors import UserError

torch = pytest.importorskip("torch")


def crafted(path, data, storage=bytes(32), **options):
    """A zip like torch's with this pickle and one storage."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", storage)
    return path


def tensor(offset=0, shape=(2, 4), strides=(4, 1), count=8, storage=b"ctorch\nFloatStorage\n"):
    """The pickle of a tensor as torch writes it, by hand."""

    def number(n):
        return b"J" + struct.pack("<i", n)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    text = b"X\x07\x00\x00\x00storage"
    persistent = (
        b"(" + text + storage + b"X\x01\x00\x00\x000" + b"X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    )
    call = (
        b"("
        + persistent
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"R"


def pickled(body):
    return b"\x80\x02" + body + b"."


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_lists_and_dicts_equal_what_torch_saved(tmp_path):
    x = torch.randn(7, 5)
    cases = [x, x.half(), x.bfloat16(), x.double(), x.T, x.bfloat16().T, x[1:, 2:], x[::2], x[:0], x[2]]
    for value in [*cases, torch.nn.Parameter(x)]:
        torch.save(value, tmp_path / "a.pt")
        found = read_torch_file(tmp_path / "a.pt")
        assert found.dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(np.float64), value.detach().double().numpy())
    torch.save([x, x[2:4].half()], tmp_path / "a.pt")
    first, second = read_torch_file(tmp_path / "a.pt")
    np.testing.assert_array_equal(first, x.numpy())
    np.testing.assert_array_equal(second, x[2:4].half().numpy())
    for value in ({"a": x, 3: x[0]}, OrderedDict([("a", x), (3, x[0])])):
        torch.save(value, tmp_path / "a.pt")
        found = read_torch_file(tmp_path / "a.pt")
        assert list(found) == ["a", 3]
        np.testing.assert_array_equal(found[3], x[0].numpy())


def test_handwritten_pickle_is_read(tmp_path):
    numbers = np.arange(8, dtype=np.float32)
    path = crafted(tmp_path / "a.pt", pickled(tensor(1, (2, 3), (4, 1))), numbers.tobytes())
    np.testing.assert_array_equal(read_torch_file(path), [[1, 2, 3], [5, 6, 7]])


class Malicious:
    """Unpickling makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_not_run(protocol, tmp_path):
    made = tmp_path / "made"
    data = pickle.dumps([1, Malicious(str(made))], protocol)
    refused(crafted(tmp_path / "a.pt", data), "holds more than tensors in lists and dicts|is damaged")
    assert not made.exists()
    pickle.loads(data)
    assert made.exists()  # the pickle would have worked


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
        b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R",
        b"\x8c\x02os\x8c\x06system\x93X\x04\x00\x00\x00true\x85R",
        b"X\x01\x00\x00\x00aQ",
        b"(X\x06\x00\x00\x00moduleNNNNtQ",
        b"K\x01u",
        b"h\x05",
        b"0",
        b"",
        b"J",
        tensor(count=-1),
        tensor(shape=(3, 4)),
        tensor(shape=(250_000, 4), count=1_000_000),
        tensor(offset=2_000_000_000, count=2_000_000_008),
        tensor(offset=1),
        tensor(offset=-1),
        tensor(strides=(-4, 1)),
        tensor(shape=(2, 4), strides=(4,)),
        tensor(storage=b"ctorch\nLongStorage\n"),
    ],
)
def test_other_content_is_refused_in_one_line(body, tmp_path):
    refused(crafted(tmp_path / "a.pt", pickled(body)), "holds more than tensors|is damaged|holds a tensor of")


def test_references_that_double_again_and_again_cost_nothing(tmp_path):
    body = b"]q\x00" + b"".join(
        b"(h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(200)
    )
    assert len(read_torch_file(crafted(tmp_path / "a.pt", pickled(body)))) == 2


def test_other_containers_are_refused(tmp_path):
    path, x = tmp_path / "a.pt", torch.randn(3, 2)
    torch.save(x, path, _use_new_zipfile_serialization=False)
    refused(path, r"old format, or is damaged; convert it with: torch.save\(torch.load")
    torch.save(x > 0, path)
    refused(path, "holds a tensor of torch.bool; save features as dense floats")
    torch.save(x.to_sparse(), path)
    refused(path, "a.pt")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/other", b"")
    refused(path, "is damaged")
    refused(tmp_path / "absent.pt", "cannot be read: No such file")


def test_without_torch_the_remedy_is_named(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from lit_fast.embed.importers.torch_file import read_torch_file\n"
        "read_torch_file('x.pt')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "x.pt is read by PyTorch, which is not installed; run: pip install torch" in done.stderr


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_and_cut_bytes_give_one_line_or_arrays_of_the_file(tmp_path_factory, data):
    file = io.BytesIO()
    crafted(file, pickled(b"]" + tensor() + b"a"))
    mutable = bytearray(file.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(mutable) - 1), max_size=4)):
        mutable[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(mutable[: data.draw(st.integers(len(mutable) // 2, len(mutable)))])
    try:
        found = read_torch_file(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        arrays = [x for x in found if isinstance(x, np.ndarray)] if isinstance(found, list) else []
        bounds = [np.lib.array_utils.byte_bounds(x) for x in arrays]
        assert all(high - low <= len(mutable) for low, high in bounds)
