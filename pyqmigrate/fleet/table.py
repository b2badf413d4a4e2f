"""The table of results: a SQLite file, so that a second run does only what is missing or changed.

It has one row for each snapshot, verb and options: the latest result. Two runs may use it at once,
and a run that is killed loses the results of its last second.

    sqlite3 results.db "select name, message from results where verdict = 'damaged'"
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from pyqmigrate.errors import PyqmigrateError, UsageError, target_error
from pyqmigrate.fleet.result import FINAL, Result, Verdict
from pyqmigrate.fleet.work import Work
from pyqmigrate.io.place import absolute

__all__ = ["Known", "ResultTable", "Row"]

_APPLICATION = 0x716D666C  # "qmfl", in the header of the file
_VERSION = 1
_COMMIT_EVERY = 0.5  # seconds
_BUSY = 30.0  # seconds that another run may take for one commit
_SCHEMA = """
create table results (
    verb text not null,
    options text not null,
    name not null,                  -- text; bytes if they are not UTF-8
    identity text not null,
    verdict text not null,
    message not null,
    data text not null,             -- JSON
    depends text not null,          -- JSON
    seconds real not null,
    finished real not null,         -- seconds since 1970
    worker text not null,
    primary key (verb, options, name)
) without rowid
"""
_COLUMNS = "name, identity, verdict, message, data, depends, seconds, finished, worker"
_ERRNO = {
    "SQLITE_FULL": errno.ENOSPC,
    "SQLITE_BUSY": errno.EBUSY,
    "SQLITE_LOCKED": errno.EBUSY,
    "SQLITE_READONLY": errno.EROFS,
    "SQLITE_PERM": errno.EACCES,
    "SQLITE_CANTOPEN": errno.EACCES,
}


@dataclass(frozen=True)
class Row:
    """A result with its verb and options."""

    verb: str
    options: str
    result: Result


@dataclass(frozen=True)
class Known:
    """What a table has of one snapshot: a result that need not be made again, if ``identity`` and
    the files in ``depends`` are still the same."""

    identity: str
    depends: dict[str, str] = field(default_factory=dict)


class ResultTable:
    """An open table. Close it. Not for several threads.

    Raises UsageError for a file that is not a table of results, TargetError.
    """

    def __init__(self, path: str | os.PathLike[str], *, reading: bool = False) -> None:
        """Open the table at ``path``; it is made unless it is there, or only ``reading``."""
        self.path = absolute(path)
        self._pending: list[tuple[object, ...]] = []
        self._committed = time.monotonic()
        if reading or self.path.exists():
            self._check_file()
        with self._refusing():
            # A reader that may write removes the files beside the table when it closes it.
            mode = "rwc" if not reading else "rw" if os.access(self.path, os.W_OK) else "ro"
            self._database = sqlite3.connect(
                f"{self.path.as_uri()}?mode={mode}", timeout=_BUSY, isolation_level=None, uri=True
            )
        try:
            with self._refusing():
                if not reading:
                    self._prepare()
                self._check_version()
        except BaseException:
            self._database.close()
            raise

    def _check_file(self) -> None:
        """Refuse a file of another kind before SQLite, which would wait for a FIFO, opens it."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise UsageError(f"{os.fspath(self.path)!r} is not a file: it cannot be a table")
            with self.path.open("rb") as file:
                head = file.read(16)
        except UsageError:
            raise
        except OSError as error:
            raise target_error(error, "cannot open the table", self.path) from error
        if head and head != b"SQLite format 3\0":
            raise self._foreign()

    def _prepare(self) -> None:
        """Make the table in a new file."""
        execute = self._database.execute
        if execute("select count(*) from sqlite_master").fetchone()[0] == 0:
            # Readers go on while a run writes, and a commit costs no fsync.
            execute("pragma journal_mode = wal")
            execute("begin immediate")  # another run may make it at the same time
            try:
                if execute("select count(*) from sqlite_master").fetchone()[0] == 0:
                    execute(f"pragma application_id = {_APPLICATION}")
                    execute(f"pragma user_version = {_VERSION}")
                    execute(_SCHEMA)
            finally:
                execute("commit")
        execute("pragma synchronous = normal")

    def _check_version(self) -> None:
        (application,) = self._database.execute("pragma application_id").fetchone()
        if application != _APPLICATION:
            raise self._foreign()
        (version,) = self._database.execute("pragma user_version").fetchone()
        if version != _VERSION:
            raise UsageError(
                f"the table {os.fspath(self.path)!r} has version {version}, only {_VERSION} is known "
                "here: choose another file"
            )

    def _foreign(self) -> UsageError:
        return UsageError(
            f"{os.fspath(self.path)!r} is not a table of results: choose another file for --table"
        )

    def known(self, work: Work) -> dict[str, Known]:
        """Return, by name, what need not be done again."""
        found = {}
        with self._refusing():
            rows = self._database.execute(
                "select name, identity, verdict, depends from results where verb = ? and options = ?",
                (str(work.verb), _text(work.options)),
            )
            for name, identity, verdict, depends in rows:
                if verdict in FINAL:
                    found[os.fsdecode(name)] = Known(identity, json.loads(depends))
        return found

    def results(self, work: Work, names: set[str]) -> Iterator[Result]:
        """Yield the results of these snapshots."""
        rows = self._rows("where verb = ? and options = ?", str(work.verb), _text(work.options))
        return (row.result for row in rows if row.result.name in names)

    def rows(self) -> Iterator[Row]:
        """Yield all results, by verb, options and name."""
        return self._rows("")

    def _rows(self, condition: str, *values: object) -> Iterator[Row]:
        with self._refusing():
            rows = self._database.execute(
                f"select verb, options, {_COLUMNS} from results {condition} "
                "order by verb, options, name",
                values,
            )
            for verb, options, name, identity, verdict, message, data, depends, *numbers in rows:
                seconds, finished, worker = numbers
                yield Row(
                    str(verb),
                    os.fsdecode(options),
                    Result(
                        os.fsdecode(name),
                        str(identity),
                        Verdict(verdict),
                        os.fsdecode(message),
                        json.loads(data),
                        json.loads(depends),
                        float(seconds),
                        float(finished),
                        str(worker),
                    ),
                )

    def keep(self, work: Work, result: Result) -> None:
        """Put a result into the table; it is committed soon, see :meth:`commit_soon`."""
        self._pending.append(
            (
                str(work.verb),
                _text(work.options),
                _text(result.name),
                result.identity,
                str(result.verdict),
                _text(result.message),
                json.dumps(result.data),
                json.dumps(result.depends),
                result.seconds,
                result.finished,
                result.worker,
            )
        )
        self.commit_soon()

    def commit_soon(self) -> None:
        """Commit what is pending if the last commit is half a second ago. Call it often."""
        if time.monotonic() - self._committed >= _COMMIT_EVERY:
            self.commit()

    def commit(self) -> None:
        """Commit what is pending. Raises TargetError (NoSpace)."""
        self._committed = time.monotonic()
        if not self._pending:
            return
        with self._refusing():
            self._database.execute("begin immediate")
            try:
                self._database.executemany(
                    f"insert or replace into results (verb, options, {_COLUMNS}) "
                    "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    self._pending,
                )
                self._database.execute("commit")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("rollback")
                raise
        self._pending.clear()

    def close(self) -> None:
        """Commit and close it. Idempotent."""
        try:
            self.commit()
        finally:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Make errors of the package of SQLite's, and of a table that has been tampered with."""
        try:
            yield
        except PyqmigrateError:
            raise
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "") or ""
            if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or not name:
                raise UsageError(
                    f"the table {os.fspath(self.path)!r} is damaged: {error}; remove it, or choose "
                    "another file"
                ) from error
            number = next((code for key, code in _ERRNO.items() if name.startswith(key)), errno.EIO)
            if number == errno.EACCES and not self.path.parent.is_dir():
                number = errno.ENOENT
            raise target_error(
                OSError(number, str(error)), "cannot use the table", self.path
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the table {os.fspath(self.path)!r} is damaged: {error}; remove it, or choose "
                "another file"
            ) from error


def _text(text: str) -> str | bytes:
    """Return a text as SQLite can keep it: bytes if it has bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text
