"""A JSON object whose values are checked as they are read; every error names the key."""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: the file.

    Returns:
        The object's items.

    Raises:
        ValueError: the file is not valid JSON in UTF-8, or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    # JSONDecodeError and UnicodeDecodeError are ValueErrors; brackets may nest too deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


class JsonFields:
    """Typed access to a JSON object; null counts as absent unless a method says otherwise.

    Args:
        values: the object's items.
        path: the keys that lead to this object, for error messages; "" at the top.
    """

    def __init__(self, values: dict[str, Any], path: str = ""):
        self.values = values
        self.path = path

    def __contains__(self, key: str) -> bool:
        """Whether the key is written down, be it as null."""
        return key in self.values

    def name(self, key: str) -> str:
        """The key with the keys that lead to it, as `yarn.factor`."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The unchecked value, or the default; a missing key without a default is a ValueError."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.name(key)}: missing")
        return default

    def integer(self, key: str, default: Any = REQUIRED, *, maximum: int = 2**31 - 1) -> Any:
        """An int from 1 to `maximum`, or the default as it is."""
        value = self.get(key, default)
        if value is default:
            return default
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.error(key, f"an integer from 1 to {maximum}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, zero: bool = False) -> Any:
        """A finite float above 0 (or 0, where `zero` allows it), or the default as it is."""
        value = self.get(key, default)
        if value is default:
            return default
        # type(), not isinstance(): to Python true is an int. NaN fails every comparison.
        finite = type(value) in (int, float) and 0 <= value <= sys.float_info.max
        if not finite or not (value or zero):
            raise self.error(key, f"a finite number {'>=' if zero else '>'} 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A bool, or the default."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: Any = REQUIRED) -> str:
        """One of the allowed words, or the default."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def section(self, key: str) -> "JsonFields | None":
        """The object under a key, or None if it is absent, null or empty."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return JsonFields(value, self.name(key)) if value else None

    def refuse(self, key: str, reason: str) -> None:
        """Raises a ValueError with the reason if the key holds anything but null, 0 or false."""
        if self.values.get(key):
            raise ValueError(f"{self.name(key)}: {reason}, got {self.values[key]!r:.80}")

    def error(self, key: str, expected: str) -> ValueError:
        """The error for a value that is not what it should be."""
        return ValueError(
            f"{self.name(key)}: expected {expected}, got {self.values.get(key)!r:.80}"
        )
