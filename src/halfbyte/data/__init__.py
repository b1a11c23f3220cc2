"""From rows on disk to batches: read, check, render, tokenise, pack.

It owns the data's way up to numpy arrays; it never imports torch and knows nothing of models.
"""
