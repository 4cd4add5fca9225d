"""Labels for images: scores against the definition, and every image that cannot be read is named."""

import numpy as np
import pytest

from lit_fast.config import LossConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.inference.classify import as_json, check_labels, classify, expand_images, format_scores
from lit_fast.storage.paths import name
from lit_fast.towers.tower import load_tower
from tests.helpers import encoded, picture
from tests.trained import random_model

SMALL = TextConfig(width=32, depth=1, heads=2, dtype="float32")
LABELS = ["a red thing", "Green_ones!", "blue"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        (directory / f"{i}.jpg").write_bytes(encoded(picture(i)))
    (directory / "1b.PNG").write_bytes(b"broken")
    (directory / "notes.txt").write_text("no image")
    return directory


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_classify_scores_equal_the_mean_over_the_templates(loss, tiny_vit, pictures):
    model = random_model(load_tower(str(tiny_vit)), SMALL, LossConfig(name=loss))
    files = expand_images([pictures])
    assert [name(f) for f in files] == ["0.jpg", "1.jpg", "1b.PNG", "2.jpg"]
    scores, errors = classify(model, files, LABELS, ["{c}", "a photo of {c}."])
    assert list(errors) == [2]
    assert "1b.PNG cannot be embedded" in errors[2]
    assert np.isnan(scores[2]).all()

    names = ["a red thing", "green ones", "blue"]
    texts = [model.embed_text([n, f"a photo of {n}"]).astype(np.float64).mean(axis=0) for n in names]
    classes = np.stack([t / np.linalg.norm(t) for t in texts])
    images = model.embed_image([files[0], files[1], files[3]]).astype(np.float64)
    logits = np.exp(model.params["t"][0].astype(np.float64)) * (images @ classes.T)
    if loss == "sigmoid":
        want = 1 / (1 + np.exp(-(logits + model.params["b"][0])))
    else:
        want = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # float32 sums of 32 products, multiplied by the temperature.
    np.testing.assert_allclose(scores[[0, 1, 3]], want, rtol=1e-4)

    table = format_scores(files, LABELS, scores).splitlines()
    assert len(table) == 3
    best = LABELS[int(want[0].argmax())]
    assert table[0].split("0.jpg", 1)[1].strip().startswith(best)
    value = as_json(model, files, LABELS, scores, errors)
    assert value["score"] == {"sigmoid": "probability", "softmax": "share"}[loss]
    assert "error" in value["images"][2]
    assert list(value["images"][0]["scores"]) == LABELS


def test_classify_with_several_broken_images_scores_the_others(tiny_vit, pictures):
    model = random_model(load_tower(str(tiny_vit)), SMALL)
    good, broken = pictures / "0.jpg", pictures / "1b.PNG"
    scores, errors = classify(model, [good, broken, good, broken, broken, good], LABELS, ["{c}"])
    assert list(errors) == [1, 3, 4]
    assert np.isnan(scores[[1, 3, 4]]).all()
    alone, _ = classify(model, [good], LABELS, ["{c}"])
    np.testing.assert_array_equal(scores[[0, 2, 5]], np.repeat(alone, 3, axis=0))


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["a cat"], ["{c}"], "at least two labels"),
        (["a cat", "!?"], ["{c}"], "neither letters nor digits"),
        (["a cat", "A  Cat."], ["{c}"], "2 labels are equal to 'a cat'"),
        (["a", "b"], ["a photo"], "lacks the class name"),
    ],
)
def test_check_labels_unusable_labels_raise(labels, templates, message):
    with pytest.raises(UserError, match=message) as caught:
        check_labels(labels, templates)
    assert ".txt" not in str(caught.value)


def test_expand_images_of_a_directory_without_images_raises(tmp_path):
    with pytest.raises(UserError, match="has no image files"):
        expand_images([tmp_path])
