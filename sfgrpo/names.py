"""What a recipe names: samplers, solvers, credit rules, rewards, judges and backbones.

A name without a colon is one of ours. "package.module:function" is anybody's: a file beside the
recipe or an installed package. Either may have options of its own, which are the arguments of the
function that the kind does not supply itself, and are checked against its signature.

Nothing of the user's is imported until it is resolved, and reading a recipe imports no PyTorch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfgrpo.option_types import misfit

OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""The form "package.module:function"."""

LABEL = re.compile(r"[\w-]+")
SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def shortened(value: object) -> str:
    """A value as a message repeats it: on one line, and not all of it if it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """A message that says what was given, what may have been meant, and what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {what} '{shortened(got)}'{hint} (known: {', '.join(names)})"


def in_one_line(error: BaseException) -> str:
    """An error's message, with what stands on further lines behind it."""
    return " ".join(str(error).split())


def told(error: BaseException) -> str:
    """An error of the user's own code in one line, with the file and line of it that raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    # What the user's code calls is of less interest than where it does so.
    mine = [f for f in frames if not _is_installed(f.filename)] or frames
    place = f"{mine[-1].filename}, line {mine[-1].lineno}: " if mine else ""
    name = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return place + name + in_one_line(error)


class OwnError(ValueError):
    """A function of the user's own that a run begins with failed."""


@contextmanager
def blaming(kind: type[Exception], what: str) -> Iterator[None]:
    """What the user's own code raises, as a `kind` in one line with its place; a `kind` stays."""
    try:
        yield
    except kind:
        raise
    except Exception as error:  # it raises what it likes
        raise kind(f"{what}: {told(error)}") from error


def blaming_own(name: str, kind: type[Exception], what: str) -> AbstractContextManager[None]:
    """`blaming` for a call of what a recipe names `name`, if that is the user's own."""
    return blaming(kind, what) if ":" in name else nullcontext()


def _is_users(file: str) -> bool:
    """Whether a frame is neither this package's nor the import system's."""
    ours = Path(file).is_relative_to(Path(__file__).parent)
    return not ours and not file.startswith("<frozen") and "importlib" not in file


