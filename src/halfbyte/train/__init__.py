"""The training step and loop.

It owns optimisation and checkpoints; it knows nothing of evaluation, files of rows or the command line.
"""
