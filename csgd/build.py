"""What a configuration names: a network or a dataset, by the dotted path of what makes it."""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, get_type_hints

from csgd.errors import InputError


def named(group: str, target: str) -> Any:
    """What the dotted path `target` names: a class, a function, or one within a class; its module is imported."""
    try:
        return _found(target)
    except Exception as error:  # whatever importing a user's module raises
        raise InputError(f"{group}._target_ '{target}' cannot be imported: {error}") from None


def makes(made: Any, kind: type) -> bool:
    """Whether `made` is a subclass of `kind`, or a function annotated to return one."""
    try:
        returned = made if isinstance(made, type) else get_type_hints(made).get("return")
    except Exception:  # whatever the annotations of a user's function raise
        return False
    return isinstance(returned, type) and issubclass(returned, kind)


def build(group: str, settings: Mapping[str, Any], *, needed: Sequence[str] = (), **offered: Any) -> Any:
    """Calls settings._target_ with its own settings, and with what is offered as far as it takes it.

    InputError if that does not fit, or if it does not take what is `needed`.
    """
    target = settings["_target_"]
    made = named(group, target)
    own = {key: value for key, value in settings.items() if key != "_target_"}
    parameters = inspect.signature(made).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | own
    if missing := [key for key in needed if key not in arguments]:
        raise InputError(f"{group}: '{target}' must take {' and '.join(missing)}")
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise InputError(f"{group}: '{target}' does not fit its settings: {error}") from None
    return made(**arguments)


def label(settings: Mapping[str, Any]) -> str:
    return str(settings.get("name") or settings["_target_"].rsplit(".", 1)[-1])


def _found(target: str) -> Any:
    owner, _, name = target.rpartition(".")
    try:
        return getattr(import_module(owner), name)
    except ModuleNotFoundError as error:
        if error.name != owner or "." not in owner:
            raise
        return getattr(_found(owner), name)
