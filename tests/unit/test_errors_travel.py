"""Exceptions go through pickle and copy, and between processes, as they are."""

from __future__ import annotations

import copy
import errno
import importlib
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import (
    GuestMemoryError,
    NoSpace,
    NotDurable,
    PyqmigrateError,
    QemuRefused,
    RamBlock,
    SnapshotError,
    TargetError,
)
from pyqmigrate.errors import DamagedContent
from pyqmigrate.store.damage import DamagedPack

WAYS: dict[str, Callable[[PyqmigrateError], PyqmigrateError]] = {
    **{
        f"pickle {protocol}": lambda error, p=protocol: pickle.loads(pickle.dumps(error, p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}

# What the constructors of these take, where that is more than one text; subclasses likewise.
ARGUMENTS: list[tuple[type[PyqmigrateError], list[Callable[[type], PyqmigrateError]]]] = [
    (
        DamagedPack,
        [
            lambda kind: kind("not what it was", b"pack", 3, 7, snapshot="a", store="/srv"),
            lambda kind: kind("missing", b"pack"),
        ],
    ),
    (
        DamagedContent,
        [lambda kind: kind("damaged", "/snap", position=0x2000), lambda kind: kind("damaged")],
    ),
    (
        NoSpace,
        [
            lambda kind: kind("cannot write", "/snap", errno=errno.EDQUOT, position=0x2000),
            lambda kind: kind("cannot write"),
        ],
    ),
    (NotDurable, [lambda kind: kind(errno.EIO, "/snap")]),
    (
        TargetError,
        [
            lambda kind: kind(errno.EIO, "cannot write", "/snap", position=0x2000),
            lambda kind: kind(errno.EIO, "cannot write", Path("/snap")),
            lambda kind: kind(errno.EIO, "cannot write"),
        ],
    ),
    (GuestMemoryError, [lambda kind: kind(errno.EFAULT, "gone", block="pc.ram")]),
    (
        SnapshotError,
        [
            lambda kind: kind("bad", offset=0x1234, block="pc.ram", field="length"),
            lambda kind: kind("bad"),
        ],
    ),
    (QemuRefused, [lambda kind: kind("migrate", "no", "DeviceNotFound")]),
]


def classes() -> list[type[PyqmigrateError]]:
    """Every class of the tree, wherever in the package it is defined."""
    for module in pkgutil.walk_packages(pyqmigrate.__path__, "pyqmigrate."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[PyqmigrateError]) -> Iterator[type[PyqmigrateError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    return sorted(set(below(PyqmigrateError)), key=lambda kind: kind.__qualname__)


def examples(kind: type[PyqmigrateError]) -> list[PyqmigrateError]:
    for base, makers in ARGUMENTS:
        if issubclass(kind, base):
            return [make(kind) for make in makers]
    for arguments in (("what", "usage: it"), (errno.ENOENT, "not there", 5)):
        if kind.__init__ is not PyqmigrateError.__init__ or issubclass(kind, OSError):
            try:
                return [kind(*arguments)]
            except TypeError:
                continue
    return [kind("what went wrong")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__qualname__)
def test_an_error_is_the_same_afterwards(kind: type[PyqmigrateError], way: str) -> None:
    for error in examples(kind):
        error.add_note("a note")
        same = WAYS[way](error)
        assert type(same) is kind
        assert str(same) == str(error)
        assert repr(same) == repr(error)
        assert same.args == error.args
        assert vars(same) == vars(error)
        assert same.__notes__ == ["a note"]
        for name in ("errno", "strerror", "filename"):
            assert getattr(same, name, None) == getattr(error, name, None)
        assert str(WAYS[way](same)) == str(error)


def fill_the_disk(path: str) -> None:
    pyqmigrate.save(path, [RamBlock("ram", b"\1" * 4096)])


def test_an_error_comes_back_from_another_process() -> None:
    """As of a save in a pool of processes: an error that cannot be pickled breaks the pool."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(TargetError) as caught:
            pool.submit(fill_the_disk, "/nonexistent/snap").result(60)
        assert caught.value.errno == errno.ENOENT
        assert str(caught.value).count("No such file") == 1
        with pytest.raises(TargetError):  # and the pool goes on
            pool.submit(fill_the_disk, "/nonexistent/snap").result(60)
