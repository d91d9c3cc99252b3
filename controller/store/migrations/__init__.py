"""How the tables came to be, step by step. `controller.store.database` runs the steps."""
