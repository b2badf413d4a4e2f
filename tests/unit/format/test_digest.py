"""Digests of 16 bytes."""

from __future__ import annotations

import hashlib
import sys

import blake3
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.digest import Algorithm, digest_of_all, digester, zero_digest
from tests.harness.examples import some

PLAIN = {
    Algorithm.XXH3_128: lambda data: xxhash.xxh3_128(data).digest(),
    Algorithm.BLAKE3: lambda data: blake3.blake3(data).digest()[:16],
    Algorithm.SHA256: lambda data: hashlib.sha256(data).digest()[:16],
}


@some
@given(st.sampled_from(Algorithm), st.binary(max_size=300_000))
def test_digest_is_the_first_16_bytes_of_the_librarys(algorithm: Algorithm, data: bytes) -> None:
    assert digester(algorithm)(data) == PLAIN[algorithm](data)


@some
@given(st.sampled_from(Algorithm), st.lists(st.binary(max_size=5000), max_size=6))
def test_digest_of_pieces_is_that_of_the_whole(algorithm: Algorithm, data: list[bytes]) -> None:
    assert digest_of_all(algorithm, data) == PLAIN[algorithm](b"".join(data))


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("length", [0, 1, 4096, 1 << 20])
def test_zeros_have_the_digest_of_zeros(algorithm: Algorithm, length: int) -> None:
    assert zero_digest(algorithm, length) == PLAIN[algorithm](bytes(length))


def test_known_values() -> None:
    assert digester(Algorithm.SHA256)(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb924"
    assert digester(Algorithm.BLAKE3)(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc949"
    assert digester(Algorithm.XXH3_128)(b"").hex() == "99aa06d3014798d86001c324468d497f"


def test_a_missing_library_is_not_supported_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(NotSupported, match="pip install blake3"):
        digester(Algorithm.BLAKE3)
