import pytest

from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.qemu_version import QEMU_11_1
from pyqmigrate.qapi.status import MigrationInfo, RamStatistics, RunState, Status
from pyqmigrate.qmp import hmp
from pyqmigrate.qmp.hmp_layouts import (
    _size,
    render_capabilities,
    render_migration,
    render_parameters,
    render_status,
)
from tests.harness.idle_guest import IdleGuest


@pytest.fixture
def guest():
    with FdSets() as fdsets:
        yield IdleGuest(fdsets)


@pytest.fixture
def say(guest):
    def say(line):
        return hmp.run(line, hmp.Human(guest, lambda _name: -1, lambda: None))

    return say


GLOBALS = [
    "globals:",
    "store-global-state: on",
    "only-migratable: off",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: on",
    "clear-bitmap-shift: 18",
]


def lines(*texts):
    return "".join(text + "\r\n" for text in texts)


def test_a_migration_that_never_was_shows_the_globals_only():
    assert render_migration(MigrationInfo()) == lines(*GLOBALS)


@pytest.mark.parametrize("status", [Status.SETUP, Status.CANCELLED, Status.FAILED])
def test_a_migration_without_numbers_shows_its_status(status):
    info = MigrationInfo(status, ram=RamStatistics(total=5), total_time=9)
    assert render_migration(info) == lines(
        *GLOBALS, f"Migration status: {status}", "total time: 0 ms"
    )


def test_an_error_is_behind_the_status():
    shown = render_migration(MigrationInfo(Status.FAILED, "no room"))
    assert "Migration status: failed (no room)\r\n" in shown


RAM = RamStatistics(
    total=67641344,
    remaining=4096,
    transferred=459249,
    duplicate=16400,
    normal=112,
    normal_bytes=458752,
    mbps=0.98448,
    dirty_sync_count=1,
    multifd_bytes=458752,
    pages_per_second=320,
    precopy_bytes=40,
)
NUMBERS = [
    "setup: 1 ms",
    "transferred ram: 448 kbytes",
    "throughput: 0.98 mbps",
    "remaining ram: 4 kbytes",
    "total ram: 66056 kbytes",
    "duplicate: 16400 pages",
    "normal: 112 pages",
    "normal bytes: 448 kbytes",
    "dirty sync count: 1",
    "page size: 4 kbytes",
    "multifd bytes: 448 kbytes",
    "pages-per-second: 320",
    "precopy ram: 0 kbytes",
]


def test_a_running_migration_shows_its_numbers_as_qemu_does():
    info = MigrationInfo(
        Status.ACTIVE, ram=RAM, total_time=502, setup_time=1, expected_downtime=300
    )
    assert render_migration(info) == lines(
        *GLOBALS,
        "Migration status: active",
        "total time: 502 ms",
        "expected downtime: 300 ms",
        *NUMBERS,
    )


def test_a_completed_migration_shows_its_downtime():
    ram = RamStatistics(downtime_bytes=2088)
    shown = render_migration(MigrationInfo(Status.COMPLETED, ram=ram, downtime=2))
    assert "\r\ndowntime: 2 ms\r\n" in shown
    assert "expected downtime" not in shown
    assert shown.endswith("downtime ram: 2 kbytes\r\n")


def test_capabilities_are_shown_one_a_line():
    shown = render_capabilities(Capabilities(multifd=True)).split("\r\n")
    assert shown[0] == "xbzrle: off"
    assert "multifd: on" in shown
    assert shown[-2:] == ["mapped-ram: off", ""]


def test_parameters_are_shown_with_their_units():
    shown = render_parameters(Parameters(direct_io=True, tls_creds="a b"))
    assert shown.startswith("announce-initial: 50 ms\r\n")
    assert "max-bandwidth: 134217728 bytes/second\r\n" in shown
    assert "tls-creds: 'a b'\r\n" in shown
    assert shown.endswith("mode: normal\r\ndirect-io: on\r\n")


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (RunState.RUNNING, "running"),
        (RunState.PAUSED, "paused"),
        (RunState.POSTMIGRATE, "paused (postmigrate)"),
        (RunState.INMIGRATE, "paused (inmigrate)"),
    ],
)
def test_status_is_running_or_paused_with_the_reason(state, shown):
    assert render_status(state) == f"VM status: {shown}\r\n"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("max-bandwidth 10", "max_bandwidth", 10 << 20),
        ("max-bandwidth 10k", "max_bandwidth", 10240),
        ("max-bandwidth 0.5", "max_bandwidth", 512 << 10),
        ("max-bandwidth 0x8", "max_bandwidth", 8 << 20),
        ("max-bandwidth 0", "max_bandwidth", 0),
        ("max-postcopy-bandwidth 1", "max_postcopy_bandwidth", 1),
        ("multifd-channels 0x8", "multifd_channels", 8),
        ("multifd-channels 010", "multifd_channels", 8),
        ("direct-io yes", "direct_io", True),
        ("downtime-limit 1k", "downtime_limit", 1024),
        ('tls-creds "a\\"b\\n"', "tls_creds", 'a"b\n'),
        ("zero-page-detection legacy", "zero_page_detection", "legacy"),
    ],
)
def test_values_are_read_as_a_person_writes_them(guest, say, line, name, value):
    assert say(f"migrate_set_parameter {line}") == ""
    assert getattr(guest.parameters, name) == value


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("max-bandwidth -1", "Error: Invalid size -1"),
        ("max-bandwidth 0xfffffffffffffff", "Error: Invalid size 0xfffffffffffffff"),
        ("direct-io maybe", "Error: Parameter 'direct-io' expects 'on' or 'off'"),
        ("multifd-channels x", "Error: Parameter 'multifd-channels' expects uint64"),
        ("multifd-channels -1", "Error: Parameter 'multifd-channels' expects uint8_t"),
        (
            "multifd-channels 0",
            "Error: Parameter 'multifd_channels' expects a value between 1 and 255",
        ),
        ("nope 1", "Error: invalid parameter value: nope"),
        (
            "block-bitmap-mapping x",
            "Error: The block-bitmap-mapping parameter can only be set through QMP",
        ),
        (
            "xbzrle-cache-size -1",
            "Error: Value '-1' is out of range for parameter 'xbzrle-cache-size'",
        ),
    ],
)
def test_a_bad_value_is_an_error_in_the_text(guest, say, line, shown):
    assert say(f"migrate_set_parameter {line}") == lines(shown)
    assert guest.parameters == Parameters()


