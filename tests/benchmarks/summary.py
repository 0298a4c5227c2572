"""What matters of pytest-benchmark's JSON: the machine, each benchmark's seconds, and its ratio to the plain version.

`python tests/benchmarks/summary.py RAW.json [--out FILE] [--note TEXT]` prints the ratios and, with --out, writes the
summary there: `tox -e bench` without options of its own keeps it in results/benchmarks/bench.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from iasvit.files import replacing

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")  # of a CPU; those that torch's kernels ask for


def summary(raw: dict[str, Any], note: str = "") -> dict[str, Any]:
    """The summary of what `--benchmark-json` wrote; of cards, the first one's name."""
    cpu = raw["machine_info"].get("cpu", {})
    machine = {
        "processor": cpu.get("brand_raw", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", [])],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cpu.get("count"),
        "system": raw["machine_info"]["system"],
        "python": raw["machine_info"]["python_version"],
        "torch": torch.__version__,
        "timm": version("timm"),
    }
    kept = [
        {
            "name": each["name"],
            "group": each["group"],
            **each["extra_info"],
            "seconds": float(f"{each['stats']['min']:.4g}"),
            "rounds": each["stats"]["rounds"],
        }
        for each in raw["benchmarks"]
    ]
    head = {"machine": machine, "note": note, "commit": raw["commit_info"].get("id"), "datetime": raw["datetime"]}
    return {key: value for key, value in head.items() if value} | {"benchmarks": kept}


def main(arguments: list[str] | None = None) -> None:
    """See above. Unknown options are pytest's, and mean that not everything was measured: nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    options, _ = parser.parse_known_args(arguments)
    made = summary(json.loads(options.raw.read_text()), options.note)
    for each in made["benchmarks"]:
        if "seconds_over_plain" in each:
            print(f"{each['seconds_over_plain']:6.2f} × the plain version's seconds: {each['name']}")
    if options.out is not None:
        with replacing(options.out) as file:
            file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
