"""Options of methods: types and ranges as their fields declare them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pytest

from iasvit import methods
from iasvit.errors import IasvitError
from iasvit.methods import get_method, parse_value
from iasvit.options import OneOf, Range, check_options
from iasvit.sos import IASViT

if TYPE_CHECKING:
    from somewhere import Unknown


@dataclass
class Declared:
    """Every kind of declaration."""

    count: Annotated[int | None, Range(0, 9)] = None
    rate: Annotated[float, Range(above=0)] = 0.5
    switch: bool = True
    name_: Annotated[str, OneOf(["a", "b"])] = "a"
    kind: Literal["x", "y"] = "x"
    text: str = ""
    either: int | bool = 0
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "options",
    [
        {"count": None, "rate": 1, "switch": False, "name_": "b", "kind": "y", "text": "a=b", "either": True},
        {"count": 0, "rate": 1e-9, "shape": "anything"},
        {"count": np.int64(9), "rate": np.float32(0.5)},
    ],
)
def test_what_fits_passes(options: dict[str, Any]) -> None:
    check_options(Declared, options, "method 'x'")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("count", "abc", "count is 'abc', but a whole number from 0 to 9 is expected"),
        ("count", 2.5, "count is 2.5, but a whole number"),
        ("count", True, "count is True, but a whole number"),
        ("count", -1, "count is -1"),
        ("count", 10, "count is 10"),
        pytest.param("count", 10**5000, "count is an integer of thousands of digits", id="digits"),
        ("rate", 0, "rate is 0, but a finite number above 0 is expected"),
        ("rate", float("inf"), "rate is inf"),
        ("rate", float("nan"), "rate is nan"),
        pytest.param("rate", 10**400, "a finite number above 0", id="too large"),
        ("rate", [1], r"rate is \[1\]"),
        ("rate", None, "rate is None"),
        ("switch", "maybe", "switch is 'maybe', but true or false is expected"),
        ("switch", 1, "switch is 1, but true or false"),
        ("name_", "c", "name_ is 'c', but there are a, b"),
        ("name_", ["a"], r"name_ is \['a'\], but there are a, b"),
        ("kind", "z", "kind is 'z', but there are x, y"),
        ("text", "a;b=1", "printable text"),
        ("text", "a\x1b", "printable text"),
        ("text", 3, "text is 3"),
        ("either", "x", "either is 'x', but a whole number or true or false is expected"),
        pytest.param("text", "x;" * 9999, r"^.{1,160}$", id="long"),
    ],
)
def test_what_does_not_fit_is_one_sentence(option: str, value: object, said: str) -> None:
    with pytest.raises(IasvitError, match=said) as error:
        check_options(Declared, {option: value}, "method 'x'")
    assert str(error.value).startswith("method 'x': ")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ias_vit", {"lr": [1]}),
        ("ias_vit", {"lr": float("inf")}),
        ("ias_vit", {"iterations": "abc"}),
        ("ias_vit", {"batch_size": True}),
        ("ias_vit", {"batch_size": 0}),
        ("ias_vit", {"init_size": 2.5}),
        ("ias_vit[sos=maybe]", {}),
        ("ias_vit[lr=inf]", {}),
        ("minmax", {"init_size": 0}),
        ("repq_vit", {"init_size": "32"}),
        ("ptq4vit", {"candidates": 10**9}),
        ("ptq4vit", {"rounds": 1.5}),
        ("base_ptq", {"low": 0}),
        ("base_ptq", {"low": 1.5}),
        ("rtn", {"seed": "x"}),
    ],
)
def test_this_repositorys_methods_declare_theirs(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(IasvitError):
        get_method(method, **options)


def test_a_method_that_is_constructed_directly_checks_its_options_too() -> None:
    with pytest.raises(IasvitError, match="method 'ias_vit': iterations is -1"):
        IASViT(iterations=-1)


@dataclass
class Foreign:
    """Somebody else's: an annotation that only a type checker can resolve, and checks of its own."""

    thing: Unknown | None = None
    size: int = 1

    name: ClassVar[str] = "foreign"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be positive")


@pytest.mark.parametrize(("size", "why"), [("x", "TypeError|'<' not supported"), (0, "size must be positive")])
def test_what_another_package_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, size: object, why: str) -> None:
    entry = EntryPoint("foreign", f"{__name__}:Foreign", methods.GROUP)
    monkeypatch.setattr(methods, "_entries", lambda: {"foreign": entry})
    assert get_method("foreign", thing="any", size=2).size == 2
    with pytest.raises(IasvitError, match=f"method 'foreign' does not take its options: .*({why})"):
        get_method("foreign", size=size)


def test_a_value_is_a_number_a_word_or_text() -> None:
    for text in ("[1]", '{"a": 1}', "[" * 100_000, "9" * 5000, "٣"):
        assert parse_value(text) == text
