"""QEMU's migration file format: bytes to values and back.

Nothing here opens, reads or writes a file. Writers get byte pieces with the absolute file
offset at which each belongs; readers take a :class:`~pyqmigrate.format.cursor.ByteSource`.

- :mod:`~pyqmigrate.format.stream.wire`: the elements of a stream. Start here.
- :mod:`~pyqmigrate.format.stream.writer`: encoding a whole stream.
- :mod:`~pyqmigrate.format.stream.mapped_ram_reader`: reading and checking a mapped-ram stream.
- :mod:`~pyqmigrate.format.stream.mapped_ram`: the headers of RAM blocks, and the places of pages.
- :mod:`~pyqmigrate.format.stream.sequential`: the sequential stream, whose pages are records.
- :mod:`~pyqmigrate.format.stream.configuration`: the machine and the capabilities at the stream's
  start.
- :mod:`~pyqmigrate.format.stream.description`: the JSON at the stream's end, and the lengths
  that it gives.
- :mod:`~pyqmigrate.format.stream.live_sections`: skipping live sections that are not RAM.
- :mod:`~pyqmigrate.format.cursor`: bounded reading of untrusted bytes.
"""
