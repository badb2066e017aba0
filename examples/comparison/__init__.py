"""Layer patterns beside each other, on the same tasks with as many parameters: what ``examples/compare.py`` does."""