def test_a_long_complaint_has_crlf_everywhere(say):
    shown = say("migrate_set_parameter downtime-limit x")
    assert shown.count("\r\n") == shown.count("\n") == 3


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("migrate_set_parameter", "migrate_set_parameter: string expected"),
        ("migrate_set_capability events", "Expected 'on' or 'off'"),
        ("migrate_cancel x", "migrate_cancel: extraneous characters at the end of line"),
        ("q x", "quit|q: extraneous characters at the end of line"),
        ("migrate -x y", "migrate: unsupported option -x"),
        ("info status x", "status: extraneous characters at the end of line"),
    ],
)
def test_a_line_that_does_not_fit_gets_a_hint(say, line, shown):
    said = line.split()[0] + (" status" if line.startswith("info") else "")
    assert say(line) == lines(shown, f'Try "help {said}" for more information')


@pytest.mark.parametrize("line", ["nope", "info nope", "infostatus"])
def test_an_unknown_command_is_named(say, line):
    assert say(line) == f"unknown command: '{line}'\r\n"


def test_bare_info_lists_what_there_is(say):
    assert "info migrate  -- show migration status\r\n" in say("info")


def test_an_empty_line_says_nothing(say):
    assert say("   ") == ""


def test_migrate_without_d_says_that_it_does_not_wait(guest, say, tmp_path):
    assert say(f"migrate file:{tmp_path}/out") == (
        "terminal does not allow synchronous migration, continuing detached\r\n"
    )
    assert guest.query().status is Status.COMPLETED
    say("cont")
    assert say(f"migrate -d file:{tmp_path}/out") == ""


def test_a_failed_migration_is_an_error_in_the_text(say):
    assert say("migrate file:/nonexistent/x") == (
        "Error: Could not create '/nonexistent/x': No such file or directory\r\n"
    )


def test_stop_and_cont_and_quit_do_what_they_say(guest):
    asked = []
    for line, state in (("stop", RunState.PAUSED), ("c", RunState.RUNNING)):
        assert hmp.run(line, hmp.Human(guest, lambda _name: -1, lambda: None)) == ""
        assert guest.run_state is state
    assert hmp.run("quit", hmp.Human(guest, lambda _name: -1, lambda: asked.append(1))) == ""
    assert asked == [1]


@pytest.fixture
def say_as_11(guest):
    guest.policy = Policy.COMPAT_11_1

    def say(line):
        return hmp.run(line, hmp.Human(guest, lambda _name: -1, lambda: None, QEMU_11_1))

    return say


def test_the_newer_layout_has_sections(guest, say_as_11):
    assert say_as_11("info migrate") == ""
    assert say_as_11("info migrate -a").startswith("Globals:\r\n  store-global-state: on\r\n")
    guest.query = lambda: MigrationInfo(
        Status.ACTIVE, ram=RAM, total_time=3, setup_time=1, expected_downtime=300
    )
    assert say_as_11("info migrate") == lines(
        "Status: \t\tactive",
        "Time (ms): \t\ttotal=3, setup=1, exp_down=300",
        "Remaining: \t\t4 KiB",
        "RAM info:",
        "  Throughput (Mbps): \t0.98",
        "  Sizes: \t\tpagesize=4 KiB, total=64.5 MiB",
        "  Transfers: \t\ttransferred=448 KiB, remain=4 KiB",
        "    Channels: \t\tprecopy=40 B, multifd=448 KiB, postcopy=0 B",
        "    Page Types: \tnormal=112, zero=16400",
        "  Page Rates (pps): \ttransfer=320",
        "  Others: \t\tdirty_syncs=1",
    )


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (4096, "4 KiB"),
        (999 << 10, "999 KiB"),
        (1000 << 10, "0.977 MiB"),
        (67641344, "64.5 MiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_a_size_has_three_digits(size, shown):
    assert _size(size) == shown


def test_a_text_with_a_quote_left_open_is_named(say_as_11):
    set_command = "migrate_set_parameter cpr-exec-command "
    for text, complaint in (
        ('a "b', 'before matching quote was found for ".'),
        ("'\"\" a' b'c", "before matching quote was found for '."),
        ("a b\\", "just after a “\\” character."),
    ):
        assert say_as_11(set_command + text) == lines(
            f"Error: Text ended {complaint} (The text was “{text}”)"
        )
    assert say_as_11(set_command + "a 'b c' d\\ e") == ""
    assert "cpr-exec-command: a b c d e\r\n" in say_as_11("info migrate_parameters")
