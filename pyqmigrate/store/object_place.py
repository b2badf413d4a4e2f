"""A place of objects in an object store, through the library obstore.

Credentials come from the environment, as obstore takes them. No message contains them: of an error's
text, only the parts that are known to be harmless are used.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.store.place import Bytes, Entry, check_key, split_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["SCHEMES", "ObjectPlace"]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https", "memory")

# Within 30 s the caller gets an error and decides whether to go on.
_RETRIES: dict[str, object] = {
    "max_retries": 8,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
    "retry_timeout": timedelta(seconds=30),
}
_CLIENT: dict[str, object] = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=5),
}
_ASKED_FIRST = 1 << 18  # bytes: larger objects are looked for before they are sent

_STATUS = re.compile(r"status code: (\d{3})( [A-Z][A-Za-z ]{0,40})?")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_UNREACHABLE = re.compile(
    r"error sending request|Connection (?:refused|reset)|timed ?out|TimedOut|dns error|"
    r"kind: Connect\b|IncompleteMessage|error decoding response body|BrokenPipe|ConnectionReset"
)
_NO_CREDENTIALS = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")

_memory: dict[str, Any] = {}
_memory_lock = threading.Lock()


class ObjectPlace:
    """The objects below ``url`` as a :class:`~pyqmigrate.store.place.Place`.

    A request that fails because of the network or the server is sent again for up to 30 seconds.
    ``memory://NAME`` is kept by this process, for tests.
    """

    directory: Path | None = None

    def __init__(self, url: str) -> None:
        """Raises UsageError for a URL that cannot be one, NotSupported without obstore."""
        parts = split_url(url)
        if parts.scheme not in SCHEMES:
            raise UsageError(f"{parts.scheme}:// is not one of file, {', '.join(SCHEMES)}")
        # abfs://CONTAINER@ACCOUNT... is not a user.
        user = parts.username and not parts.scheme.startswith("abfs")
        if parts.query or parts.fragment or parts.password is not None or user:
            # Not shown: it may be a credential.
            raise UsageError(
                f"a {parts.scheme}:// URL has no user, query or fragment here: give credentials in "
                "the environment"
            )
        if not parts.netloc and parts.scheme != "memory":
            raise UsageError(f"{url!r} names no bucket or host")
        self._url = url.rstrip("/")
        self._scheme = parts.scheme
        self._store = _open(self._url, parts.scheme)

    @property
    def name(self) -> str:
        return self._url

    def read(self, key: str, offset: int = 0, length: int | None = None) -> Bytes:
        import obstore

        check_key(key)
        if length == 0:
            return b""
        try:
            if offset == 0 and length is None:
                return memoryview(obstore.get(self._store, key).bytes())
            if length is None:
                found = obstore.get(self._store, key, options={"range": {"offset": offset}})
                return memoryview(found.bytes())
            return memoryview(obstore.get_range(self._store, key, start=offset, length=length))
        except Exception as error:
            if _is_beyond_end(error) and self._ends_before(key, offset):
                return b""
            raise self._error(error, "cannot read", key, offset or None) from None

    def read_end(self, key: str, length: int) -> tuple[Bytes, int]:
        import obstore

        check_key(key)
        try:
            found = obstore.get(self._store, key, options={"range": {"suffix": length}})
            return memoryview(found.bytes()), found.meta["size"]
        except Exception as error:
            if isinstance(error, (FileNotFoundError, MemoryError)):
                raise self._error(error, "cannot read", key) from None
        # Azure has no such ranges, and S3 none of an empty object.
        entry = self.find(key)
        if entry is None:
            raise self._missing("cannot read", key)
        start = max(0, entry.size - length)
        return self.read(key, start, entry.size - start), entry.size

    def find(self, key: str) -> Entry | None:
        import obstore

        check_key(key)
        try:
            return _entry(key, obstore.head(self._store, key))
        except Exception as error:
            found = self._error(error, "cannot look for", key)
        if isinstance(found, TargetError) and found.errno == errno.ENOENT:
            return None
        raise found

    def write_new(self, key: str, data: Bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        check_key(key)
        if len(data) >= _ASKED_FIRST and self.find(key) is not None:
            return False
        try:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # It can be what an earlier attempt of this request has written.
            return bytes(self.read(key)) == bytes(data)
        except Exception as error:
            raise self._error(error, "cannot write", key) from None
        return True

    def replace(self, key: str, data: Bytes) -> None:
        import obstore

        check_key(key)
        try:
            obstore.put(self._store, key, data, mode="overwrite", use_multipart=False)
        except Exception as error:
            raise self._error(error, "cannot write", key) from None

    def delete(self, key: str) -> bool:
        import obstore

        check_key(key)
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._error(error, "cannot delete", key) from None
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        import obstore

        if prefix.removesuffix("/"):
            check_key(prefix.removesuffix("/"))
        try:
            for chunk in obstore.list(self._store, prefix.removesuffix("/") or None):
                for found in chunk:
                    yield _entry(found["path"], found)
        except Exception as error:
            if isinstance(error, FileNotFoundError):
                return
            raise self._error(error, "cannot list", prefix) from None

    def close(self) -> None:
        """Nothing is held; connections are closed when they have been idle."""

    def _ends_before(self, key: str, offset: int) -> bool:
        entry = self.find(key)
        return entry is not None and entry.size <= offset

    def _missing(self, what: str, key: str) -> TargetError:
        return TargetError(errno.ENOENT, what, f"{self._url}/{key}")

    def _error(
        self, error: Exception, what: str, key: str, position: int | None = None
    ) -> Exception:
        """Return the package's error for one of obstore's, without its text."""
        from obstore import exceptions as kinds

        if isinstance(error, (TargetError, MemoryError)):
            return error
        where = f"{self._url}/{key}"
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        answer = code[1] if code else f"{status[1]}{status[2] or ''}".strip() if status else ""
        said = f"{what}: the server answered {answer}" if answer else what
        if isinstance(error, kinds.NotSupportedError):
            return NotSupported(f"{what}: {self._scheme}:// cannot do this ({where})")
        if isinstance(error, FileNotFoundError) or (status and status[1] == "404"):
            number = errno.ENOENT
            said = said if code and code[1] not in ("NoSuchKey", "BlobNotFound") else what
        elif isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)):
            number = errno.EACCES
        elif any(host in text for host in _NO_CREDENTIALS):
            number, said = errno.EACCES, f"{what}: there are no credentials in the environment"
        elif status and status[1] in ("405", "501"):
            return NotSupported(f"{said} ({where})")
        elif _UNREACHABLE.search(text) or (status and status[1] in ("429", "500", "502", "503")):
            number, said = errno.ETIMEDOUT, f"{said}: the object store does not answer"
        else:
            number = errno.EIO
        return TargetError(number, said, where, position=position)


def _open(url: str, scheme: str) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise NotSupported(f"{scheme}:// needs the library obstore: pip install obstore") from None
    if scheme == "memory":
        with _memory_lock:
            store: ObjectStore = _memory.setdefault(url, MemoryStore())
            return store
    # Plain HTTP is used where the user's own URL or endpoint demands it.
    options: Any = {**_CLIENT, "allow_http": True}
    retries: Any = _RETRIES
    try:
        return from_url(url, client_options=options, retry_config=retries)
    except (BaseError, ValueError):  # whose text can contain a part of a credential
        raise UsageError(
            f"{url!r} cannot be opened: its form, or a setting in the environment, is wrong"
        ) from None


def _is_beyond_end(error: Exception) -> bool:
    return "416" in str(error) or "range" in str(error).lower()


def _entry(key: str, found: Any) -> Entry:
    etag = found.get("e_tag") or ""
    return Entry(key, found["size"], found["last_modified"].timestamp(), etag)
