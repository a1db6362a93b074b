"""Does.  All IO, no policy; the core decides."""
