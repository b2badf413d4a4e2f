"""Write a sequential stream, as QEMU does with ``file:`` and without mapped-ram.

    start_sequential_save("/snap/guest", [RamBlock("pc.ram", memory)], machine="pc-q35-10.0").wait()

Pages are stored in the order in which they were saved; a page that changes during a save is stored
again. So there is one channel, and direct I/O has no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyqmigrate.core import Block, Channel, Transfer, file_error_from_fault
from pyqmigrate.format.stream.sequential import encode_head, settings_of
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import RAM_EOS, encode_end, encode_part_header
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.forward_output import ForwardOutput, goes_forward
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.records import BlockName, Encoder
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse, StreamWriter

__all__ = ["SequentialWriter", "start_sequential_save"]

_DEFAULTS = SaveOptions()
_BUFFERED = "a sequential stream goes through the page cache"


def start_sequential_save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    machine: str = "",
    target_page_bits: int | None = None,
    reuse: bool = False,
    max_bandwidth: int = 0,
) -> Job[SaveReport]:
    """Start to save guest memory as a sequential stream; return at once.

    Arguments and errors are those of :func:`pyqmigrate.api.start_save`. QEMU loads the file only on
    the machine that it names: every machine accepts an empty name.
    """
    writer = SequentialWriter(
        target,
        blocks,
        SaveOptions(
            machine=machine,
            target_page_bits=target_page_bits,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
        ),
    )
    try:
        return Job(writer.channels, writer.total, writer.run)
    except BaseException:
        writer.close()
        raise


class SequentialWriter(StreamWriter):
    """A sequential stream being written.

    Each pass is one PART section with a record for every page of the pass: a zero page, also one
    in a hole of a sparse memory, is a record of nine bytes. As in QEMU's own streams no page is
    left out: a page that no record mentions keeps its content on the loading side, which need not
    be zero, since ROMs have content from the start. Holes are neither read nor made resident.

    Of the options, ``channels``, ``direct_io``, ``sparse`` and ``mark_zero`` have no effect.
    """

    sparse = Sparse.EXACT

    def __init__(
        self, target: Target, blocks: Sequence[RamBlock], options: SaveOptions = _DEFAULTS
    ) -> None:
        super().__init__(blocks, options, channels=1)
        with self._closed_on_error():
            self._head = encode_head(
                options.machine,
                self.specs,
                target_page_bits=options.target_page_bits,
                uuid=options.uuid,
                ignore_shared=options.left_out is not None,
                before=options.before,
            )
            self.settings = settings_of(
                options.machine,
                target_page_bits=options.target_page_bits,
                uuid=options.uuid,
                ignore_shared=options.left_out is not None,
            )
            self._names = [BlockName(spec.name) for spec in self.specs]
            self._open(target, DirectIO.OFF)
            self._encoder = Encoder(self.target.fd, self.target.offset, forward=self.target.forward)

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        if goes_forward(target):
            self.target = ForwardOutput(target)
            self._cleanup.callback(self.target.abort)
        else:
            super()._open(target, direct_io)

    def _file_size(self) -> int:
        return self._encoder.position

    def begin(self) -> None:
        self._check_space()
        # A pipe cannot take the magic later.
        magic = MAGIC if self.target.forward else bytes(len(MAGIC))
        self._put(self._encoder, magic + self._head[len(MAGIC) :])

    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """Write a pass as the base does; a pass that selects nothing writes nothing."""
        if selections is not None and not any(bitmap.count() for bitmap in selections):
            return
        self._pass(self.channels, self._encoder, selections)

    def clean(self) -> int:
        """Return 0: no reader sees the pages of earlier passes."""
        return 0

    def finish(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        return self.finish_with(
            [
                encode_end(
                    settings=self.settings,
                    sections=sections,
                    description=description,
                    switchover_start=switchover_start,
                    page_size=self.specs[0].page_size,
                )
            ]
        )

    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        for piece in tail:
            self._put(self._encoder, piece)
        self._check(self._encoder.flush(self.channels.core), self._encoder)
        if self.reuse:
            self.target.set_size(self._encoder.position)
        self._publish()
        return self._report()

    def _needed(self) -> int:
        records = sum(spec.length // spec.page_size for spec in self.specs) * _RECORD
        return sum(memory.extent_bytes for memory in self.memories) + records

    def _least(self) -> int:
        stored = (self.specs[n] for n in self.stored)
        return sum(spec.length // spec.page_size for spec in stored) * _RECORD

    def _count(self) -> int:
        """Return the bytes of all records of one pass."""
        counter = Encoder(-1, 0)
        self._pass(self.channels.sibling("pyqmigrate-count"), counter, None)
        return counter.position

    def _pass(
        self, channels: Channels, encoder: Encoder, selections: Sequence[Bitmap] | None
    ) -> None:
        transfers = [
            Transfer(
                channels.core,
                Block(spec.length, spec.page_size),
                memory=memory,
                selection=selections[n] if selections else None,
            )
            for n, (spec, memory) in enumerate(zip(self.specs, self.memories, strict=True))
        ]

        def move(channel: Channel, item: Range) -> int:
            transfer, name = transfers[item.block], self._names[item.block]
            return encoder.put_pages(transfer, channel, name, item.first, item.npages)

        self._put(encoder, encode_part_header())
        encoder.forget_block()
        channels.run(
            (
                item
                for n in self.stored
                for spec in [self.specs[n]]
                for item in split_ranges(n, spec.length // spec.page_size, spec.page_size)
            ),
            move,
            self.target.name,
            [spec.name for spec in self.specs],
        )
        self._put(encoder, RAM_EOS)

    def _put(self, encoder: Encoder, data: bytes) -> None:
        self._check(encoder.put(self.channels.core, data), encoder)

    def _check(self, rc: int, encoder: Encoder) -> None:
        if rc:
            raise file_error_from_fault(
                rc, encoder.fault, "cannot write the stream", self.target.name
            )

    def _direct_io_reason(self) -> str:
        return _BUFFERED


_RECORD = 8 + 1  # bytes of a record beside its page: the word, and a zero page's filling