def _is_installed(file: str) -> bool:
    """Whether a frame is a library's, or Python's own."""
    return "site-packages" in file or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class Kind:
    """One kind of thing that a recipe names."""

    what: str
    """What messages call it."""
    options: str
    """The recipe's key of its options."""
    home: str | None = None
    """Where ours are: a package with a module for each, or a module that registers them."""
    function: str = ""
    """What each module of the package calls it."""
    beside: Collection[str] = ()
    """Modules of the package that are none."""
    given: Collection[str] = ()
    """What it is called with, before those that are options."""
    made: Collection[str] = ()
    """What that which it returns is called with, if it is not called with these itself."""
    labelled: bool = False
    """Whether "NAME/LABEL" is NAME again, under a name and with options of its own."""
    registered: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Those that stand under a name of their own (`register`)."""

    def register(self, name: str, function: Callable[..., Any]) -> None:
        """Let `name` mean `function` in this process."""
        self.registered[name] = function

    def names(self) -> list[str]:
        """Names of ours, and of what was registered."""
        return sorted({*self._modules(), *self.registered})

    def check(self, name: str) -> None:
        """ValueError if `name` is neither one of ours nor of the form "module:function"."""
        base = self._base(name)
        if base not in self.names() and not OWN.fullmatch(base):
            known = self.names()
            if not known:
                raise ValueError(
                    f"{self.what} '{shortened(name)}' is not of the form 'module:function'"
                )
            raise ValueError(unknown_name(self.what, name, known) + "; or 'module:function'")

    def resolve(self, name: str) -> Callable[..., Any]:
        """The function that `name` means.

        Raises:
            ValueError: there is none, or its module cannot be imported; says file and line.
        """
        self.check(name)
        base = self._base(name)
        if base in self.registered:
            return self.registered[base]
        module, _, function = base.partition(":")
        if not function:
            module, function = f"{self.home}.{base}", self.function
        return self._attribute(name, self._import(name, module), function)

    def bind(
        self, name: str, options: Mapping[str, Any] | None = None, *, supplied: Collection[str] = ()
    ) -> Callable[..., Any]:
        """The function that `name` means, with its options; it keeps its name and attributes.

        Args:
            supplied: names of arguments that the caller passes by keyword, so that they are no
                options.

        Raises:
            ValueError: as `resolve`; an option that it does not have, or of another type than it
                is annotated to take; it lacks one it needs.
        """
        function, options = self.resolve(name), dict(options or {})
        self._check_options(name, function, options, supplied)
        if wrong := misfit(function, options):
            raise ValueError(f"{self.what} '{name}': {wrong}; see {self.options}")
        if not options:
            return function
        kept = () if isinstance(function, type) else functools.WRAPPER_UPDATES
        return functools.update_wrapper(
            functools.partial(function, **options), function, updated=kept
        )

    def _base(self, name: str) -> str:
        """The name without its label, where names have one."""
        base, slash, label = name.partition("/")
        return base if self.labelled and slash and LABEL.fullmatch(label) else name

    def _modules(self) -> list[str]:
        if self.home is None:
            return []
        folder = Path(__file__).parents[1] / self.home.replace(".", "/")
        if not folder.is_dir():
            importlib.import_module(self.home)  # registers them
            return []
        names = (module.name for module in pkgutil.iter_modules([str(folder)]))
        return [name for name in names if name[0] != "_" and name not in self.beside]

    def _import(self, name: str, module: str) -> Any:
        try:
            return importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever a file raises when it is run
            raise ValueError(f"{self.what} '{name}' cannot be imported: {told(error)}") from error

    def _attribute(self, name: str, module: Any, function: str) -> Callable[..., Any]:
        found = module
        for part in function.split("."):
            if not hasattr(found, part):
                raise ValueError(
                    f"{self.what} '{name}': {unknown_name('function', part, _defined(module))} in "
                    f"{getattr(module, '__file__', module.__name__)}"
                )
            found = getattr(found, part)
        if not callable(found):
            raise ValueError(f"{self.what} '{name}' is a {type(found).__name__}, not a function")
        return found

    def _check_options(
        self,
        name: str,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        supplied: Collection[str],
    ) -> None:
        """Before the call, so that a TypeError from inside of it stays what it is."""
        try:
            signature = inspect.signature(function)
        except ValueError:  # some functions written in C do not tell
            return
        parameters = list(signature.parameters.values())
        self._check_call(name, parameters, supplied)
        taken = {p.name for p in parameters[: len(self.given)]} | set(supplied)
        known = [p.name for p in parameters if p.name not in taken and p.kind not in _VARIABLE]
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            for option in options:
                if option not in known:
                    if not known:
                        raise ValueError(f"{self.what} '{name}' has no options, got '{option}'")
                    text = unknown_name("option", option, known)
                    raise ValueError(f"{self.what} '{name}': {text}; see {self.options}")
        missing = [
            p.name for p in parameters
            if p.name in known and p.name not in options and p.default is inspect.Parameter.empty
        ]  # fmt: skip
        if missing:
            hint = ""
            if self.made and ":" in name:
                called = ", ".join(self.made)
                hint = f" (it is called with these alone, and what it returns with ({called}))"
            raise ValueError(
                f"{self.what} '{name}': missing a required argument: '{missing[0]}'; see "
                f"{self.options}{hint}"
            )

    def _check_call(
        self, name: str, parameters: Sequence[inspect.Parameter], supplied: Collection[str]
    ) -> None:
        """ValueError if a function of these parameters cannot be called as its kind is."""
        kinds = {p.kind for p in parameters}
        takes = [p.name for p in parameters if p.kind in _POSITIONAL]
        if len(takes) < len(self.given) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise ValueError(
                f"{self.what} '{name}' is called with ({', '.join(self.given)}), and takes "
                f"({', '.join(takes)})"
            )
        named = {p.name for p in parameters}
        unknown = [argument for argument in supplied if argument not in named]
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
            given = ", ".join([*self.given, *(f"{argument}=" for argument in supplied)])
            raise ValueError(
                f"{self.what} '{name}' is called with ({given}), and takes no '{unknown[0]}'"
            )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _defined(module: Any) -> list[str]:
    """Names of the functions and classes that a module defines itself."""
    here = {key: getattr(value, "__module__", None) for key, value in vars(module).items()}
    return [key for key, origin in here.items() if origin == module.__name__ and key[0] != "_"]


_CREDITED = ("rewards", "trainable", "options")
SAMPLER = Kind("sampler", "sample.sampler_options", "sfgrpo.samplers", given=["step"])
SOLVER = Kind("solver", "credit.solver_options", "sfgrpo.solvers", given=["t"])
RULE = Kind(
    "credit rule", "credit.options", "sfgrpo.credit", "advantages",
    beside=("components", "mixtures"), given=_CREDITED,
)  # fmt: skip
MIXTURE = Kind(
    "mixture", "credit.mixture_options", "sfgrpo.credit.mixtures", "advantages", given=_CREDITED
)
REWARD = Kind(
    "reward", "reward_options", "sfgrpo.rewards", "build", beside=("base",), labelled=True,
    made=("images", "prompts", "metadata"),
)  # fmt: skip
JUDGE = Kind("judge", "eval.judge_options", given=["samples", "metadata"])
TRACKER = Kind(
    "tracker", "run.track_options", "sfgrpo.track", "start", beside=("base",), given=["run"]
)
BACKBONE = Kind(
    "backbone", "model.options", "sfgrpo.backbones", "load", beside=("base",), given=["path"]
)
