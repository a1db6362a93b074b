"""Faces of a session's results: terminal, Markdown, one self-contained HTML file.  All show the same tables, made in `tables`."""
