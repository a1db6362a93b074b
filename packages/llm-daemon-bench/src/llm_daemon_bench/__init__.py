"""The benchmark: servers x models x quantizations x cases, with several checkpoints in each case, in milliseconds.

`suite` says what to measure, `runner` measures it, `results` keeps it; `cli` faces people.
"""
