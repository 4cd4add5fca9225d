"""Answer queries, texts and images, with the nearest images of one dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import matching_features
from lit_fast.inference.model import Model
from lit_fast.inference.search import Hit, read_hits, search
from lit_fast.towers.embed import ImageLike


@dataclass(frozen=True)
class Answer:
    """A query and its hits, the best first.

    Attributes:
      query: the text, or the name of the image.
      kind: "text" or "image".
      hits: the rows found.
      probabilities: one per hit, where the model gives them.
    """

    query: str
    kind: str
    hits: tuple[Hit, ...]
    probabilities: tuple[float, ...] = ()


class Searcher:
    """Searches a dataset that has features of the model's tower."""

    def __init__(self, model: Model, dataset: Dataset) -> None:
        """Open the features.

        Raises:
          UserError: the dataset has no features of the model's tower, or they are incomplete.
        """
        self.model, self.dataset = model, dataset
        self._features = matching_features(dataset, model.tower_json)
        self._features.invalid_rows()

    def answer(
        self, texts: Sequence[str] = (), images: Mapping[str, ImageLike] | None = None, top: int = 20
    ) -> list[Answer]:
        """Find the `top` nearest rows of each query, the images first; one pass over the features.

        Args:
          texts: queries.
          images: queries, by their names.
          top: rows per query.

        Raises:
          UserError: an image cannot be used, or the features are damaged.
        """
        model, images = self.model, images or {}
        embeddings = np.zeros((0, model.width), np.float32)
        if images:
            embeddings = np.concatenate([embeddings, model.embed_image(list(images.values()))])
        if texts:
            embeddings = np.concatenate([embeddings, model.embed_text(texts)])
        queries = [*(("image", name) for name in images), *(("text", text) for text in texts)]
        found = search(self._features, embeddings, top, model.embed_features)
        return [self._answer(*query, rows) for query, rows in zip(queries, found, strict=True)]

    def _answer(self, kind: str, query: str, found: list[tuple[int, float]]) -> Answer:
        probabilities = np.zeros(0)
        if kind == "text" and self.model.loss.name == "sigmoid":
            cosines = np.array([[cosine] for _, cosine in found], np.float32)
            probabilities = self.model.probabilities(cosines)[:, 0] if found else probabilities
        return Answer(query, kind, tuple(read_hits(self.dataset, found)), tuple(probabilities.tolist()))
