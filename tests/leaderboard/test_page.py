"""The leaderboard's page: what it holds, and, where Chromium is found, how it behaves.

Chromium is looked for on the path; the environment variable IASVIT_CHROMIUM names another one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from result_rows import PUBLISHED_HEADER, make_row

from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.page import Value, page
from iasvit.leaderboard.published import published_documents, read_published
from iasvit.leaderboard.views import page_values

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
CHROMIUM = os.environ.get("IASVIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
    "--dump-dom",
]
KEPT = (
    "8 codes at 3 bits; integer zero-points; static; activations per tensor; weights per row; float: image; "
    "network unchanged"
)
BROKEN = (
    "9 codes at 3 bits; integer zero-points; static; activations per token; weights per row; float: image; "
    "network changed by relu_mlps"
)


def value(number: float | None, method: str, bits: str = "W3A3", kind: str = "embedded", **more: Any) -> Value:
    given = {"heading": f"Of kind {kind}", "task": "imagenet", "dataset": "mini", "model": "vit_s", "metric": "top1"}
    return Value(kind=kind, method=method, bits=bits, value=number, **{**given, **more})


COCO = {"task": "coco", "model": "mask_rcnn_swin_t", "metric": "bbox_mAP"}
VALUES = [
    value(9.5, "b", gap=-70.5, seeds=3, std=1.25, error=0.4, seconds=12.0, device="cpu", images=20, rules=(BROKEN,),
          settings="calib_size=8", source="python tasks/imagenet.py", note="other version"),
    value(60.0, "b", gap=-30.0, model="swin_t", best=True),
    value(79.5, "a", gap=-0.5, best=True, seconds=100.0, device="cpu", rules=(KEPT,)),
    value(50.0, "a", gap=-40.0, model="swin_t", seconds=3.0, device="gpu"),
    value(None, "c", note="failed"),
    value(78.0, "weights", gap=-2.0, competes=False, seconds=1.0, device="cpu"),
    value(78.0, "elsewhere", gap=-2.0, seconds=1.0, device="gpu"),
    value(50.0, "a", "W4A4"),
    value(40.0, "d", "W6A6", gap=-6.0, **COCO),
    value(35.0, "d", "W6A6", gap=-6.0, **{**COCO, "metric": "segm_mAP"}),
    value(60.0, "paper <b>", "W4A4", kind="published", dataset="", source="arXiv:1 & 2"),
    value(55.0, "a", "W4A4", kind="real", dataset="photographs"),
]  # fmt: skip


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_holds_every_value() -> None:
    data = data_of(page(VALUES))
    tables = {(table["kind"], table["task"], table["dataset"]): table for table in data["tables"]}
    assert list(tables) == [
        ("real", "imagenet", "photographs"),
        ("embedded", "coco", "mini"),
        ("embedded", "imagenet", "mini"),
        ("published", "imagenet", ""),
    ]
    table = tables["embedded", "imagenet", "mini"]
    assert table["bits"] == ["W3A3", "W4A4"]
    assert table["headings"]["W3A3"] == "Of kind embedded"
    assert [cell["method"] for cell in table["cells"]] == ["b", "b", "a", "a", "c", "weights", "elsewhere", "a"]
    first = table["cells"][0]
    texts = {name: data["texts"][first.pop(name)] for name in ("settings", "device", "source", "note")}
    assert texts == {
        "settings": "calib_size=8",
        "device": "cpu",
        "source": "python tasks/imagenet.py",
        "note": "other version",
    }
    rules = data["rules"][first.pop("rules")]
    assert rules == {"text": [BROKEN], "broken": ["9 values at 3 bits", "activations per token"], "changed": True}
    assert first == {
        **{"bits": "W3A3", "metric": "top1", "method": "b", "model": "vit_s", "value": 9.5, "std": 1.25},
        **{"error": 0.4, "gap": -70.5, "seeds": 3, "images": 20, "seconds": 12.0},
    }
    assert list(tables["embedded", "coco", "mini"]["metrics"]) == ["bbox_mAP", "segm_mAP"]


def test_a_table_holds_one_kind_of_number_of_one_task_and_data_set() -> None:
    kinds, tasks, datasets = ("published", "real", "embedded"), ("x", "y"), ("mini", "")
    cases = list(itertools.product(kinds, tasks, datasets))
    html = page([value(float(i), "a", kind=k, task=t, dataset=d) for i, (k, t, d) in enumerate(cases)])
    found = {(t["kind"], t["task"], t["dataset"]): [c["value"] for c in t["cells"]] for t in data_of(html)["tables"]}
    assert found == {case: [float(place)] for place, case in enumerate(cases)}


def test_stored_rows_and_published_values_come_to_the_page(tmp_path: Path) -> None:
    (tmp_path / "published.csv").write_text(
        PUBLISHED_HEADER + "imagenet,vit_s,fp32,32,32,top1,81,x\nimagenet,vit_s,a,3,3,top1,75,arXiv:1\n"
    )
    rows = [make_row(seed=seed, top1=70.0 + seed, admission=KEPT, transformed="") for seed in range(2)]
    rows += [make_row(method="rtn", a_bits=32, spec="W3A32", w_bits=3, top1=79.0)]
    documents = [*measured_documents(rows), *published_documents(read_published(tmp_path / "published.csv"))]
    values = {found.method: found for found in page_values(documents)}
    noise = values["noise"]
    assert (noise.value, noise.std, noise.error, noise.gap, noise.seeds) == (
        70.5,
        pytest.approx(0.7071, 1e-3),
        1.5,
        -9.5,
        2,
    )
    assert (noise.rules, noise.images, noise.device, noise.source) == ((KEPT,), 20, "cpu: test", "python x.py")
    assert noise.best
    assert (values["rtn, weights only"].competes, values["rtn, weights only"].rules) == (False, ())
    assert (values["a"].kind, values["a"].value, values["a"].gap, values["a"].source) == (
        "published",
        75.0,
        -6.0,
        "arXiv:1",
    )


def test_models_come_in_the_order_of_their_task() -> None:
    rows = [make_row(task="imagenet", model=model) for model in ("swin_t", "deit_t", "vit_s")]
    assert [found.model for found in page_values(measured_documents(rows))] == ["vit_s", "deit_t", "swin_t"]


@pytest.mark.parametrize("name", ["{{ 1 + 1 }}", "</script><script>alert(1)", '" onclick="', "a_b", "<!--"])
def test_no_name_is_read_as_part_of_the_page(name: str) -> None:
    html = page([value(1.0, name, model=name, source=name, heading=name, note=name)])
    empty = page([])
    for mark in ("<script", "</script", "<!--", "onclick"):
        assert html.count(mark) == empty.count(mark) or (mark == "onclick" and mark in name)
    (table,) = data_of(html)["tables"]
    assert table["cells"][0]["method"] == table["headings"]["W3A3"] == name


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page(VALUES)
    assert not re.findall(r"(?:src|href)=|@import|url\(|\bfetch\(|XMLHttpRequest", html)
    assert re.findall(r"https?://[^\"' ]*", html) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in html
    assert len(page([]).encode()) < 40_000  # without values


# ---- In a browser

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; IASVIT_CHROMIUM may name one")


def browse(folder: Path, address: str = "", script: str = "", result: str = "null", width: int = 1280) -> Any:
    """What a JavaScript expression is on the page, after a script and then what follows from it."""
    code = f"""
      addEventListener("error", event => document.body.append("FAILED " + event.message));
      const all = selector => [...document.querySelectorAll(selector)];
      const texts = selector => all(selector).map(node => node.textContent);
      const press = (node, key) => node.dispatchEvent(
        new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
      setTimeout(() => {{ {script};
        setTimeout(() => {{
          const found = document.createElement("pre");
          found.id = "found";
          found.textContent = JSON.stringify({result});
          document.body.append(found);
        }}, 500);
      }}, 100);"""
    path = folder / "index.html"
    path.write_text(page(VALUES).replace("</body>", f"<script>{code}</script></body>"), encoding="utf-8")
    command = [
        CHROMIUM,
        *FLAGS,
        f"--window-size={width},900",
        f"--user-data-dir={folder / 'profile'}",
        path.as_uri() + address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "FAILED " not in done.stdout.split("</script>")[-1], done.stdout[-2000:]
    return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))


MINI = "#task=imagenet&data=mini&bits=W3A3"
METHODS = "all('tr[data-method]').map(row => row.dataset.method)"
SELECTED = "all('[aria-selected=true]').map(tab => tab.firstChild.textContent)"


@in_browser
@pytest.mark.parametrize(
    ("address", "script", "expected"),
    [
        # By mean difference; what covers few backbones or has no value is behind, weights only is last.
        (MINI, "", ["a", "b", "elsewhere", "c", "weights"]),
        (MINI + "&sort=method", "", ["a", "b", "c", "elsewhere", "weights"]),
        (MINI + "&sort=method&order=reversed", "", ["weights", "elsewhere", "c", "b", "a"]),
        (MINI, "all('th button')[3].click()", ["b", "a", "c", "elsewhere", "weights"]),
        (MINI + "&sort=model:swin_t", "all('th button')[3].click()", ["a", "b", "c", "elsewhere", "weights"]),
    ],
)  # fmt: skip
def test_the_order_of_methods(tmp_path: Path, address: str, script: str, expected: list[str]) -> None:
    assert browse(tmp_path, address, script, METHODS) == expected


@in_browser
@pytest.mark.parametrize(
    ("address", "script", "expected"),
    [
        ("", "", ["imagenet · photographs", "W4A4", "Matrix"]),
        ("#task=coco&metric=segm_mAP&view=scatter", "", ["coco · mini", "W6A6", "segm_mAP", "Accuracy and seconds"]),
        (MINI, "all('[role=tab]')[0].click()", ["imagenet · photographs", "W4A4", "Matrix"]),
        (MINI, "press(all('[role=tab]')[2], 'ArrowRight')", ["imagenet", "W4A4", "Matrix"]),
        (MINI, "press(all('[role=tab]')[2], 'End')", ["imagenet", "W4A4", "Matrix"]),
        (MINI, "press(all('[role=tab]')[2], 'ArrowLeft')", ["coco · mini", "W6A6", "bbox_mAP", "Matrix"]),
        (MINI, "press(all('[role=tablist]')[1].firstChild, 'ArrowLeft')", ["imagenet · mini", "W4A4", "Matrix"]),
    ],
)  # fmt: skip
def test_tabs_by_address_click_and_key(tmp_path: Path, address: str, script: str, expected: list[str]) -> None:
    found = browse(tmp_path, address, script, f"[{SELECTED}, location.hash]")
    assert found[0] == expected
    again = browse(tmp_path, found[1], "", SELECTED)  # the address restores the view
    assert again == expected


@in_browser
def test_what_an_address_names_in_vain_is_said(tmp_path: Path) -> None:
    status = "document.getElementById('status').textContent"
    assert browse(tmp_path, MINI, "", status) == ""
    assert browse(tmp_path, "#data=mini&task=imagenet&bits=W9A9", "", status) == "bits W9A9 is not here: W4A4 is shown."
    assert "first one is shown" in browse(tmp_path, "#data=none", "", status)


@in_browser
def test_a_tab_keeps_the_focus_and_names_the_panel(tmp_path: Path) -> None:
    script = "all('[role=tab]')[2].focus(); press(all('[role=tab]')[2], 'ArrowRight')"
    names = "document.getElementById('panel').getAttribute('aria-labelledby').split(' ')"
    result = f"[document.activeElement.textContent, {names}.map(id => document.getElementById(id).role)]"
    assert browse(tmp_path, MINI, script, result) == ["imagenetpublished", ["tab", "tab", "tab"]]


@in_browser
def test_the_matrix_is_a_table_with_loss_rules_and_full_precision(tmp_path: Path) -> None:
    result = "all('tbody tr').map(row => [...row.cells].map(cell => cell.innerText.replaceAll('\\n', ' ')))"
    rows = {row[0]: row[1:] for row in browse(tmp_path, MINI, "", result)}
    assert rows["full precision"] == ["", "80.00", "90.00", ""]
    assert rows["a"][0] == "−20.25"
    assert rows["a"][1].startswith("79.50 best")
    assert rows["a"][1].endswith("−0.50")
    assert rows["a"][3] == "keeps the rules; known for 1 of 2"
    assert rows["b"][3] == "breaks: 9 values at 3 bits; activations per token; network changed; known for 1 of 2"
    assert "9.50 ±1.25" in rows["b"][1]
    assert "failed" in rows["c"][1]
    assert rows["c"][3] == "not computed"
    assert rows["elsewhere"][2].startswith("–")
    classes = "all('tr[data-method=b] td.value').map(cell => cell.className.match(/loss\\d/)[0])"
    assert browse(tmp_path, MINI, "", classes) == ["loss4", "loss3"]
    scope = "all('{} th').every(cell => cell.scope === '{}')"
    scopes = f"{scope.format('tbody', 'row')} && {scope.format('thead', 'col')}"
    sorts = "all('th[aria-sort]').map(cell => [cell.textContent, cell.ariaSort])"
    assert browse(tmp_path, MINI, "", f"[{scopes}, all('table caption').length, {sorts}]") == [
        *(True, 1, [["mean difference", "descending"]]),
    ]


@in_browser
def test_a_cell_opens_its_details_and_arrow_keys_move_between_cells(tmp_path: Path) -> None:
    script = "const cell = all('tr[data-method=b] td button')[0]; cell.focus(); cell.click()"
    result = "[document.getElementById('details').open, texts('dialog h2')[0], texts('dialog dt'), texts('dialog dd')]"
    is_open, title, names, values = browse(tmp_path, MINI, script, result)
    entries = dict(zip(names, values, strict=True))
    assert (is_open, title) == (True, "b, vit_s, W3A3")
    assert entries["commands"] == "python tasks/imagenet.py"
    assert (entries["top1"], entries["standard error of the split"], entries["seeds"]) == ("9.50 ± 1.25", "0.40", "3")
    assert entries["breaks the rules"] == "9 values at 3 bits; activations per token"
    keys = "const cell = all('tr[data-method=a] td button')[0]; cell.focus(); press(cell, 'ArrowRight'); "
    keys += "press(document.activeElement, 'ArrowDown')"
    focus = "document.activeElement"
    stops = """all('td button[tabindex="0"]').length"""
    result = f"[{focus}.closest('tr').dataset.method, {focus}.textContent, {stops}]"
    method, shown, stops = browse(tmp_path, MINI, keys, result)
    assert (method, shown[:5], stops) == ("b", "60.00", 1)


@in_browser
def test_the_scatter_plot_has_one_device_a_front_hover_and_a_table(tmp_path: Path) -> None:
    scatter = MINI + "&view=scatter&model=vit_s"
    script = "all('.point')[2].dispatchEvent(new Event('pointerenter'))"
    results = [
        "all('.point').map(point => point.getAttribute('aria-label'))",
        "texts('#tip')[0]",
        "document.getElementById('tip').hidden",
        "texts('tbody tr')",
        "texts('caption')[0]",
        "all('.point.apart').length",
        "document.querySelector('.front').getAttribute('d')",
    ]
    result = f"[{', '.join(results)}]"
    labels, tip, is_hidden, rows, caption, apart, front = browse(tmp_path, scatter, script, result)
    assert labels == [
        "weights, top1 78.00 (−2.00), 1.0 seconds",
        "b, top1 9.50 ± 1.25 (−70.50), 12.0 seconds",
        "a, top1 79.50 (−0.50), 100.0 seconds",
    ]
    assert (tip.splitlines()[0], is_hidden) == ("a", False)
    assert len(rows) == 3
    assert "on cpu" in caption
    assert "1 measured on another device, which does not compare; 1 without seconds or value" in caption
    assert (apart, front.count("H")) == (1, 1)
    enter = "press(all('.point')[0], 'Enter')"
    assert browse(tmp_path, scatter, enter, "texts('dialog h2')") == ["weights, vit_s, W3A3"]
    message = "texts('#panel p').some(text => text.includes('have no seconds'))"
    assert browse(tmp_path, "#kind=published&view=scatter", "", message)


@in_browser
@pytest.mark.parametrize("address", [MINI, MINI + "&view=scatter", "#kind=published"])
def test_a_telephone_scrolls_the_table_and_not_the_page(tmp_path: Path, address: str) -> None:
    width, needed = browse(tmp_path, address, "", "[innerWidth, document.documentElement.scrollWidth]", width=390)
    if width != 390:
        pytest.skip(f"this Chromium has no window of 390 pixels, but one of {width}")
    assert needed <= 390
