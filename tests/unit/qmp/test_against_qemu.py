"""The same requests to a real QEMU and to our server that imitates it: the answers are equal.

Equal in class, text and JSON types. Not compared, because they are not ours to choose: numbers
of descriptors, statistics, time stamps, and the package part of the version.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import socket
import subprocess
import time

import pytest

from pyqmigrate.qapi.capabilities import CAPABILITY_NAMES
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp.json_stream import JsonError, JsonStream, encode_line
from tests.harness.qmp_server import RawClient
from tests.harness.version import program_of

pytestmark = pytest.mark.qemu


@pytest.fixture(
    scope="session", params=[Policy.COMPAT_10_0, Policy.COMPAT_11_1], ids=lambda p: p.value
)
def policy(request):
    return request.param


@pytest.fixture(scope="session")
def qemu_program(policy):
    return program_of(policy.qemu.numbers[:2])


@pytest.fixture
def serve(serve, policy):
    """Servers that imitate the QEMU at hand."""

    def start(**options):
        return serve(policy=policy, **options)

    start.connect = serve.connect
    return start


def listens(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def start_qemu(qemu_program, tmp_path):
    started = []

    def start(*options):
        path = tmp_path / f"qemu{len(started)}"
        process = subprocess.Popen(
            [
                qemu_program,
                "-accel",
                "tcg",
                "-machine",
                "none",
                "-m",
                "16M",
                "-nodefaults",
                "-display",
                "none",
                "-qmp",
                f"unix:{path},server=on,wait=off",
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        deadline = time.monotonic() + 20
        while not listens(path):
            assert process.poll() is None, "QEMU ended at once"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return path

    yield start
    for process in started:
        process.kill()
        process.wait()


def request(command, **arguments):
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return raw(command, named)


def raw(command, arguments):
    return json.dumps({"execute": command, "arguments": arguments}).encode(), None


def with_fd(message, flags):
    return message[0], flags


def caps(*names, state=True):
    entries = [{"capability": name, "state": state} for name in names]
    return request("migrate-set-capabilities", capabilities=entries)


def params(**values):
    return request("migrate-set-parameters", **values)


def hmp(line):
    return request("human-monitor-command", command_line=line)


def channel(transport="file", **address):
    return {"channel-type": "main", "addr": {"transport": transport, **address}}


FILE = channel(filename="/nonexistent/x", offset=0)
W, R, RW, D = os.O_WRONLY, os.O_RDONLY, os.O_RDWR, os.O_DIRECT

PROTOCOL = [
    (text, None)
    for text in [
        b"[]",
        b"{}",
        b'"x"',
        b'{"foo":1}',
        b'{"foo":1,"id":7}',
        b'{"execute":1,"id":{"a":[1]}}',
        b'{"execute":"x","foo":1}',
        b'{"execute":"x","arguments":1}',
        b'{"arguments":1}',
        b'{"execute":"xyzzy","id":null}',
        b'{"execute":"xyzzy","id":18446744073709551616}',
        b'{"execute":"xyzzy","id":"\xc3\xa9\\u007f\\u0000"}',
        b"{'execute':'query-status'}",
        b'{"exec-oob":"query-status"}',
        b'{"exec-oob":"x","execute":"y"}',
        b"@\n",
        b"{nope}",
        b'{"execute":"qmp_capabilities"}',
        b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
        b'{"execute":"stop","id":1}',
        b'{"execute":"query-status"}',
        b'{"execute":"cont"}',
    ]
]

FDSETS = [
    request("query-fdsets"),
    request("add-fd"),
    raw("add-fd", {"fdset-id": "x"}),
    raw("add-fd", {"fdset-id": 1.0}),
    raw("add-fd", {"fdset-id": 2**63}),
    raw("add-fd", {"fdset_id": 1}),
    raw("add-fd", {"opaque": 1}),
    raw("add-fd", {"fdset-id": True}),
    with_fd(request("add-fd", fdset_id=-1), W),
    with_fd(request("add-fd"), W),
    with_fd(request("add-fd", fdset_id=3), W),
    with_fd(request("add-fd", fdset_id=3, opaque="abc"), W | D),
    with_fd(request("add-fd", opaque=""), R),
    with_fd(request("add-fd", fdset_id=2**63 - 1), R),
    with_fd(raw("add-fd", {"fdset-id": "x"}), W),
    request("add-fd", fdset_id=7),
    request("query-fdsets"),
    raw("remove-fd", {}),
    request("remove-fd", fdset_id=99),
    request("remove-fd", fdset_id=3, fd=9999),
    request("remove-fd", fdset_id=-1, fd=-5),
    request("remove-fd", fdset_id=0),
    with_fd(request("add-fd"), W),
    request("query-fdsets"),
    request("getfd"),
    request("getfd", fdname="x"),
    with_fd(request("getfd", fdname="1x"), W),
    with_fd(request("getfd", fdname="x"), W),
    with_fd(request("getfd", fdname=""), W),
    request("closefd", fdname="x"),
    request("closefd", fdname="x"),
    request("closefd", fdname=""),
    *(
        request("migrate", uri=f"file:/dev/fdset/{text}")
        for text in ["77", "", "x", "-1", "1x", "99999999999", "+1", "01", "2147483648", "0x1"]
    ),
    request("query-migrate"),
    with_fd(request("add-fd", fdset_id=20), RW),
    request("migrate", uri="file:/dev/fdset/20"),
    with_fd(request("add-fd", fdset_id=21), R),
    request("migrate", uri="file:/dev/fdset/21"),
    with_fd(request("add-fd", fdset_id=22), W | D),
    request("migrate", uri="file:/dev/fdset/22"),
    with_fd(request("add-fd", fdset_id=23), W | os.O_SYNC),
    request("migrate", uri="file:/dev/fdset/23"),
    with_fd(request("add-fd", fdset_id=24), W | os.O_DSYNC),
    request("migrate", uri="file:/dev/fdset/24"),
    request("query-migrate"),
    request("query-fdsets"),
    hmp("info migrate"),
]

OPTIONS = [
    request("query-migrate-capabilities"),
    request("query-migrate-parameters"),
    *(
        raw("migrate-set-capabilities", {"capabilities": value})
        for value in [
            1,
            None,
            {},
            [1],
            [{}],
            [],
            [{"capability": "nope", "state": True}],
            [{"capability": "events"}],
            [{"capability": "events", "state": 1}],
            [{"capability": "events", "state": True, "x": 1}],
        ]
    ),
    raw("migrate-set-capabilities", {}),
    caps("postcopy-ram", "x-ignore-shared"),
    caps("postcopy-ram", "multifd"),
    caps("background-snapshot", "multifd", "xbzrle"),
    caps("zero-copy-send"),
    caps("postcopy-preempt"),
    caps("switchover-ack"),
    caps("dirty-limit"),
    caps("dirty-limit", "auto-converge"),
    caps("multifd", "xbzrle"),
    caps("mapped-ram", "xbzrle"),
    caps("mapped-ram", "postcopy-ram"),
    params(multifd_channels=0),
    params(multifd_channels=256),
    params(multifd_channels="4"),
    params(multifd_channels=2.0),
    params(max_bandwidth=-1),
    params(max_bandwidth=2**64),
    params(direct_io="on"),
    params(direct_io=None),
    params(tls_creds=None),
    params(tls_creds=1),
    params(zero_page_detection="x"),
    params(mode=1),
    params(nope=1),
    params(),
    params(nope=1, multifd_channels="x"),
    params(x_checkpoint_delay=2**32),
    params(multifd_channels=0, downtime_limit=2000001),
    params(direct_io=True),
    params(block_bitmap_mapping=[{"node-name": "n", "alias": "a", "bitmaps": []}]),
    request("query-migrate-parameters"),
    # The quirk: with mapped-ram the current compression counts, not the one being set.
    caps("mapped-ram"),
    params(multifd_compression="zlib"),
    params(multifd_compression="none"),
    params(multifd_channels=0),
    params(vcpu_dirty_limit=0),
    params(),
    caps("mapped-ram", state=False),
    params(multifd_compression="none"),
    request("query-migrate-parameters"),
    caps("zero-blocks"),
    caps("x-colo"),
    caps("x-colo", state=False),
    params(x_rdma_chunk_size=1),
    params(x_rdma_chunk_size=1 << 21),
    params(mode="cpr-exec"),
    params(cpr_exec_command=["a", "b"]),
    params(cpr_exec_command=[1]),
    params(max_cpu_throttle=1),
    params(x_vcpu_dirty_limit_period=0),
    request("query-migrate-parameters"),
    request("query-name"),
    request("query-uuid"),
    raw("query-name", {"x": 1}),
]

MIGRATE = [
    *(
        raw("migrate", arguments)
        for arguments in [
            {},
            {"channels": []},
            {"uri": 1},
            {"channels": 1},
            {"channels": [1]},
            {"channels": [{}]},
            {"channels": [{"channel-type": "x", "addr": {}}]},
            {"channels": [channel("x")]},
            {"channels": [channel()]},
            {"channels": [channel(filename="/nonexistent/x")]},
            {"channels": [channel(filename="/x", offset="0x1000")]},
            {"channels": [channel(filename="/x", offset=0, q=1)]},
            {"channels": [FILE]},
            {"channels": [FILE, FILE]},
            {"uri": "file:/nonexistent/x", "channels": [FILE]},
            {"uri": "file:/nonexistent/x", "channels": []},
            {"channels": [channel("socket", type="z")]},
            {"channels": [channel("socket", type="inet", host=1)]},
            {"channels": [channel("exec", args=["x"], foo=1)]},
            {"uri": "defer"},
            {"uri": ""},
            {"uri": "FILE:x"},
            {"uri": "file:x,offset=0x20M"},
            {"uri": "file:x,offset=-1"},
            {"uri": "file:x", "resume": True},
            {"uri": "file:x", "resume": 1},
            {"uri": "file:x", "blk": True},
            {"uri": "file:"},
            {"uri": "file:/nonexistent/x", "detach": True},
            {"uri": "file:/"},
            {"uri": "fd:nope"},
            {"uri": "file:/dev/full"},
            {"uri": "file:/dev/full,offset=0x1b"},
        ]
    ),
    request("query-migrate"),
    hmp("info migrate"),
    caps("multifd"),
    request("migrate", uri="file:/nonexistent/x"),
    caps("mapped-ram"),
    request("migrate", uri="fd:x"),
    request("migrate", uri="exec:cat"),
    request("migrate", uri="tcp:localhost:1"),
    request("migrate", uri="file:/nonexistent/x"),
    params(multifd_compression="zlib"),
    request("migrate", uri="file:/nonexistent/x"),
    caps("mapped-ram", "multifd", state=False),
    params(multifd_compression="none", tls_creds="x"),
    caps("mapped-ram"),
    request("migrate", uri="file:/nonexistent/x"),
    caps("mapped-ram", state=False),
    params(multifd_compression="zlib"),
    caps("mapped-ram"),
    request("migrate", uri="file:/nonexistent/x"),
    caps("mapped-ram", state=False),
    params(multifd_compression="none", tls_creds=None),
    request("query-memory-size-summary"),
    request("migrate-continue", state="pre-switchover"),
    request("migrate-continue", state="x"),
    request("migrate-continue"),
    request("migrate-continue", state="failing"),
    request("migrate-continue", state="postcopy-device"),
    request("migrate_cancel"),
    request("query-migrate"),
    request("migrate-incoming", uri="zz"),
    request("migrate-incoming"),
    raw("migrate-incoming", {"uri": "file:/x", "exit-on-error": 1}),
    raw("migrate-incoming", {"resume": True}),
    request("migrate", uri="file:OUT"),
    "settle",
    request("query-status"),
    request("migrate", uri="file:OUT"),
    request("stop"),
    request("query-status"),
    request("cont"),
    request("migrate", uri="file:OUT"),
    "settle",
    hmp("info status"),
    hmp("migrate file:OUT"),
    request("cont"),
    request("query-status"),
    params(mode="cpr-exec"),
    request("migrate", uri="file:/nonexistent/x"),
    params(mode="normal"),
    params(mode="cpr-transfer"),
    request("migrate", uri="file:/nonexistent/x"),
]

HMP = [
    hmp(line)
    for line in [
        "",
        "  ",
        "nope",
        "info nope",
        "info  status  ",
        "info status x",
        "info migrate x",
        "info migrate",
        "info migrate_capabilities",
        "info migrate_parameters",
        'info "status"',
        "migrate",
        "migrate -d",
        "migrate -x y",
        "migrate -d a b",
        "migrate -dr file:/x",
        "migrate --d x",
        "migrate -r file:x",
        "migrate -d zz",
        "migrate -d file:/nonexistent/x",
        "migrate_cancel",
        "migrate_cancel x",
        "stop",
        "s",
        "cont",
        "c",
        "quit x",
        "q x",
        "migrate_set_capability",
        "migrate_set_capability events",
        "migrate_set_capability events maybe",
        "migrate_set_capability events on x",
        "migrate_set_capability nope on",
        'migrate_set_capability "events" on',
        "migrate_set_capability postcopy-ram on",
        "migrate_set_capability x-ignore-shared on",
        "migrate_set_parameter",
        "migrate_set_parameter max-bandwidth",
        "migrate_set_parameter multifd-channels 5 6",
        "migrate_set_parameter multifd_channels 5",
        'migrate_set_parameter tls-creds "a\\"b\\\\c\\n"',
        'migrate_set_parameter tls-creds a"b"',
        'migrate_set_parameter tls-authz "a b"',
        'migrate_set_parameter tls-hostname "',
        *(
            f"migrate_set_parameter {name} {value}"
            for name in [
                "multifd-channels",
                "max-bandwidth",
                "xbzrle-cache-size",
                "direct-io",
                "announce-initial",
                "x-checkpoint-delay",
                "mode",
                "downtime-limit",
                "avail-switchover-bandwidth",
                "max-postcopy-bandwidth",
                "vcpu-dirty-limit",
                "block-bitmap-mapping",
                "zero-page-detection",
                "cpu-throttle-tailslow",
            ]
            for value in [
                "1",
                "010",
                "0x8",
                "1k",
                "4096",
                "0.5",
                "-1",
                "300",
                "x",
                "yes",
                "off",
                "No",
                "99999999999999999999",
                "normal",
                '""',
                "1-2",
                "+5",
            ]
        ),
        "info migrate_parameters",
        "info migrate -a",
        "info migrate -x",
        "info migrate -a x",
        "migrate_set_parameter cpr-exec-command a 'b c' \"d",
        "migrate_set_parameter mode  normal ",
        "migrate_set_parameter cpr-exec-command a 'b c'  d",
        "migrate_set_parameter mode cpr-exec",
        "migrate_set_parameter x-rdma-chunk-size 1k",
        "migrate_set_parameter x-rdma-chunk-size 2M",
        "migrate_set_capability zero-blocks on",
        "info migrate_parameters",
        *(
            f"help {line}"
            for line in [
                "help",
                "info migrate",
                "info migrate_capabilities",
                "info migrate_parameters",
                "info status x",
                "info nope",
                "nope",
                "migrate x",
                "? x",
                "c",
                "migrate_cancel",
                "migrate_set_capability",
                "migrate_set_parameter",
                "q",
                "s",
                '"stop',
            ]
        ),
        "? info status",
    ]
]

INCOMING = [
    request("query-status"),
    request("query-migrate"),
    request("migrate", uri="file:/x"),
    request("cont"),
    request("stop"),
    request("query-status"),
    hmp("info status"),
    request("migrate-incoming"),
    request("migrate-incoming", uri="zz"),
    request("migrate-incoming", uri="file:x,offset=zz"),
    raw("migrate-incoming", {"channels": [FILE, FILE]}),
    caps("multifd"),
    request("migrate-incoming", uri="file:/nonexistent/x"),
    caps("mapped-ram"),
    request("migrate-incoming", uri="exec:cat"),
    request("query-migrate"),
    request("migrate-incoming", uri="file:/nonexistent/x"),
    request("query-migrate"),
    request("migrate-incoming", uri="file:/nonexistent/x"),
    request("migrate-incoming", uri="zz"),
    hmp("info migrate"),
    caps("events"),
]


def settle(client):
    """Wait for the end of a migration, whose numbers nobody compares."""
    deadline = time.monotonic() + 20
    while client.execute("query-migrate")["return"]["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def without_numbers(value):
    """Hide the numbers of descriptors, which depend on what else a process has open."""
    if isinstance(value, dict):
        return {
            key: type(inner) if key == "fd" else without_numbers(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [without_numbers(inner) for inner in value]
    return re.sub(r"fd=\d+", "fd=N", value) if isinstance(value, str) else value


def answers(client, requests, directory):
    file = directory / "member"
    file.touch()
    for step in requests:
        if step == "settle":
            settle(client)
            continue
        message, flags = step
        if flags is not None:
            fd = os.open(file, flags)
            client.send(b" ", [fd])
            os.close(fd)
        out = str(directory / "out").encode()
        yield message, without_numbers(client.ask(message.replace(b"OUT", out)))


def differences(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return [(sent, mine, real) for (sent, mine), (_, real) in pairs if mine != real]


@pytest.mark.parametrize(
    ("requests", "incoming"),
    [
        (PROTOCOL, False),
        (FDSETS, False),
        (OPTIONS, False),
        (MIGRATE, False),
        (HMP, False),
        (INCOMING, True),
    ],
    ids=["protocol", "fdsets", "options", "migrate", "hmp", "incoming"],
)
def test_answers_are_those_of_qemu(requests, incoming, serve, start_qemu, tmp_path):
    real = RawClient(start_qemu(*(["-incoming", "defer"] if incoming else [])))
    ours = serve.connect(serve(incoming=incoming, memory=16 << 20))
    try:
        both = (answers(client, requests, tmp_path) for client in (ours, real))
        assert differences(*both) == []
    finally:
        real.close()


BEFORE_NEGOTIATION = [
    b'{"execute":"query-status","id":1}',
    b'{"execute":"nope"}',
    b'{"foo":1}',
    b"@\n",
    b'{"exec-oob":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":[1]}',
    b'{"exec-oob":"add-fd"}',
    b'{"exec-oob":"nope"}',
    b'{"exec-oob":1}',
    b'{"exec-oob":"add-fd","execute":"add-fd"}',
    b'{"execute":"qmp_capabilities"}',
    b'{"exec-oob":"qmp_capabilities","id":3}',
    b'{"execute":"query-status"}',
]


def test_negotiation_is_that_of_qemu(serve, start_qemu):
    real = RawClient(start_qemu(), negotiate=False)
    ours = serve.connect(serve(), negotiate=False)
    try:
        greetings = ours.line(), real.line()
        greetings[1]["QMP"]["version"]["package"] = ""
        assert greetings[0] == greetings[1]
        for message in BEFORE_NEGOTIATION:
            assert (message, ours.ask(message)) == (message, real.ask(message))
    finally:
        real.close()


def test_every_command_is_one_of_qemus(serve, start_qemu):
    real = RawClient(start_qemu())
    ours = serve.connect(serve())
    try:
        names = [
            {entry["name"] for entry in client.execute("query-commands")["return"]}
            for client in (ours, real)
        ]
        assert names[0] <= names[1]
    finally:
        real.close()


def resolved(schema):
    """The types of a schema by name, each with its members instead of their numbers."""
    entries = {entry["name"]: entry for entry in schema}

    def of(name, above=()):
        entry = entries[name]
        kind = entry["meta-type"]
        if name in above:
            return "recursive"
        above = (*above, name)
        if kind in ("command", "event"):
            return {key: of(entry[key], above) for key in ("arg-type", "ret-type") if key in entry}
        if kind == "array":
            return [of(entry["element-type"], above)]
        if kind == "enum":
            return set(entry["values"])
        if kind == "alternate":
            return {"either": [of(member["type"], above) for member in entry["members"]]}
        if kind == "object":
            members = {
                member["name"]: ("default" in member, of(member["type"], above))
                for member in entry["members"]
            }
            variants = {v["case"]: of(v["type"], above) for v in entry.get("variants", [])}
            variants = {case: type for case, type in variants.items() if type["members"]}
            return {"members": members, "variants": variants}
        return kind, name

    return {n: of(n) for n, entry in entries.items() if entry["meta-type"] in ("command", "event")}


def not_in(part, whole, path=""):
    """Where ``part``, of a returned type, says what ``whole`` does not."""
    if isinstance(part, set):
        return [] if part <= whole else [(path, part - whole)]
    if isinstance(part, dict):
        missing = [(f"{path}/{key}", "missing") for key in part if key not in whole]
        return missing + [
            found
            for key in part.keys() & whole.keys()
            for found in not_in(part[key], whole[key], f"{path}/{key}")
        ]
    if isinstance(part, list | tuple) and type(part) is type(whole) and part[0] != "builtin":
        return [f for a, b in zip(part, whole, strict=True) for f in not_in(a, b, path)]
    return [] if part == whole else [(path, part, whole)]


def test_the_schema_is_that_of_qemu_for_what_is_served(serve, start_qemu):
    real = RawClient(start_qemu())
    ours = serve.connect(serve())
    try:
        mine, theirs = (
            resolved(client.execute("query-qmp-schema")["return"]) for client in (ours, real)
        )
        names = {entry["name"] for entry in ours.execute("query-commands")["return"]}
        assert names == {name for name, described in mine.items() if "ret-type" in described}
        for name, described in mine.items():
            if name in ("qmp_capabilities",):  # what it enables is the connection's
                continue
            if "ret-type" in described:
                assert (name, described["arg-type"]) == (name, theirs[name]["arg-type"])
            assert (name, not_in(described, theirs[name])) == (name, [])
    finally:
        real.close()


PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"a"',
    b'"b"',
    b"'c'",
    b"1",
    b"-",
    b".5",
    b"+",
    b"true",
    b"null",
    b"nope",
    b"T",
    b"@",
    b"\n",
    b"\t",
    b" ",
    b"\xff",
    b"\xfe",
    b"\\",
    b'"',
    b"'",
    b"\xc3\xa9",
    b"\xc3",
    b"\x00",
    b"\x01",
    b"\x7f",
    b"\\u12",
    b'"\\u00e9"',
    b'"\\ud83d\\ude00"',
    b'"\\ud83d"',
    b'{"execute":"x","id":',
    b'{"id":1}',
    b'[1,2,{"a":',
    b'"\xc0\x80"',
    b'"\xef\xbf\xbf"',
    b'"\\q"',
    b"18446744073709551616",
    b"1.0e5",
]


def test_random_input_is_read_as_qemu_reads_it(start_qemu, policy):
    choose = random.Random(7)
    real = RawClient(start_qemu())
    stream = JsonStream(positions=policy.qemu.json_positions)
    list(stream.feed(b'{"execute":"qmp_capabilities"}'))
    try:
        for _ in range(400):
            junk = b"".join(choose.choices(PIECES, k=choose.randint(1, 60)))
            if b"0e" in junk:  # valid JSON that QEMU takes for two tokens
                continue
            junk += b"\xff\n"
            end = b'{"execute":"query-version","id":"end"}'
            real.send(junk + end)
            said = []
            while (answer := real.answer()).get("id") != "end":
                said.append(answer["error"]["desc"])
            read = list(stream.feed(junk))
            assert len(list(stream.feed(end))) == 1
            assert len(read) == len(said), junk
            for item, text in zip(read, said, strict=True):
                if isinstance(item, JsonError):
                    assert json.loads(encode_line(item.text)) == text, junk
                else:
                    assert "JSON" not in text or "JSON object" in text, junk
    finally:
        real.close()


COMMANDS = [
    b'{"execute":"add-fd","arguments":{"fdset-id":1}}',
    b'{"execute":"add-fd"}',
    b" ",
    b"\n",
    b"@\n",
    b'{"execute":"query-status"}',
    b'{"execute":"add-fd","arguments":{"x":1}}',
    b'{"execute":"getfd","arguments":{"fdname":"a"}}',
]


def all_answers(client, parts):
    """Send each part with so many descriptors; return the answers, numbers hidden."""
    null = os.open("/dev/null", os.O_WRONLY)
    for data, count in parts:
        client.send(data, [null] * count)
    os.close(null)
    client.send(b'{"execute":"query-fdsets","id":"end"}')
    found = []
    while not found or found[-1].get("id") != "end":
        found.append(without_numbers(client.answer()))
    client.execute("getfd", fdname="left over")
    for fdset in client.execute("query-fdsets")["return"]:
        client.execute("remove-fd", fdset_id=fdset["fdset-id"])
    return found


def test_descriptors_sent_anywhere_go_where_qemu_has_them_go(serve, start_qemu):
    choose = random.Random(5)
    real = RawClient(start_qemu())
    ours = serve.connect(serve())
    try:
        for _ in range(100):
            text = b"".join(choose.choices(COMMANDS, k=choose.randint(1, 6)))
            cuts = sorted(choose.randint(1, len(text)) for _ in range(choose.randint(0, 6)))
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if a < b]
            parts = [(piece, choose.choice([0, 0, 1, 2])) for piece in pieces]
            assert (parts, all_answers(ours, parts)) == (parts, all_answers(real, parts))
    finally:
        real.close()


def test_random_settings_are_taken_and_refused_as_qemu_does(serve, start_qemu, policy):
    choose = random.Random(11)
    values = [
        -1,
        0,
        1,
        2,
        9,
        10,
        20,
        21,
        50,
        99,
        100,
        101,
        255,
        256,
        1000,
        1001,
        4096,
        10001,
        100001,
        2000001,
        2**32,
        2**64 - 1,
        2**64,
        1.0,
        "x",
        "none",
        "zlib",
        "legacy",
        "normal",
        "",
        True,
        False,
        None,
        [],
    ]
    names = [name for name in dict(Parameters()) if policy.qemu.has(name)]
    real = RawClient(start_qemu())
    ours = serve.connect(serve())
    try:
        for _ in range(600):
            if choose.random() < 0.3:
                chosen = choose.choices(CAPABILITY_NAMES, k=choose.randint(1, 3))
                if "background-snapshot" in chosen:  # whether it works is the host's business
                    continue
                message = caps(*chosen, state=choose.random() < 0.5)[0]
            else:
                picked = choose.choices(names, k=choose.randint(1, 3))
                message = raw(
                    "migrate-set-parameters", {name: choose.choice(values) for name in picked}
                )[0]
            assert (message, ours.ask(message)) == (message, real.ask(message))
        for command in ("query-migrate-capabilities", "query-migrate-parameters"):
            assert ours.execute(command) == real.execute(command)
    finally:
        real.close()
