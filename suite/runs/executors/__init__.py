"""Where groups of cells are run."""
