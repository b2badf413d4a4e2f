"""A finished snapshot in other forms.

- :mod:`~pyqmigrate.export.convert`: a mapped-ram file, a classic stream, raw files;
- :mod:`~pyqmigrate.export.raw`: sparse raw files, one a RAM block.
"""
