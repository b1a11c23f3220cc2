"""Labelled images, from where they lie to the arrays a model is given.

It owns all that is so of images alone; it must not know models or what is learnt from them.
"""
