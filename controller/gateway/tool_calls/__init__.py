"""What models write when they call tools, one file a format, and what they are told of tools."""
