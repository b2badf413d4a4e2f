"""A finished snapshot in other forms.

- :mod:`~pyqmigrate.export.convert`: any of them;
- :mod:`~pyqmigrate.export.raw`: sparse raw files, one a RAM block;
- :mod:`~pyqmigrate.export.elf`, :mod:`~pyqmigrate.export.lime`: the guest's physical memory, for
  debuggers and for forensics.
"""
