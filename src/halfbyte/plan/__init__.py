"""What a run will take of memory, time, energy and money, and how wrong that was.

It owns forecasts and their record; it never trains and never measures quality.
"""
