"""Images in files of `tf.train.Example`: array_records and TFRecords."""

from __future__ import annotations

import threading
from functools import cache, lru_cache
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from lit_fast.data.dataset import Source
from lit_fast.data.images.decode import ImageError
from lit_fast.errors import UserError
from lit_fast.storage.cache import local_copy
from lit_fast.storage.machine import cached_files

# The exceptions of array_record for damaged files.
ERRORS = (ValueError, RuntimeError, IndexError, OverflowError, MemoryError)


class ExampleError(ValueError):
    """A record that is not a `tf.train.Example`; the message is the reason."""


def parse_example(record: bytes) -> dict[str, list[bytes] | list[int]]:
    """Return the values of every feature of bytes or integers by name; [] for floats and empty features.

    Raises:
      ExampleError: the record is damaged or something else.
    """
    example = _example_class()()
    try:
        example.ParseFromString(record)
    except DecodeError:
        raise ExampleError("it cannot be parsed") from None
    features = example.features.feature
    return {
        name: [*feature.bytes_list.value, *feature.int64_list.value] for name, feature in features.items()
    }


@cache
def _example_class() -> Any:
    """Return the message class of tensorflow/core/example/{example,feature}.proto, without the lists of floats.

    message Example  { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }
    message Feature  { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    """
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="lit_fast", syntax="proto3")

    def add_field(message: Any, name: str, number: int, kind: int | str, *, repeated: bool = False) -> Any:
        label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
        if isinstance(kind, str):
            return message.field.add(
                name=name, number=number, label=label, type=types.TYPE_MESSAGE, type_name=f".lit_fast.{kind}"
            )
        return message.field.add(name=name, number=number, label=label, type=kind)

    add_field(file.message_type.add(name="BytesList"), "value", 1, types.TYPE_BYTES, repeated=True)
    add_field(file.message_type.add(name="Int64List"), "value", 1, types.TYPE_INT64, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    add_field(feature, "bytes_list", 1, "BytesList").oneof_index = 0
    add_field(feature, "int64_list", 3, "Int64List").oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add_field(entry, "key", 1, types.TYPE_STRING)
    add_field(entry, "value", 2, "Feature")
    add_field(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add_field(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lit_fast.Example"))


def open_records(path: str) -> ArrayRecordReader:
    """Open an array_record file for reading records in any order, a remote one in its copy in the cache.

    Raises:
      UserError: the file is remote and cannot be read.
      FileNotFoundError: there is no such file.
      ValueError, RuntimeError: it is not an array_record file, is cut off, or has data behind its end.
    """
    reader = ArrayRecordReader(local_copy(path, in_parts=True), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():  # it would have no records
        reader.close()  # raises the reason
        raise ValueError("it cannot be opened")
    return reader


def image_of_example(record: bytes, feature: str) -> bytes:
    """Return the image in a feature of a record.

    Raises:
      ImageError: it has none.
    """
    try:
        values = parse_example(record).get(feature)
    except ExampleError as error:
        raise ImageError(f"not a tf.train.Example ({error})") from None
    if not values or not isinstance(values[0], bytes):
        raise ImageError(f"no image in {feature}")
    return values[0]


class ExampleImages:
    """Reads images from array_record files; keeps the most recently used files open."""

    def __init__(self) -> None:
        self._open = lru_cache(maxsize=cached_files())(_RecordFile)

    def read(self, source: Source, *, record: int) -> bytes:
        """Return the image in feature `source.image` of a record.

        Raises:
          UserError: the file is damaged.
          ImageError: the record has no image.
        """
        try:
            data = self._open(source.path).read(record)
        except ERRORS as error:
            raise UserError(f"{source.path} is damaged at record {record}: {error}; restore it") from None
        return image_of_example(data, source.image)


class _RecordFile:
    """An open array_record file; its reader serves one thread at a time."""

    def __init__(self, path: str) -> None:
        self._reader, self._lock = open_records(path), threading.Lock()

    def read(self, record: int) -> bytes:
        with self._lock:
            return bytes(self._reader.read(record, record + 1)[0])
