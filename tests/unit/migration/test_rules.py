import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.migration.rules import (
    check_incoming,
    check_incoming_transport,
    check_outgoing,
    check_strictly,
    check_transport,
    check_with_mapped_ram,
    effective_direct_io,
)
from pyqmigrate.qapi.address import Transport
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import MigrationMode, MultifdCompression, Parameters
from pyqmigrate.qapi.status import RunState, Status

NOT_FILES = [transport for transport in Transport if transport is not Transport.FILE]


@pytest.mark.parametrize("mapped_ram", [False, True])
@pytest.mark.parametrize("multifd", [False, True])
@pytest.mark.parametrize("direct_io", [False, True])
def test_direct_io_needs_mapped_ram_and_multifd(direct_io, multifd, mapped_ram):
    capabilities = Capabilities(mapped_ram=mapped_ram, multifd=multifd)
    expected = direct_io and multifd and mapped_ram
    assert effective_direct_io(capabilities, Parameters(direct_io=direct_io)) is expected


@pytest.mark.parametrize("transport", NOT_FILES)
def test_mapped_ram_needs_a_file(transport):
    with pytest.raises(UsageError, match=r"^Migration requires seekable transport \(e.g. file\)$"):
        check_transport(transport, Capabilities(mapped_ram=True, multifd=True), Parameters())


@pytest.mark.parametrize("transport", [*Transport])
@pytest.mark.parametrize("capability", ["multifd", "postcopy_preempt"])
def test_multifd_needs_many_channels(transport, capability):
    capabilities = Capabilities(**{capability: True})
    if transport is Transport.SOCKET:
        check_transport(transport, capabilities, Parameters())
    else:
        with pytest.raises(UsageError, match=r"^Migration requires multi-channel URIs \(e.g. tcp"):
            check_transport(transport, capabilities, Parameters())


def test_a_file_with_mapped_ram_has_many_channels():
    capabilities = Capabilities(mapped_ram=True, multifd=True)
    check_transport(Transport.FILE, capabilities, Parameters(direct_io=True))


def test_cpr_transfer_does_not_go_to_a_file():
    parameters = Parameters(mode=MigrationMode.CPR_TRANSFER)
    with pytest.raises(UsageError, match=r"^Migration requires streamable transport \(eg unix\)$"):
        check_transport(Transport.FILE, Capabilities(), parameters)


def test_mapped_ram_has_neither_tls_nor_compression():
    mapped = Capabilities(mapped_ram=True)
    compressed = Parameters(multifd_compression=MultifdCompression.ZSTD)
    with pytest.raises(UsageError, match=r"^Cannot use TLS with mapped-ram$"):
        check_with_mapped_ram(mapped, Parameters(tls_creds="x"))
    with pytest.raises(UsageError, match=r"^Cannot use compression with mapped-ram$"):
        check_with_mapped_ram(mapped, compressed)
    check_with_mapped_ram(Capabilities(), compressed)
    check_with_mapped_ram(mapped, Parameters())


@pytest.mark.parametrize("capability", ["return_path", "postcopy_ram"])
def test_strict_refuses_what_needs_a_way_back(capability):
    with pytest.raises(UsageError, match=r"switch .*off"):
        check_strictly(Capabilities(**{capability: True}))


def test_strict_leaves_the_rest_alone():
    names = [
        "mapped_ram",
        "multifd",
        "events",
        "release_ram",
        "auto_converge",
        "validate_uuid",
        "x_ignore_shared",
    ]
    check_strictly(Capabilities(**dict.fromkeys(names, True)))


def outgoing(transport=Transport.FILE, capabilities=None, parameters=None, **options):
    with pytest.raises(UsageError) as caught:
        check_outgoing(
            transport,
            capabilities or Capabilities(),
            parameters or Parameters(),
            **{"status": Status.NONE, "run_state": RunState.RUNNING} | options,
        )
    return str(caught.value)


@pytest.mark.parametrize("status", [s for s in Status if s.running])
def test_one_migration_at_a_time(status):
    assert outgoing(status=status) == "There's a migration process in progress"


@pytest.mark.parametrize("status", [s for s in Status if not s.running])
@pytest.mark.parametrize("run_state", [RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH])
def test_a_new_migration_may_begin_when_the_last_one_has_ended(status, run_state):
    check_outgoing(Transport.FILE, Capabilities(), Parameters(), status=status, run_state=run_state)


@pytest.mark.parametrize(
    ("run_state", "text"),
    [
        (RunState.INMIGRATE, "Guest is waiting for an incoming migration"),
        (RunState.POSTMIGRATE, "Can't migrate the vm that was paused due to previous migration"),
    ],
)
def test_the_guest_must_be_in_a_state_to_leave(run_state, text):
    assert outgoing(run_state=run_state) == text


def test_checks_come_in_qemus_order():
    wrong = {
        "capabilities": Capabilities(mapped_ram=True),
        "parameters": Parameters(tls_creds="x"),
        "status": Status.ACTIVE,
        "run_state": RunState.POSTMIGRATE,
        "resume": True,
    }
    texts = [outgoing(Transport.EXEC, **wrong), outgoing(**wrong)]
    for right in ("resume", "status", "run_state"):
        del wrong[right]
        texts.append(outgoing(**wrong))
    assert [text.split()[0] for text in texts] == [
        "Migration",
        "Cannot",
        "There's",
        "Can't",
        "Cannot",
    ]
    assert texts[-1] == "Cannot use TLS with mapped-ram"


def test_a_load_needs_a_process_that_waits_for_it_and_happens_once():
    with pytest.raises(UsageError, match="'-incoming' was not specified on the command line"):
        check_incoming(deferred=False, started=True)
    with pytest.raises(UsageError, match="The incoming migration has already been started"):
        check_incoming(deferred=True, started=True)
    check_incoming(deferred=True, started=False)


def test_a_load_begins_once_only():
    def check(status, transport=Transport.FILE):
        check_incoming_transport(
            transport, Capabilities(mapped_ram=True), Parameters(), status=status
        )

    check(Status.NONE)
    with pytest.raises(UsageError, match="Illegal migration incoming state: setup"):
        check(Status.SETUP)
    with pytest.raises(UsageError, match="seekable"):
        check(Status.SETUP, Transport.EXEC)
