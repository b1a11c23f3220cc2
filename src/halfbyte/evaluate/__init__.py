"""Measurements of a model with intervals.

It owns held-out loss, graded answers and their statistics; it knows nothing of training.
"""
