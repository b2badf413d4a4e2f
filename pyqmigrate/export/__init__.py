"""A finished snapshot in other forms.

- :mod:`~pyqmigrate.export.raw`: sparse raw files, one a RAM block.
"""
