"""Write the usage section of an ONNX export's card.

Its Python runs unchanged in the directory of the export.
"""

from __future__ import annotations

import math

from lit_fast.inference.model import Model

_TEXT = """\
Embeddings are float32 of unit length; the dot product of an image's and a text's is their cosine.

```python
import numpy as np
import onnxruntime
import sentencepiece

pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")

def tokenize(caption):  # ASCII lower case; truncated, end-of-sentence, padded
    ids = pieces.encode(caption.encode().lower().decode())[:{cut}] + [{eos}]
    return ids + [{pad}] * ({length} - len(ids))

text_tower = onnxruntime.InferenceSession("text.onnx")
(texts,) = text_tower.run(None, {{"ids": np.array([tokenize("a dog"), tokenize("a flower")])}})
```
"""

_VISION = """
Images become uint8 pixels by lit_fast's {method}; mean and standard deviation are in the graph.

```python
from lit_fast.data.images.decode import decode
from lit_fast.towers.preprocess import Preprocess

preprocess = Preprocess.from_dict({preprocess})
image = decode(open("image.jpg", "rb").read(), at_least=preprocess.at_least, alpha=preprocess.alpha)
pixels = preprocess.apply(image)
(images,) = onnxruntime.InferenceSession("vision.onnx").run(None, {{"images": pixels[None]}})
```
"""

_NO_VISION = """
`images`, float32 [n, {width}], come from `lit_fast.load(...).embed_image`, or from the graph that
`lit-fast export --format onnx --vision` writes.
"""

_SIGMOID = """
The probability that an image and a text match, for each pair independently:

```python
probabilities = 1 / (1 + np.exp(-({temperature:.9g} * images @ texts.T {bias:+.9g})))
```
"""

_SOFTMAX = """
The probability of each text among the given texts:

```python
logits = {temperature:.9g} * images @ texts.T
weights = np.exp(logits - logits.max(axis=1, keepdims=True))
probabilities = weights / weights.sum(axis=1, keepdims=True)
```
"""

_ZERO_SHOT = """
`zero_shot.npy` holds an embedding of every class of `classes.txt`:

```python
classes, names = np.load("zero_shot.npy"), open("classes.txt", encoding="utf-8").read().splitlines()
print([names[i] for i in (images @ classes.T).argmax(axis=1)])
```
"""


def usage(model: Model, vision: bool, zero_shot: bool) -> str:
    """Return Markdown for an export with or without vision tower and zero-shot head."""
    tokenizer, params = model.tokenizer, model.params
    length = tokenizer.max_length
    text = _TEXT.format(cut=length - 1, length=length, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    if vision:
        preprocess = model.tower.preprocess
        text += _VISION.format(method=preprocess.method, preprocess=preprocess.to_dict())
    else:
        text += _NO_VISION.format(width=model.width)
    bias = float(params["b"][0]) if "b" in params else 0.0
    score = _SOFTMAX if model.loss.name == "softmax" else _SIGMOID
    text += score.format(temperature=math.exp(float(params["t"][0])), bias=bias)
    return text + (_ZERO_SHOT if zero_shot else "")
