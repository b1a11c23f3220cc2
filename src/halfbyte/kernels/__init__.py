"""Operations on 4-bit weights and of transformer blocks: one contract each, one reference, fast backends.

It owns what is computed and by whom; it knows nothing of models or files.
"""
