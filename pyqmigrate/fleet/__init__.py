"""Work with many snapshots: files, objects and stores, on threads or on the workers of Dask.

Verify all snapshots of a directory and an object store; the table makes a second run do only what is
new or has changed::

    from pyqmigrate import fleet

    listing = fleet.list_targets(["/snap", "s3://bucket/saves/"])
    report = fleet.run(fleet.Work(fleet.Verb.VERIFY), listing.targets, table="results.db")
    for result in report.damaged:
        print(result.name, result.message)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.fleet.listing import Listing, list_targets
    from pyqmigrate.fleet.result import Result, Verdict
    from pyqmigrate.fleet.running import FleetReport, run
    from pyqmigrate.fleet.table import ResultTable, Row
    from pyqmigrate.fleet.target import Kind, Target
    from pyqmigrate.fleet.work import Verb, Work

__all__ = [
    # What to do with what.
    "run",
    "list_targets",
    "Work",
    "Verb",
    "Target",
    "Kind",
    "Listing",
    # What came of it.
    "FleetReport",
    "Result",
    "Verdict",
    "ResultTable",
    "Row",
]

_HOME = {
    "run": "running",
    "FleetReport": "running",
    "list_targets": "listing",
    "Listing": "listing",
    "Work": "work",
    "Verb": "work",
    "Target": "target",
    "Kind": "target",
    "Result": "result",
    "Verdict": "result",
    "ResultTable": "table",
    "Row": "table",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
