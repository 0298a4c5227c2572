"""Versions of methods and tasks: integers that people raise when numbers change, with a line of changelog each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from iasvit.benchmark.task import find_task_class
from iasvit.errors import IasvitError
from iasvit.methods import load_method_class, split_variant


def method_version(name: str) -> int:
    """The version of an installed method, also of a variant's name; 1 for one that has none, as for "fp32"."""
    return _version(_method(name))


def other_version(row: Mapping[str, Any]) -> str:
    """Which other version than the present one measured a row, as part of a sentence: no capital, no full stop.

    Args:
        row: with task, method, task_version and method_version.

    Returns:
        For example "measured by version 1 of ias_vit; the present version is 2 (rounds to even)"; for a task "on
        version 1 of"; "" for a row of the present versions. A method or task that is not installed counts as present.
    """
    parts = []
    for by, name, cls, version in (
        ("by", row["method"], _method(row["method"]), row["method_version"]),
        ("on", row["task"], find_task_class(row["task"]), row["task_version"]),
    ):
        present = _version(cls)
        if cls is None or version == present:
            continue
        changelog = getattr(cls, "changelog", {})
        changes = "; ".join(changelog[n] for n in range(version + 1, present + 1) if n in changelog)
        parts.append(
            f"{by} version {version} of {name}; the present version is {present}{f' ({changes})' if changes else ''}"
        )
    return f"measured {', and '.join(parts)}" if parts else ""


def forget() -> None:
    """Look for installed methods and tasks again."""
    _method.cache_clear()
    find_task_class.cache_clear()


def _version(cls: type | None) -> int:
    return getattr(cls, "version", 1)


@cache
def _method(name: str) -> type | None:
    try:
        return load_method_class(split_variant(name)[0])
    except IasvitError:
        return None
