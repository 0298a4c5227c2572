"""Progress of long work: phases and their seconds, a bar or plain lines, and a checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from iasvit import distributed
from iasvit.errors import StorageError, reason
from iasvit.files import DamagedError, read_tensors, replacing, write_tensors

logger = logging.getLogger(__name__)


class CheckpointError(StorageError):
    """The checkpoint cannot be written."""


class _Lines(tqdm):
    """For logs: a plain line every `mininterval` seconds, and none for what takes less."""

    def __init__(self, mininterval: float, **options: Any) -> None:
        form = "{desc}: {n_fmt}/{total_fmt} after {elapsed}, {remaining} to go"
        super().__init__(  # the position keeps tqdm from moving the cursor
            mininterval=mininterval, delay=mininterval, leave=False, position=1, bar_format=form, **options
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the line as it is now; tqdm's request to clear it (an empty message) is ignored."""
        if msg is None:
            print(self, file=sys.stderr, flush=True)


class Progress:
    """Handed to `Method.quantize`: what a method reports to, and, where a folder is given, resumes from.

    Of several processes, all of which have one, the first prints, and reads and writes the files.

    Args:
        label: what the work is, shown at the start of each line.
        checkpoint: folder for resume files, or None to keep nothing. One cell, one folder.
        quiet: print nothing.

    Attributes:
        seconds: phase name → seconds spent in it so far, those before an interruption included.
    """

    LINE_EVERY = 20.0  # seconds between plain lines when standard error is no terminal
    SAVE_EVERY = 10.0  # least seconds between records: one of a ViT-S takes as long as 200 steps of a block on a GPU

    def __init__(self, label: str = "", checkpoint: Path | None = None, quiet: bool = True) -> None:
        self.label = label
        self.checkpoint = checkpoint
        self.quiet = quiet or distributed.rank() > 0
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []  # phases, the innermost last
        self._charged = 0.0  # the time up to which seconds holds what was spent
        self._saved = 0.0  # when the last record was written

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[tqdm]:
        """Time a phase and show its bar; `update(n)` on what it yields moves the bar towards `total`.

        A phase inside another counts for itself alone. One without a total shows no bar.
        """
        desc, disable = f"{self.label} {name}".strip(), self.quiet or not total
        if sys.stderr.isatty():
            bar = tqdm(total=total, desc=desc, disable=disable, mininterval=0.2, leave=False)
        else:
            bar = _Lines(total=total, desc=desc, disable=disable, mininterval=self.LINE_EVERY)
        self._charge()
        self._running.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield bar
        finally:
            self._charge()
            self._running.pop()
            bar.close()

    def _charge(self) -> None:
        """Add the time since the last call to the innermost phase that is running."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what a phase launched belongs to it
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._charged
        self._charged = now

    def save(self, step: int, state: dict[str, torch.Tensor]) -> None:
        """Record that steps 0 … `step` are done, with the tensors to go on from. Atomic; the older record goes.

        The first call writes, and a later one only if SAVE_EVERY seconds have passed since. So a resumed run repeats
        these seconds and the step that was interrupted, at most.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self.checkpoint is not None:
            self._charge()
            distributed.first(lambda: self._write(self.checkpoint, step, state))

    def _write(self, folder: Path, step: int, state: dict[str, torch.Tensor]) -> None:
        if self._saved and self._charged - self._saved < self.SAVE_EVERY:
            return
        target = folder / "checkpoint.safetensors"
        metadata = {"step": str(step), "seconds": json.dumps(self.seconds)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
            with replacing(target) as temporary:
                write_tensors(temporary, tensors, metadata)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target} cannot be written: {reason(error)}; free space or run in another folder"
            ) from error
        self._saved = self._charged

    def restore(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The last record as (step, tensors), or None; the seconds spent before are added to this run's."""
        if self.checkpoint is None:
            return None
        path = self.checkpoint / "checkpoint.safetensors"
        record = distributed.first(lambda: _read(path))
        if record is None:
            return None
        state, metadata = record
        for name, seconds in json.loads(metadata["seconds"]).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return int(metadata["step"]), state

    def discard(self) -> None:
        """Forget the checkpoint: the cell is done and its row is stored."""
        if self.checkpoint is not None and distributed.rank() == 0:
            shutil.rmtree(self.checkpoint, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """A record's tensors and what it says of them; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        return read_tensors(path)
    except (SafetensorError, OSError, DamagedError) as error:
        logger.warning("the checkpoint %s is damaged (%s); the work starts again", path, reason(error))
        return None


def fingerprint(*parts: object) -> str:
    """Sixteen hex digits of the parts' text: the key of a cell, the name of a checkpoint."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]
