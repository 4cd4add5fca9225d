"""A whole small job with the installed package alone: run this file outside of the repository."""

import random
import sys
from pathlib import Path

import lit_fast
from lit_fast import api
from lit_fast.demo.demo import CONFIG, TOWER
from lit_fast.demo.drawing import render
from lit_fast.demo.scenes import captions, sample

if __name__ == "__main__":
    assert Path(sys.prefix) in Path(lit_fast.__file__).parents, lit_fast.__file__
    pictures, rng = Path("pictures"), random.Random(0)
    pictures.mkdir()
    for number in range(96):
        scene = sample(rng)
        render(scene, rng).save(pictures / f"{number}.jpg")
        (pictures / f"{number}.txt").write_text(captions(scene, rng)[0])
    api.index(pictures, out="d")
    api.embed("d", tower=TOWER, preprocess="tf-squash", batch_size=32)
    api.tokenize("d", train_vocab=300, model_type="bpe", max_length=16, name="words")
    config = {"steps": 2, "stream.global_batch": 32, "text.width": 32, "optimizer.warmup_steps": 1}
    api.train(CONFIG, workdir="run", dataset="d", config=config)
    (result,) = api.evaluate("run", retrieval=["d"])
    assert result["metrics"]["image_retrieval_recall@10"] > 0
    assert api.load("run").score([pictures / "0.jpg"], ["a red star", "a blue ring"]).shape == (1, 2)
    assert Path("run/report.html").stat().st_size > 10_000
