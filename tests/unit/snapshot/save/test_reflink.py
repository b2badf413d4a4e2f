"""A clone of a base that cannot be one is refused, with the ways out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pyqmigrate import UsageError
from pyqmigrate.snapshot.save.reflink import ReflinkWriter


def test_base_behind_a_header_of_libvirt_names_the_ways_out() -> None:
    target: Any = SimpleNamespace(offset=0)
    base: Any = SimpleNamespace(
        offset=4096,
        source=SimpleNamespace(name="guest.save"),
        stream_file=SimpleNamespace(configuration=None),
    )
    with pytest.raises(UsageError, match=r"'guest\.save'.*without full.*method changed"):
        ReflinkWriter(target, base)
