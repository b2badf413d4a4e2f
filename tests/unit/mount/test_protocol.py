"""The structures of the protocol, against linux/fuse.h as it is written there."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.mount import protocol
from pyqmigrate.mount.protocol import Attributes, BadRequest, Init, Request

U16, U32, U64, I32 = ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
u32s = st.integers(0, (1 << 32) - 1)
u64s = st.integers(0, (1 << 64) - 1)


def struct_of(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


InHeader = struct_of(
    "InHeader",
    ("len", U32), ("opcode", U32), ("unique", U64), ("nodeid", U64), ("uid", U32), ("gid", U32),
    ("pid", U32), ("total_extlen", U16), ("padding", U16),
)  # fmt: skip
OutHeader = struct_of("OutHeader", ("len", U32), ("error", I32), ("unique", U64))
Attr = struct_of(
    "Attr",
    ("ino", U64), ("size", U64), ("blocks", U64), ("atime", U64), ("mtime", U64), ("ctime", U64),
    ("atimensec", U32), ("mtimensec", U32), ("ctimensec", U32), ("mode", U32), ("nlink", U32),
    ("uid", U32), ("gid", U32), ("rdev", U32), ("blksize", U32), ("flags", U32),
)  # fmt: skip
AttrOut = struct_of(
    "AttrOut", ("attr_valid", U64), ("attr_valid_nsec", U32), ("dummy", U32), ("attr", Attr)
)
EntryOut = struct_of(
    "EntryOut",
    ("nodeid", U64), ("generation", U64), ("entry_valid", U64), ("attr_valid", U64),
    ("entry_valid_nsec", U32), ("attr_valid_nsec", U32), ("attr", Attr),
)  # fmt: skip
InitIn = struct_of(
    "InitIn",
    ("major", U32), ("minor", U32), ("max_readahead", U32), ("flags", U32), ("flags2", U32),
    ("unused", U32 * 11),
)  # fmt: skip
InitOut = struct_of(
    "InitOut",
    ("major", U32), ("minor", U32), ("max_readahead", U32), ("flags", U32), ("max_background", U16),
    ("congestion_threshold", U16), ("max_write", U32), ("time_gran", U32), ("max_pages", U16),
    ("map_alignment", U16), ("flags2", U32), ("max_stack_depth", U32), ("request_timeout", U16),
    ("unused", U16 * 11),
)  # fmt: skip
ReadIn = struct_of(
    "ReadIn",
    ("fh", U64), ("offset", U64), ("size", U32), ("read_flags", U32), ("lock_owner", U64),
    ("flags", U32), ("padding", U32),
)  # fmt: skip
Dirent = struct_of("Dirent", ("ino", U64), ("off", U64), ("namelen", U32), ("type", U32))
NotifyStore = struct_of(
    "NotifyStore", ("nodeid", U64), ("offset", U64), ("size", U32), ("padding", U32)
)


@given(u32s, u64s, u64s, u32s)
def test_header_of_a_request_is_read_as_it_is_written(operation, unique, node, pid):
    raw = bytes(InHeader(40, operation, unique, node, 1, 2, pid, 0, 0))
    request = Request.decode(raw, len(raw))
    assert (request.operation, request.unique, request.node) == (operation, unique, node)
    assert (request.uid, request.gid, request.pid) == (1, 2, pid)


@given(st.binary(max_size=80), st.integers(0, 80))
def test_header_of_another_length_is_refused(raw, length):
    raw = raw.ljust(length, b"\0")[:length]
    if length < 40 or int.from_bytes(raw[:4], "little") != length:
        with pytest.raises(BadRequest):
            Request.decode(raw, length)


@given(u64s, st.integers(0, 1 << 20), st.integers(0, 511))
def test_header_of_a_reply(unique, length, error):
    header = OutHeader.from_buffer_copy(protocol.encode_reply(unique, length, error))
    assert (header.len, header.error, header.unique) == (16 + length, -error, unique)


@given(
    u64s,
    st.integers(0, (1 << 63) - 1),
    st.integers(0, (1 << 62) - 1),
    st.integers(-(10**18), 1 << 62),
)
def test_attributes_of_a_file(node, size, allocated, mtime_ns):
    mode = stat.S_IFREG | 0o444
    attributes = Attributes(node, mode, size, allocated, mtime_ns, 1000, 100)
    raw = protocol.encode_attributes(attributes, 60)
    assert len(raw) == ctypes.sizeof(AttrOut)
    out = AttrOut.from_buffer_copy(raw)
    attr = out.attr
    assert (out.attr_valid, attr.ino, attr.size, attr.mode) == (60, node, size, mode)
    assert ctypes.c_int64(attr.mtime).value * 10**9 + attr.mtimensec == mtime_ns
    assert allocated <= attr.blocks * 512 < allocated + 512
    assert (attr.uid, attr.gid, attr.nlink) == (1000, 100, 1)


def test_entry_has_the_attributes_and_both_times():
    attributes = Attributes(7, stat.S_IFREG | 0o400, 10, 10, 5 * 10**9 + 3, 0, 0)
    raw = protocol.encode_entry(attributes, 1, 3600)
    assert len(raw) == ctypes.sizeof(EntryOut)
    out = EntryOut.from_buffer_copy(raw)
    assert (out.nodeid, out.entry_valid, out.attr_valid) == (7, 1, 3600)
    assert (out.attr.mtime, out.attr.mtimensec, out.attr.size) == (5, 3, 10)


@given(u32s, u32s)
def test_flags_of_init_are_64_bits_if_the_kernel_says_so(low, high):
    raw = bytes(InitIn(7, 45, 131072, low, high))
    flags = low | (high << 32 if low & protocol.INIT_EXT else 0)
    assert protocol.decode_init(raw) == Init(7, 45, 131072, flags)


def test_init_of_an_old_kernel_has_no_second_flags():
    raw = bytes(InitIn(7, 31, 0, protocol.INIT_EXT, 7))[:16]
    assert protocol.decode_init(raw).flags == protocol.INIT_EXT


@given(st.integers(31, 60))
def test_answer_to_init(minor):
    want = protocol.MAX_PAGES | protocol.INIT_EXT | protocol.HAS_RESEND
    raw = protocol.encode_init(Init(7, minor, 131072, want), want)
    assert len(raw) == ctypes.sizeof(InitOut)
    out = InitOut.from_buffer_copy(raw)
    assert (out.major, out.minor, out.max_readahead) == (7, min(minor, 45), 131072)
    assert out.flags | out.flags2 << 32 == want
    assert out.max_pages == 256
    # What the kernel demands of the buffer that reads its requests.
    assert max(8192, 40 + 40 + out.max_write) <= protocol.REQUEST_MAX


@given(u64s, st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 20))
def test_range_of_a_read(handle, offset, length):
    raw = bytes(ReadIn(handle, offset, length, 0, 0, 0, 0))
    assert protocol.decode_range(raw) == (handle, offset, length)


@pytest.mark.parametrize(("offset", "length"), [(1 << 63, 10), (0, (1 << 20) + 1), (0, 1 << 31)])
def test_range_that_no_file_has_is_refused(offset, length):
    with pytest.raises(BadRequest) as caught:
        protocol.decode_range(bytes(ReadIn(0, offset, length, 0, 0, 0, 0)))
    assert caught.value.errno == errno.EINVAL


@given(st.binary(max_size=19))
def test_body_that_is_cut_off_is_refused(raw):
    for decode in (protocol.decode_range, protocol.decode_seek):
        with pytest.raises(BadRequest):
            decode(raw)


@given(st.binary(max_size=20))
def test_name_ends_with_its_only_nul(raw):
    if raw.count(b"\0") == 1 and raw.endswith(b"\0") and len(raw) > 1:
        assert os.fsencode(protocol.decode_name(raw)) == raw[:-1]
    else:
        with pytest.raises(BadRequest):
            protocol.decode_name(raw)


@given(st.binary(min_size=1, max_size=255), u64s, st.booleans())
def test_entry_of_a_directory_is_padded_to_8_bytes(name, node, directory):
    raw = protocol.encode_directory_entry(node, 12, name, directory)
    assert len(raw) % 8 == 0
    assert len(raw) - 24 - len(name) in range(8)
    entry = Dirent.from_buffer_copy(raw)
    assert (entry.ino, entry.off, entry.namelen) == (node, 12, len(name))
    assert entry.type == (4 if directory else 8)  # DT_DIR, DT_REG
    assert raw[24 : 24 + len(name)] == name


def test_notifications():
    raw = protocol.encode_notify_store(3, 1 << 40, 4096)
    header = OutHeader.from_buffer_copy(raw)
    assert (header.len, header.error, header.unique) == (16 + 24 + 4096, 4, 0)
    store = NotifyStore.from_buffer_copy(raw, 16)
    assert (store.nodeid, store.offset, store.size) == (3, 1 << 40, 4096)
    header = OutHeader.from_buffer_copy(protocol.encode_notify_resend())
    assert (header.len, header.error, header.unique) == (16, 7, 0)


def test_other_answers_have_the_lengths_of_the_kernel():
    assert len(protocol.encode_open(1, protocol.KEEP_CACHE)) == 16
    assert len(protocol.encode_statfs()) == 80
    assert len(protocol.encode_seek(1)) == 8
