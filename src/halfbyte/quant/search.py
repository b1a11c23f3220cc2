"""Where the search for the least-error scale of a block looks.

It owns the search's few numbers, read by every backend; it must not know how a backend computes the error.
"""

from __future__ import annotations

# Trial scales are these fractions of the block's largest magnitude, evenly spaced. Outside of them no better scale
# was found for real or normally distributed blocks of 64 (`bench/quantize.py` prints the gain).
FIRST_FRACTION = 0.64
LAST_FRACTION = 1.08
TRIALS = 23

# Then the best is moved this often to the least-squares scale of its own codes.
REFINEMENTS = 2
