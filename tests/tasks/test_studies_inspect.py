"""The command `iasvit inspect`: what it prints and writes, and what it says to bad targets."""

from __future__ import annotations

from pathlib import Path

import commands
import pandas as pd
import pytest
import tiny_models
import torch

import iasvit
from tasks.mini import zoo
from tasks.studies.inspect_model import app


def test_a_file_gives_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "mine.safetensors"
    iasvit.save(iasvit.quantize(zoo.build("deit_t").eval(), images, "W4A4", "minmax"), path)
    assert commands.run(app, monkeypatch, path, "--images", 2, "--out", tmp_path) == 0
    assert "mine.safetensors: minmax at W4A4, 2 images of mini" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "inspect-mine.csv")
    assert set(written["operand"]) == {"weight", "input", "left", "right"}
    assert written["error"].notna().sum() == (written["operand"] != "weight").sum()
    assert "mine.safetensors" in (tmp_path / "inspect-mine.svg").read_text()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a model whose images are of another size than the mini benchmark's."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    iasvit.save(iasvit.quantize(tiny_models.vit(), tiny_models.images(2), "W4A4", "minmax"), path)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "backbone 'nope' does not exist in the mini benchmark"),
        (["none.safetensors"], "does not exist"),
        (["TINY"], "the checkpoint's model takes images 3×32×32, but those of --data mini are 3×56×56"),
        (["deit_t", "--images", 0], "--images is 0, but 1 or more is expected"),
        (["deit_t", "--out", "FILE"], "cannot be written: File exists; choose another one"),
        (["deit_t", "--iterations", 2], "--iterations is not an option of minmax"),
    ],
)
def test_bad_targets_are_one_sentence(
    arguments: list[object],
    said: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [tiny if argument in ("TINY", "FILE") else argument for argument in arguments]
    assert said in commands.complaint(app, monkeypatch, capsys, *given)
