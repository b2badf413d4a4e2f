"""What the words on a command line mean."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyqmigrate import TargetError, UsageError
from pyqmigrate.fleet import Kind, Listing, list_targets
from pyqmigrate.store import Store, add
from tests.harness.fleet import copy
from tests.harness.snapshots import save_known


@pytest.fixture
def snaps(tmp_path: Path) -> Path:
    """``a`` and ``web/b``, sealed, with other companions, and ``notes``."""
    snaps = tmp_path / "snaps"
    (snaps / "web").mkdir(parents=True)
    save_known(snaps / "a", seal="xxh3-128")
    copy(snaps / "a", snaps / "web" / "b")
    (snaps / "a.vm.json").write_text("{}")
    (snaps / "notes").write_text("notes")
    return snaps


@pytest.fixture
def store(tmp_path: Path, snaps: Path) -> Path:
    """A store of ``monday`` and ``tuesday``."""
    with Store.create(tmp_path / "store") as store:
        add(store, snaps / "a", "monday")
        add(store, snaps / "a", "tuesday")
    return tmp_path / "store"


def names(listing: Listing, top: Path) -> list[str]:
    return [os.path.relpath(target.name, top) for target in listing.targets]


def listed(*words: Path | str) -> Listing:
    return list_targets(map(str, words))


def test_a_directory_is_everything_below_it_without_companions(snaps: Path) -> None:
    listing = listed(snaps)
    assert names(listing, snaps) == ["a", "notes", "web/b"]
    assert [target.sealed for target in listing.targets] == [True, False, True]
    assert [target.below for target in listing.targets] == ["a", "notes", "web/b"]


def test_links_and_sockets_in_a_directory_are_skipped_and_named(snaps: Path) -> None:
    (snaps / "link").symlink_to("a")
    (snaps / "elsewhere").symlink_to("/")
    os.mkfifo(snaps / "fifo")
    (snaps / ".a.1234.partial").touch()
    skipped = {Path(result.name).name: result.message for result in listed(snaps).skipped}
    assert skipped == {
        ".a.1234.partial": "a file that is being written",
        "elsewhere": "a symbolic link",
        "fifo": "not a regular file",
        "link": "a symbolic link",
    }


def test_a_shell_s_pattern_names_companions_which_are_left_out(snaps: Path) -> None:
    listing = listed(*sorted(path for path in snaps.iterdir() if path.is_file()))
    assert names(listing, snaps) == ["a", "notes"]


def test_a_companion_without_its_snapshot_is_listed(snaps: Path) -> None:
    (snaps / "a").unlink()
    assert names(listed(snaps), snaps) == ["a.seal", "a.vm.json", "notes", "web/b"]


def test_a_pattern_is_matched_and_a_file_of_that_very_name_wins(snaps: Path) -> None:
    assert names(listed(snaps / "[ax]"), snaps) == ["a"]
    assert names(listed(snaps / "**" / "b"), snaps) == ["web/b"]
    assert names(listed(snaps / "w*"), snaps) == ["web/b"]
    copy(snaps / "a", snaps / "[ax]")
    assert names(listed(snaps / "[ax]"), snaps) == ["[ax]"]


def test_each_snapshot_is_listed_once(snaps: Path) -> None:
    assert names(listed(snaps / "a", snaps, snaps / "w*"), snaps) == ["a", "notes", "web/b"]


def test_a_store_is_all_of_its_snapshots_or_those_that_fit(store: Path) -> None:
    listing = listed(store)
    assert [target.key for target in listing.targets] == ["monday", "tuesday"]
    assert {target.kind for target in listing.targets} == {Kind.STORED}
    assert [target.key for target in listed(f"{store}#t*").targets] == ["tuesday"]
    assert [target.key for target in listed(store.parent / "st*").targets] == ["monday", "tuesday"]
    with pytest.raises(TargetError, match="no such snapshot"):
        listed(f"{store}#friday")


def test_a_stored_snapshot_has_another_identity_after_it_was_replaced(
    store: Path, snaps: Path
) -> None:
    before = listed(f"{store}#monday").targets[0].identity
    (store / "snapshots" / "monday.snap").unlink()
    save_known(snaps / "other", seed=3)
    with Store.open(store) as opened:
        add(opened, snaps / "other", "monday")
    assert listed(f"{store}#monday").targets[0].identity != before


@pytest.mark.parametrize("word", ["missing", "missing/*", "no*", "store#x"])
def test_a_word_that_nothing_fits_is_an_error(tmp_path: Path, word: str) -> None:
    with pytest.raises((TargetError, UsageError)):
        listed(tmp_path / word)


@pytest.mark.long
def test_deep_directories_are_listed(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1010):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(os.open("guest", os.O_CREAT, dir_fd=directory))
    os.close(directory)
    try:
        assert len(listed(tmp_path).targets) == 1
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for Python's rmtree


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no snapshot fits"):
        listed(tmp_path)


def test_an_error_about_a_url_does_not_show_it() -> None:
    for url in ("s3://name:secret@bucket/x", "s3://name:secret@bucket", "s3://b/x?sig=secret"):
        with pytest.raises(UsageError) as caught:
            listed(url)
        assert "secret" not in str(caught.value)
