"""What can go wrong with the store.

StoreError
├── DatabaseUnavailable  temporary: locked, disk full, too many waiting, closed
├── DatabaseCorrupt      permanent: not a database, or damaged
├── DatabaseTooNew       permanent: written by a newer version of this program
└── NotStored            there is no such row
"""


class StoreError(Exception):
    """The store cannot do what was asked."""


class DatabaseUnavailable(StoreError):
    """The database cannot be used now; trying again later can help."""


class DatabaseCorrupt(StoreError):
    """The file is damaged or is no database of ours."""


class DatabaseTooNew(StoreError):
    """A newer version of this program has changed the tables."""


class NotStored(StoreError):
    """There is no such row."""
