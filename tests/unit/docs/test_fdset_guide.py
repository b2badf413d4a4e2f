"""The example of the page on fdsets runs as it stands there."""

import os
import re
from pathlib import Path

import pytest

from pyqmigrate.migration.fdset import FdsetError, FdSets
from pyqmigrate.migration.fdset_checks import Direction, check_fdset

PAGE = Path(__file__).parents[3] / "docs" / "fdsets.md"


def test_the_example_runs_and_describes_both_members(tmp_path, monkeypatch, capsys):
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in printed] == ["O_WRONLY|O_DIRECT", "O_WRONLY"]


def test_the_complaint_shown_is_the_one_made(tmp_path):
    with FdSets() as sets:
        sets.add(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), 1)
        with pytest.raises(FdsetError) as caught:
            check_fdset(sets, "/dev/fdset/1", Direction.SAVE, direct_io=True, offset=0)
    shown = re.sub(r"fd \d+", "fd 7", str(caught.value))
    assert f"\n{shown}\n" in PAGE.read_text()
