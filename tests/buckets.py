"""Buckets of real servers on localhost: an own small one of Google's interface, moto's of Amazon's."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest

from lit_fast.storage import buckets, remote
from tests.gcs import running_gcs


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; processes that inherit the environment reach it too."""
    monkeypatch.setattr(buckets, "_stores", {})
    remote._open_filesystem.cache_clear()
    if request.param == "gs":
        with running_gcs() as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            yield "gs://bucket"
        return
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        # All servers of a process share their buckets.
        for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", method=method)).close()
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield "s3://bucket"
    finally:
        server.stop()
