"""Every figure in the docs comes from a script here, and so does the demonstration."""
