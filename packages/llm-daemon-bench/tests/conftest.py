"""The fixtures are in `suites.py`: for mypy there is one `tests.conftest` in the workspace already."""

from .suites import own_place as own_place, write as write
