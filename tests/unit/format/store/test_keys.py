"""Names and keys of a store: nothing leads out of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.format.store.keys import (
    check_name,
    is_name,
    name_of_snapshot,
    pack_key,
    pack_of_key,
    snapshot_key,
    working_set_key,
)
from tests.harness.examples import some

GOOD = ["a", "guest-1", "web@2026-11-27T22:15:00+01", "A_b.c", "x" * 200, "-dash"]
BAD = [
    "", ".", "..", ".hidden", "a/b", "../a", "a\0b", "x" * 201, "guest.seal", "g.workingset",
    "g.vm.json", "g.pages", ":a", "ä", "a b", "a#b", "a\n", "a\\b",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_has_keys_that_lead_back_to_it(name: str) -> None:
    assert check_name(name) == name
    assert name_of_snapshot(snapshot_key(name)) == name
    assert working_set_key(name) == f"working-sets/{name}.ws"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_everywhere(name: str) -> None:
    assert not is_name(name)
    assert name_of_snapshot(f"snapshots/{name}.snap") is None
    for make in (check_name, snapshot_key, working_set_key):
        with pytest.raises(UsageError, match="cannot be the name of a stored snapshot"):
            make(name)


@some
@given(st.binary(min_size=16, max_size=16))
def test_a_pack_key_leads_back_to_its_digest(digest: bytes) -> None:
    assert pack_of_key(pack_key(digest)) == digest


@some
@given(st.text(max_size=60))
def test_no_other_key_is_one_of_a_pack_or_a_snapshot(text: str) -> None:
    for key in (text, f"packs/{text}", f"packs/{text}.pack"):
        digest = pack_of_key(key)
        assert digest is None or pack_key(digest) == key
    for key in (text, f"snapshots/{text}.snap"):
        name = name_of_snapshot(key)
        assert name is None or (snapshot_key(name) == key and "/" not in name)
