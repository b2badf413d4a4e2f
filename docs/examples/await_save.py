"""A save on an event loop, which keeps running; one that takes too long is cancelled."""
import asyncio
import mmap
import sys
from pathlib import Path

import pyqmigrate


async def main(directory):
    memory = mmap.mmap(-1, 64 << 20)
    memory.write(b"guest" * 4096)
    blocks = [pyqmigrate.RamBlock("toy.ram", memory)]
    report = await pyqmigrate.start_save(directory / "snapshot", blocks)
    print("saved:", report.data_pages, "pages")
    slow = pyqmigrate.start_save(directory / "slow", blocks, max_bandwidth=1024, sparse="dense")
    try:
        async with asyncio.timeout(0.2):
            await slow
    except TimeoutError:  # the job has ended and left no file
        print("cancelled:", slow.done(), [path.name for path in directory.iterdir()])
asyncio.run(main(Path(sys.argv[1])))
