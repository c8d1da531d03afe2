"""Groups of options: what several commands take alike is one tuple to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def takes(**groups: tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command's parameters of these names a group of options each.

    typer makes one option of every parameter in a command's signature, by its annotation and
    default. In place of a group's parameter it finds the fields of the group; the command gets
    their values as one tuple again.

    Args:
        groups: name of a parameter -> a NamedTuple whose annotations describe the options, and
            whose values are their defaults.

    Returns:
        A decorator, to stand under `app.command()`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shown = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name in groups:
                shown += _fields(groups[parameter.name], parameter.kind)
            else:
                shown.append(parameter)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = type(group)(*(values.pop(field) for field in group._fields))
            command(**values)

        run.__signature__ = inspect.Signature(shown)
        return run

    return decorate


def _fields(group: tuple[Any, ...], kind: Any) -> list[inspect.Parameter]:
    annotations = get_type_hints(type(group), include_extras=True)
    return [
        inspect.Parameter(name, kind, default=default, annotation=annotations[name])
        for name, default in group._asdict().items()
    ]
