"""The options of saves and restores: declared once for callers, once as checked values."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pyqmigrate import vm
from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.vm import sync
from pyqmigrate.vm.incoming.options import DiskOptions, RestoreOptions
from pyqmigrate.vm.outgoing.options import SaveOptions


def test_each_save_option_has_a_checked_value() -> None:
    names = {field.name for field in dataclasses.fields(SaveOptions)}
    one_value = set(get_type_hints(vm.VmLiveOptions)) - {"live"}
    assert names == set(get_type_hints(vm.VmSaveOptions)) - one_value


def test_each_restore_option_has_a_checked_value() -> None:
    disks = {"with_disks", "disks_dir", "disks_as_they_are"}
    given = set(get_type_hints(vm.VmRestoreOptions))
    only_for_pools = {"bound"}
    assert {*RestoreOptions._fields} - {"disks"} - only_for_pools == given - disks
    assert len(DiskOptions._fields) == len(disks & given)


@pytest.mark.parametrize(
    ("blocking", "coroutine"),
    [
        (sync.Vm.save, vm.Vm.save),
        (sync.Vm.check, vm.Vm.check),
        (sync.restore, vm.restore),
        (sync.clone, vm.clone),
    ],
    ids=lambda function: function.__qualname__,
)
def test_sync_functions_have_the_parameters_of_the_coroutines(
    blocking: Callable[..., Any], coroutine: Callable[..., Any]
) -> None:
    ours, theirs = inspect.signature(blocking), inspect.signature(coroutine)
    assert ours.parameters == theirs.parameters


def test_save_options_are_checked() -> None:
    checked = SaveOptions.check({"then": "quit", "seal": "blake3", "direct_io": "off"})
    assert (checked.then, checked.seal, checked.direct_io) == (
        vm.Then.QUIT,
        Algorithm.BLAKE3,
        DirectIO.OFF,
    )
    assert SaveOptions.check({"then": None, "seal": None}) == SaveOptions()


@pytest.mark.parametrize(
    "options",
    [{"then": "stay"}, {"direct_io": None}, {"sparse": None}, {"seal": "md5"}, {"channels": 0}],
    ids=str,
)
def test_bad_save_option_is_refused(options: vm.VmSaveOptions) -> None:
    with pytest.raises(UsageError):
        SaveOptions.check(options)


def test_restore_options_are_checked(tmp_path: Path) -> None:
    checked = RestoreOptions.check(
        {"mode": "load", "qmp": f"unix:{tmp_path}/qmp", "with_disks": True, "disks_dir": tmp_path}
    )
    assert checked == RestoreOptions(
        mode=vm.Mode.LOAD, qmp=tmp_path / "qmp", disks=DiskOptions(True, tmp_path)
    )


@pytest.mark.parametrize("options", [{"mode": "x"}, {"direct_io": "x"}, {"pass_fds": [1 << 40]}])
def test_bad_restore_option_is_refused(options: vm.VmRestoreOptions) -> None:
    with pytest.raises(UsageError):
        RestoreOptions.check(options)


def test_unknown_options_are_type_errors() -> None:
    """A caller without a type checker sees a misspelled name, as of any function."""
    calls: list[Callable[..., Any]] = [vm.Vm("/none").save, vm.restore, vm.clone]
    for call in calls:
        with pytest.raises(TypeError, match="chanels"):
            asyncio.run(call("/none", chanels=2))
    with pytest.raises(TypeError, match="qmp"):  # an option of a restore, not of clones
        asyncio.run(vm.clone("/none", qmp="/none"))  # type: ignore[call-arg]
