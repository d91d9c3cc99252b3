"""Objects that a command line names as `module:attribute.attribute`."""

import importlib
from typing import Any


def find_named(path: str) -> Any:
    """Import a module and return what is named in it.

    Raises:
        ImportError: There is no such module.
        AttributeError: There is nothing of that name in it.
    """
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found
