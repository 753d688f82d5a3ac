"""Turns settings into plain data and back: what a checkpoint says of a module, its method and its optimizer.

Our own classes go by a short name, others by their path. A name never leads to an import or to a call of anything
but a class that is wanted there: it is looked up among the subclasses that are imported already.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

from lopa_lightning.errors import LoPAError, shown

_NO_DEFAULT = inspect.Parameter.empty
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


class Argument(NamedTuple):
    """Describes an argument of a class.

    Attributes:
        hint: Its type; ``Any`` where that is not known.
        default: Its default; ``inspect.Parameter.empty`` where it must be given.
    """

    hint: Any
    default: Any


def arguments(cls: type) -> dict[str, Argument]:
    """Returns the arguments of a class by name, with those that it hands on to its bases as ``**kwargs``."""
    found: dict[str, Argument] = {}
    for base in cls.__mro__:
        if (init := base.__dict__.get("__init__")) is None:
            continue
        try:
            hints = get_type_hints(init)
        except (NameError, TypeError, AttributeError):  # of names that are imported for a type checker alone
            hints = {}
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, Argument(hints.get(parameter.name, Any), parameter.default))
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def defaults(cls: type) -> dict[str, Any]:
    """Returns the defaults of a class's arguments as plain data."""
    return {name: plain(each.default) for name, each in arguments(cls).items() if each.default is not _NO_DEFAULT}


# To plain data


def plain(value: Any) -> Any:
    """Turns hyperparameters into plain data, which a checkpoint can hold without pickled code.

    Raises:
        TypeError: If a value has no plain form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a subclass, only what is plain
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if callable(value):
        return factory_spec(value)
    raise TypeError(f"hyperparameter {value!r} of type {type(value).__name__} cannot be stored in a checkpoint")


def made_class(factory: Callable[..., Any]) -> type | None:
    """Returns the class that a factory makes objects of; None if it is neither a class nor a partial of one."""
    # The CLI's partials call a helper with the class among its arguments.
    parts = (factory.func, *factory.args) if isinstance(factory, functools.partial) else (factory,)
    return next((part for part in reversed(parts) if isinstance(part, type)), None)


def factory_spec(factory: Callable[..., Any]) -> dict[str, Any]:
    """Describes a class, or a ``functools.partial`` of one, as ``class_path`` and ``init_args``.

    Args:
        factory: What is called later for an object.

    Returns:
        The class's name, and every argument that has a plain value, defaults included.

    Raises:
        TypeError: If it is neither, such as a lambda, and so could not be rebuilt from a checkpoint.
    """
    given = factory.keywords if isinstance(factory, functools.partial) else {}
    if (target := made_class(factory)) is None:
        raise TypeError(f"{factory!r} cannot be stored in a checkpoint; pass a class or a functools.partial of one")
    return {"class_path": class_name(target), "init_args": {**defaults(target), **plain(given)}}


def without_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the arguments of a class that have their default, and likewise within those that are settings.

    Args:
        cls: The class.
        values: Its arguments as plain data; others are kept as they are.
    """
    known, usual, kept = arguments(cls), defaults(cls), {}
    for name, value in values.items():
        if name in usual and value == usual[name]:
            continue
        for hint in _options(known[name].hint) if name in known and isinstance(value, Mapping) else ():
            if dataclasses.is_dataclass(hint):
                value = without_defaults(hint, value)  # type: ignore[arg-type]
            elif bases := _built_by(hint):
                value = with_arguments(value, without_defaults, *bases)
            elif get_origin(hint) is dict and (bases := _built_by(get_args(hint)[1])):
                value = {key: with_arguments(item, without_defaults, *bases) for key, item in value.items()}
        kept[name] = value
    return kept


