"""Which rows other code measured than the present, and what the store knows about that code's numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pandas as pd

from iasvit.benchmark.provenance import code_hash
from iasvit.benchmark.results import Key, Row, metric_columns
from iasvit.errors import IasvitError
from iasvit.methods import load_method_class, split_variant

# How stale a row is, and a cell, which is as stale as the stalest of its rows: places in STALE_MARKS and STALE_WORDS.
FRESH, SAME_VALUES, STALE = range(3)
STALE_MARKS = ("", "‡", "†")  # in tables
STALE_WORDS = ("no", "same values", "yes")  # in CSV


@cache
def current_code(method: str) -> str | None:
    """The code hash that a method's rows would get now; None where the method cannot be loaded."""
    try:
        return code_hash(load_method_class(split_variant(method)[0]).__module__)
    except (IasvitError, ImportError):
        return None


def equal_code(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Earlier code whose numbers the present code was seen to measure again, to the last digit.

    Two codes of a method compare where both measured a cell (equal keys) on the same device with the same torch and
    neither failed. They are equal where there is such a cell and all metrics of all such cells are equal exactly. What
    equals code that equals the present is equal too, unless a cell of its own differs from the present. A variant runs
    its method's code: ias_vit[-sulq] counts for ias_vit and the other way round.

    Args:
        rows: all of the store, those that a later row replaces too.

    Returns:
        (method without its switches, code hash) → number of cells that were compared; of the links of a chain, the
        fewest. The present code itself is not among them.
    """
    frame = pd.DataFrame([row for row in rows if row["status"] == "ok" and row["code_hash"]])
    if frame.empty:
        return {}
    metrics = metric_columns(frame.columns)
    frame["base"] = [_base(method) for method in frame["method"]]
    cell = list(Key._fields)
    both = frame.merge(frame, on=[*cell, "base", "device", "torch"], suffixes=("", "_other"))
    both = both[both["code_hash"] != both["code_hash_other"]]
    first, second = (both[[f"{name}{end}" for name in metrics]].astype(float) for end in ("", "_other"))
    both["same"] = ((first.to_numpy() == second.to_numpy()) | (first.isna() & second.isna().to_numpy())).all(axis=1)
    found: dict[tuple[str, str], int] = {}
    for base, pairs in both.groupby("base", sort=True):
        agree = pairs.groupby(["code_hash", "code_hash_other"])["same"].all()
        cells = pairs.drop_duplicates([*cell, "code_hash", "code_hash_other"])
        counts = cells.groupby(["code_hash", "code_hash_other"]).size()
        found |= {(base, code): n for code, n in _reachable(current_code(base), agree, counts).items()}
    return found


def _reachable(present: str | None, agree: pd.Series, counts: pd.Series) -> dict[str, int]:
    """Codes that a chain of agreeing pairs joins to the present one → the fewest cells of a link, at best."""
    reached = {present: int(counts.max())}
    while links := [
        (min(n, reached[other]), code)
        for (code, other), n in counts[agree].items()
        if other in reached and code not in reached and agree.get((code, present), True)
    ]:
        n, code = max(links)
        reached[code] = n
    del reached[present]
    return reached


def _base(method: str) -> str:
    return method.partition("[")[0]


def staleness(row: Row, equal: dict[tuple[str, str], int]) -> tuple[int, int]:
    """How stale a row is, and how many cells say that its code's values are the present code's.

    Args:
        row: as stored.
        equal: of `equal_code`.
    """
    if row["method"] == "fp32" or row["code_hash"] == current_code(row["method"]):
        return FRESH, 0
    compared = equal.get((_base(row["method"]), row["code_hash"]), 0)
    return (SAME_VALUES if compared else STALE), compared


def stale_notes(cells: pd.DataFrame) -> list[str]:
    """A sentence for each mark that these cells bear.

    Args:
        cells: columns method, stale and compared.
    """
    notes = []
    if (cells["stale"] == STALE).any():
        notes.append(f"{STALE_MARKS[STALE]} measured by other code than the present; measure it again with --force.")
    same = cells[cells["stale"] == SAME_VALUES]
    if not same.empty:
        methods = {n: sorted(set(part["method"])) for n, part in same.groupby("compared", sort=True)}
        counts = [f"{n} ({', '.join(names)})" if len(methods) > 1 else f"{n}" for n, names in methods.items()]
        notes.append(
            f"{STALE_MARKS[SAME_VALUES]} measured by earlier code; the present code, measuring "
            f"{' or '.join(counts)} of the method's cells again, got the same values to the last digit."
        )
    return notes
