"""Several runs against each other: a grid of recipes and seeds, its table, its statistics."""
