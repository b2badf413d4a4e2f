"""The chart of a bench: MiB/s over channels, for saves and for loads, as a PNG or an SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyqmigrate.cli.bench_chart import chart
from pyqmigrate.cli.picture_file import check_picture_place, write_picture
from pyqmigrate.cli.sizes import MIB
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.png import mark

__all__ = ["check_place", "draw"]


def check_place(path: str) -> Path:
    """Return the absolute path for the picture.

    Raises UsageError if its name ends in neither .png nor .svg or another kind of file is there,
    NotSupported, with the command to run, for a PNG without matplotlib, TargetError if no file can
    be created.
    """
    place = check_picture_place(path, ".png", ".svg")
    if _is_svg(path):
        return place
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NotSupported(
            "a PNG needs matplotlib, which is not installed: pip install matplotlib, or draw an SVG "
            "(--plot FILE.svg)"
        ) from error
    return place


def draw(
    place: Path,
    path: str,
    results: Sequence[dict[str, Any]],
    data_bytes: int,
    title: str,
    conclusions: dict[str, str],
) -> None:
    """Write the ``results`` of a bench, each of ``data_bytes``, to ``place``, which
    :func:`check_place` returned for ``path``. Needs no display.

    ``conclusions`` has a sentence for ``save`` and one for ``load``.
    """
    if _is_svg(path):
        data = chart(results, data_bytes, title, conclusions)
        write_picture(place, path, lambda file: file.write(data))
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    channels = sorted({result["channels"] for result in results})
    for axis, work in zip(axes, ("save", "load"), strict=True):
        for direct_io, name in ((True, "direct"), (False, "buffered")):
            points = [r for r in results if r["direct_io"] is direct_io]
            if points:
                medians = [r[f"{work}_rate"] / MIB for r in points]
                rates = [[data_bytes / s / MIB for s in r[f"{work}_runs"]] for r in points]
                below = [m - min(runs) for m, runs in zip(medians, rates, strict=True)]
                above = [max(runs) - m for m, runs in zip(medians, rates, strict=True)]
                axis.errorbar(
                    [r["channels"] for r in points],
                    medians,
                    yerr=[below, above],
                    marker="o",
                    capsize=4,
                    label=name,
                )
        axis.set_title(work if work == "save" else "load, cold cache")
        axis.set_xscale("log", base=2)
        axis.set_xticks(channels, [str(n) for n in channels])
        conclusion = conclusions[work].replace("; ", ";\n")
        axis.set_xlabel(f"channels\n{conclusion}", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)  # shared with the other
    axes[0].set_ylabel("MiB/s of data, slowest to fastest run")
    axes[0].legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    write_picture(place, path, lambda file: file.write(mark(image.getvalue())))


def _is_svg(path: str) -> bool:
    return Path(path).suffix.lower() == ".svg"
