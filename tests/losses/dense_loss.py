"""The losses by their formulas, in float64 NumPy, from the matrix of all pairs."""

import numpy as np

from lit_fast.losses.pairs import mix


def dense_loss(config, batch, texts, log_scale, bias=None, head=None):
    """Return (loss, gradients by name, logits of positives, logits of negatives)."""
    texts, features = np.float64(texts), np.float64(batch["features"])
    scale = np.exp(np.float64(log_scale))
    linear = features if head is None else features @ np.float64(head)
    norm = np.linalg.norm(linear, axis=1, keepdims=True)
    images = features if head is None else linear / norm
    cosine = images @ texts.T
    logit = scale * cosine + (0.0 if bias is None else np.float64(bias))
    positive, negative = pairs(config, batch, cosine)
    formula = softmax if config.name == "softmax" else sigmoid
    value, slope = formula(logit, positive, negative)
    gradients = {
        "texts": scale * slope.T @ images,
        "log_scale": (slope * scale * cosine).sum(),
        "bias": None if bias is None else slope.sum(),
        "head": None,
        "images": scale * slope @ texts,
    }
    if head is not None:
        by_image = gradients["images"]
        by_linear = (by_image - (by_image * images).sum(axis=1, keepdims=True) * images) / norm
        gradients["head"] = features.T @ by_linear
    return value, gradients, logit[positive], logit[negative]


def sigmoid(logit, positive, negative):
    n = len(logit)
    value = np.logaddexp(0, -logit[positive]).sum() + np.logaddexp(0, logit[negative]).sum()
    slope = negative / (1 + np.exp(-logit)) - positive / (1 + np.exp(logit))
    return value / n, slope / n


def softmax(logit, positive, negative):
    value, slope = 0.0, np.zeros_like(logit)
    for axis in (0, 1):
        # Axis 1: an image over the texts. The target is uniform over the positives.
        masked = np.where(positive | negative, logit, -np.inf)
        log_probability = masked - np.logaddexp.reduce(masked, axis=axis, keepdims=True)
        target = positive / positive.sum(axis=axis, keepdims=True)
        weight = 0.5 / logit.shape[1 - axis]
        value -= weight * (target[positive] * log_probability[positive]).sum()
        slope += weight * (np.exp(log_probability) - target)
    return value, slope


def pairs(config, batch, cosine):
    """Return the positive and the negative pairs, bool [images, texts]."""
    rows, ids, captions = batch["rows"], batch["ids"], len(batch["ids"]) // len(batch["rows"])
    n, m = cosine.shape
    same_row = rows[:, None] == np.repeat(rows, captions)[None, :]
    positive, negative = same_row, ~same_row
    if config.near_duplicates != "negative":
        features = np.float64(batch["features"])
        near = np.repeat(features @ features.T >= config.near_duplicate_cosine, captions, axis=1)
        if config.near_duplicates == "positive":
            positive = same_row | near
            negative = ~positive
        else:
            negative &= ~near
    if config.same_caption == "mask":
        equal = (ids[:, None] == ids[None, :]).all(axis=-1)  # [texts, texts]
        came_with = equal.reshape(n, captions, m).any(axis=1)
        negative &= ~came_with
    if config.negatives == "random":
        share = config.negatives_per_positive / max(n - 1, 1)
        seeds = batch["seeds"]
        image_ids = mix(mix(np.arange(n, dtype=np.uint32)) ^ seeds[0])
        text_ids = mix(mix(np.arange(m, dtype=np.uint32)) ^ seeds[1])
        draw = np.asarray(mix(image_ids[:, None] ^ text_ids[None, :]))
        negative &= (draw / 2**32 < share) | (share >= 1)
    elif config.negatives != "all":
        rank = np.where(negative, cosine if config.negatives == "hardest" else -cosine, -np.inf)
        wanted = int(np.ceil(config.negatives_per_positive * m))
        if wanted < negative.sum():
            negative &= rank >= np.sort(rank, axis=None)[-wanted]
    return positive, negative
