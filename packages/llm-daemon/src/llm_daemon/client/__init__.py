"""Faces programs: standard library only, imports in a blink."""
