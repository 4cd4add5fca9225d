"""Stage 1: from images to a dataset and the features of a frozen vision tower.

index      sources -> dataset: `sources` (a module per format), row_reader, skipped
extract    dataset -> features: loader decodes, pipeline runs the tower, shard_writer and journal store
tokenize   captions -> token ids
importers  features that another program computed -> dataset
verify     compare what is stored with checksums, sources and a sample of new features
"""

from __future__ import annotations
