"""The commands `classify` and `search` with a run and with its export."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.runs.run import open_run
from tests.helpers import encoded, picture, tiny_vit_arrays


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(trained_run), "--out", str(path)]) == 0
    return path


@pytest.fixture(params=["run", "exported"])
def model(request, trained_run):
    return trained_run if request.param == "run" else request.getfixturevalue("exported")


def command(*arguments):
    return main([str(a) for a in arguments])


def test_search_ranks_as_evaluation_does(model, trained_run, tmp_path, capsys):
    data, out, page = trained_run.parent / "d", tmp_path / "out.json", tmp_path / "page.html"
    image = tmp_path / "5.jpg"
    image.write_bytes(encoded(picture(5)))
    queries = ["a red boat", "picture 3"]
    options = ["--model", model, "--image", image, "--top", 6, "--page", page, "--json", out]
    assert command("search", data, queries[0], *options, queries[1]) == 0
    text = capsys.readouterr().out
    answers = json.loads(out.read_text())
    assert [a["kind"] for a in answers] == ["image", "text", "text"]

    run = open_run(trained_run)
    rows, images = run.image_embeddings(open_dataset(data))
    cosines = images @ run.embed_text(queries).T
    for column, answer in enumerate(answers[1:]):
        found = answer["results"]
        assert [r["row"] for r in found] == rows[np.argsort(-cosines[:, column])[:6]].tolist()
        # Sums of 32 float32 products in another order.
        np.testing.assert_allclose(
            [r["cosine"] for r in found], np.sort(cosines[:, column])[::-1][:6], atol=1e-5
        )
        logits = np.exp(run.params["t"][0]) * cosines[found[0]["row"], column] + run.params["b"][0]
        assert found[0]["probability"] == pytest.approx(1 / (1 + np.exp(-logits)), rel=1e-3)
        assert found[0]["captions"][0] in text

    keys = [key for block in open_dataset(data).iter_blocks() for key in block.keys]
    nearest = answers[0]["results"][0]  # the picture itself, rounded to bfloat16
    assert keys[nearest["row"]] == nearest["key"] == "000000005"
    assert nearest["cosine"] == pytest.approx(1, abs=1e-4)
    assert "probability" not in nearest
    assert page.read_text().count("data:image/jpeg") == 3 * 6 + 1


def test_classify_continues_after_a_broken_image(model, tmp_path, capsys, monkeypatch):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
    (tmp_path / "broken.jpg").write_bytes(encoded(picture(3))[:500])
    labels, out = tmp_path / "labels.txt", tmp_path / "out.json"
    labels.write_text("a dog\na cat\na house\n")
    status = command("classify", tmp_path, "--model", model, "--labels-file", labels, "--json", out)
    shown = capsys.readouterr()
    assert status == 2
    assert "own probability" in shown.out
    assert shown.out.count("%") == 6
    assert "broken.jpg cannot be embedded" in shown.err
    assert "1 of 3 images failed" in shown.err
    scores = {entry["image"]: entry for entry in json.loads(out.read_text())["images"]}
    assert [len(e.get("scores", [])) for e in scores.values()] == [3, 3, 0]

    status = command("classify", tmp_path / "0.jpg", "--model", model, "--labels", "a dog, a cat,a house")
    assert status == 0
    one = capsys.readouterr().out
    assert f"{100 * scores[str(tmp_path / '0.jpg')]['scores']['a cat']:.3g} %" in one

    monkeypatch.setenv("LIT_FAST_MODEL", str(model))
    assert command("classify", tmp_path / "0.jpg", "--labels", "a dog, a cat,a house") == 0
    assert capsys.readouterr().out == one


def test_another_tower_or_tokenizer_than_the_runs_is_refused(trained_run, tmp_path, capsys):
    run, other, data = tmp_path / "run", tmp_path / "other.npz", trained_run.parent / "d"
    shutil.copytree(trained_run, run)
    np.savez(other, **(tiny_vit_arrays() | {"cls": np.ones((1, 1, 32), np.float32)}))
    (tmp_path / "0.jpg").write_bytes(encoded(picture(0)))
    page = tmp_path / "page.html"
    query = ["search", data, "--image", tmp_path / "0.jpg", "--model", run, "--page", page]
    assert command(*query, "--tower", other) == 2
    assert "other.npz is not the vision tower" in capsys.readouterr().err
    text = "a few other words to make a vocabulary of its own from\n" * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(run / "tokenizer"), vocab_size=25,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    assert command("search", data, "words", "--model", run, "--page", page) == 2
    assert "tokenizer.model is not the tokenizer that tokens.json records" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("search {d} --model {w}", "the query is missing"),
        ("search {d} dog --model {w} --top 0", "--top must be at least 1, not 0"),
        ("search {d} dog --model {w} --imag x", "unrecognized arguments: --imag"),
        ("search {d} dog --model {d}", "is not a run"),
        ("search {w} dog --model {w}", "is not a dataset"),
        ("search {d} --image {t}/absent.jpg --model {w} --page {t}/p.html", "there is no such file"),
        ("search {d} dog --model {w} --page {t}", "is a directory"),
        ("search {d} dog", "the model is missing; add --model W"),
        ("classify {t}/absent.jpg --model {w} --labels a,b", "there is no such file"),
        ("classify {t} --model {w} --labels a,b", "has no image files"),
        ("classify x.jpg --model {w} --labels a", "at least two labels"),
        ("classify x.jpg --model {w} --labels a,b --tower {t}/no.npz", "no.npz"),
        ("classify x.jpg --labels a,b", "the model is missing; add --model W"),
    ],
)
def test_mistake_with_a_model_is_one_line(arguments, message, trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LIT_FAST_MODEL", raising=False)
    line = arguments.format(d=trained_run.parent / "d", w=trained_run, t=tmp_path)
    assert command(*line.split()) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("lit-fast: error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.iterdir())
