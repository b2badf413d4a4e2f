"""An object store for measurements: it answers reads from memory, after its delay.

moto needs some 10 ms of processor time for a range of a large object, which would hide the delay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tests.harness.object_store import ObjectStore

__all__ = ["QuickObjectStore"]

_KEPT = ("etag", "last-modified", "content-type")


class _Object(NamedTuple):
    headers: list[tuple[str, str]]
    content: bytes


class QuickObjectStore(ObjectStore):
    """As :class:`ObjectStore`; what was read once is kept until something is written."""

    def __init__(self) -> None:
        self._objects: dict[str, _Object] = {}
        super().__init__()

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or environ.get("QUERY_STRING"):
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                self._objects.clear()
            return super()._answer(environ, start_response)
        time.sleep(self.delay)
        found = self._objects.get(environ["PATH_INFO"]) or self._read(environ)
        if found is None:
            return self._app(environ, start_response)  # type: ignore[no-any-return]
        content, headers, status = found.content, found.headers, "200 OK"
        wanted = environ.get("HTTP_RANGE", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            size = len(content)
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1 if first and last else size, size)
            headers = [*headers, ("Content-Range", f"bytes {start}-{end - 1}/{size}")]
            content, status = content[start:end], "206 Partial Content"
        start_response(status, [*headers, ("Content-Length", str(len(content)))])
        return [content]

    def _read(self, environ: dict[str, Any]) -> _Object | None:
        """Read a whole object; None if there is none."""
        answers: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            answers.append((status, headers))

        whole = {name: value for name, value in environ.items() if name != "HTTP_RANGE"}
        content = b"".join(self._app(whole, start))
        status, headers = answers[0]
        if not status.startswith("200"):
            return None
        kept = [(name, value) for name, value in headers if name.lower() in _KEPT]
        found = _Object(kept, content)
        self._objects[environ["PATH_INFO"]] = found
        return found
