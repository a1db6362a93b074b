"""`/metrics`, `/api/*` and `/ui/`: a Starlette app on a unix socket of its own, imported and started when first asked for.

The gateway relays to it like to one more engine, after its own checks (Host, Origin, token); the socket lies in the
generation's folder, which is the user's alone.  Only `/ui/` needs no token: it is the dashboard's static files.
"""

from .facts import Facts
from .server import Admin

__all__ = ["OPEN_PREFIX", "PREFIXES", "Admin", "Facts"]
PREFIXES = ("/metrics", "/api/", "/ui")  # of paths that are answered here
OPEN_PREFIX = "/ui/"  # static files, readable without a token
