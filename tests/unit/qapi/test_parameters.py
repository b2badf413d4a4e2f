import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import MultifdCompression, Parameters, ZeroPageDetection
from pyqmigrate.qapi.policy import Policy

MAPPED = Capabilities(mapped_ram=True)
CONFLICT = "Mapped-ram only available for non-compressed non-TLS multifd migration"


def refusal(changes, parameters=None, **options):
    with pytest.raises(UsageError) as caught:
        (parameters or Parameters()).merge_json(changes, **options)
    return str(caught.value)


def test_defaults_are_qemus():
    assert Parameters().to_json() == {
        "announce-initial": 50,
        "announce-max": 550,
        "announce-rounds": 5,
        "announce-step": 100,
        "throttle-trigger-threshold": 50,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "cpu-throttle-tailslow": False,
        "max-cpu-throttle": 99,
        "tls-creds": "",
        "tls-hostname": "",
        "tls-authz": "",
        "max-bandwidth": 134217728,
        "avail-switchover-bandwidth": 0,
        "downtime-limit": 300,
        "x-checkpoint-delay": 20000,
        "multifd-channels": 2,
        "multifd-compression": "none",
        "multifd-zlib-level": 1,
        "multifd-zstd-level": 1,
        "multifd-qatzip-level": 1,
        "zero-page-detection": "multifd",
        "xbzrle-cache-size": 67108864,
        "max-postcopy-bandwidth": 0,
        "x-vcpu-dirty-limit-period": 1000,
        "vcpu-dirty-limit": 1,
        "mode": "normal",
        "direct-io": False,
    }


def test_merge_changes_what_it_is_told_and_nothing_else():
    before = Parameters()
    after = before.merge({"multifd-channels": 8, "zero_page_detection": "legacy"})
    assert after == Parameters(multifd_channels=8, zero_page_detection=ZeroPageDetection.LEGACY)
    assert before == Parameters()


def test_json_takes_qemus_names_only():
    assert refusal({"multifd_channels": 8}) == "Parameter 'multifd_channels' is unexpected"


LIMITS = [
    ("multifd-channels", 1, 255, "multifd_channels' expects a value between 1 and 255"),
    ("multifd-zlib-level", 0, 9, "multifd_zlib_level' expects a value between 0 and 9"),
    ("multifd-zstd-level", 0, 20, "multifd_zstd_level' expects a value between 0 and 20"),
    ("multifd-qatzip-level", 1, 9, "multifd_qatzip_level' expects a value between 1 and 9"),
    (
        "downtime-limit",
        0,
        2000000,
        "downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    (
        "throttle-trigger-threshold",
        1,
        100,
        "throttle_trigger_threshold' expects an integer in the range of 1 to 100",
    ),
    ("cpu-throttle-initial", 1, 99, "cpu_throttle_initial' expects an integer in the range of 1"),
    (
        "cpu-throttle-increment",
        1,
        99,
        "cpu_throttle_increment' expects an integer in the range of 1 to 99",
    ),
    (
        "max-cpu-throttle",
        20,
        99,
        "max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99",
    ),
    ("announce-initial", 0, 100000, "announce_initial' expects a value between 0 and 100000"),
    ("announce-max", 0, 100000, "announce_max' expects a value between 0 and 100000"),
    ("announce-rounds", 0, 1000, "announce_rounds' expects a value between 0 and 1000"),
    ("announce-step", 1, 10000, "announce_step' expects a value between 0 and 10000"),
    (
        "x-vcpu-dirty-limit-period",
        1,
        1000,
        "x-vcpu-dirty-limit-period' expects a value between 1 and 1000",
    ),
    ("vcpu-dirty-limit", 1, 2**64 - 1, "vcpu_dirty_limit' must be greater than 1 MB/s"),
    ("xbzrle-cache-size", 4096, 2**63, "xbzrle_cache_size' expects a power of two no less than"),
]


@pytest.mark.parametrize(("name", "low", "high", "text"), LIMITS)
def test_ranges_are_qemus_with_its_words(name, low, high, text):
    for value in (low, high):
        assert Parameters().merge({name: value}).to_json()[name] == value
    outside = [value for value in (low - 1, high + 1) if 0 <= value < 2**64 and value != 256]
    for value in outside:
        assert refusal({name: value}).startswith(f"Parameter '{text}")


def test_the_cache_size_is_a_power_of_two():
    assert "power of two" in refusal({"xbzrle-cache-size": 6144})


