"""Contrastive losses over all pairs of a global batch, in tiles on a ring of devices.

`contrastive` has the entry point and the sigmoid formula, `softmax` the softmax formula. `pairs` makes tiles of pairs
and decides which are positive, negative or masked; `negatives` finds the hardest or easiest negatives. `accumulate`
sums a formula's loss, gradients and logit statistics over all tiles; `ring` scans over the tiles of all devices.
"""
