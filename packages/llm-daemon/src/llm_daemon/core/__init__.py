"""Decides.  Pure: no socket, clock, process or log; `handle(event, now)` returns commands.  A test proves the import rule."""