def with_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults that a class has now."""
    return {**defaults(cls), **values}


def with_arguments(spec: Any, change: Callable[[type, Any], dict[str, Any]], *bases: type) -> Any:
    """Changes the ``init_args`` beside a ``class_path``.

    Args:
        spec: The two; returned as it is if the class is not known.
        change: Makes other arguments of the class and its arguments.
        *bases: What the class must be a subclass of.
    """
    with contextlib.suppress(LoPAError, KeyError, TypeError, AttributeError):
        return {**spec, "init_args": change(find_class(spec["class_path"], *bases), spec["init_args"])}
    return spec


# Names of classes


def class_name(cls: type) -> str:
    """Returns the short name of a class, or the shortest path that it can be imported from.

    Raises:
        TypeError: If it is defined within a function.
    """
    if "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} cannot be stored in a checkpoint; define it at the top level of a module")
    return cls.__dict__.get("short_name") or _path(cls)


def find_class(name: Any, *bases: type) -> type:
    """Finds a class by name among the imported subclasses of others.

    Args:
        name: A short name or a path, as a file says it.
        *bases: What it must be a subclass of.

    Raises:
        LoPAError: If there is none, or more than one.
    """
    found = [cls for cls in subclasses(bases) if name and name in (cls.__dict__.get("short_name"), *_paths(cls))]
    if len(paths := {f"{cls.__module__}.{cls.__qualname__}" for cls in found}) > 1:
        raise LoPAError(f"{shown(name)} is the name of several classes: {', '.join(sorted(paths))}")
    if found:
        return found[-1]  # of one that is defined again, the newest
    wanted = " or ".join(base.__name__ for base in bases)
    known = ", ".join(sorted(short for cls in subclasses(bases) if (short := cls.__dict__.get("short_name"))))
    module = name.rpartition(".")[0] if isinstance(name, str) else ""
    may_be_yours = module not in sys.modules and module.replace(".", "").isidentifier()
    raise LoPAError(
        f"{shown(name)} is no {'' if module in sys.modules else 'imported '}subclass of {wanted}"
        + (f"; ours are {known}" if known else "")
        + (f"; if it is one of yours, import {shown(module, str)} first" if may_be_yours else "")
    )


def subclasses(bases: Iterable[type]) -> list[type]:
    """Returns classes and all of their subclasses that are imported."""
    found = [*bases]
    for cls in found:  # which grows
        subs: list[type] = type.__subclasses__(cls)
        found += [each for each in subs if each not in found]
    return found


def _paths(cls: type) -> set[str]:
    """Returns the paths that a class may be known by; ours are also exported by the package itself."""
    own = __name__.partition(".")[0]
    exported = {f"{own}.{cls.__qualname__}"} if cls.__module__.startswith(f"{own}.") else set()
    return {_path(cls), f"{cls.__module__}.{cls.__qualname__}"} | exported


def _path(cls: type) -> str:
    """Returns the shortest path: what a package exports stays where it is when files move."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        # Not by getattr, which may import what the package has not imported yet.
        if getattr(sys.modules.get(package), "__dict__", {}).get(cls.__qualname__) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


# From plain data


def built(value: Any, hint: Any, name: str) -> Any:
    """Builds what an argument's type asks for from plain data.

    Args:
        value: The data; what is of the type already is returned as it is.
        hint: The type.
        name: The argument's, for messages.

    Raises:
        LoPAError: If it is of another type, or names a class that is not imported.
    """
    *others, last = [option for option in _options(hint) if option is not type(None)] or [Any]
    if value is None and type(None) in _options(hint):
        return None
    for option in others:
        with contextlib.suppress(LoPAError):
            return _built(value, option, name)
    return _built(value, last, name)


def _built(value: Any, hint: Any, name: str) -> Any:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else kind(**_filled(kind, value, name))  # type: ignore[arg-type,operator]
    if bases := _built_by(hint):
        if callable(value):
            return value
        if not isinstance(value, Mapping) or set(value) != {"class_path", "init_args"}:
            raise LoPAError(f"{name} must have class_path and init_args, got {shown(value)}")
        made = find_class(value["class_path"], *bases)
        return functools.partial(made, **_filled(made, value["init_args"], name, partly=True))
    if kind in _LISTS and isinstance(value, list | tuple):
        items = [built(item, inner[0] if inner else Any, name) for item in value]
        return tuple(items) if kind is tuple else items
    if kind in (dict, collections.abc.Mapping) and isinstance(value, Mapping):
        key_hint, item_hint = inner or (Any, Any)
        return {built(key, key_hint, name): built(item, item_hint, f"{name}.{key}") for key, item in value.items()}
    if kind is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in inner)
    else:
        allowed = {bool: (bool,), int: (int,), float: (int, float), str: (str,), dict: (), collections.abc.Callable: ()}
        fits = kind not in (*allowed, *_LISTS) or type(value) in allowed.get(kind, ())
    if not fits:
        wanted = " or ".join(map(repr, inner)) if kind is Literal else getattr(hint, "__name__", str(hint))
        raise LoPAError(f"{name} must be {wanted}, got {shown(value)}")
    return value


def _filled(cls: type, values: Any, name: str, partly: bool = False) -> dict[str, Any]:
    """Builds the arguments of a class; ``partly`` where those without a default are given later."""
    known = arguments(cls)
    if not isinstance(values, Mapping) or not set(values) <= set(known):
        raise LoPAError(f"{name} must be of {', '.join(known)}; got {shown(values)}")
    if lacking := [
        key for key, each in known.items() if each.default is _NO_DEFAULT and key not in values and not partly
    ]:
        raise LoPAError(f"{name} lacks {', '.join(lacking)}")
    return {key: built(value, known[key].hint, f"{name}.{key}") for key, value in values.items()}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _built_by(hint: Any) -> tuple[type, ...]:
    """Returns the classes whose objects a callable of such a type builds; none if it is no such type."""
    if get_origin(hint) is not collections.abc.Callable or not get_args(hint):
        return ()
    return tuple(option for option in _options(get_args(hint)[-1]) if isinstance(option, type))
