"""The work of cells: the one place where runs meet torch, models, fits, evaluation and timing."""
