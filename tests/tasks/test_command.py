"""Options of methods from the command line."""

from __future__ import annotations

import pytest

from iasvit.errors import IasvitError
from iasvit.spec import QuantSpec
from tasks.command import Profile, make_cells, parse_options


def test_values_are_numbers_truth_values_or_text() -> None:
    options = parse_options(["a=3", "b=0.5", "c=true", "d=false", "e=block", "f=a=b", "g=1e-3"])
    assert options == {"a": 3, "b": 0.5, "c": True, "d": False, "e": "block", "f": "a=b", "g": 0.001}
    assert type(options["a"]) is int
    assert parse_options([]) == {}


@pytest.mark.parametrize("text", ["autocast", "=true", "autocast=", ""])
def test_what_is_no_option_is_said(text: str) -> None:
    with pytest.raises(IasvitError, match=f"--option '{text}' is not of the form NAME=VALUE, as autocast=true"):
        parse_options([text])


def test_an_unknown_option_is_named() -> None:
    specs = [QuantSpec.parse("W4A4")]
    with pytest.raises(IasvitError, match="--option no_such is no option of ias_vit, rtn"):
        make_cells(["m"], specs, ["ias_vit", "rtn"], [0], 4, Profile(), parse_options(["no_such=1"]))
    cells = make_cells(
        ["m"], specs, ["ias_vit", "rtn"], [0], 4, Profile(iterations=9), parse_options(["autocast=true"])
    )
    assert [dict(cell.options).get("autocast") for cell in cells] == [True, None]
    assert [dict(cell.options).get("iterations") for cell in cells] == [9, None]
