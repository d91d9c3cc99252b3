"""`python -m snapshots`."""

from snapshots.cli import main

main()
