"""Sizes as they are written and shown."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.cli.sizes import read_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0x1000", 4096),
        ("512M", 512 << 20),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("2 KiB", 2048),
        ("1.5GiB", 3 << 29),
        ("64Ki", 65536),
        ("0", 0),
    ],
)
def test_size_is_read_in_binary_units(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1GB", "1iB", "-1", "1GiBs", "x", "1.5", "0x1MiB", "20EiB", "1e3", "1 2M"]
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="1GiB"):
        read_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_size_is_shown_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert show_size(size) == text


@given(st.integers(0, 1 << 60))
def test_shown_size_reads_back_within_its_rounding(size: int) -> None:
    read = read_size(show_size(size).removesuffix(" B"))
    assert abs(read - size) <= max(size * 0.05, 0)
