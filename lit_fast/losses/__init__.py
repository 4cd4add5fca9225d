"""Contrastive losses over all pairs of a global batch, in tiles on a ring of devices.

`contrastive` has the entry point and the sigmoid formula, `softmax` the softmax formula. `pairs` makes tiles of pairs
and decides which are positive, negative or masked; `negatives` finds the hardest or easiest negatives. `accumulate`
sums a formula's loss, gradients and logit statistics over all tiles; `ring` scans over the tiles of all devices.

To change the sigmoid formula, edit `pair_loss` in `contrastive.sigmoid_loss`, which returns the derivative by each
logit beside the loss, and the float64 formula in `tests/losses/dense_loss.py` that it is compared with. An option of a
formula is a field of `lit_fast.config.LossConfig`. A new formula is a `PairLossFn` and a branch in `contrastive`.
"""
