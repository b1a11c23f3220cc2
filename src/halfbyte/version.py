"""The version of this package.

It owns that one text; it must not import anything.
"""

__version__ = "0.1.0"
