"""All pages of the product, from a small run whose captions, keys, classes and names are hostile."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_fast import api
from lit_fast.data.dataset import open_dataset
from lit_fast.inference.load import load
from lit_fast.inference.searcher import Searcher
from lit_fast.inference.serve import SearchServer
from lit_fast.report.compare import comparison_page, read_records
from lit_fast.report.race import race_page, rank
from lit_fast.runs.metrics import read_metrics
from lit_fast.train.tracking.report import write_report
from tests.demo.test_page import page as demo_page
from tests.helpers import encoded, picture, write_tar
from tests.trained import command

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "\u202eمرحبا بالعالم، قطة على سجادة حمراء",  # noqa: RUF001
    "👩‍👩‍👧‍👦🏳️‍🌈 a family & 'friends' \"here\"",
    "{{ 7 * 7 }} {% raw %} ${7*7} </textarea></style></title>--><!--",
)
CONFIG = """
steps = 4
[text]
variant = "mu"
[stream]
global_batch = 16
[optimizer]
warmup_steps = 1
[evaluate]
every_steps = 2
"""


def build_pages(directory: Path, tower: Path) -> dict[str, Path]:
    """Write every page as its command does; return them by name."""
    pairs, labelled = [], []
    for i in range(24):
        text = HOSTILE[i % len(HOSTILE)]
        key = f"{i:02d} {text}".translate(str.maketrans("/.", "__"))[:60]
        pairs += [(f"{key}.jpg", encoded(picture(i, 48, 30 + 3 * i))), (f"{key}.txt", f"{text} {i}".encode())]
        labelled += [(f"{i}.jpg", encoded(picture(i))), (f"{i}.cls", str(i % len(HOSTILE)).encode())]
    write_tar(directory / "pairs.tar", pairs, tarfile.GNU_FORMAT)
    write_tar(directory / "wds/test/0.tar", labelled)
    (directory / "wds/classnames.txt").write_text("\n".join(HOSTILE) + "\n")
    (directory / "wds/zeroshot_classification_templates.txt").write_text("a {c}.\n")
    (directory / "c.toml").write_text(CONFIG)
    data, zero_shot = directory / "pairs & <b>captions<b>", directory / "shapes"
    run = directory / 'run <i>1 & "2"'
    api.index(directory / "pairs.tar", out=data)
    api.index(directory / "wds", out=zero_shot)
    for dataset in (data, zero_shot):
        api.embed(dataset, tower=str(tower), preprocess="tf-squash")
    api.tokenize(data, train_vocab=360, name="words", max_length=12)
    sets = {"evaluate.retrieval": [data], "evaluate.zero_shot": [zero_shot]}
    api.train(directory / "c.toml", workdir=run, dataset=data, config=sets)
    evaluated, found, query = directory / "eval.html", directory / "search.html", directory / "🦊 'q'.jpg"
    query.write_bytes(encoded(picture(5)))
    command("eval", run, "--zero-shot", zero_shot, "--retrieval", data, "--page", evaluated)
    command("search", data, *HOSTILE, "--model", run, "--image", query, "--top", 30, "--page", found)
    pages = {"report": run / "report.html", "eval": evaluated, "search": found}
    longer = [
        _longer(run, directory / f"{name}-{seed}", 0.2 * i + 0.02 * seed)
        for i, name in enumerate(("vit <b>s<b> of a rather long name", "b8", "鳥" * 40))
        for seed in range(2)
    ]
    write_report(longer[0])
    pages["long report"] = longer[0] / "report.html"
    command("compare", *longer[:2], "--out", directory / "compare.html")
    pages["compare"] = directory / "compare.html"
    many = read_records([run, *longer, *longer[:4]])
    pages["compare many"] = _write(directory / "many.html", comparison_page(many))
    standings = rank(
        {
            "efficientnet": read_records(longer[:2]),
            "vit": read_records(longer[2:4]),
            "鳥" * 30: read_records(longer[4:]),
        }
    )
    pages["race"] = _write(directory / "race.html", race_page(*standings))
    pages["demo"] = _write(
        directory / "demo.html", demo_page(commands=[f"lit-fast index {text}" for text in HOSTILE])
    )
    return pages


def _longer(run: Path, path: Path, shift: float) -> Path:
    """Copy a run and give it the metrics of 20,000 steps."""
    shutil.copytree(run, path)
    config = path / "config.toml"
    config.write_text(config.read_text().replace("steps = 4\n", "steps = 20000\n", 1))
    lines = read_metrics(run / "metrics.jsonl")
    logged = next(line for line in lines if "loss" in line)
    evaluated = next(line for line in lines if any("/" in key for key in line))
    out: list[dict[str, Any]] = []
    for step in range(100, 20_001, 100):
        t = step / 20_000
        seconds = {"elapsed_seconds": 36_000 * t, "chip_hours": 40 * t}
        noise = math.sin(step) / 20
        out.append(
            logged
            | seconds
            | {
                "step": step,
                "loss": 9 * math.exp(-4 * t) + 1 + shift + noise,
                "learning_rate": 1e-3 * t,
                "temperature": 10 + 20 * t,
                "bias": -10 - t,
                "pairs_per_second": 24_650 + 3000 * noise,
            }
        )
        if step % 1000 == 0:
            figures = {
                key: min(1.0, (0.05 + 0.9 * t - shift / 9) * (0.4 + 0.15 * i))
                for i, key in enumerate(k for k in evaluated if "/" in k)
            }
            out.append(seconds | {"step": step} | figures)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in out))
    return path


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Serve the search of the dataset of `build_pages`; yield the address."""
    model = load(str(directory / 'run <i>1 & "2"'))
    with SearchServer(
        "127.0.0.1", 0, Searcher(model, open_dataset(directory / "pairs & <b>captions<b>"))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()
