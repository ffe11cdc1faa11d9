"""Planted bugs, each of which the simulator must find, and the states that it must reach.

A canary is a patch of the code under test, never a switch in it. `plant` lasts as long as the process does.
"""

from collections.abc import Callable
from typing import Final

STATES: Final = ()
CANARIES: Final[dict[str, Callable[[], None]]] = {}


def plant(name: str) -> None:
    """Switch a bug on."""
    CANARIES[name]()
