"""`lit-fast serve`: the page, the JSON, and requests that are refused."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.inference import serve
from lit_fast.inference.load import load
from lit_fast.inference.searcher import Searcher
from lit_fast.inference.serve import RequestError, SearchServer, form_file
from tests.helpers import encoded, picture


@pytest.fixture(scope="module")
def searcher(trained_run):
    return Searcher(load(str(trained_run)), open_dataset(trained_run.parent / "d"))


@contextmanager
def serving(searcher, host="127.0.0.1"):
    with SearchServer(host, 0, searcher) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(searcher):
    with serving(searcher) as server:
        yield server


def ask(server, path, method="GET", body=None, headers=()):
    """Return status, headers and body of a request."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


def form(data, name="image", boundary=b"xyz"):
    head = (
        f'Content-Disposition: form-data; name="{name}"; filename="../../é.jpg"\r\nContent-Type: image/jpeg'
    )
    body = b"--%b\r\n%b\r\n\r\n%b\r\n--%b--\r\n" % (boundary, head.encode(), data, boundary)
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}


def test_text_query_finds_what_search_finds(server, searcher):
    (answer,) = searcher.answer(["a red <b>boat</b>"], top=3)
    code, headers, body = ask(server, "/search.json?top=3&q=" + quote("a red <b>boat</b>"))
    assert (code, headers["Content-Type"]) == (200, "application/json")
    assert [r["row"] for r in json.loads(body)[0]["results"]] == [hit.row for hit in answer.hits]
    code, headers, body = ask(server, "/?top=3&q=" + quote("a red <b>boat</b>"))
    page = body.decode()
    assert code == 200
    assert "<b>" not in page
    assert re.findall(r'href="/image/(\d+)"', page) == [str(hit.row) for hit in answer.hits]
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_image_query_finds_the_image_itself(server, searcher):
    data = searcher.dataset.path and server.reader.read_or_none(5)
    body, headers = form(data)
    code, _, page = ask(server, "/", "POST", body, headers)
    assert code == 200
    assert re.findall(r'href="/image/(\d+)"', page.decode())[0] == "5"


def test_icon_that_browsers_ask_for_is_empty(server):
    assert ask(server, "/favicon.ico")[::2] == (204, b"")


def test_image_of_a_row_is_a_jpeg(server):
    code, headers, body = ask(server, "/image/5")
    assert (code, headers["Content-Type"], headers["X-Content-Type-Options"]) == (
        200,
        "image/jpeg",
        "nosniff",
    )
    assert Image.open(io.BytesIO(body)).format == "JPEG"
    assert ask(server, "/image/5", "HEAD")[2] == b""


@pytest.mark.parametrize(
    ("path", "code", "text"),
    [
        ("/image/24", 404, "no such row"),
        ("/image/-1", 404, "no such row"),
        ("/image/" + "9" * 400, 404, "no such row"),
        ("/image/1/../../../etc/passwd", 404, "no such row"),
        ("/image/%2e%2e%2fetc%2fpasswd", 404, "no such row"),
        ("/image/%D9%A1", 404, "no such row"),
        ("/../../etc/passwd", 404, "no such page"),
        ("/?q=" + "x" * 1001, 400, "more than 1000 characters"),
        ("/search.json", 400, "the query is missing"),
        ("/search.json?q=a&top=0", 400, "from 1 to 100"),
        ("/search.json?q=a&top=1e9", 400, "from 1 to 100"),
        ("/search.json?q=a&top=%D9%A1", 400, "from 1 to 100"),
        ("/?" + "&".join(f"a{i}=1" for i in range(30)), 400, "too many fields"),
    ],
)
def test_wrong_request_is_refused_with_a_message(server, path, code, text):
    got, _, body = ask(server, path)
    assert got == code
    assert text in body.decode()


@pytest.mark.parametrize("query", ["%ff%fe", "%00", "%E2%80%AE", "%F0%9F%90%95", "+++"])
def test_any_query_is_answered(server, query):
    code, _, body = ask(server, f"/?q={query}")
    assert code == 200
    assert b"Search in d" in body


def test_other_hosts_and_origins_are_refused(server):
    port = server.server_address[1]
    assert ask(server, "/", headers={"Host": "evil.example"})[0] == 403
    assert ask(server, "/", headers={"Host": f"evil.example:{port}"})[0] == 403
    assert ask(server, "/", headers={"Host": f"localhost:{port}"})[0] == 200
    body, headers = form(encoded(picture(1)))
    assert ask(server, "/", "POST", body, headers | {"Origin": "http://evil.example"})[0] == 403
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert ask(server, "/", "POST", body, headers | own)[0] == 200


def bomb():
    """Return a PNG that says it has 2**32 pixels."""
    data = bytearray(encoded(picture(1), "PNG"))
    data[16:24] = (1 << 16).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"no image", "the image cannot be used: not a JPEG"),
        (bomb(), "the image cannot be used: "),
        (b"", "the form has no file"),
    ],
    ids=["text", "bomb", "empty"],
)
def test_upload_that_is_no_image_is_refused(server, data, text):
    code, _, body = ask(server, "/", "POST", *form(data))
    assert code == 400
    assert text in body.decode()


def test_upload_of_another_form_or_size_is_refused(server):
    data = encoded(picture(1))
    assert ask(server, "/", "POST", *form(data, name="other"))[0] == 400
    assert ask(server, "/", "POST", data, {"Content-Type": "image/jpeg"})[0] == 400
    assert ask(server, "/elsewhere", "POST", *form(data))[0] == 404
    for length, code in ((str(serve.MAX_UPLOAD + 1), 413), ("9" * 30, 413), ("-1", 411), ("\xb2", 411)):
        with socket.create_connection(server.server_address[:2], timeout=20) as client:
            client.sendall(
                f"POST / HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")
            )
            assert f" {code} ".encode() in client.recv(100)


def test_nested_form_does_not_exhaust_the_stack():
    head = b"".join(
        b"--b%d\r\nContent-Type: multipart/mixed; boundary=b%d\r\n\r\n" % (i, i + 1) for i in range(3000)
    )
    with pytest.raises(RequestError, match="no file"):
        form_file("multipart/form-data; boundary=b0", head, "image")


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=200), st.sampled_from([b"\r\n", b"\n", b"\r", b"\x85", b"--xyz", b""]))
def test_form_file_returns_the_bytes_that_were_sent(data, end):
    data += end
    if b"--xyz" not in data:
        body, headers = form(data)
        assert form_file(headers["Content-Type"], body, "image") == data


@settings(max_examples=200)
@given(st.text(max_size=60), st.binary(max_size=300))
def test_form_file_refuses_anything_else(content_type, data):
    with pytest.raises(RequestError, match="no file"):
        form_file(content_type, data, "image")


def test_port_in_use_is_one_line(server, trained_run, capsys):
    port = server.server_address[1]
    assert main(["serve", str(trained_run), str(trained_run.parent / "d"), "--port", str(port)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith(
        f"error: --host 127.0.0.1 --port {port} cannot be used: Address already in use; choose another"
    )
    assert main(["serve", str(trained_run), str(trained_run.parent / "d"), "--port", "70000"]) == 2


def test_command_serves_until_it_is_interrupted(trained_run):
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_fast", "serve", trained_run, trained_run.parent / "d", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    line = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C stops\)", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/?q=boat")
    assert connection.getresponse().status == 200
    with socket.create_connection(("127.0.0.1", port)):  # one that sends nothing does not keep the server
        for i in range(4):  # nor does a client that is gone while the model is at work
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(f"GET /?q=boat{i} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
