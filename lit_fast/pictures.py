"""The image files of a dataset's rows, for pages that show them.

How sources are read is the business of the first stage; its function is found through an entry point of the group
`lit_fast.pictures`, as commands are, so that the ground floor never has to import a stage.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from lit_fast.dataset import Dataset

ReadPicture = Callable[[int], bytes | None]
"""A row to its image file as it lies in the source; None where it cannot be had."""


def picture_reader(dataset: Dataset) -> ReadPicture:
    """A function that reads the image files of a dataset from its sources; it never raises for a missing one."""
    for point in entry_points(group="lit_fast.pictures"):
        return point.load()(dataset)
    return lambda row: None
