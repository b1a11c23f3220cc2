"""The evidence of a run: its folder, what happened when, and what it was made from.

It owns records for people who must answer for a run; it never imports torch and computes no result.
"""
