"""The registry: names, variants, options, and what is said of those that do not exist."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
from torch import nn

from iasvit import methods
from iasvit.errors import IasvitError
from iasvit.methods import Calibration, Method, get_method, list_methods, method_options, split_variant
from iasvit.progress import Progress
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec


@dataclass
class Two:
    """Three ingredients, one of which another option replaces, and an option that is no switch."""

    seed: int = 0
    first: bool = True
    second: bool = True
    loud: bool = False
    kind: str = "good"

    name: ClassVar[str] = "two"
    ablations: ClassVar[dict[str, dict[str, str]]] = {"goodness": {"kind": "plain"}}

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        return model


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points "two", here, and two that cannot be loaded."""
    values = {"two": f"{__name__}:Two", "gone": "no_such_module:Gone", "renamed": f"{__name__}:NoSuchClass"}
    entries = [EntryPoint(name, value, methods.GROUP) for name, value in values.items()]
    monkeypatch.setattr(methods, "entry_points", lambda group: entries)


def test_this_repositorys_methods_are_registered() -> None:
    assert {"ias_vit", "base_ptq", "ptq4vit", "repq_vit", "minmax", "rtn"} <= set(list_methods())
    method = get_method("ias_vit", iterations=3)
    assert isinstance(method, IASViT)
    assert isinstance(method, Method)
    assert (method.iterations, method.softmax, method.sos, method.variant) == (3, None, True, "ias_vit")


@pytest.mark.parametrize(
    ("name", "method_there"),
    [
        ("two", Two(7)),
        ("two[-first]", Two(7, first=False)),
        ("two[-second]", Two(7, second=False)),
        ("two[-first-second]", Two(7, first=False, second=False)),
        ("two[-first,-second]", Two(7, first=False, second=False)),
        ("two[-goodness]", Two(7, kind="plain")),
        ("two[-first-goodness]", Two(7, first=False, kind="plain")),
        ("two[kind=odd]", Two(7, kind="odd")),
        ("two[-first,kind=odd,loud=true]", Two(7, first=False, loud=True, kind="odd")),
    ],
)
@pytest.mark.usefixtures("registered")
def test_a_variant_leaves_ingredients_out_and_sets_options(name: str, method_there: Two) -> None:
    method = get_method(name, seed=7)
    assert method == method_there
    assert (method.name, method.variant) == ("two", name)


@pytest.mark.usefixtures("registered")
def test_names_and_options_are_listed() -> None:
    assert list_methods() == ["gone", "renamed", "two"]
    assert method_options("two") == ["seed", "first", "second", "loud", "kind"]
    assert method_options("two[-first,kind=odd]") == ["seed", "second", "loud"]
    assert method_options("two[-goodness]") == ["seed", "first", "second", "loud"]


def test_a_number_with_an_exponent_leaves_nothing_out() -> None:
    assert split_variant("two[a=1e-5,b=2.5E-3-first,c=1e5]") == ("two", ["first"], {"a": 1e-5, "b": 2.5e-3, "c": 1e5})
    assert split_variant("two[loud=true-first]") == ("two", ["first"], {"loud": True})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "two[",
        "two[]",
        "two[first]",
        "two[-]",
        "two[-first",
        "two-first",
        "two [-first]",
        "two[loud=]",
        "two[a=1 b=2]",
    ],
)
def test_what_is_no_variant_is_refused(name: str) -> None:
    with pytest.raises(IasvitError, match="is neither a name nor a name"):
        split_variant(name)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("three", {}, "method 'three' is not registered; the registered ones are gone, renamed, two"),
        ("two", {"lr": 1.0}, "method 'two' has no option 'lr'; it knows seed, first, second, loud, kind"),
        ("two[-third]", {}, "no ingredient 'third' to leave out; it has goodness, first, second"),
        ("two[-loud]", {}, "no ingredient 'loud'"),
        ("two[-first]", {"first": True}, "option 'first' is given twice, one of them by method 'two[-first]'"),
        ("two[kind=odd]", {"kind": "odd"}, "option 'kind' is given twice"),
        ("two[-goodness,kind=odd]", {}, "option 'kind' is given twice"),
        ("two[kind=odd,kind=even]", {}, "gives option 'kind' twice"),
        ("two[size=3]", {}, "method 'two' has no option 'size'"),
        ("gone", {}, "method 'gone' is registered as no_such_module:Gone, but loading that failed"),
        ("renamed", {}, "NoSuchClass, but loading that failed"),
    ],
)
@pytest.mark.usefixtures("registered")
def test_what_does_not_exist_is_named(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(IasvitError) as error:
        get_method(name, **options)
    assert said in str(error.value)
