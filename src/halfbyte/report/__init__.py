"""What people look at after a run: plots and pages.

It owns presentation; it computes no result of its own.
"""
