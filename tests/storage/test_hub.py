"""Files of the Hugging Face Hub, from a Hub on this machine."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from lit_fast.errors import UserError
from lit_fast.storage.hub import AbsentError, Snapshot, hub_problem
from tests.web import BODY, COMMIT, Hub, own_cache, running_hub  # noqa: F401


def test_fetch_a_large_file_takes_it_from_the_linked_server(hub: Hub) -> None:
    hub.add("o/n", {"model.safetensors": BODY})
    path = Path(Snapshot("o/n").fetch("model.safetensors"))
    assert path.read_bytes() == BODY
    assert path.parent.name == COMMIT


def test_fetch_all_files_are_of_the_first_files_commit(hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}", "other.json": b"[]"})
    snapshot = Snapshot("o/n", "v1")
    snapshot.fetch("config.json")
    snapshot.fetch("other.json")
    assert hub.downloads == ["/o/n/resolve/v1/config.json", f"/o/n/resolve/{COMMIT}/other.json"]


def test_fetch_a_cached_commit_makes_one_request(hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}", "model.safetensors": BODY})
    for _ in range(2):
        hub.requests.clear()
        snapshot = Snapshot("o/n")
        for name in ("config.json", "model.safetensors"):
            snapshot.fetch(name)
        with pytest.raises(AbsentError, match=r"hf:o/n has no absent\.json"):
            snapshot.fetch("absent.json")
    assert [method for method, _, _ in hub.requests] == ["HEAD"]  # whether `main` has moved


def test_fetch_a_cut_connection_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.add("o/n", {"model.safetensors": BODY})
    hub.cut = [100_000]
    assert Path(Snapshot("o/n").fetch("model.safetensors")).read_bytes() == BODY
    ranges = [headers.get("range") for _, _, headers in hub.content.requests]
    assert ranges == [None, "bytes=100000-"]


def test_fetch_the_token_is_sent_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("o/n", {"model.safetensors": BODY})
    Snapshot("o/n").fetch("model.safetensors")
    assert [headers["authorization"] for _, _, headers in hub.requests] == ["Bearer hf_secret"]
    assert [headers.get("authorization") for _, _, headers in hub.content.requests] == [None]


def test_fetch_a_stored_token_opens_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/n", {"config.json": b"{}"})
    hub.gated.add("o/n")
    with pytest.raises(
        UserError, match=rf"hf:o/n is gated; accept its licence at {hub.url}/o/n and run: hf auth"
    ):
        Snapshot("o/n").fetch("config.json")
    (tmp_path / "token").write_text("hf_stored")  # as `hf auth login` leaves it
    assert Path(Snapshot("o/n").fetch("config.json")).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        (
            "o/absent",
            "main",
            "hf:o/absent does not exist or is private .*; check the name, or run: hf auth login",
        ),
        ("o/n", "v2", "hf:o/n@v2 has no such revision"),
        ("o/n", "main", r"hf:o/n has no absent\.json"),
        ("no repository", "main", "is not the name of a repository; give OWNER/NAME"),
    ],
)
def test_fetch_an_absent_file_is_one_line(hub: Hub, repository: str, revision: str, message: str) -> None:
    hub.add("o/n", {"config.json": b"{}"})
    with pytest.raises(UserError, match=message) as caught:
        Snapshot(repository, revision).fetch("absent.json")
    assert "\n" not in str(caught.value)


def test_fetch_a_larger_file_than_allowed_is_not_downloaded(hub: Hub) -> None:
    hub.add("o/n", {"config.json": BODY})
    with pytest.raises(UserError, match=r"has 300,000 bytes in config\.json, more than 299,999"):
        Snapshot("o/n").fetch("config.json", 299_999)
    assert not hub.downloads
    Snapshot("o/n").fetch("config.json", 300_000)


def test_fetch_offline_uses_the_cached_revision(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/n", {"config.json": b"{}"})
    Snapshot("o/n").fetch("config.json")
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    hub.requests.clear()
    assert Path(Snapshot("o/n").fetch("config.json")).read_bytes() == b"{}"
    with pytest.raises(AbsentError, match=r'offline\); run "hf download o/m --local-dir DIR" elsewhere'):
        Snapshot("o/m").fetch("config.json")
    assert not hub.requests


def test_fetch_a_closed_server_uses_the_cache(hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}"})
    Snapshot("o/n").fetch("config.json")
    hub.close()
    assert Path(Snapshot("o/n").fetch("config.json")).read_bytes() == b"{}"


def test_fetch_from_an_unreachable_server_logs_no_retries(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.close()
    with pytest.raises(UserError, match="hf:o/n cannot be downloaded from"):
        Snapshot("o/n").fetch("config.json")
    assert not caplog.records


def test_hub_problem_of_an_unreachable_server_names_the_cause(hub: Hub) -> None:
    error = LocalEntryNotFoundError("An error happened")
    error.__cause__ = ConnectionRefusedError("refused\nagain")
    expected = (
        f'cannot be downloaded from {hub.url}/o/n: refused; run "hf download o/n --local-dir DIR" elsewhere'
    )
    assert hub_problem(error, "o/n") == f"{expected} and give DIR"
