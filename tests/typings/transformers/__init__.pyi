"""Any class of transformers, imported from the package itself, is Any to pyright: to know better it
would bind the 2,500 modules that the package names, for half of the time that all checks take."""

from typing import Any

def __getattr__(name: str) -> Any: ...
