"""The pages of docs/ on how to add something, done: what they print is run."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import commands
import pytest
import torch
from PIL import Image

import iasvit
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import EMBEDDED
from iasvit.progress import Progress
from tasks.classification import setup
from tasks.imagenet import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("adding-a-*.md"))


def code_block(page: str, language: str) -> str:
    """The one code block of a page in a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return block


@pytest.fixture
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A page's Python code as an importable module: indirect, (page, name of the module)."""
    page, name = request.param
    (tmp_path / f"{name}.py").write_text(code_block(page, "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages(page: Path) -> None:
    for target in re.findall(r"\]\(([^):]+\.md)\)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).is_file(), target


def test_a_data_set_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "SOURCES", dict(setup.SOURCES))
    exec(code_block("adding-a-data-set.md", "python"), {})
    for name in ("daisies/0.png", "daisies/1.png", "roses/0.png", "roses/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / name)
    args = ["--data", "flowers", "--data-root", tmp_path, "--no-pretrained", "--backbone", "test_vit", "--dry-run"]
    sentence = commands.complaint(app, monkeypatch, capsys, *args, "--calib-size", 2)
    assert "1000 classes, but the labels of flowers are of 2" in sentence


def test_a_metric_is_one_description_and_one_value() -> None:
    names: dict = {}
    exec(code_block("adding-a-metric.md", "python"), names)
    task = names["WithConfidence"](setup.make_setup("mini", pretrained=False, limit=4))
    network = task.load_model("deit_t")
    reference = task.predict("deit_t", network, Progress())
    with torch.no_grad():
        network.head.weight.mul_(9)
    outputs = task.predict("deit_t", network, Progress())
    assert set(task.score(outputs, reference)) == {metric.name for metric in task.scored}
    assert task.score(reference, reference)["confidence_gap"] == 0 < task.score(outputs, reference)["confidence_gap"]


@pytest.mark.parametrize("module", [("adding-a-task.md", "iasvit_stripes")], indirect=True)
def test_a_task_is_one_class(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f'= "{module.__name__}:Stripes"' in code_block("adding-a-task.md", "toml")
    monkeypatch.chdir(tmp_path)
    assert commands.run(module.Stripes.command(), monkeypatch, "--method", "rtn", "--bits", "W8A8") == 0
    out = capsys.readouterr().out
    assert "top1, 64 images" in out
    assert str(Path("results/runs/stripes-drawn.csv")) in out
    rows = ResultStore("results/runs").rows().set_index("method")
    assert rows.loc["rtn", "agreement"] > 90
    assert rows.loc["rtn", "fp_top1"] == rows.loc["fp32", "top1"]
    assert module.Stripes.data_sets["drawn"].kind == EMBEDDED


@pytest.mark.parametrize("module", [("adding-a-model-family.md", "patch_mlp")], indirect=True)
def test_a_model_family_is_one_adapter(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = re.findall(r'^"(.*)" = "(.*)"$', code_block("adding-a-model-family.md", "toml"), re.MULTILINE)[0]
    entry = EntryPoint(name, value, "iasvit.models")
    monkeypatch.setattr("iasvit.models.registry.entry_points", lambda group: [entry])
    torch.manual_seed(0)
    model, images = module.PatchMlp().eval(), torch.randn(8, 3, 32, 32)
    for method, options in (("minmax", {}), ("ias_vit", {"iterations": 2, "batch_size": 4})):
        quantized = iasvit.quantize(model, images, "W8A8", method, **options)
        assert torch.allclose(quantized(images), model(images), atol=0.1)
        iasvit.save(quantized, tmp_path / f"{method}.safetensors")
        assert torch.equal(iasvit.load(tmp_path / f"{method}.safetensors")(images), quantized(images))
