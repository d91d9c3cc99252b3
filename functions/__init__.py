"""Function specs: the schema, its loader, and the YAML files, one function a file."""
