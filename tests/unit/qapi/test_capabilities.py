import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi.capabilities import CAPABILITY_NAMES, Capabilities


def refusal(capabilities, changes, **options):
    with pytest.raises(UsageError) as caught:
        capabilities.merge(changes, **options)
    return str(caught.value)


def on(*names):
    return Capabilities(**{name.replace("-", "_"): True for name in names})


def test_names_are_qemus_in_its_order():
    assert " ".join(CAPABILITY_NAMES) == (
        "xbzrle rdma-pin-all auto-converge zero-blocks events postcopy-ram x-colo release-ram "
        "return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime "
        "late-block-activate x-ignore-shared validate-uuid background-snapshot zero-copy-send "
        "postcopy-preempt switchover-ack dirty-limit mapped-ram"
    )


def test_all_are_off_at_first():
    assert Capabilities().to_json() == [
        {"capability": name, "state": False} for name in CAPABILITY_NAMES
    ]


def test_merge_changes_what_it_is_told_and_nothing_else():
    before = on("events", "multifd")
    after = before.merge({"mapped-ram": True, "multifd": False})
    assert after == on("events", "mapped-ram")
    assert before == on("events", "multifd")


def test_merge_takes_field_names_too():
    assert Capabilities().merge({"mapped_ram": True}) == on("mapped-ram")


def test_the_last_of_two_entries_wins():
    entry = {"capability": "events", "state": True}
    assert not Capabilities().merge_json([entry, entry | {"state": False}]).events


def test_an_empty_list_changes_nothing():
    assert Capabilities().merge_json([]) == Capabilities()


def test_values_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Capabilities().events = True


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "Invalid parameter type for 'capabilities', expected: array"),
        ([{}], "Parameter 'capabilities[0].capability' is missing"),
        ([{"capability": "events"}], "Parameter 'capabilities[0].state' is missing"),
        (
            [{"capability": "nope", "state": True}],
            "Parameter 'capability' does not accept value 'nope'",
        ),
        (
            [{"capability": "events", "state": 1}],
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            [{"capability": "events", "state": True, "x": 1}],
            "Parameter 'capabilities[0].x' is unexpected",
        ),
    ],
)
def test_ill_formed_entries_are_refused_in_qemus_words(status, text):
    with pytest.raises(UsageError) as caught:
        Capabilities().merge_json(status)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("postcopy-ram x-ignore-shared multifd", "Postcopy is not compatible with ignore-shared"),
        ("postcopy-ram multifd mapped-ram", "Postcopy is not yet compatible with multifd"),
        (
            "background-snapshot multifd dirty-bitmaps",
            "Background-snapshot is not compatible with dirty-bitmaps",
        ),
        ("background-snapshot multifd", "Background-snapshot is not compatible with multifd"),
        ("zero-copy-send", "Zero copy only available for non-compressed non-TLS multifd migration"),
        (
            "zero-copy-send multifd xbzrle",
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        ("postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
        ("switchover-ack", "Capability 'switchover-ack' requires capability 'return-path'"),
        (
            "dirty-limit auto-converge",
            "dirty-limit conflicts with auto-converge either of then available currently",
        ),
        ("dirty-limit", "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"),
        ("multifd xbzrle mapped-ram", "Multifd is not compatible with xbzrle"),
        ("mapped-ram xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
        ("mapped-ram postcopy-ram", "Mapped-ram migration is incompatible with postcopy"),
    ],
)
def test_combinations_are_refused_in_qemus_order_and_words(names, text):
    *first, last = names.split()
    assert refusal(Capabilities(), dict.fromkeys([*first, last], True)) == text
    assert refusal(on(*first), {last: True}) == text


@pytest.mark.parametrize(
    "names",
    [
        "mapped-ram multifd events",
        "mapped-ram return-path",
        "mapped-ram background-snapshot",
        "postcopy-ram postcopy-preempt",
        "return-path switchover-ack",
        "multifd zero-copy-send",
        "mapped-ram x-ignore-shared validate-uuid pause-before-switchover release-ram",
    ],
)
def test_combinations_that_qemu_takes_are_taken(names):
    assert Capabilities().merge(dict.fromkeys(names.split(), True)) == on(*names.split())


def test_zero_copy_send_does_not_go_with_compression_or_tls():
    changes = {"zero-copy-send": True, "multifd": True}
    text = "Zero copy only available for non-compressed non-TLS multifd migration"
    assert refusal(Capabilities(), changes, compressed_or_tls=True) == text


@given(st.dictionaries(st.sampled_from(CAPABILITY_NAMES), st.booleans()))
def test_a_merge_that_passes_shows_every_change(changes):
    try:
        merged = dict(Capabilities().merge(changes))
    except UsageError:
        return
    assert merged == dict.fromkeys(CAPABILITY_NAMES, False) | changes
