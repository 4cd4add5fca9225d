"""Writes `tf.train.Example` through protobuf's own library, the reference for the parser by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto


def _message_class() -> Any:
    """`tf.train.Example` as tensorflow/core/example/{example,feature}.proto define it."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, parent: Any = None) -> Any:
        return (file.message_type if parent is None else parent.nested_type).add(name=name)

    def field(
        of: Any, name: str, number: int, kind: int, label: int = 1, type_name: str | None = None, **more: Any
    ) -> None:
        of.field.add(name=name, number=number, type=kind, label=label, type_name=type_name, **more)

    for name, kind in (
        ("BytesList", _FIELD.TYPE_BYTES),
        ("FloatList", _FIELD.TYPE_FLOAT),
        ("Int64List", _FIELD.TYPE_INT64),
    ):
        field(message(name), "value", 1, kind, 3)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        kind_name = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}[name]
        field(feature, name, number, _FIELD.TYPE_MESSAGE, 1, f".t.{kind_name}", oneof_index=0)
    features = message("Features")
    entry = message("FeatureEntry", features)
    entry.options.map_entry = True
    field(entry, "key", 1, _FIELD.TYPE_STRING)
    field(entry, "value", 2, _FIELD.TYPE_MESSAGE, 1, ".t.Feature")
    field(features, "feature", 1, _FIELD.TYPE_MESSAGE, 3, ".t.Features.FeatureEntry")
    field(message("Example"), "features", 1, _FIELD.TYPE_MESSAGE, 1, ".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _message_class()


def example(features: Mapping[str, list[bytes] | list[int] | list[float]]) -> bytes:
    """One serialized Example."""
    made = Example()
    for name, values in features.items():
        feature = made.features.feature[name]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return made.SerializeToString()
