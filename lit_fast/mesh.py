"""The mesh of devices: one axis, over which the batch is dealt."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def dealt(mesh: Mesh) -> NamedSharding:
    """The first axis in equal parts over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))
