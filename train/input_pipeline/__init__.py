"""Batches of features and token ids.

    stream           opens features and tokens, chooses a shuffle, yields batches
    exact_shuffle    order of the rows of a dataset that fits in memory
    neighbour_order  order of the rows where batches are composed of groups of similar images
    window_shuffle   order of the rows of a larger dataset, read block by block; its arithmetic is window_layout
    captions         captions and views that an epoch uses of each row
    images           pixels of the rows, for a trained image tower
    buffers          reusable memory of batches
    corruption       noise in images, texts and their alignment
    packing          several captions in one row of the text tower

To change the order of batches, edit one of the two shuffles; they know nothing of corruption or packing. To change
which captions are used, edit captions; to corrupt batches in another way, edit corruption.

`stream.memory_gib` decides which shuffle runs, so change both. Raise `stream.ORDER_VERSION` with every change of the
order: it is part of the identity that a resumed run compares. packing sizes its rows for captions in random order.
"""
