"""The http benchmark: holds for our server, and notices servers that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench import http
from elbowroom.bench.http_visitor import Visitor


def test_our_server_survives_a_short_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = write_tiny_model(tmp_path_factory.mktemp("tiny"), context=8192)

    result = http.visit(28, seed=1, model=str(directory), memory="48MiB", concurrency=8)

    assert [(claim.id, claim.value, claim.holds) for claim in result.claims] == [
        ("http.errors", 0, True),
        ("http.leaks", 0, True),
    ]
    assert {row["row"] for row in result.rows} >= {"ttft_s", "tpot_s", "e2e_s", "server"}


@contextmanager
def impostor(status: int, body: bytes) -> Iterator[str]:
    """Run a server that answers everything with ``status`` and ``body``; 0 closes the connection without a word."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if status:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "status", "body", "fault"),
    [
        ("completion", 500, b'{"error": {"message": "x"}}', "HTTP 500"),
        ("chat", 429, b'{"error": {"message": "x"}}', "HTTP 429"),
        ("completion", 0, b"", "connection"),
        ("completion", 200, b'{"id": "x", "choices": []}', "schema"),
        ("chat", 200, b'{"id": 5}', "schema"),
        ("malformed", 200, b"{}", "HTTP 200"),
        ("malformed", 500, b"{}", "HTTP 500"),
        ("malformed", 400, b'{"error": {"message": "x"}}', "schema"),
        ("malformed", 400, b'{"detail": "x"}', "schema"),
        ("malformed", 400, b"oops", "schema"),
    ],
)
def test_each_way_to_misbehave_is_a_fault(kind: str, status: int, body: bytes, fault: str) -> None:
    with impostor(status, body) as url:
        outcome = Visitor(url, "tiny").visit(kind, seed=3)

    assert outcome.fault is not None
    assert outcome.fault.startswith(fault), outcome.fault
