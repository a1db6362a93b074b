"""Adapts: one file for each server application, found through entry points.  `base.py` says what an adapter is."""
