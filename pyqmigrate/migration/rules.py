"""Checks at the start of a migration: its transport, capabilities and parameters together.

The checks of QEMU's ``migrate`` and ``migrate-incoming`` are in its order and have its texts
(docs/internals/qemu-management.md, "Checks at the start of a migration"). The strict ones are those
that QEMU omits, and later fails or dies.
"""

from __future__ import annotations

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi.address import Transport
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import MigrationMode, Parameters
from pyqmigrate.qapi.status import RunState, Status

__all__ = [
    "check_incoming",
    "check_incoming_transport",
    "check_outgoing",
    "check_strictly",
    "check_transport",
    "check_with_mapped_ram",
    "effective_direct_io",
]


def effective_direct_io(capabilities: Capabilities, parameters: Parameters) -> bool:
    """Return whether O_DIRECT will be used: direct-io has no effect without mapped-ram and multifd."""
    return parameters.direct_io and capabilities.mapped_ram and capabilities.multifd


def check_transport(
    transport: Transport, capabilities: Capabilities, parameters: Parameters
) -> None:
    """Check that the transport supports the capabilities, for a save or a load.

    Raises UsageError with QEMU's text.
    """
    is_file = transport is Transport.FILE
    if capabilities.mapped_ram and not is_file:
        raise UsageError("Migration requires seekable transport (e.g. file)")
    many = transport is Transport.SOCKET or (is_file and capabilities.mapped_ram)
    if (capabilities.multifd or capabilities.postcopy_preempt) and not many:
        raise UsageError("Migration requires multi-channel URIs (e.g. tcp)")
    if effective_direct_io(capabilities, parameters) and not is_file:
        raise UsageError("Migration requires a transport that allows for extra fds (e.g. file)")
    if parameters.mode is MigrationMode.CPR_TRANSFER and is_file:
        raise UsageError("Migration requires streamable transport (eg unix)")


def check_with_mapped_ram(capabilities: Capabilities, parameters: Parameters) -> None:
    """Make the last check of ``migrate`` before it changes any state.

    Raises UsageError with QEMU's text: TLS or compression together with mapped-ram.
    """
    if not capabilities.mapped_ram:
        return
    if parameters.tls_creds:
        raise UsageError("Cannot use TLS with mapped-ram")
    if parameters.compressed_or_tls:
        raise UsageError("Cannot use compression with mapped-ram")


def check_strictly(capabilities: Capabilities) -> None:
    """Refuse capabilities with which QEMU starts a migration to a file and then fails.

    Raises UsageError with the capability to switch off.
    """
    if capabilities.return_path:
        raise UsageError(
            "a file has no way back for return-path: switch the capability off "
            "(switchover-ack with it)"
        )
    if capabilities.postcopy_ram:
        raise UsageError("a file cannot serve pages on demand: switch postcopy-ram off")


def check_outgoing(
    transport: Transport,
    capabilities: Capabilities,
    parameters: Parameters,
    *,
    status: Status,
    run_state: RunState,
    resume: bool = False,
) -> None:
    """Make the checks of ``migrate`` after the address, in QEMU's order.

    ``status`` is that of the last outgoing migration. Raises UsageError with QEMU's text; no
    state may have changed then, and no event been sent.
    """
    check_transport(transport, capabilities, parameters)
    if resume:
        raise UsageError("Cannot resume if there is no paused migration")
    if status.running:
        raise UsageError("There's a migration process in progress")
    if run_state is RunState.INMIGRATE:
        raise UsageError("Guest is waiting for an incoming migration")
    if run_state is RunState.POSTMIGRATE:
        raise UsageError("Can't migrate the vm that was paused due to previous migration")
    check_with_mapped_ram(capabilities, parameters)
    if parameters.mode is MigrationMode.CPR_EXEC:
        if not parameters.cpr_exec_command:
            raise UsageError("cpr-exec mode requires setting cpr-exec-command")
        raise UsageError(  # QEMU would become that program
            "mode cpr-exec is not possible here, there is no QEMU to replace: set mode to normal"
        )


def check_incoming(*, deferred: bool, started: bool) -> None:
    """Make the checks of ``migrate-incoming`` before the address.

    ``deferred``: the process was started to wait for a migration; ``started``: it has accepted one.
    Raises UsageError with QEMU's text.
    """
    if not deferred:
        raise UsageError("'-incoming' was not specified on the command line")
    if started:
        raise UsageError("The incoming migration has already been started")


def check_incoming_transport(
    transport: Transport, capabilities: Capabilities, parameters: Parameters, *, status: Status
) -> None:
    """Make the checks of ``migrate-incoming`` after the address, in QEMU's order.

    ``status`` is that of the incoming migration. Raises UsageError with QEMU's text; only a
    failed open leaves it at ``setup``, for good.
    """
    check_transport(transport, capabilities, parameters)
    if status is not Status.NONE:
        raise UsageError(f"Illegal migration incoming state: {status}")
