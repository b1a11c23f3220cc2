"""Settings files of other tools: what their keys mean here.

The package owns the translation; what a setting of ours means, and how ours are read, is elsewhere.
"""
