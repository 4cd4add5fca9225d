"""The mesh of devices: one axis, over which the batch is dealt."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def on_each_device(function: Callable, mesh: Mesh, *dealt_arguments: bool) -> Callable:
    """`function` as one device runs it, on its part of the dealt arguments and the whole of the others.

    Its result must be the same on every device, so it has to end in a collective.
    """
    specs = tuple(PartitionSpec(AXIS) if d else PartitionSpec() for d in dealt_arguments)
    # Without check_vma gradients stay a device's own until they are summed, all at once, by hand.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def dealt(mesh: Mesh) -> NamedSharding:
    """The first axis in equal parts over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))
