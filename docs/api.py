"""Builds the API reference from the docstrings: `tox -e docs`, or `python docs/api.py [FOLDER]`."""

from __future__ import annotations

import argparse
import pkgutil
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import iasvit
from tasks.detection import ops


def main() -> None:
    """Write a page for each module of iasvit, index.html first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/api"), help="default: build/api")
    folder = parser.parse_args().folder
    ops.install()  # mmdet, which the adapters of detectors import
    for name in iasvit.__all__:  # they are loaded when first used, and pdoc reads what is loaded
        setattr(iasvit, name, getattr(iasvit, name))
    found = [module.name for module in pkgutil.walk_packages(iasvit.__path__, "iasvit.")]
    modules = ["iasvit", *(name for name in found if not name.endswith("__main__"))]
    warnings.filterwarnings("ignore", "The module specification")  # of a package's modules, which it names too
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"iasvit {iasvit.__version__}")
    pdoc.pdoc(*modules, output_directory=folder)
    print(f"{folder / 'index.html'}: {len(modules)} modules")


if __name__ == "__main__":
    main()
