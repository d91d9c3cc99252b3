"""Names of tools."""

NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,64}$"


def is_name(char: str) -> bool:
    """Return whether a character may be in a tool's name."""
    return char.isascii() and (char.isalnum() or char in "_.-")
