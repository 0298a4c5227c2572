"""docs/adding-a-method.md, done: a package of somebody else's, installed and run by name through the harness."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs in a process of its own, which knows the method by its installed package alone.
SCRIPT = """
import json
from pathlib import Path
import torch
from baselines_tiny import tiny_images, tiny_model
import iasvit
from iasvit.benchmark.harness import Cell, exit_status, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import DataSet, Metric, Task

class Noise(Task):
    name, metrics, data, split_size = "tiny", (Metric("agreement", primary=True),), DataSet("noise"), 64

    def data_fingerprint(self):
        return "seed 99"

    def load_model(self, model):
        return tiny_model(model)

    def calibration(self, model, n, seed):
        return tiny_images(tiny_model(model), n, seed)

    def predict(self, model, network, progress):
        return network(tiny_images(network, self.split_size, seed=99)).argmax(dim=1)

    def score(self, predictions, reference):
        return {"agreement": float((predictions == reference).float().mean() * 100)}

cells = [Cell("vit", "clipped", spec, 0, 8, (("percentile", 0.99),)) for spec in ("W3A3", "W8A8")]
rows = run_cells(Noise(), cells, ResultStore(Path("runs")), checkpoint_root=Path("checkpoint"), quiet=True)
model = tiny_model("swin")
quantized = iasvit.quantize(model, tiny_images(model, 4), "W4A4", "clipped")
iasvit.save(quantized, "model.safetensors")
loaded = iasvit.load("model.safetensors")
x = tiny_images(model, 2)
print(json.dumps({
    "methods": iasvit.list_methods(),
    "rows": [{key: row[key] for key in ("method", "spec", "status", "reason", "agreement", "options")} for row in rows],
    "stored": len(ResultStore(Path("runs")).rows()),
    "loads": torch.equal(loaded(x), quantized(x)),
    "status": exit_status(rows),
}))
"""


def code_blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def install(package: Path, target: Path) -> None:
    """Install a package into a folder, without a network."""
    # Not find_spec("pip"): setuptools watches for it, and this process could not compile extensions any more.
    if any(package.name == "pip" for package in importlib.metadata.distributions()):
        command = [sys.executable, "-m", "pip", "install", "--no-index"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--offline", "--python", sys.executable]
    else:
        pytest.skip("neither pip nor uv is there to install a package with")
    command += ["--no-deps", "--no-build-isolation", "--target", str(target), str(package)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_a_package_of_somebody_elses_adds_a_method(tmp_path: Path) -> None:
    package = tmp_path / "clipped"
    package.mkdir()
    (pyproject,), (module,) = code_blocks("toml"), code_blocks("python")
    (package / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    (package / "iasvit_clipped.py").write_text(module, encoding="utf-8")
    body = module[module.index("@dataclass") :].splitlines()
    assert len([line for line in body if line.strip()]) <= 20  # twenty lines, as the page promises
    install(package, tmp_path / "site")
    path = os.pathsep.join(str(folder) for folder in (tmp_path / "site", ROOT, ROOT / "tests"))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert {"clipped", "ias_vit"} <= set(told["methods"])
    low, high = told["rows"]
    assert (low["method"], low["spec"], low["options"]) == ("clipped", "W3A3", "percentile=0.99")
    assert [(row["status"], row["reason"]) for row in told["rows"]] == [("ok", ""), ("ok", "")]
    assert low["agreement"] < high["agreement"]
    assert told["stored"] == 3  # and the full-precision model's row
    assert told["loads"]
    assert told["status"] == 0
