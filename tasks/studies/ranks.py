"""Do mini models rank methods as a real network does? Spearman's rank correlation: `python -m tasks.studies.ranks`.

Reads the stored rows. A method's place is its mean top-1 over seeds, on the latest data of each data set; of several
settings of one method the best counts. Weights-only methods are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from iasvit.benchmark.results import read_rows
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError, reason
from iasvit.files import replacing
from iasvit.leaderboard.cells import labelled

FEWEST = 5  # methods that both must have

app = make_app()


def places(folder: Path, dataset: str, metric: str) -> pd.DataFrame:
    """Mean of a metric for each (spec, model, method) of an ImageNet data set's rows in a results folder.

    Raises:
        IasvitError: the folder has no row of this data set.
    """
    rows = [row for path in sorted(folder.rglob(f"imagenet-{dataset}.csv")) for row in read_rows(path)[0]]
    frame = labelled(row for row in rows if row["status"] == "ok")
    if frame.empty:
        raise IasvitError(f"--results {folder} has no row of {dataset}; measure some, or name another folder")
    frame = frame[~frame["weights_only"]]
    frame = frame[frame["data_fingerprint"] == frame.sort_values("time")["data_fingerprint"].iloc[-1]]
    means = frame.groupby(["spec", "model", "method", "settings"])[metric].mean()
    return means.groupby(level=["spec", "model", "method"]).max().rename("mean").reset_index()


def correlations(real: pd.DataFrame, mini: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ between the one real model and each mini model, over the methods that both have.

    Args:
        real, mini: as `places` returns them; `real` has one model.

    Returns:
        Columns spec, model, methods (how many) and rho; models that share fewer than FEWEST methods have no line.
    """
    found = []
    for (spec, model), part in mini.groupby(["spec", "model"], sort=True):
        ours = part.set_index("method")["mean"]
        theirs = real[real["spec"] == spec].set_index("method")["mean"]
        both = pd.concat([ours, theirs], axis=1, join="inner", keys=["mini", "real"])
        if len(both) >= FEWEST:
            rho = both["mini"].rank().corr(both["real"].rank())
            found.append({"spec": spec, "model": model, "methods": len(both), "rho": round(rho, 3)})
    return pd.DataFrame(found, columns=["spec", "model", "methods", "rho"])


@app.command(help=__doc__.partition("\n")[0])
def ranks(
    results: Annotated[Path, typer.Option(help="Folder of stored rows.")] = Path("results/runs"),
    real: Annotated[str, typer.Option(help="Data set of the real network.")] = "cifar10-224",
    mini: Annotated[list[str], typer.Option(help="Repeatable; data sets to compare with it.")] = ["mini", "mini-hard"],  # noqa: B006
    metric: Annotated[str, typer.Option(help="top1, agreement or cosine.")] = "top1",
    out: Annotated[Path, typer.Option(help="CSV file, written anew.")] = Path("results/mini_ranks.csv"),
) -> None:
    """A line (dataset, spec, model, methods, rho) for each mini model and bit-width."""
    if metric not in ("top1", "agreement", "cosine"):
        raise IasvitError(f"--metric {metric} is not known; give top1, agreement or cosine")
    theirs = places(results, real, metric)
    if theirs["model"].nunique() != 1:
        raise IasvitError(f"--real {real} has {theirs['model'].nunique()} models, but one is expected")
    parts = [correlations(theirs, places(results, name, metric)).assign(dataset=name) for name in mini]
    table = pd.concat(parts)[["dataset", "spec", "model", "methods", "rho"]]
    print(table.to_string(index=False))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            table.to_csv(temporary, index=False)
    except OSError as error:
        raise IasvitError(f"--out {out} cannot be written: {reason(error)}") from None


if __name__ == "__main__":
    main(app)
