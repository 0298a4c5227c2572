"""`iasvit submit`: the row of somebody's method, the rules that it breaks, and what is no method."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from iasvit.admission import Admission
from iasvit.cli import main
from iasvit.methods import list_methods
from iasvit.rules import sentence, violations

ROOT = Path(__file__).parents[1]
SMALL = ["--calib-size", "4", "--limit", "10"]


def method(weight: str = "quantizer", activation: str = "quantizer", last: str = "", name: str = "mine") -> str:
    """A method's file; `quantizer` and `Fine`, `Dynamic` and `None` may be what it puts at weights and activations."""
    return f"""
import copy
from dataclasses import dataclass

from iasvit.calibration import calibrate_in_sequence, calibrate_weights, first_images
from iasvit.models import insert_quantizers
from iasvit.nn import quant_layers, quantizers_of
from iasvit.quantizers import UniformQuantizer


class Dynamic(UniformQuantizer):
    kind = "dynamic"

    def _evaluate(self, x):
        scale = (x.amax() - x.amin()) / (2**self.n_bits - 1)
        return ((x - x.amin()) / scale).round() * scale + x.amin()


def quantizer(site, **more):
    return UniformQuantizer(site.n_bits, **more)


def fine(site):
    return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)


def dynamic(site):
    return Dynamic(site.n_bits) if site.role == "gelu" else quantizer(site)


@dataclass
class Mine:
    seed: int = 0
    name = "{name}"

    def quantize(self, model, calibration, spec, progress):
        quantized = insert_quantizers(copy.deepcopy(model), spec, {weight}, {activation}).requires_grad_(False)
        images = first_images(calibration, 4, next(model.parameters()).device)
        calibrate_weights(quant_layers(quantized))
        calibrate_in_sequence(list(quantizers_of(quantized, weights=False)), lambda: quantized(images))
        {last or "pass"}
        return quantized
"""


def submit(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["iasvit", "submit", *map(str, arguments)])
    before = list(sys.path), list_methods()
    with pytest.raises(SystemExit) as ended:
        main()
    assert (list(sys.path), list_methods()) == before  # what was registered is gone
    return ended.value.code


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_file_that_keeps_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit(monkeypatch, write(tmp_path, method()), "--backbone", "swin_t", "--bits", "W6A5", *SMALL) == 0
    out = capsys.readouterr().out
    row = dict(re.findall(r"^(\w+)  +(.*)$", out, re.M))
    assert (row["method"], row["model"], row["spec"], row["split_size"], row["status"]) == (
        *("mine", "swin_t", "W6A5", "10", "ok"),
    )
    assert row["admission"].startswith("64 codes at 6 bits; integer zero-points; static; activations per tensor")
    assert float(row["top1"]) >= 0
    assert float(row["packed_bytes"]) < float(row["model_bytes"]) / 3
    assert out.endswith("verdict: keeps the admission rules\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]  # nothing is stored


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (method(activation="fine"), "An activation has a range for each channel; one range for the tensor is allowed."),
        (method(activation="dynamic"), "A quantizer's parameters depend on the values that it is given"),
        (
            method(last="quantized.blocks[0].mlp.fc1.input_quantizer.zero_point += 0.5"),
            "A zero-point is not a whole number; all zero-points must be.",
        ),
        (
            method(last="quantized.blocks[1].mlp.fc2.input_quantizer.enabled = False"),
            "No quantizer touches 1 of the activations; each but the image must have one.",
        ),
        (method(last="raise RuntimeError('no luck.')"), "The method failed: RuntimeError: no luck."),
    ],
)
def test_a_broken_rule_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    text = text.replace(
        "zero_point += 0.5", "zero_point = quantized.blocks[0].mlp.fc1.input_quantizer.zero_point + 0.5"
    )
    assert submit(monkeypatch, write(tmp_path, text), *SMALL) == 1
    verdict = capsys.readouterr().out.partition("verdict: not admitted\n")[2]
    assert f"- {said}" in verdict
    assert all(re.fullmatch(r"- [A-Z].*\.", line) for line in verdict.splitlines())


def test_a_registered_method_a_variant_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(monkeypatch, "rtn", *SMALL) == 1
    assert "of the activations; each but the image must have one" in capsys.readouterr().out
    assert submit(monkeypatch, "minmax", "--option", "calib_images=2", *SMALL) == 2
    assert "calib_images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("def x(:", (), "mine.py cannot be imported: SyntaxError in line 1"),
        ("import nothing_such", (), "mine.py cannot be imported: ModuleNotFoundError"),
        ("1 / 0", (), "mine.py cannot be imported: ZeroDivisionError"),
        ("class A:\n    pass", (), "mine.py has no method: a class with a name and quantize("),
        (method().replace("@dataclass\n", ""), (), "Mine of"),
        (method(name="minmax"), (), "has the name 'minmax', which is registered; choose another"),
        (method(name="a b"), (), "has the name 'a b'; letters, digits and _ are allowed"),
        (method(), ("--class", "Other"), "has no method 'Other'; it has Mine"),
        (method() + "class Two(Mine):\n    name = 'two'\n", (), "several methods: Mine, Two; choose one with --class"),
        (method(), ("--bits", "W9"), "bits 'W9'"),
        (method(), ("--backbone", "vit_x"), "vit_x"),
        (method(), ("--option", "steps=3"), "--option steps"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    more: tuple[str, ...],
    said: str,
) -> None:
    assert submit(monkeypatch, write(tmp_path, text), *SMALL, *more) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("none.py", "none.py is no file"),
        ("no-name.py", "its name must be a Python name"),
        ("json.py", "has the name of another module, json; rename the file"),
        ("none", "none is no file, module or registered method; registered are "),
        ("none.such", "none.such is no file, module or registered method"),
        ("a b", "'a b' is no file, module or registered method"),
    ],
)
def test_what_is_no_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, method(), "no-name.py")
    write(tmp_path, method(), "json.py")
    assert submit(monkeypatch, target) == 2
    assert said in capsys.readouterr().err


def test_violations_read_from_the_text_are_those_of_the_model() -> None:
    kept = Admission(3, 8, True, True, "tensor", "row", ("image",), ())
    changes = {
        "codes": (8, 9, 17),
        "integer_zero_points": (True, False),
        "static": (True, False),
        "granularity": ("tensor", "channel", "token"),
        "floats": ((), ("image",), ("image", "2 weights", "3 activations")),
        "transforms": ((), (("relu_mlps", False),), (("rotate_heads", True),)),
    }
    seen = set()
    for chosen in itertools.product(*changes.values()):
        admission = replace(kept, **dict(zip(changes, chosen, strict=True)))
        assert violations(str(admission)) == admission.violations
        seen |= set(admission.violations)
    sentences = {sentence(violation) for violation in seen}
    assert len(sentences) == len(seen) == 8
    assert not [text for text in sentences if text.startswith("It breaks a rule")]
    assert sentence("17 values at 4 bits") == "A quantizer gives 17 different values at 4 bits; at most 16 are allowed."