def test_the_largest_throttle_follows_the_initial_one():
    assert "max_cpu_throttle" in refusal({"cpu-throttle-initial": 50, "max-cpu-throttle": 49})
    Parameters().merge({"cpu-throttle-initial": 50, "max-cpu-throttle": 50})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"multifd-channels": 256}, "Parameter 'multifd-channels' expects uint8_t"),
        ({"multifd-channels": 2.0}, "Parameter 'multifd-channels' expects uint64"),
        ({"x-checkpoint-delay": 2**32}, "Parameter 'x-checkpoint-delay' expects uint32_t"),
        ({"direct-io": "on"}, "Invalid parameter type for 'direct-io', expected: boolean"),
        ({"direct-io": None}, "Invalid parameter type for 'direct-io', expected: boolean"),
        ({"tls-creds": 1}, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
        ({"mode": "x"}, "Parameter 'mode' does not accept value 'x'"),
        (
            {"multifd-compression": "qpl"},
            "Parameter 'multifd-compression' does not accept value 'qpl'",
        ),
        ({"nope": 1}, "Parameter 'nope' is unexpected"),
        ({"nope": 1, "multifd-channels": "x"}, "Parameter 'multifd-channels' expects uint64"),
    ],
)
def test_ill_formed_values_are_refused_in_qemus_words(changes, text):
    assert refusal(changes) == text


def test_one_bad_value_keeps_the_good_ones_out():
    parameters = Parameters()
    refusal({"direct-io": True, "multifd-channels": 0}, parameters)
    assert not parameters.direct_io


def test_a_negative_bandwidth_wraps_around():
    assert Parameters().merge({"max-bandwidth": -1}).max_bandwidth == 2**64 - 1


def test_null_empties_a_tls_text():
    assert Parameters(tls_creds="x").merge({"tls-creds": None}).tls_creds == ""


def test_bitmap_mapping_is_kept_and_shown_once_it_is_set():
    mapping = [{"node-name": "n", "alias": "a", "bitmaps": [{"name": "b", "alias": "c"}]}]
    assert "block-bitmap-mapping" not in Parameters().to_json()
    merged = Parameters().merge({"block-bitmap-mapping": mapping})
    assert merged.to_json()["block-bitmap-mapping"] == mapping
    assert merged.merge({"block-bitmap-mapping": []}).to_json()["block-bitmap-mapping"] == []


@pytest.mark.parametrize("changes", [{"multifd-compression": "zstd"}, {"tls-creds": "x"}])
def test_strict_refuses_compression_and_tls_with_mapped_ram_when_they_are_set(changes):
    refused = refusal(changes, capabilities=MAPPED)
    assert refused.startswith(f"{CONFLICT}: ")
    assert "switch mapped-ram off" in refused


@pytest.mark.parametrize("changes", [{"multifd-compression": "zstd"}, {"tls-creds": "x"}])
def test_compat_takes_them_and_then_refuses_even_to_take_them_back(changes):
    options = {"capabilities": MAPPED, "policy": Policy.COMPAT}
    merged = Parameters().merge(changes, **options)
    back = {"multifd-compression": "none", "tls-creds": None}
    assert refusal(back, merged, **options) == CONFLICT
    assert refusal({}, merged, **options) == CONFLICT
    assert merged.merge(back, policy=Policy.COMPAT) == Parameters()


def test_strict_lets_them_be_taken_back():
    compressed = Parameters(multifd_compression=MultifdCompression.ZLIB)
    merged = compressed.merge({"multifd-compression": "none"}, capabilities=MAPPED)
    assert merged == Parameters()


@pytest.mark.parametrize("policy", Policy)
def test_zero_copy_send_does_not_go_with_compression(policy):
    capabilities = Capabilities(zero_copy_send=True, multifd=True)
    text = refusal({"multifd-compression": "zlib"}, capabilities=capabilities, policy=policy)
    assert text == "Zero copy only available for non-compressed non-TLS multifd migration"


IN_FLIGHT = [
    ("multifd-channels", 7),
    ("direct-io", True),
    ("multifd-compression", "zlib"),
    ("zero-page-detection", "none"),
]


@pytest.mark.parametrize(("name", "value"), IN_FLIGHT)
def test_strict_refuses_to_change_in_flight_what_takes_qemu_down(name, value):
    text = refusal({name: value}, running=True)
    assert text.startswith(f"Parameter '{name}' cannot change while a migration is running")
    assert "max-bandwidth may change" in text


@pytest.mark.parametrize(("name", "value"), IN_FLIGHT)
def test_compat_lets_it_pass(name, value):
    merged = Parameters().merge({name: value}, running=True, policy=Policy.COMPAT)
    assert merged.to_json()[name] == value


def test_bandwidth_may_change_in_flight_and_the_others_may_be_repeated():
    changes = {"max-bandwidth": 1, "multifd-channels": 2, "direct-io": False}
    assert Parameters().merge(changes, running=True).max_bandwidth == 1


@given(
    st.dictionaries(st.sampled_from([name for name, *_ in LIMITS]), st.integers(0, 300), max_size=4)
)
def test_a_merge_that_passes_shows_every_change(changes):
    try:
        merged = Parameters().merge(changes).to_json()
    except UsageError:
        return
    assert merged == Parameters().to_json() | changes
