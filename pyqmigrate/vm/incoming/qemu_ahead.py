"""A QEMU that is started before the restore is checked, since it takes as long to load itself as this process to
import what checks.

It is started with the given command line, and waits before it looks at that (:mod:`pyqmigrate.vm.qemu.spawn`): it
has opened nothing that the command line names. After the checks it gets what the restore adds, or is ended. A
wrapper around QEMU is not started ahead: it could do anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.target import Target
from pyqmigrate.vm.incoming.command import make_incoming
from pyqmigrate.vm.incoming.identity import with_new_generation
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.qemu.binary import has_type
from pyqmigrate.vm.qemu.command_line import CommandLine, is_qemu
from pyqmigrate.vm.qemu.memory_options import WITHOUT_BACKEND, memory_backends
from pyqmigrate.vm.qemu.readconfig import as_configuration
from pyqmigrate.vm.qemu.spawn import QemuProcess, WaitingQemu

__all__ = ["QemuAhead", "start_ahead"]

_QEMU_TYPE = "memory-backend-file"  # every QEMU for which memory is mapped has it


class QemuAhead:
    """A waiting QEMU that inherits ``input``, the open snapshot, and has the other end of ``monitor``.

    A caller that uses ``input`` or ``monitor`` owns it from then on. Call :meth:`end`.
    """

    def __init__(self, command: CommandLine, snapshot: InputFile, options: RestoreOptions) -> None:
        """Start it. Raises what :class:`~pyqmigrate.vm.qemu.spawn.WaitingQemu` does."""
        self.input = snapshot
        self._command = command
        self.monitor, qemu_end = socket.socketpair()
        try:
            with qemu_end:  # the end of QEMU must be noticed
                self._qemu: WaitingQemu | None = WaitingQemu(
                    command, [snapshot.fd, *options.pass_fds], **options.connections(qemu_end)
                )
        except BaseException:
            self.monitor.close()
            raise

    def way_on(self, command: CommandLine, mapped_fd: int) -> Callable[[], QemuProcess] | None:
        """Return what lets it go on as ``command``, which maps memory from ``mapped_fd``; None if it cannot."""
        count = len(self._command.options)
        if mapped_fd != self.input.fd or self._command != command._replace(
            options=command.options[:count]
        ):
            return None
        sections = as_configuration(command.options[count:])
        return None if sections is None else partial(self._go, sections)

    def _go(self, sections: str) -> QemuProcess:
        assert self._qemu is not None
        qemu, self._qemu = self._qemu, None
        return qemu.go(sections)

    def end(self) -> None:
        """End it, unless it went on. Can be called again."""
        if self._qemu is not None:
            self._qemu.end()
            self._qemu = None
            self.monitor.close()


def start_ahead(
    snapshot: Target, words: Sequence[str] | None, options: RestoreOptions
) -> QemuAhead | None:
    """Start QEMU for an instant restore of a file. Not for the main thread.

    Returns None if nothing can be started ahead, or if anything is wrong, which the restore reports.
    """
    if (
        not isinstance(snapshot, str)
        or "#" in snapshot
        or words is None
        or options.mode not in (Mode.AUTO, Mode.INSTANT)
        or options.record is not None  # it needs another environment
        or options.disks.new_overlays
    ):
        return None
    with contextlib.suppress(PyqmigrateError, OSError), contextlib.ExitStack() as undo:
        command = CommandLine.parse(words)
        if not _is_qemu_itself(command):
            return None
        # Memory backends are replaced. Left out, they would be missing when the guest's command line is recorded.
        if any(memory_backends(command)):
            return None
        command, _ = make_incoming(with_new_generation(command)[0], paused=options.paused)
        command = command.without(*WITHOUT_BACKEND)
        input_file = InputFile(snapshot, cache=options.cache, ahead=options.reads_ahead)
        undo.callback(input_file.close)
        ahead = QemuAhead(command, input_file, options)
        undo.pop_all()
        return ahead
    return None


def _is_qemu_itself(command: CommandLine) -> bool:
    if command.before or not is_qemu(command.program):
        return False
    places = [""] if "/" in command.program else os.get_exec_path()
    paths = (os.path.join(place, command.program) for place in places)
    program = next((path for path in paths if os.access(path, os.X_OK)), None)
    return program is not None and has_type(program, _QEMU_TYPE)
