"""What an import costs is what is used of it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import pyqmigrate
import pyqmigrate.analysis
import pyqmigrate.fleet
import pyqmigrate.store
import pyqmigrate.vm
from pyqmigrate.vm.plan.live_option import LiveMethod


def loaded(code):
    """The modules that are there after ``code``."""
    text = subprocess.check_output(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], text=True
    )
    return set(text.splitlines()[-1].split())


def named(*names):
    """Modules of the package, which exist: a name that has changed must not go unnoticed."""
    modules = {f"pyqmigrate.{name}" for name in names}
    assert all(importlib.util.find_spec(module) for module in modules)
    return modules


@pytest.mark.parametrize(
    "package",
    [pyqmigrate, pyqmigrate.analysis, pyqmigrate.fleet, pyqmigrate.store, pyqmigrate.vm],
    ids=lambda package: package.__name__,
)
def test_every_public_name_is_there_and_listed(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pyqmigrate.no_such_name


def test_the_package_alone_loads_no_monitor_and_no_command_line():
    assert not {"qemu.qmp", "pyqmigrate.cli", "pyqmigrate.vm"} & loaded("import pyqmigrate")


def test_a_verb_loads_its_own_module_and_no_other():
    code = (
        "import contextlib, pyqmigrate.cli\n"
        "with contextlib.suppress(SystemExit):\n    pyqmigrate.cli.main(['info', '--help'])"
    )
    verbs = {name for name in loaded(code) if name.startswith("pyqmigrate.cli.")}
    assert "pyqmigrate.cli.info" in verbs
    assert not {"pyqmigrate.cli.pack", "pyqmigrate.cli.vm.save"} & verbs


def test_a_restore_loads_nothing_that_saves_or_seals():
    saving = named(
        "api",
        "integrity.seal",
        "integrity.verify",
        "snapshot.save.mapped_ram",
        "snapshot.save.writer",
        "snapshot.load.sequential",
    )
    assert not saving & loaded("import pyqmigrate.cli.vm.restore, pyqmigrate.vm.incoming.restore")


def test_a_restore_loads_no_guest_agent_until_it_sets_a_clock():
    other = named("vm.guest.agent", "vm.guest.disks", "vm.guest.process")
    assert not other & loaded("import pyqmigrate.cli.vm.restore, pyqmigrate.vm.incoming.restore")


def test_the_keeper_of_a_lazy_restore_is_small():
    own = {
        name
        for name in loaded("import pyqmigrate.vm.incoming.keeper.keeper")
        if name.startswith("pyqmigrate.")
    }
    parts = [
        "keeper",
        "clients",
        "lines",
        "loop",
        "monitor",
        "plugged",
        "recovery",
        "server",
        "state",
    ]
    keeper = ("keeper", *(f"keeper.{part}" for part in parts))
    allowed = named("errors", "vm", "vm.incoming", *(f"vm.incoming.{name}" for name in keeper))
    assert own <= allowed
    assert not {"asyncio", "cffi", "ctypes"} & loaded("import pyqmigrate.vm.incoming.keeper.keeper")


def test_a_restore_loads_nothing_of_a_lazy_one():
    lazy = named(
        "vm.incoming.lazy",
        "vm.incoming.lazy_checks",
        "vm.incoming.lazy_keeper",
        "vm.incoming.lazy_process",
        "vm.incoming.lazy_start",
        "vm.incoming.lazy_status",
        "vm.incoming.keeper",
    )
    assert not lazy & loaded("import pyqmigrate.cli.vm.restore, pyqmigrate.vm.incoming.restore")


EARLY = (
    "import pyqmigrate.cli, pyqmigrate.cli.vm.restore, pyqmigrate.vm.incoming.early_start\n"
    "import pyqmigrate.vm.incoming.qemu_ahead, pyqmigrate.vm.incoming.early_restore"
)


def test_a_restore_starts_qemu_before_it_loads_an_event_loop_or_a_monitor():
    late = {"asyncio", "ssl", "qemu.qmp"} | named("vm.qemu.monitor", "qapi.parameters")
    assert not late & loaded(EARLY)


def test_a_restore_starts_qemu_without_the_libraries_that_take_long():
    slow = {"dataclasses", "inspect", "ast", "logging", "traceback", "hmac", "secrets", "numpy"}
    loads = named("io.memory", "io.job", "io.pages", "format.seal", "snapshot.load.mapped_ram")
    assert not (slow | loads) & loaded(f"{EARLY}, pyqmigrate.vm.record.disk_check")


def test_the_guest_of_an_instant_restore_runs_before_an_event_loop_is_loaded():
    late = {"asyncio", "qemu.qmp"} | named("vm.qemu.monitor", "vm.incoming.attempt")
    assert not late & loaded(f"{EARLY}, pyqmigrate.vm.incoming.instant_start")


def test_a_command_line_is_parsed_without_asking_shutil_for_the_terminal():
    code = (
        "import pyqmigrate.cli\n"
        "pyqmigrate.cli.build_parser().parse_args(['vm', 'restore', 'x', '--', 'qemu'])"
    )
    assert "shutil" not in loaded(code)


def test_a_snapshot_in_a_file_loads_nothing_of_stores():
    stores = named("io.view", "mount.view", "store.store", "format.store.config")
    code = (
        "import pyqmigrate.cli.vm.restore, pyqmigrate.cli.vm.clone, pyqmigrate.cli.verify\n"
        "import pyqmigrate.vm.incoming.restore\n"
        "from pyqmigrate.io.input import InputFile\n"
        f"InputFile({__file__!r}).close()"
    )
    assert not stores & loaded(code)


def test_a_verb_of_a_store_loads_no_other_verb_and_no_library_for_urls() -> None:
    code = (
        "import pyqmigrate.cli, tempfile\n"
        "pyqmigrate.cli.main(['store', 'create', tempfile.mkdtemp()])"
    )
    found = loaded(code)
    assert "pyqmigrate.cli.store.create" in found
    assert not named("cli.store.get", "store.adding", "store.object_place", "vm") & found
    assert not {"obstore", "numpy", "asyncio"} & found


def test_a_save_without_a_seal_loads_nothing_that_seals():
    sealing = named("integrity.manifest", "integrity.save_seal", "integrity.digests")
    code = (
        "import pyqmigrate, tempfile\n"
        "blocks = [pyqmigrate.RamBlock('pc.ram', bytearray(1 << 20))]\n"
        "pyqmigrate.save(tempfile.mkdtemp() + '/snapshot', blocks)"
    )
    assert not sealing & loaded(code)


def test_the_version_is_shown_without_any_verb():
    found = loaded("import pyqmigrate.cli\npyqmigrate.cli.main(['--version'])")
    assert not {name for name in found if name.startswith("pyqmigrate.cli.vm")}


def test_a_save_loads_what_makes_a_twin_only_where_it_makes_one():
    twin = named("vm.twin.twin", "vm.qemu.launch")
    assert not twin & loaded("import pyqmigrate.vm.outgoing.save")


def test_live_methods_are_loaded_only_for_a_live_save():
    live = named(
        *(f"vm.outgoing.{method}" for method in LiveMethod),
        *(f"vm.plan.live_{method}" for method in ("background", "changed", "precopy")),
        "vm.outgoing.live_save",
        "vm.outgoing.live_methods",
        "vm.guest.changed_pages",
        "vm.guest.guest_base",
        "io.page_digests",
        "io.page_table_file",
        "io.stash",
        "snapshot.save.background",
        "snapshot.save.increment",
    )
    assert not live & loaded("import pyqmigrate.vm\npyqmigrate.vm.Vm, pyqmigrate.vm.restore")
    assert not live & loaded("import pyqmigrate.cli.vm.save, pyqmigrate.vm.outgoing.save")


@pytest.mark.parametrize(
    "package",
    [pyqmigrate, pyqmigrate.analysis, pyqmigrate.fleet, pyqmigrate.store, pyqmigrate.vm],
    ids=lambda package: package.__name__,
)
def test_no_module_hides_a_public_name(package):
    """``import PACKAGE.NAME`` makes the module the attribute, whatever that was before."""
    root = Path(package.__file__).parent
    modules = {path.stem for path in root.glob("*.py")}
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert modules
    assert not (modules | folders) & set(package.__all__)


def test_the_command_does_not_collect_garbage_while_a_restore_is_imported():
    code = (
        "import gc, pyqmigrate\n"
        "def count(): return sum(stats['collections'] for stats in gc.get_stats())\n"
        "before = count()\n"
        "import pyqmigrate.__main__\n"
        f"{EARLY}\n"
        "print(count() - before)"
    )
    # One may be due when the command is imported; without its setting there are some 30.
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) <= 1


def test_the_library_leaves_the_garbage_collector_alone():
    code = "import gc; before = gc.get_threshold(); import pyqmigrate.cli; print(gc.get_threshold() == before)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"
