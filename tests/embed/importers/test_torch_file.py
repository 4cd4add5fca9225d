"""Torch's files: the same numbers as torch reads, and nothing that a pickle asks for is done."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.importers.torch_file import read_torch_file
from lit_fast.errors import UserError


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


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


def test_tensors_lists_and_dicts_are_as_torch_saved_them(torch, tmp_path):
    x = torch.randn(7, 5)
    cases = [x, x.half(), x.bfloat16(), x.double(), x.T, x[1:, 2:], x[::2], x[:0], x[2]]
    for value in cases:
        torch.save(value, tmp_path / "a.pt")
        found = read_torch_file(tmp_path / "a.pt")
        assert found.dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(np.float64), value.double().numpy())
    for protocol in (2, 4):
        torch.save([x, x[2:4].half()], tmp_path / "a.pt", pickle_protocol=protocol)
        first, second = read_torch_file(tmp_path / "a.pt")
        np.testing.assert_array_equal(first, x.numpy())
        np.testing.assert_array_equal(second, x[2:4].half().numpy())
    for value in ({"a": x, 3: x[0]}, OrderedDict([("a", x), (3, x[0])])):
        torch.save(value, tmp_path / "a.pt")
        found = read_torch_file(tmp_path / "a.pt")
        assert list(found) == ["a", 3]
        np.testing.assert_array_equal(found[3], x[0].numpy())


def test_the_handwritten_pickle_is_read_by_both(torch, tmp_path):
    numbers = np.arange(8, dtype=np.float32)
    path = crafted(tmp_path / "a.pt", pickled(tensor(1, (2, 3), (4, 1))), numbers.tobytes())
    np.testing.assert_array_equal(read_torch_file(path), [[1, 2, 3], [5, 6, 7]])
    np.testing.assert_array_equal(torch.load(path).numpy(), [[1, 2, 3], [5, 6, 7]])


class Malicious:
    """Unpickling makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_a_pickle_asks_for_is_done(protocol, tmp_path):
    made = tmp_path / "made"
    data = pickle.dumps([1, Malicious(str(made))], protocol)
    path = crafted(tmp_path / "a.pt", data)
    with pytest.raises(UserError, match=r"it names 'posix.mkdir'|opcode") as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert not made.exists()
    pickle.loads(data)
    assert made.exists()  # the pickle would have worked


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", "it names 'os.system'"),
        (b"cbuiltins\neval\n", "it names 'builtins.eval'"),
        (b"\x8c\x02os\x8c\x06system\x93", "it names 'os.system'"),
        (b"ctorch._utils\n_rebuild_parameter\n", "_rebuild_parameter"),
        (b"ctorch\nFloatStorage\n)R", "calls something other"),
        (b"ctorch\nFloatStorage\n)\x81", "opcode NEWOBJ"),
        (b"X\x01\x00\x00\x00aQ", "damaged"),
        (b"(X\x06\x00\x00\x00moduleNNNNtQ", "other than a storage"),
        (b"}((K\x01K\x02tK\x03u", "neither text nor numbers"),
        (b"K\x01u", "no mark"),
        (b"h\x05", "damaged"),
        (b"0", "opcode POP"),
        (b"", "damaged"),
        (b"J", "damaged"),
        (tensor(count=9), "fewer numbers"),
        (tensor(count=-1), "fewer numbers"),
        (tensor(shape=(3, 4)), "larger than its storage"),
        (tensor(offset=1), "larger than its storage"),
        (tensor(offset=-1), "wrong shape"),
        (tensor(strides=(-4, 1)), "wrong shape"),
        (tensor(shape=(2_000_000_000, 4), strides=(0, 0)), "larger than its storage"),
        (tensor(shape=(2, 4), strides=(4,)), "no storage or shape"),
        (tensor(storage=b"ctorch\nLongStorage\n"), "LongStorage"),
    ],
)
def test_what_is_not_a_float_tensor_is_refused_in_one_line(body, message, tmp_path):
    path = crafted(tmp_path / "a.pt", pickled(body))
    with pytest.raises(UserError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_references_that_double_again_and_again_cost_nothing(tmp_path):
    body = b"]q\x00" + b"".join(
        b"(h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(200)
    )
    found = read_torch_file(crafted(tmp_path / "a.pt", pickled(body)))
    assert isinstance(found, tuple)
    for more in (b"}h\xc8K\x01s", b"\x8c\x01ah\xc8\x93"):  # as the name in a dict, as a name of a global
        with pytest.raises(UserError):
            read_torch_file(crafted(tmp_path / "a.pt", pickled(body + more)))


def test_other_containers(torch, tmp_path):
    path, x = tmp_path / "a.pt", torch.randn(3, 2)
    torch.save(x, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old format becomes one by torch.save\(torch.load"):
        read_torch_file(path)
    crafted(path, pickled(tensor()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/other", b"")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        read_torch_file(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_torch_file(tmp_path / "absent.pt")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_and_cut_bytes_never_do_more_than_one_line(tmp_path_factory, data):
    file = io.BytesIO()
    crafted(file, pickled(b"]" + tensor() + b"a"))
    mutable = bytearray(file.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(mutable) - 1), max_size=4)):
        mutable[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(mutable[: data.draw(st.integers(len(mutable) // 2, len(mutable)))])
    try:
        found = read_torch_file(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:  # the place of the storage, or a number in the shape, may be another one within the file
        assert sum(x.nbytes for x in found if isinstance(x, np.ndarray)) <= len(mutable)
