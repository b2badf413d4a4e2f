"""Migration capabilities: QEMU's switches, by its names, with its cross-checks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi import types as qapi
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.qemu_version import QemuVersion

__all__ = ["CAPABILITY_NAMES", "Capabilities", "capability_status"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The 22 capabilities of QEMU 10.0, all off unless said otherwise. 11.1 has no zero-blocks.

    Those without effect on a file migration can be set too, and are kept. A field has QEMU's name,
    with underscores for dashes.
    """

    xbzrle: bool = False
    rdma_pin_all: bool = False
    auto_converge: bool = False
    zero_blocks: bool = False
    events: bool = False
    postcopy_ram: bool = False
    x_colo: bool = False
    release_ram: bool = False
    return_path: bool = False
    pause_before_switchover: bool = False
    multifd: bool = False
    dirty_bitmaps: bool = False
    postcopy_blocktime: bool = False
    late_block_activate: bool = False
    x_ignore_shared: bool = False
    validate_uuid: bool = False
    background_snapshot: bool = False
    zero_copy_send: bool = False
    postcopy_preempt: bool = False
    switchover_ack: bool = False
    dirty_limit: bool = False
    mapped_ram: bool = False

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """Yield (QEMU's name, state), in QEMU's order."""
        for field in dataclasses.fields(self):
            yield field.name.replace("_", "-"), getattr(self, field.name)

    def merge(
        self,
        changes: Mapping[str, bool],
        *,
        compressed_or_tls: bool = False,
        policy: Policy = Policy.STRICT,
    ) -> Capabilities:
        """Return these capabilities with ``changes`` (name to state), if they are compatible.

        Names are QEMU's, or the fields'. ``compressed_or_tls``: the parameters in force have
        compression or TLS, which zero-copy-send excludes. ``policy`` selects the QEMU whose names and
        rules apply.

        Raises UsageError with QEMU's text, and then nothing has changed: an unknown name, a
        state that is not a bool, or a combination that QEMU refuses.
        """
        status = [
            {"capability": name.replace("_", "-"), "state": state}
            for name, state in changes.items()
        ]
        return self.merge_json(status, compressed_or_tls=compressed_or_tls, policy=policy)

    def merge_json(
        self, status: object, *, compressed_or_tls: bool = False, policy: Policy = Policy.STRICT
    ) -> Capabilities:
        """Do what ``merge`` does for the JSON list that migrate-set-capabilities takes.

        Of entries with one name the last wins. The texts of errors are those of the command.
        """
        shape = qapi.Struct({"capabilities": qapi.ListOf(capability_status(policy.qemu))})
        entries = shape.read({"capabilities": status})["capabilities"]
        assert isinstance(entries, list)
        changed = dataclasses.replace(
            self, **{entry["capability"].replace("-", "_"): entry["state"] for entry in entries}
        )
        changed._check(compressed_or_tls, policy.qemu)
        return changed

    def to_json(self, policy: Policy = Policy.STRICT) -> list[dict[str, object]]:
        """Return the reply of query-migrate-capabilities."""
        return [
            {"state": state, "capability": name} for name, state in self if policy.qemu.has(name)
        ]

    def _check(self, compressed_or_tls: bool, qemu: QemuVersion) -> None:
        """Refuse incompatible capabilities, in the order of QEMU's checks."""
        if self.x_colo and not self.return_path and qemu.colo_needs_return_path:
            raise UsageError("Capability 'x-colo' requires capability 'return-path'")
        if self.postcopy_ram and self.x_ignore_shared:
            raise UsageError("Postcopy is not compatible with ignore-shared")
        if self.postcopy_ram and self.multifd and not qemu.postcopy_with_multifd:
            raise UsageError("Postcopy is not yet compatible with multifd")
        if self.background_snapshot:
            states = dict(self)
            for name in _AGAINST_BACKGROUND_SNAPSHOT:
                if states[name]:
                    raise UsageError(f"Background-snapshot is not compatible with {name}")
        if self.zero_copy_send and (not self.multifd or self.xbzrle or compressed_or_tls):
            raise UsageError(
                "Zero copy only available for non-compressed non-TLS multifd migration"
            )
        if self.postcopy_preempt and not self.postcopy_ram:
            raise UsageError("Postcopy preempt requires postcopy-ram")
        if self.switchover_ack and not self.return_path:
            raise UsageError("Capability 'switchover-ack' requires capability 'return-path'")
        if self.dirty_limit and self.auto_converge:
            raise UsageError(
                "dirty-limit conflicts with auto-converge either of then available currently"
            )
        if self.dirty_limit:  # there is no KVM here
            raise UsageError(
                "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
            )
        if self.multifd and self.xbzrle:
            raise UsageError("Multifd is not compatible with xbzrle")
        if self.mapped_ram and self.xbzrle:
            raise UsageError("Mapped-ram migration is incompatible with xbzrle")
        if self.mapped_ram and self.postcopy_ram:
            raise UsageError("Mapped-ram migration is incompatible with postcopy")


CAPABILITY_NAMES = tuple(name for name, _ in Capabilities())
"""QEMU's names, in its order."""


@functools.cache
def capability_status(qemu: QemuVersion) -> qapi.Struct:
    """Return the shape of one entry of migrate-set-capabilities."""
    names = tuple(name for name in CAPABILITY_NAMES if qemu.has(name))
    return qapi.Struct({"capability": qapi.Words(names), "state": qapi.BOOL})


_AGAINST_BACKGROUND_SNAPSHOT = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)
