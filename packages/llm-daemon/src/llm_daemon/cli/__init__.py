"""Faces people: the command line.  `main` parses, each command is one file that is imported when it is asked for."""
