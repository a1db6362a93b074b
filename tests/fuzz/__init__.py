"""Fuzzing of everything that reads what strangers send: the parsers one by one, and the whole HTTP front.

`python -m tests.fuzz --seconds 600` from the root of the checkout; `make soak` runs it too.
"""
