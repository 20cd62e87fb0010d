"""What a configuration names: a network or a dataset, by the dotted path of what makes it."""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

from csgd.errors import InputError, line_of


def named(group: str, target: str) -> Any:
    """What the dotted path `target` names: a class, a function, or one within a class; its module is imported."""
    try:
        return _found(target)
    except Exception as error:  # whatever importing a user's module raises
        told = line_of(error, own=", or, of a file of your own, PYTHONPATH=FOLDER")
        raise InputError(f"{group}._target_ {target!r} cannot be imported: {told}") from None


def makes(made: Any, kind: type) -> bool:
    """Whether `made` is a subclass of `kind`, or a function annotated to return one."""
    try:
        returned = made if isinstance(made, type) else get_type_hints(made).get("return")
    except Exception:  # whatever the annotations of a user's function raise
        return False
    return isinstance(returned, type) and issubclass(returned, kind)


def within(name: str, packages: Collection[str]) -> bool:
    """Whether the dotted `name` is one of `packages`, or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def judged(
    group: str, target: str, own: Mapping[str, Callable[[Any], bool]], allow: Collection[str] = (), otherwise: str = ""
) -> Any:
    """What the dotted path `target` of a file names, judged before anything is imported or called.

    own        {package: whether what it holds runs by itself}: known packages, whose names are only looked up
    allow      dotted names on the user's word: modules to import, classes and functions to call, and all below them
    otherwise  what the user can do instead, for the message

    What is found must be written in such a package too: no path leads through one into another.  InputError if not.
    """
    if isinstance(allow, str):
        raise InputError(f"allow must be a list of dotted names, got the text {allow!r}")
    owner, _, name = target.rpartition(".")
    made = None
    if within(target, allow):
        made = named(group, target)
    elif within(owner, own) and "._" not in target:
        import_module(next(package for package in own if within(owner, [package])))
        made = vars(sys.modules[owner]).get(name) if owner in sys.modules else None
    written = f"{made.__module__}.{made.__qualname__}" if isinstance(made, type | FunctionType) else ""
    if callable(made) and (target in allow or within(written, allow)):
        return made
    if any(within(written, [package]) and runs(made) for package, runs in own.items()):
        return made
    root = target.split(".")[0]
    if within(target, allow):
        why = f"it is {written or 'neither a class nor a function'}"
        word = f'allow=["{target}"] calls it'
    else:
        why = f"by themselves only makers in {', '.join(own)} are"
        word = f'allow=["{root}"] (--allow {root}) trusts the code of {root}'
    foreign = root.isidentifier() and root not in {
        *sys.stdlib_module_names,
        *(package.split(".")[0] for package in own),
    }
    advice = ", ".join(filter(None, [otherwise, word if foreign else ""]))
    raise InputError(f"{group}._target_ {target!r} is not called: {why}; {advice}")


@contextmanager
def off_the_path(folder: Path | str) -> Iterator[None]:
    """Nothing is imported from `folder` in here, also where it is the current directory."""
    before, folder = list(sys.path), Path(folder).resolve()
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != folder]
    try:
        yield
    finally:
        sys.path[:] = before


def build(group: str, settings: Mapping[str, Any], *, needed: Sequence[str] = (), **offered: Any) -> Any:
    """Calls settings._target_ on the user's word: with its own settings, and what is offered as far as it takes that.

    InputError if that does not fit, if it does not take what is `needed`, or for whatever it raises.
    """
    made = named(group, settings["_target_"])
    try:
        return call(group, made, settings, needed=needed, **offered)
    except InputError:
        raise
    except Exception as error:
        told = f"fails on its settings: {type(error).__name__}: {line_of(error)}"
        raise InputError(f"{group}: '{settings['_target_']}' {told}") from error


def call(group: str, made: Any, settings: Mapping[str, Any], *, needed: Sequence[str] = (), **offered: Any) -> Any:
    """What `build` does with `made`, which settings._target_ names."""
    target = settings["_target_"]
    own = {key: value for key, value in settings.items() if key != "_target_"}
    parameters = inspect.signature(made).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | own
    if missing := [key for key in needed if key not in arguments]:
        raise InputError(f"{group}: '{target}' must take {' and '.join(missing)}")
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        left = [] if takes_any else [f"~{group}.{key}" for key in own if key not in parameters]
        advice = f"; {' '.join(left)} leaves out what it does not take" if left else ""
        raise InputError(f"{group}: '{target}' does not fit its settings: {error}{advice}") from None
    return made(**arguments)


def label(settings: Mapping[str, Any]) -> str:
    """A short name of a network or a dataset; cifar10 and cifar100 are one function."""
    if name := settings.get("name"):
        return str(name)
    classes = settings.get("classes")
    return settings["_target_"].rsplit(".", 1)[-1] + (str(classes) if isinstance(classes, int) else "")


def _found(target: str) -> Any:
    owner, _, name = target.rpartition(".")
    try:
        return getattr(import_module(owner), name)
    except ModuleNotFoundError as error:
        if error.name != owner or "." not in owner:
            raise
        return getattr(_found(owner), name)
