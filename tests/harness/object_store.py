"""An object store that answers on the loopback interface: moto's, in threads of this process.

It can wait before each answer, be stopped and started again with its content, and it knows which
requests it got. moto copies the whole object for a range: objects should be small (packs are).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest

__all__ = ["ObjectStore", "Request", "object_store"]

_BUCKET = "bucket"
_HOST = "127.0.0.1"


class Request(NamedTuple):
    """A request that was answered: ``sent`` bytes came with it."""

    method: str
    path: str
    sent: int


class ObjectStore:
    """A server with one empty bucket; ``environment`` is what a program needs to reach it.

    ``delay`` is how long each request waits, in seconds; ``requests`` grows with each one.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from moto.s3.models import s3_backends

        s3_backends.reset()
        self.delay = 0.0
        self.requests: list[Request] = []
        self._stopped = False
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server: Any = None
        self._port = 0
        self.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "very-secret-key",
            "AWS_REGION": "us-east-1",
        }
        s3_backends["123456789012"]["aws"].create_bucket(_BUCKET, "us-east-1")

    def url(self, prefix: str = "") -> str:
        return f"s3://{_BUCKET}/{prefix}".rstrip("/")

    def start(self) -> None:
        """Answer again, at the same port."""
        self._stopped = False
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, as by real ones

            def log(self, *_: object) -> None:
                pass

        self._server = make_server(_HOST, self._port, self._answer, True, request_handler=Quiet)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections until :meth:`start`, and drop those that are open; what is stored
        remains."""
        self._stopped = True
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, part: str = "") -> int:
        """Return the number of requests of a method whose path has this part."""
        return sum(r.method == method and part in r.path for r in self.requests)

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if self.delay:
            time.sleep(self.delay)
        if self._stopped:
            raise ConnectionResetError
        sent = int(environ.get("CONTENT_LENGTH") or 0)
        self.requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], sent))
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


@contextlib.contextmanager
def _running() -> Iterator[ObjectStore]:
    server = ObjectStore()
    try:
        # boto and obstore also look into files and at other variables.
        others = {name: "" for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN") if name in os.environ}
        with mock.patch.dict(os.environ, server.environment | others):
            yield server
    finally:
        server.stop()


@pytest.fixture
def object_store() -> Iterator[ObjectStore]:
    """An object store with an empty bucket, whose settings are in the environment of this process."""
    pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    with _running() as server:
        yield server
