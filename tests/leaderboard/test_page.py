"""The leaderboard's page: what it holds, and, where Chromium is installed, how it behaves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from markupsafe import escape

from iasvit.leaderboard.page import Value, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def value(number: float | None, method: str, bits: str = "W3A3", kind: str = "Measured", **more: object) -> Value:
    given = {"heading": kind, "task": "imagenet", "dataset": "mini", "model": "vit_s", "metric": "top1", **more}
    return Value(kind=kind, method=method, bits=bits, value=number, **given)


VALUES = [
    value(9.5, "b", gap=-70.5, seeds=3, std=1.25, seconds=12.0, how="calib_size=8\npython tasks/imagenet.py"),
    value(10.0, "a", best=True),
    value(None, "c", note="failed"),
    value(50.0, "a", "W4A4"),
    value(40.0, "d", "W6A6", task="coco", model="mask_rcnn_swin_t", metric="bbox_mAP"),
    value(60.0, "paper <b>", "W4A4", kind="Published", dataset="", how="arXiv:1 & 2"),
]


def shown(html: str) -> dict[str, list[str]]:
    """Heading of each visible table → the methods of its visible rows, in order."""
    tables = {}
    for attributes, heading, body in re.findall(r"<section([^>]*)><h2>(.*?)</h2>.*?<tbody>(.*?)</tbody>", html, re.S):
        if "hidden" not in attributes:
            rows = re.findall(r"<tr([^>]*)>", body)
            tables[heading] = [re.search(r'data-method="(.*?)"', row)[1] for row in rows if " hidden" not in row]
    return tables


def test_the_page_holds_every_value_and_escapes_what_it_is_given() -> None:
    html = page(VALUES, ["plots/x.svg"])
    assert shown(html) == {"Measured": ["b", "a", "c", "a", "d"], "Published": ["paper &lt;b&gt;"]}
    assert '<td class="number value" data-value="9.50">9.50 ± 1.25</td>' in html
    assert '<td class="number gap" data-value="-70.50">-70.50</td>' in html
    assert '<td class="number value" data-value="">failed</td>' in html
    assert "arXiv:1 &amp; 2" in html
    assert '<img loading="lazy" src="plots/x.svg" alt="x">' in html
    assert "{{" not in html
    assert "{%" not in html


@pytest.mark.parametrize("name", ["@plots@", "{{ 1 + 1 }}", "<script>", '" onclick="', "a_b"])
def test_no_name_is_read_as_part_of_the_page(name: str) -> None:
    html = page([value(1.0, name, model=name, how=name, kind=name, note=name)], [f"plots/{name}.svg"])
    shown = str(escape(name))
    assert html.count("<tr data-place") == html.count("<figure>") == 1
    assert f'data-method="{shown}" data-model="{shown}"' in html
    assert f"<td>{shown.replace('_', '_<wbr>')}</td>" in html
    assert f"<pre>{shown}</pre>" in html
    assert f"<h2>{shown}</h2>" in html


def test_two_kinds_with_one_heading_are_two_tables() -> None:
    html = page([value(1.0, "a"), value(2.0, "b", heading="Measured", kind="x")], [])
    assert html.count("<section>") == 2


def test_digits_are_the_metrics() -> None:
    html = page([value(0.1235, "a", digits=4, std=0.5, gap=-0.1)], [])
    assert '<td class="number value" data-value="0.1235">0.1235 ± 0.5000</td>' in html
    assert ">-0.1000<" in html


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page(VALUES, ["plots/x.svg"])
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//|@import|url\(""", html)


def browse(folder: Path, address: str = "", script: str = "") -> str:
    """The page's document as Chromium has it after loading and running a script in it."""
    path = folder / "index.html"
    path.write_text(page(VALUES, []).replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", path.as_uri() + address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(
    ("address", "script", "expected"),
    [
        ("", "", {"Measured": ["b", "a", "c", "a", "d"], "Published": ["paper &lt;b&gt;"]}),
        ("#bits=W3A3&sort=value", "", {"Measured": ["b", "a", "c"]}),
        ("#dataset=mini&sort=value&order=descending", "", {"Measured": ["a", "d", "a", "b", "c"]}),
        ("#task=coco", "", {"Measured": ["d"]}),
        ("#task=coco&bits=W3A3", "", {}),
        ("#task=imagenet&method=a&bits=W4A4", "", {"Measured": ["a"]}),
        # One click on a heading of numbers sorts descending, the next ascending; the failed cell stays last.
        ("", "document.querySelectorAll('th[data-key=value] button')[0].click()",
         {"Measured": ["a", "d", "a", "b", "c"], "Published": ["paper &lt;b&gt;"]}),
        ("#bits=W3A3", "for (let i of [1, 2]) document.querySelector('th[data-key=value] button').click()",
         {"Measured": ["b", "a", "c"]}),
        ("#bits=W3A3", "document.querySelector('th[data-key=method] button').click()", {"Measured": ["a", "b", "c"]}),
        ("", "const s = document.forms[0].elements.method; s.value = 'a'; "
             "s.dispatchEvent(new Event('change', {bubbles: true}))", {"Measured": ["a", "a"]}),
        ("#bits=W4A4", "document.forms[0].reset()",
         {"Measured": ["b", "a", "c", "a", "d"], "Published": ["paper &lt;b&gt;"]}),
    ],
)  # fmt: skip
def test_sorting_and_filtering_in_a_browser(
    tmp_path: Path, address: str, script: str, expected: dict[str, list[str]]
) -> None:
    assert shown(browse(tmp_path, address, script)) == expected
