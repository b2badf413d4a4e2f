"""A toy VMM: its guest counts in its memory, is saved while it runs, and loaded back."""
import asyncio
import mmap
import struct
import sys
import threading
import time

from pyqmigrate import DeviceSection, Guest, Migration, RamBlock
from pyqmigrate.qmp import QmpServer

PAGE, PAGES, WANTED = 4096, 4096, {"mapped-ram": True, "multifd": True}


class Vmm(Guest):
    def __init__(self):
        self.ram, self.changed, self.ticks = mmap.mmap(-1, PAGES * PAGE), bytearray(PAGES // 8), 0
        self.lock, self.running = threading.Lock(), threading.Event()
        threading.Thread(target=self.processor, daemon=True).start()
    def processor(self):
        while self.running.wait():
            with self.lock:  # a tick happens completely or not at all
                if self.running.is_set():
                    page, self.ticks = self.ticks * 7 % PAGES, self.ticks + 1
                    struct.pack_into("<Q", self.ram, page * PAGE, self.ticks)
                    self.changed[page // 8] |= 1 << page % 8
            time.sleep(0.0001)
    def stop(self):
        with self.lock:
            self.running.clear()
    def cont(self):
        self.running.set()
    def dirty(self):
        with self.lock:
            dirty, self.changed = self.changed, bytearray(PAGES // 8)
        return {"toy.ram": dirty}
    def save_devices(self):
        return [DeviceSection("toy-timer", struct.pack(">Q", self.ticks))]
    def load_devices(self, devices):
        [self.ticks] = [struct.unpack(">Q", d.data)[0] for d in devices if d.name == "toy-timer"]


async def main(directory):
    old, new, uri = Vmm(), Vmm(), f"file:{directory}/snapshot"
    old.cont()
    source = Migration([RamBlock("toy.ram", old.ram)], guest=old)
    source.set_capabilities(WANTED)
    async with QmpServer(source, source.fdsets) as server:  # a manager would connect to this
        await server.listen(f"{directory}/qmp")
        await asyncio.to_thread(source.migrate, uri)
        print("saved:", (await asyncio.to_thread(source.wait)).status)
    target = Migration([RamBlock("toy.ram", new.ram)], guest=new, incoming=True, autostart=False)
    target.set_capabilities(WANTED)
    target.migrate_incoming(uri)
    print("loaded:", target.wait().status)
    print("equal:", new.ram[:] == old.ram[:] and new.ticks == old.ticks)
asyncio.run(main(sys.argv[1]))
