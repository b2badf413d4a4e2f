"""QEMU's migration file format: bytes to values and back.

Nothing here opens, reads or writes a file. Writers get byte pieces with the absolute file
offset at which each belongs; readers take a :class:`~pyqmigrate.format.cursor.ByteSource`.

- :mod:`~pyqmigrate.format.stream.writer`: the whole stream, written and read. Start here.
- :mod:`~pyqmigrate.format.stream.mapped_ram`: RAM blocks, their headers and where their pages
  stand.
- :mod:`~pyqmigrate.format.stream.sequential`: the sequential stream, whose pages are records.
- :mod:`~pyqmigrate.format.stream.configuration`: the machine and the capabilities at the stream's
  start.
- :mod:`~pyqmigrate.format.stream.description`: the JSON at the stream's end, and what it tells of
  lengths.
- :mod:`~pyqmigrate.format.stream.live_sections`: skipping live sections that are not RAM.
- :mod:`~pyqmigrate.format.cursor`: bounded reading of bytes that nobody vouches for.
"""
