"""What a model is tuned for: the rows each task learns from, the head, the loss and what is measured.

It owns the differences between tasks; it must not know the order of a run's steps.
"""
