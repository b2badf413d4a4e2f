"""The options of live saves on the command line, and the keywords that they become."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from pyqmigrate.cli.vm.live import add_live, live_options
from pyqmigrate.vm.plan.live_option import LiveMethod

NONE = {"live": False, "max_pause": None, "base": None, "full": False, "keep_digests": False}


def options(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_live(parser)
    return dict(live_options(parser.parse_args(words)))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--live"], {"live": True}),
        (["--method", "precopy"], {"live": "precopy"}),
        (["--live", "--method", "changed"], {"live": "changed"}),
        (["--live", "--max-pause", "20"], {"live": True, "max_pause": 0.02}),
        (["--live", "--max-pause", "0.5"], {"live": True, "max_pause": 0.0005}),
        (["--base", "none"], {}),
        (["--base", "auto"], {"base": "auto"}),
        (["--base", "b.mapped", "--full"], {"base": "b.mapped", "full": True}),
        (["--live", "--keep-digests"], {"live": True, "keep_digests": True}),
    ],
)
def test_words_become_keywords(words: list[str], changes: dict[str, Any]) -> None:
    assert options(*words) == NONE | changes


@pytest.mark.parametrize("method", list(LiveMethod))
def test_every_method_can_be_given(method: LiveMethod) -> None:
    assert options("--method", str(method))["live"] == method


def test_pause_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(argparse.ArgumentError, match="not a number of milliseconds: 'soon'"):
        options("--live", "--max-pause", "soon")
