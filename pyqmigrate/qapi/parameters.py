"""Migration parameters: QEMU's values, by its names, with its types, ranges and defaults."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi import types as qapi
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.qemu_version import QemuVersion

__all__ = [
    "MigrationMode",
    "MultifdCompression",
    "Parameters",
    "ZeroPageDetection",
    "parameters_shape",
]


class ZeroPageDetection(StrEnum):
    """The thread that detects zero pages: none, the main thread, or the channels."""

    NONE = "none"
    LEGACY = "legacy"
    MULTIFD = "multifd"


class MultifdCompression(StrEnum):
    """The compression of multifd channels; mapped-ram allows only ``none``."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"


class MigrationMode(StrEnum):
    """The purpose of a migration."""

    NORMAL = "normal"
    CPR_REBOOT = "cpr-reboot"
    CPR_TRANSFER = "cpr-transfer"
    CPR_EXEC = "cpr-exec"


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of QEMU 10.0 and 11.1 with their defaults; the last two are 11.1's.

    Those without effect on a file migration can be set too, and are kept. A field has QEMU's name,
    with underscores for dashes. Bandwidths are in bytes a second (0:
    unlimited), sizes in bytes, times in milliseconds.
    """

    announce_initial: int = 50
    announce_max: int = 550
    announce_rounds: int = 5
    announce_step: int = 100
    throttle_trigger_threshold: int = 50
    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    cpu_throttle_tailslow: bool = False
    tls_creds: str = ""
    tls_hostname: str = ""
    tls_authz: str = ""
    max_bandwidth: int = 128 << 20
    avail_switchover_bandwidth: int = 0
    downtime_limit: int = 300
    x_checkpoint_delay: int = 20000
    multifd_channels: int = 2
    xbzrle_cache_size: int = 64 << 20
    max_postcopy_bandwidth: int = 0
    max_cpu_throttle: int = 99
    multifd_compression: MultifdCompression = MultifdCompression.NONE
    multifd_zlib_level: int = 1
    multifd_qatzip_level: int = 1
    multifd_zstd_level: int = 1
    block_bitmap_mapping: tuple[Mapping[str, object], ...] | None = None
    x_vcpu_dirty_limit_period: int = 1000
    vcpu_dirty_limit: int = 1
    mode: MigrationMode = MigrationMode.NORMAL
    zero_page_detection: ZeroPageDetection = ZeroPageDetection.MULTIFD
    direct_io: bool = False
    x_rdma_chunk_size: int = 1 << 20
    cpr_exec_command: tuple[str, ...] = ()

    @property
    def compressed_or_tls(self) -> bool:
        """Whether multifd compression or TLS is on, which mapped-ram excludes."""
        return self.multifd_compression is not MultifdCompression.NONE or bool(self.tls_creds)

    def __iter__(self) -> Iterator[tuple[str, object]]:
        """Yield (QEMU's name, value) in QEMU's order of declaration."""
        for field in dataclasses.fields(self):
            yield field.name.replace("_", "-"), getattr(self, field.name)

    def merge(
        self,
        changes: Mapping[str, object],
        *,
        capabilities: Capabilities | None = None,
        policy: Policy = Policy.STRICT,
        running: bool = False,
    ) -> Parameters:
        """Return these parameters with ``changes`` (name to value), if all are valid.

        Names are QEMU's, or the fields' (``merge_json`` takes QEMU's only); values are JSON's.
        ``capabilities`` are those in force (all off, by default); ``running``: a migration runs.

        Raises UsageError, and then nothing has changed: an unknown name, a wrong type, a value
        out of range, compression or TLS together with mapped-ram. While a migration runs, a STRICT
        policy also refuses changes that crash QEMU or have no effect. COMPAT accepts them, and
        compares the *current* values, not the new ones, with mapped-ram, as QEMU does.
        """
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        return self.merge_json(named, capabilities=capabilities, policy=policy, running=running)

    def merge_json(
        self,
        arguments: object,
        *,
        capabilities: Capabilities | None = None,
        policy: Policy = Policy.STRICT,
        running: bool = False,
    ) -> Parameters:
        """Do what ``merge`` does for the JSON arguments of migrate-set-parameters."""
        read: dict[str, Any] = {
            name.replace("-", "_"): _typed(name, value)
            for name, value in parameters_shape(policy.qemu).read(arguments).items()
        }
        new = dataclasses.replace(self, **read)
        capabilities = Capabilities() if capabilities is None else capabilities
        new._check_ranges(capabilities, self if policy.compat else new, policy.qemu)
        if policy is Policy.STRICT and running:
            new._check_unchanged_since(self)
        return new

    def to_json(self, policy: Policy = Policy.STRICT) -> dict[str, object]:
        """Return the reply of query-migrate-parameters."""
        values = {name: value for name, value in self if policy.qemu.has(name)}
        mapping = values.pop("block-bitmap-mapping")
        if mapping is not None:
            values["block-bitmap-mapping"] = list(self.block_bitmap_mapping or ())
        return values

    def _check_ranges(
        self, capabilities: Capabilities, compared: Parameters, qemu: QemuVersion
    ) -> None:
        values = dict(self)
        for limit in _LIMITS_BEFORE:
            limit.check(values, qemu)
        if capabilities.mapped_ram and compared.compressed_or_tls:
            advice = (
                ""
                if compared is not self
                else (
                    ": leave multifd-compression none and tls-creds empty, or switch mapped-ram off"
                )
            )
            raise UsageError(
                f"Mapped-ram only available for non-compressed non-TLS multifd migration{advice}"
            )
        if capabilities.zero_copy_send and self.compressed_or_tls:
            raise UsageError(
                "Zero copy only available for non-compressed non-TLS multifd migration"
            )
        for limit in _LIMITS_AFTER:
            limit.check(values, qemu)

    def _check_unchanged_since(self, before: Parameters) -> None:
        old = dict(before)
        for name, value in self:
            if name in _FIXED_WHILE_RUNNING and value != old[name]:
                raise UsageError(
                    f"Parameter '{name}' cannot change while a migration is running; set it "
                    "before, or migrate_cancel first (max-bandwidth may change at any time)"
                )


_FIXED_WHILE_RUNNING = frozenset(
    {
        "direct-io",
        "mode",
        "multifd-channels",
        "multifd-compression",
        "multifd-qatzip-level",
        "multifd-zlib-level",
        "multifd-zstd-level",
        "tls-authz",
        "tls-creds",
        "tls-hostname",
        "zero-page-detection",
    }
)
_WORDS: dict[str, type[StrEnum]] = {
    "multifd-compression": MultifdCompression,
    "mode": MigrationMode,
    "zero-page-detection": ZeroPageDetection,
}
_BITMAP_TRANSFORM = qapi.Struct({"persistent": qapi.optional(qapi.BOOL)})
_BITMAP_ALIAS = qapi.Struct(
    {"name": qapi.STR, "alias": qapi.STR, "transform": qapi.optional(_BITMAP_TRANSFORM)}
)
_NODE_ALIAS = qapi.Struct(
    {"node-name": qapi.STR, "alias": qapi.STR, "bitmaps": qapi.ListOf(_BITMAP_ALIAS)}
)
_U8, _U64, _TEXT = qapi.UINT8, qapi.UINT64, qapi.STR_OR_NULL

_SHAPES = {
    "announce-initial": _U64,
    "announce-max": _U64,
    "announce-rounds": _U64,
    "announce-step": _U64,
    "throttle-trigger-threshold": _U8,
    "cpu-throttle-initial": _U8,
    "cpu-throttle-increment": _U8,
    "cpu-throttle-tailslow": qapi.BOOL,
    "tls-creds": _TEXT,
    "tls-hostname": _TEXT,
    "tls-authz": _TEXT,
    "max-bandwidth": _U64,
    "avail-switchover-bandwidth": _U64,
    "downtime-limit": _U64,
    "x-checkpoint-delay": qapi.UINT32,
    "multifd-channels": _U8,
    "xbzrle-cache-size": _U64,
    "max-postcopy-bandwidth": _U64,
    "max-cpu-throttle": _U8,
    "multifd-compression": qapi.Words(tuple(MultifdCompression)),
    "multifd-zlib-level": _U8,
    "multifd-qatzip-level": _U8,
    "multifd-zstd-level": _U8,
    "block-bitmap-mapping": qapi.ListOf(_NODE_ALIAS),
    "x-vcpu-dirty-limit-period": _U64,
    "vcpu-dirty-limit": _U64,
    "mode": qapi.Words(tuple(MigrationMode)),
    "zero-page-detection": qapi.Words(tuple(ZeroPageDetection)),
    "direct-io": qapi.BOOL,
    "x-rdma-chunk-size": _U64,
    "cpr-exec-command": qapi.ListOf(qapi.STR),
}


@functools.cache
def parameters_shape(qemu: QemuVersion) -> qapi.Struct:
    """Return the shape of the arguments of migrate-set-parameters."""
    return qapi.Struct(
        {
            name: qapi.optional(_known(shape, qemu))
            for name, shape in _SHAPES.items()
            if qemu.has(name)
        }
    )


def _known(shape: qapi.Shape, qemu: QemuVersion) -> qapi.Shape:
    if isinstance(shape, qapi.Words):
        return qapi.Words(tuple(word for word in shape.words if qemu.has(word)))
    return shape


def _typed(name: str, value: object) -> object:
    if name in _WORDS:
        return _WORDS[name](str(value))
    return tuple(value) if isinstance(value, list) else value


class _Limit(NamedTuple):
    """The condition for a number, and its description in QEMU's error."""

    name: str
    holds: Callable[[int, Mapping[str, object]], bool]
    range: str
    text: str = ""  # of its own, for this limit

    def check(self, values: Mapping[str, object], qemu: QemuVersion) -> None:
        value = values[self.name]
        assert isinstance(value, int)
        if not self.holds(value, values):
            raise UsageError(
                (self.text or qemu.out_of_range).format(
                    name=qemu.shown(self.name),
                    range=self.range.format(initial=qemu.shown("cpu-throttle-initial")),
                )
            )


def _between(name: str, low: int, high: int, words: str = "") -> _Limit:
    expected = words or f"a value between {low} and {high}"
    return _Limit(name, lambda value, _: low <= value <= high, expected)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


_PERCENT = "an integer in the range of 1 to 99"
_PAGE = 4096

# In the order of QEMU's checks; it compares capabilities in between.
_LIMITS_BEFORE = (
    _between("throttle-trigger-threshold", 1, 100, "an integer in the range of 1 to 100"),
    _between("cpu-throttle-initial", 1, 99, _PERCENT),
    _between("cpu-throttle-increment", 1, 99, _PERCENT),
    _between("downtime-limit", 0, 2000000, "an integer in the range of 0 to (2000 * 1000) ms"),
    _between("multifd-channels", 1, 255),
    _between("multifd-zlib-level", 0, 9),
    _between("multifd-qatzip-level", 1, 9),
    _between("multifd-zstd-level", 0, 20),
    _Limit(
        "xbzrle-cache-size",
        lambda value, _: value >= _PAGE and _power_of_two(value),
        "a power of two no less than the target page size",
    ),
    _Limit(
        "max-cpu-throttle",
        lambda value, values: int(str(values["cpu-throttle-initial"])) <= value <= 99,
        "an integer in the range of {initial} to 99",
    ),
    _between("announce-initial", 0, 100000),
    _between("announce-max", 0, 100000),
    _between("announce-rounds", 0, 1000),
    _between("announce-step", 1, 10000, "a value between 0 and 10000"),
)
_LIMITS_AFTER = (
    _between("x-vcpu-dirty-limit-period", 1, 1000),
    _Limit(
        "vcpu-dirty-limit",
        lambda value, _: value >= 1,
        "",
        "Parameter '{name}' must be greater than 1 MB/s",
    ),
    _Limit(
        "x-rdma-chunk-size",
        lambda value, _: 1 << 20 <= value <= 1 << 30 and _power_of_two(value),
        "a power of 2 in the range 1MiB to 1024MiB",
    ),
)
