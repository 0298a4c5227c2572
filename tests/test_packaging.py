"""What is published beside the code: the citation says the package's version, and the docs say the extras."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^(\w[\w-]*): ([^\n]+)$", text, re.M))
    about = metadata("iasvit")
    assert (stated["version"], stated["license"]) == (about["Version"], about["License-Expression"])


def test_the_page_on_installing_names_every_extra() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.M)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\[", project, re.S)[1]
    assert sorted(listed) == sorted(re.findall(r"^(\w+) = \[", block, re.M))
