"""Options of methods from the command line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from iasvit.errors import IasvitError
from iasvit.sos import RECIPES
from iasvit.spec import QuantSpec
from tasks import command
from tasks.classification.setup import MINI, PAPER
from tasks.command import Profile, make_cells, make_device, parse_options


def test_values_are_numbers_truth_values_or_text() -> None:
    options = parse_options(["a=3", "b=0.5", "c=true", "d=false", "e=block", "f=a=b", "g=1e-3"])
    assert options == {"a": 3, "b": 0.5, "c": True, "d": False, "e": "block", "f": "a=b", "g": 0.001}
    assert type(options["a"]) is int
    assert parse_options([]) == {}


@pytest.mark.parametrize("text", ["autocast", "=true", "autocast=", ""])
def test_what_is_no_option_is_said(text: str) -> None:
    with pytest.raises(IasvitError, match=f"--option '{text}' is not of the form NAME=VALUE, such as autocast=true"):
        parse_options([text])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["seed=5"], "'seed=5' sets the seed, which --seed does"),
        (["iterations=3"], "'iterations=3' gives 'iterations' a second time"),
        (["a=1", "a=1"], "'a=1' gives 'a' a second time"),
        (["lr=null"], "'lr=null' gives no value"),
    ],
)
def test_an_option_is_given_once_and_not_beside_its_own(texts: list[str], said: str) -> None:
    with pytest.raises(IasvitError, match=said):
        parse_options(texts, {"iterations": 2, "lr": None})
    assert parse_options(["lr=1"], {"iterations": 2, "lr": None}) == {"iterations": 2, "lr": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": float("inf")}, "method 'ias_vit': lr is inf"),
        ({"sos": "maybe"}, "sos is 'maybe', but true or false"),
        ({"sulq": "maybe"}, "--option sulq is not an option of ias_vit"),
        ({"iterations": "abc"}, "iterations is 'abc'"),
        ({"batch_size": True}, "batch_size is True"),
    ],
)
def test_a_value_that_no_method_takes_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(IasvitError, match=said):
        make_cells(["m"], [QuantSpec.parse("W4A4")], ["ias_vit"], [0], 4, Profile(), options)


def test_the_same_number_is_the_same_cell() -> None:
    spec = [QuantSpec.parse("W4A4")]
    one, other = (make_cells(["m"], spec, ["ias_vit"], [0], 4, Profile(), {"lr": lr}) for lr in (1, 1.0))
    assert str(one) == str(other)


def test_seeds_are_those_of_all_generators() -> None:
    with pytest.raises(IasvitError, match="--seed is 4294967296, but 4294967295 at most is expected"):
        make_cells(["m"], [QuantSpec.parse("W4A4")], ["rtn"], [2**32], 4, Profile(), {})


@pytest.mark.parametrize(
    ("jobs", "threads", "device", "kind", "expected"),
    [
        (None, None, "cpu", "embedded", 6),
        (None, None, "cpu", "real", 1),
        (None, 2, "cpu", "embedded", 1),
        (None, None, "cuda", "embedded", 1),
        (3, None, "cpu", "real", 3),
        (3, 1, "cpu", "real", 3),
        (1, 4, "cpu", "embedded", 1),
        (2, None, "cuda", "real", "--jobs is 2, but cells run side by side on a CPU only"),
        (2, 4, "cpu", "real", "--threads is 4, but cells side by side have one thread each"),
    ],
)
def test_how_many_cells_run_at_once(
    monkeypatch: pytest.MonkeyPatch, jobs: int | None, threads: int | None, device: str, kind: str, expected: int | str
) -> None:
    monkeypatch.setattr(command, "usable_cores", lambda: 6)
    task = SimpleNamespace(data=SimpleNamespace(kind=kind), device=torch.device(device))
    if isinstance(expected, int):
        assert command._jobs(task, jobs, threads) == expected
    else:
        with pytest.raises(IasvitError, match=expected):
            command._jobs(task, jobs, threads)


@pytest.mark.parametrize("name", ["meta", "cuda:99", "nope", "\udcff"])
def test_a_device_that_computes_nothing_here_is_refused(name: str) -> None:
    with pytest.raises(IasvitError, match="cannot be used here"):
        make_device(name)


def test_an_unknown_option_is_named() -> None:
    specs = [QuantSpec.parse("W4A4")]
    with pytest.raises(IasvitError, match="--option no_such is not an option of ias_vit, rtn"):
        make_cells(["m"], specs, ["ias_vit", "rtn"], [0], 4, Profile(), parse_options(["no_such=1"]))
    cells = make_cells(
        ["m"], specs, ["ias_vit", "rtn"], [0], 4, Profile(iterations=9), parse_options(["autocast=true"])
    )
    assert [dict(cell.options).get("autocast") for cell in cells] == [True, None]
    assert [dict(cell.options).get("iterations") for cell in cells] == [9, None]


def test_the_fast_recipe_takes_at_most_a_fifth_of_the_images_and_most_in_stage_3() -> None:
    spec = QuantSpec.parse("W3A3")
    for profile in (PAPER, MINI):
        plain, fast = (profile.by(recipe).options(spec, "ias_vit") for recipe in ("paper", "fast"))
        images = [options["iterations"] * options["batch_size"] for options in (plain, fast)]
        assert 5 * images[1] <= images[0]
        assert "stage1_share" not in plain
        assert "recipe" not in plain
        assert fast["recipe"] == "fast"
        assert fast["stage1_share"] == RECIPES["fast"].stage1_share
    assert PAPER.by("fast").iterations == RECIPES["fast"].iterations[0]
    assert PAPER.by("fast").lr == RECIPES["fast"].lr
