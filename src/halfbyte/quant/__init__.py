"""The 4-bit formats: codebooks, scales, quantised weights, and their files.

It owns bytes and numbers; it knows nothing of kernels, modules or training.
"""
