"""Checking whether a description that was written for other bytes applies to these.

Two QEMUs with the same machine write the same device sections. The description from one applies to the
bytes of the other if they have the same sections in the same order, of the same length and version,
and if it explains both bodies of each section or neither (some cannot be explained:
:mod:`~pyqmigrate.format.device.decode`). A subsection that only one of them has changes the length,
and its name is part of the body.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.device.decode import Budget, decode_device, described_devices
from pyqmigrate.format.stream.description import body_lengths
from pyqmigrate.format.stream.device_only import SectionBuffer, read_device_sections
from pyqmigrate.format.stream.wire import Section

__all__ = ["check_described"]


def check_described(ours: bytes, theirs: bytes, description: Mapping[str, Any]) -> None:
    """Check that the ``description`` of the sections ``theirs`` applies to ``ours``.

    ours, theirs: FULL sections, one after another, with their footers.

    Raises NotSupported with the name of a section to which it does not apply, SnapshotError for bytes
    that are not sections.
    """
    lengths = body_lengths(description)
    devices = described_devices(description)
    first, second = SectionBuffer(ours), SectionBuffer(theirs)
    for mine, other in zip_longest(
        read_device_sections(first, lengths), read_device_sections(second, lengths)
    ):
        if mine is None or other is None or _identity(mine) != _identity(other):
            raise NotSupported(f"it has {_shown(other)} where the snapshot has {_shown(mine)}")
        described = devices.get((mine.name, mine.instance_id))
        if described is None:
            raise NotSupported(f"it does not describe {_shown(mine)}")
        if _explained(mine, first, described) != _explained(other, second, described):
            raise NotSupported(f"its description does not fit {_shown(mine)}")


def _identity(section: Section) -> tuple[object, ...]:
    return (
        section.section_id,
        section.name,
        section.instance_id,
        section.version_id,
        section.body_length,
    )


def _explained(section: Section, source: SectionBuffer, described: Mapping[str, Any]) -> bool:
    body = source.read_at(section.body_offset, section.body_length)
    return decode_device(section, body, described, Budget()).explained


def _shown(section: Section | None) -> str:
    if section is None:
        return "no further section"
    return (
        f"section {section.section_id} {section.name!r} (instance {section.instance_id}, version "
        f"{section.version_id}) of {section.body_length} bytes"
    )
