"""What a command line says of a recipe: the recipe, and any of its keys before or after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Arguments(NamedTuple):
    """A command line, taken apart."""

    words: list[str]
    """What stands alone: the recipe."""
    options: list[str]
    """The command's own options, with their values, for argparse."""
    pairs: list[tuple[str, str]]
    """Keys of the recipe and their values."""

    def no_more_than_a_recipe(self) -> None:
        """ValueError if a second word stands alone."""
        if self.words[1:]:
            raise ValueError(f"expected --key value, got '{self.words[1]}'")


def apart(
    arguments: Sequence[str], *, flags: Collection[str] = (), valued: Collection[str] = ()
) -> Arguments:
    """Take a command line apart: a `--name` that is none of the command's own is a recipe's key.

    argparse takes the value of an option that it does not know for the recipe, so the options have
    to be told apart before it sees them.

    Args:
        flags: the command's own options without a value, beside -h and --help.
        valued: its own options with one.

    Raises:
        ValueError: a key without a value.
    """
    found, rest = Arguments([], [], []), list(arguments)
    own = {"-h", "--help", *flags, *valued}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in own or (word.startswith("-") and not word.startswith("--") and word != "-"):
            found.options.append(word)
            if name in valued and not equals and rest:
                found.options.append(rest.pop(0))
        elif word.startswith("--"):
            if not equals and (not rest or rest[0] in own):
                raise ValueError(f"{name} needs a value")
            found.pairs.append((name[2:], value if equals else rest.pop(0)))
        else:
            found.words.append(word)
    return found
