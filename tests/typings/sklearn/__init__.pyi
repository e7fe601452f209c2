"""What is taken of scikit-learn is Any to pyright: to infer its classes from their sources takes it
longer than any module of this project."""

from typing import Any

def __getattr__(name: str) -> Any: ...
