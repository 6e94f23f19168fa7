"""The commands that a person types: one file for each, and `cli.py` with the tree of all."""
