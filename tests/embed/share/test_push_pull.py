"""`lit-fast push` and `lit-fast pull` through a Hub on this machine: equal bytes, no images, no paths, no trust."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.embed import import_rows
from lit_fast.storage.files import sha256
from tests.embed.contents import captions, keys, patch_shard_rows, tree
from tests.helpers import encoded, picture, samples, write_tar
from tests.web import COMMIT, Hub, running_hub, sha  # noqa: F401

REPOSITORY = "someone/pairs"
HERE = f"datasets/{REPOSITORY}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_vit):
    """A dataset of two tars with features of a tower, imported ones being absent, and tokens."""
    directory = tmp_path_factory.mktemp("homes") / "alice" / "secret"
    write_tar(directory / "0.tar", samples(20))
    write_tar(directory / "1.tar", samples(20, first=20))
    dataset = directory / "d"
    commands = [
        ["index", directory / "0.tar", directory / "1.tar", "--out", dataset],
        ["embed", dataset, "--tower", tiny_vit],
        ["tokenize", dataset, "--train-vocab", 284, "--name", "words"],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0
    return dataset


@pytest.fixture(autouse=True)
def token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")


def run(*words):
    return main([str(word) for word in words])


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


def files(hub):
    return hub.repositories[HERE]


def put(hub, changed):
    """Set the files of the repository in a new commit."""
    hub.add(HERE, changed)
    hub.commits[HERE] = sha(json.dumps({name: sha(data) for name, data in changed.items()}).encode())[:40]


def replace_file(hub, path, data, *, declared=True):
    """Change a file of the repository, and its entry in the manifest."""
    manifest = json.loads(files(hub)["lit_fast.json"])
    if declared:
        manifest["files"][path] = [len(data), sha(data)]
    put(hub, files(hub) | {path: data, "lit_fast.json": json.dumps(manifest).encode()})


def test_pulled_dataset_has_equal_bytes_and_trains(made, hub, tmp_path, capsys):
    assert run("push", made, REPOSITORY) == 0
    assert HERE in hub.private
    shown = capsys.readouterr()
    assert "(private)" in shown.err
    assert "pushed 40 rows with 80 captions, features tiny, tokens words to" in shown.out
    assert run("pull", REPOSITORY, tmp_path / "d") == 0
    assert "pulled 40 rows with 80 captions, features tiny, tokens words from" in capsys.readouterr().out

    here, there = tree(made), tree(tmp_path / "d")
    changed = {"dataset.json", "features/tiny/tower.json"}
    assert {path for path in there if here[path] != there[path]} == changed
    assert not any(path.startswith(".") or ".cache" in path for path in there)
    assert set(here) - set(there) <= {"left_out.jsonl"}
    one, other = open_dataset(made), open_dataset(tmp_path / "d")
    assert (one.digest, keys(one), captions(one)) == (other.digest, keys(other), captions(other))
    assert open_features(one).identity == open_features(other).identity
    assert os.listdir(tmp_path / "d" / "..").count("d") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".pull", ".lock"))]

    (tmp_path / "c.toml").write_text(
        'steps = 2\n[text]\nwidth = 16\ndepth = 1\nheads = 2\ndtype = "float32"\n'
        "[stream]\nglobal_batch = 8\n[optimizer]\nwarmup_steps = 1\n"
    )
    assert run("train", tmp_path / "c.toml", "--workdir", tmp_path / "w", "--dataset", tmp_path / "d") == 0
    assert run("verify", tmp_path / "d", "--sample", "0") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "d") == 0
    shown = capsys.readouterr().out
    assert "elsewhere; connect them with: lit-fast index --relocate elsewhere://1=DIRECTORY" in shown


def test_nothing_that_is_pushed_names_a_directory_of_this_machine(made, hub, capsys):
    assert run("push", made, REPOSITORY, "--license", "cc-by-4.0") == 0
    everything = b"\0".join(files(hub).values()) + "\0".join(files(hub)).encode()
    for word in (b"alice", b"secret", str(Path.home()).encode() + b"/", b"/tmp/", b".jpg\0"):
        assert word not in everything
    assert b"elsewhere://1/0.tar" in files(hub)["dataset.json"]
    assert not [name for name in files(hub) if name.endswith((".tar", ".jpg"))]
    card = files(hub)["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "lit-fast pull someone/pairs pairs\nlit-fast train siglit_b8_one_day" in card
    assert "40 rows with 80 captions" in card
    assert "| `tiny` | 32 | 1 | 40 |" in card


def test_images_of_a_pulled_dataset_are_connected_by_relocation(made, hub, tiny_vit, tmp_path, capsys):
    assert run("push", made, REPOSITORY) == 0
    assert run("pull", REPOSITORY, tmp_path / "d") == 0
    capsys.readouterr()
    command = ("embed", tmp_path / "d", "--tower", tiny_vit, "--name", "again")
    assert run(*command) == 2
    hint = f"lit-fast index --relocate elsewhere://1=DIRECTORY {tmp_path}/d"
    shown = error(capsys)
    assert "the images of" in shown
    assert "are not here" in shown
    assert hint in shown
    assert run("index", "--relocate", f"elsewhere://1={made.parent}", tmp_path / "d") == 0
    assert run(*command) == 0
    dataset = open_dataset(tmp_path / "d")
    np.testing.assert_array_equal(
        open_features(dataset, "again").read_all(), open_features(dataset, "tiny").read_all()
    )


def test_second_push_uploads_nothing_and_an_interrupted_one_continues(made, hub, capsys, monkeypatch):
    from lit_fast.embed.share import push

    monkeypatch.setattr(push, "_GROUP_FILES", 1)
    real = push.HubDataset.commit
    commits = []

    def commit(self, additions, deletions, message):
        if len(commits) == 3:
            raise KeyboardInterrupt
        commits.append(list(additions))
        real(self, additions, deletions, message)

    with monkeypatch.context() as patch:
        patch.setattr(push.HubDataset, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            push.push_dataset(made, REPOSITORY)
    assert "lit_fast.json" not in files(hub)
    assert run("pull", REPOSITORY, "nowhere") == 2
    assert "has no lit_fast.json; it was not made, or not finished, by lit-fast push" in error(capsys)
    uploads = list(hub.content.uploaded)
    assert run("push", made, REPOSITORY) == 0
    first = dict(files(hub))
    put = [path for method, path, _ in hub.content.requests if method == "PUT"]
    assert len(put) == len(set(put)) > len(uploads)  # nothing twice
    capsys.readouterr()
    assert run("push", made, REPOSITORY) == 0
    assert "push 0 of" in capsys.readouterr().err
    assert files(hub) == first
    assert len([path for method, path, _ in hub.content.requests if method == "PUT"]) == len(put)


def rows(first=0, count=30, width=4):
    rng = np.random.default_rng(width)
    vectors = rng.normal(size=(first + count, width))
    return [(f"k{i}", vectors[i], f"text {i}") for i in range(first, first + count)]


def test_parts_are_chosen_and_added_later(made, hub, tmp_path, capsys):
    d = tmp_path / "two"
    shutil.copytree(made, d)
    shutil.copytree(d / "tokens/words", d / "tokens/more")
    shutil.copytree(d / "features/tiny", d / "features/twin")
    assert run("push", d, REPOSITORY, "--tower", "tiny", "--tokenizer", "words") == 0
    assert not [name for name in files(hub) if "twin" in name or "more" in name]
    assert run("push", d, REPOSITORY, "--tower", "twin", "--tokenizer", "more") == 0
    manifest = json.loads(files(hub)["lit_fast.json"])
    assert {name.split("/")[1] for name in manifest["files"] if "/" in name} >= {
        "tiny",
        "twin",
        "words",
        "more",
    }
    p = tmp_path / "p"
    assert run("pull", REPOSITORY, p, "--tower", "twin", "--tokenizer", "words") == 0
    assert (os.listdir(p / "features"), os.listdir(p / "tokens")) == (["twin"], ["words"])
    before = len(hub.downloads)
    assert run("pull", REPOSITORY, p, "--tower", "tiny") == 0
    assert not [path for path in hub.downloads[before:] if "index" in path]
    assert sorted(os.listdir(p / "features")) == ["tiny", "twin"]
    assert sorted(os.listdir(p / "tokens")) == ["more", "words"]
    assert tree(p / "features/tiny/c") == tree(d / "features/tiny/c")
    capsys.readouterr()
    assert run("pull", REPOSITORY, p) == 0
    assert "has all of someone/pairs already" in capsys.readouterr().out
    for option, message in (
        ("--tower", "has no features 'x'; choose from tiny, twin"),
        ("--tokenizer", "no tokens 'x'"),
    ):
        assert run("pull", REPOSITORY, tmp_path / "q", option, "x") == 2
        assert message in error(capsys)
    assert run("push", d, REPOSITORY, "--tower", "x") == 2
    assert "no features of tower 'x'" in error(capsys)


def test_other_dataset_does_not_replace_the_pushed_one(made, hub, tmp_path, capsys):
    assert run("push", made, REPOSITORY) == 0
    import_rows(rows(), tmp_path / "other", tower="t")
    assert run("push", tmp_path / "other", REPOSITORY) == 2
    assert "holds another dataset, of 40 rows; choose another repository" in error(capsys)
    assert run("pull", REPOSITORY, tmp_path / "other") == 2
    assert "is already another dataset than" in error(capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    assert run("pull", REPOSITORY, tmp_path / "full") == 2
    assert "holds other files" in error(capsys)


def test_grown_dataset_replaces_its_earlier_rows(made, hub, tiny_vit, tmp_path, capsys):
    d = tmp_path / "grown"
    shutil.copytree(made, d)
    assert run("push", d, REPOSITORY) == 0
    old = hub.commits[HERE]
    write_tar(tmp_path / "2.tar", samples(7, first=40))
    assert run("index", tmp_path / "2.tar", "--out", d, "--append") == 0
    assert run("embed", d, "--tower", tiny_vit) == 0
    assert run("push", d, REPOSITORY) == 0
    assert "note: tokens words are not pushed" in capsys.readouterr().err
    assert not [name for name in files(hub) if name.startswith(("tokens/", "index/", "captions/"))]
    assert run("pull", REPOSITORY, tmp_path / "new") == 0
    assert run("pull", REPOSITORY, tmp_path / "old", "--revision", old) == 0
    assert [open_dataset(tmp_path / name).rows for name in ("new", "old")] == [47, 40]
    assert run("pull", REPOSITORY, tmp_path / "x", "--revision", "v9") == 2
    assert "has no such revision" in error(capsys)


def test_several_shards_are_shared_and_replaced_by_more_rows_of_the_same(hub, tmp_path, monkeypatch, capsys):
    patch_shard_rows(monkeypatch)
    for name, count, prefix in (("short", 1500, "k"), ("long", 2500, "k"), ("other", 2500, "x")):
        given = [(prefix + key, vector, text) for key, vector, text in rows(count=count)]
        import_rows(given, tmp_path / name, tower="t")
    assert run("push", tmp_path / "short", REPOSITORY) == 0
    assert run("push", tmp_path / "other", REPOSITORY) == 2
    assert "holds another dataset, of 1,500 rows" in error(capsys)
    assert run("push", tmp_path / "long", REPOSITORY) == 0
    assert run("push", tmp_path / "short", REPOSITORY) == 2
    assert "holds another dataset, of 2,500 rows" in error(capsys)
    assert run("pull", REPOSITORY, tmp_path / "p") == 0
    assert tree(tmp_path / "p/features/t/c") == tree(tmp_path / "long/features/t/c")
    assert len(tree(tmp_path / "p/features/t/manifest")) == 3


def test_imported_features_are_shared_as_well(hub, tmp_path, capsys):
    import_rows(rows(), tmp_path / "d", tower="t", source="my encoder")
    assert run("push", tmp_path / "d", REPOSITORY) == 0
    assert run("pull", REPOSITORY, tmp_path / "p") == 0
    assert tree(tmp_path / "p/features/t/c") == tree(tmp_path / "d/features/t/c")
    assert open_dataset(tmp_path / "p").sources == open_dataset(tmp_path / "d").sources
    assert "images are not included" not in capsys.readouterr().out
    assert "Before it, make tokens: `lit-fast tokenize pairs" in files(hub)["README.md"].decode()


def test_folders_and_tables_of_two_directories_are_pushed_and_connected(hub, tiny_vit, tmp_path, capsys):
    home = tmp_path / "alice"
    for label in ("cat", "dog"):
        (home / "val" / label).mkdir(parents=True)
        for number in range(3):
            (home / "val" / label / f"{number}.png").write_bytes(encoded(picture(number), "PNG"))
    lines = [f"{label}/{number}.png,a {label}" for label in ("cat", "dog") for number in range(3)]
    (home / "captions.csv").write_text("\n".join(["filepath,title", *lines]))
    for source, images in ((home / "val", ()), (home / "captions.csv", ("--images", home / "val"))):
        d, p = tmp_path / f"d{source.suffix}", tmp_path / f"p{source.suffix}"
        name = f"someone/d{source.suffix}"
        assert run("index", source, "--out", d, *images) == 0
        assert run("push", d, name) == 0
        assert b"alice" not in b"".join(hub.repositories[f"datasets/{name}"].values())
        assert run("pull", name, p) == 0
        assert run("embed", p, "--tower", tiny_vit) == 2
        assert "--relocate elsewhere://" in error(capsys)
        sources = json.loads((p / "dataset.json").read_text())["sources"]
        moves = {s["path"]: source for s in sources} | {s["images"]: home / "val" for s in sources}
        words = [word for old, new in moves.items() for word in ("--relocate", f"{old}={new}")]
        assert run("index", *words, p) == 0
        assert run("embed", p, "--tower", tiny_vit) == 0
        assert run("push", p, f"{name}-2") == 0


def test_licence_must_be_a_name_and_secrets_of_addresses_are_not_pushed(made, hub, tmp_path, capsys):
    assert run("push", made, REPOSITORY, "--license", "mit\nx: y") == 2
    assert "is not the name of a licence" in error(capsys)
    d = tmp_path / "d"
    shutil.copytree(made, d)
    value = json.loads((d / "dataset.json").read_text())
    value["sources"][0]["path"] = "https://user:pass@host/a/0.tar?X-Signature=abc"
    value["sources"][1]["path"] = "s3://bucket/1.tar"
    (d / "dataset.json").write_text(json.dumps(value))
    assert run("push", d, REPOSITORY) == 0
    pushed = [source["path"] for source in json.loads(files(hub)["dataset.json"])["sources"]]
    assert pushed == ["https://host/a/0.tar", "s3://bucket/1.tar"]


def test_own_text_of_the_card_is_kept(made, hub):
    assert run("push", made, REPOSITORY) == 0
    put(hub, files(hub) | {"README.md": b"mine"})
    assert run("push", made, REPOSITORY) == 0
    assert files(hub)["README.md"] == b"mine"


def test_nothing_is_public_unless_asked(made, hub, capsys):
    hub.add(HERE, {"x": b""})
    assert run("push", made, REPOSITORY) == 2
    assert "is public; give --public" in error(capsys)
    assert list(files(hub)) == ["x"]
    assert run("push", made, REPOSITORY, "--public") == 0
    assert run("push", made, "someone/new", "--public") == 0
    assert not hub.private


HOSTILE = [
    ("../../escaped", b"x"),
    ("/etc/escaped", b"x"),
    ("features/../../escaped/tower.json", b"x"),
    ("features/.hidden/tower.json", b"x"),
    ("tokens/a/b/tokens.json", b"x"),
    ("features/tiny/c/0/0/x", b"x"),
    ("run.py", b"x"),
    ("index/00000.array_record\n", b"x"),
    ("tokens/..\\x/tokens.json", b"x"),
]


@pytest.mark.parametrize(("path", "data"), HOSTILE)
def test_files_that_are_no_part_of_a_dataset_are_refused(path, data, hub, tmp_path, capsys):
    manifest = {
        "format": 1,
        "rows": 1,
        "digest": "",
        "files": {"dataset.json": [1, "0" * 64], path: [1, "0" * 64]},
    }
    hub.add(HERE, {"lit_fast.json": json.dumps(manifest).encode(), path: data})
    assert run("pull", REPOSITORY, tmp_path / "in" / "d") == 2
    assert "which is not a file of a dataset; ask its owner" in error(capsys)
    assert os.listdir(tmp_path) in ([], ["hub"])


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"{}", b"[]", b"null", b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1, "rows": "1", "digest": "", "files": {}}',
        b'{"format": 1, "rows": 1, "digest": "", "files": []}',
        b'{"format": 1, "rows": 1, "digest": "", "files": {"dataset.json": 1}}',
        b'{"format": 1, "rows": 1, "digest": "", "files": {"dataset.json": [-1, "%s"]}}' % (b"0" * 64),
        b'{"format": 1, "rows": 1, "digest": "", "files": {"dataset.json": [1, "zz"]}}',
        b'{"format": 1, "rows": 1, "digest": "", "files": {"dataset.json": [1, 5]}}',
        b'{"format": 1, "rows": 1, "digest": "", "files": {}}',
    ],
)  # fmt: skip
def test_malformed_manifest_is_refused_in_one_line(manifest, hub, tmp_path, capsys):
    hub.add(HERE, {"lit_fast.json": manifest})
    assert run("pull", REPOSITORY, tmp_path / "d") == 2
    assert "someone/pairs/lit_fast.json" in error(capsys)
    assert not (tmp_path / "d").exists()


def test_damaged_repositories_are_refused_and_nothing_lands(made, hub, tmp_path, capsys):
    assert run("push", made, REPOSITORY) == 0
    whole, out = dict(files(hub)), tmp_path / "d"
    shard = "features/tiny/c/0/0"
    flipped = bytearray(whole[shard])
    flipped[7] ^= 1

    def pulled(message):
        assert run("pull", REPOSITORY, out) == 2
        assert message in error(capsys)
        assert not out.exists()
        put(hub, whole)

    put(hub, {name: data for name, data in whole.items() if name != shard})
    pulled(f"has no {shard}, which its lit_fast.json names")
    replace_file(hub, shard, whole[shard] + b"x", declared=False)
    pulled(f"bytes in {shard}, but its lit_fast.json states")
    replace_file(hub, shard, bytes(flipped), declared=False)
    pulled("; pull another revision, or ask its owner")
    replace_file(hub, shard, bytes(flipped))
    pulled("is damaged in its features tiny")
    replace_file(hub, "captions/00000.array_record", whole["index/00000.array_record"])
    pulled("is damaged in its captions")
    replace_file(hub, "dataset.json", b"{}")
    pulled("dataset.json is damaged")
    other = json.loads(whole["dataset.json"]) | {"shard_keys": ["0" * 32]}
    replace_file(hub, "dataset.json", json.dumps(other).encode())
    pulled("holds another dataset than its lit_fast.json states")
    replace_file(hub, "features/tiny/zarr.json", b"{}")
    pulled("is damaged in its features tiny")
    put(hub, whole | {"extra.py": b"import os"})
    assert run("pull", REPOSITORY, out) == 0
    assert not (out / "extra.py").exists()


def test_repository_larger_than_the_disk_is_refused_before_a_download(hub, tmp_path, capsys):
    size = 1 << 60
    manifest = {"format": 1, "rows": 1, "digest": "", "files": {"dataset.json": [1, "0" * 64]}}
    manifest["files"]["features/t/c/0/0"] = [size, "0" * 64]
    hub.add(HERE, {"lit_fast.json": json.dumps(manifest).encode(), "dataset.json": b"x"})
    answer = hub._api

    def api(repository, files, commit, rest, body):
        found = answer(repository, files, commit, rest, body)
        if rest[:1] == ["paths-info"]:
            large = {"type": "file", "path": "features/t/c/0/0", "oid": "0" * 40, "size": size}
            found.body = json.dumps([large, *json.loads(found.body)]).encode()
        return found

    hub._api = api
    assert run("pull", REPOSITORY, tmp_path / "d") == 2
    assert "needs 1073741824.00 GiB at" in error(capsys)


@pytest.mark.parametrize("name", ["pairs", "a/b/c", "../x", "some one/x", "/x", "x/", ""])
def test_malformed_names_are_refused_without_a_request(name, made, hub, tmp_path, capsys):
    for command in (("pull", name, tmp_path / "d"), ("push", made, name)):
        assert run(*command) == 2
        assert "is not the name of a repository; give OWNER/NAME" in error(capsys)
    assert not hub.requests


def test_refusals_of_the_hub_are_one_line_each(made, hub, tmp_path, capsys, monkeypatch):
    assert run("pull", "someone/absent", tmp_path / "d") == 2
    assert "does not exist or is private" in error(capsys)
    hub.refused = 403
    assert run("push", made, REPOSITORY) == 2
    assert "hf auth login with a token that may write" in error(capsys)
    hub.refused = 0
    assert run("push", made, REPOSITORY) == 0
    monkeypatch.delenv("HF_TOKEN")
    assert run("pull", REPOSITORY, tmp_path / "d") == 2  # private
    assert "does not exist or is private" in error(capsys)
    assert run("push", made, "someone/other") == 2
    assert "(401); run hf auth login" in error(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    assert run("pull", REPOSITORY, tmp_path / "d") == 2
    assert "no request may be made (offline)" in error(capsys)
    monkeypatch.delenv("LIT_FAST_OFFLINE")
    hub.close()
    assert run("pull", REPOSITORY, tmp_path / "d") == 2
    assert "someone/pairs cannot be pulled" in error(capsys)
    assert not (tmp_path / "d").exists()


def test_killed_pull_continues(made, hub, tmp_path):
    assert run("push", made, REPOSITORY) == 0
    program = """
import os, signal, sys
from lit_fast.embed.share import pull
from lit_fast.embed.share.pull import pull_dataset
number = 0
real = pull.HubDataset.download
def download(self, path, *rest):
    global number
    number += 1
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, path, *rest)
pull.HubDataset.download = download
pull._THREADS = 1
pull_dataset("someone/pairs", sys.argv[1])
"""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "hf_token",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "d"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()
    before = tree(tmp_path / ".d.pull")
    assert run("pull", REPOSITORY, tmp_path / "d") == 0
    after = tree(tmp_path / "d")
    assert all(after[path] == data for path, data in before.items() if not path.startswith(".cache"))
    assert sha256(tmp_path / "d/features/tiny/c/0/0") == sha256(made / "features/tiny/c/0/0")
    assert not (tmp_path / ".d.pull").exists()


def test_commit_of_a_revision_is_kept_through_a_pull(made, hub, tmp_path):
    assert run("push", made, REPOSITORY) == 0
    assert hub.commits[HERE] != COMMIT
    assert run("pull", REPOSITORY, tmp_path / "d") == 0
    assert all(f"/resolve/{hub.commits[HERE]}/" in path for path in hub.downloads)
