"""Work with many snapshots: files, objects and stores, on threads or on the workers of Dask.

Verify all snapshots of a directory and an object store; the table makes a second run do only what is
new or has changed::

    from pyqmigrate import fleet

    listing = fleet.list_targets(["/snap", "s3://bucket/saves/"])
    report = fleet.run(fleet.Work(fleet.Verb.VERIFY), listing.targets, table="results.db")
    for result in report.damaged:
        print(result.name, result.message)
"""

from typing import TYPE_CHECKING

from pyqmigrate import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
