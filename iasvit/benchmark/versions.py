"""Versions of methods and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def other_version(row: Mapping[str, Any]) -> str:
    """Which other version than the present one measured a row, as part of a sentence; "" for the present one."""
    return ""
