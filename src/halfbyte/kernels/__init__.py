"""Operations on 4-bit weights: one contract (`ops`), one reference, fast backends.

It owns what is computed and by whom; it knows nothing of models or files.
"""
