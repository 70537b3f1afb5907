"""The run folder: a view of the store, and how it is read."""
