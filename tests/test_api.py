"""`lit_fast.api`: the commands as functions. `tests.trained` makes its run with them."""

import json

import pytest

from lit_fast import api
from lit_fast.cli.main import main
from lit_fast.errors import UserError


def test_evaluate_returns_what_the_command_writes(trained_run, tmp_path, capsys):
    data = trained_run.parent / "d"
    results = api.evaluate(trained_run, retrieval=[data], average=False)
    command = ["eval", str(trained_run), "--retrieval", str(data), "--json", str(tmp_path / "x.json")]
    assert main(command) == 0
    assert results == [json.loads((tmp_path / "x.json").read_text())]
    assert results != api.evaluate(trained_run, retrieval=[data], average=True)
    assert api.load(trained_run).embed_text(["a"]).shape[0] == 1


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda d: api.index("none.tar", out=d / "new"), "none.tar"),
        (lambda d: api.embed(d, tower="none"), "tower 'none' is neither a file nor a name"),
        (lambda d: api.embed(d, tower="none", batchsize=3), "unrecognized arguments: --batchsize=3"),
        (lambda d: api.tokenize(d), "--tokenizer"),
        (lambda d: api.train("none", workdir=d / "new", dataset=d), "none"),
        (
            lambda d: api.train("coco", workdir="w", dataset=d, config={"optimizer.learningrate": 1}),
            "learning_rate",
        ),
        (lambda d: api.evaluate(d), "nothing to evaluate"),
    ],
)
def test_mistakes_raise_the_line_of_the_command(trained_run, call, line):
    with pytest.raises(UserError, match=line):
        call(trained_run.parent / "d")
