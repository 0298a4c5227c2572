"""Reads torch.save files without running code from them: tensors, and blanks in place of a trainer's own objects.

A training checkpoint holds more than weights: the trainer's arguments, counts of numpy's, a log. torch's weights-only
unpickler refuses the file for the first such class. Here the usual ones are read as blanks: nothing of the class named
in the file is imported or called, and what it held is dropped. Any other class is refused by its name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from iasvit.errors import IasvitError


class _Blank:
    """Stands for any object: takes whatever it is made from, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Blank:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Dict:
    """Stands for a subclass of dict: an OrderedDict, the kind that the unpickler gives entries and attributes to."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _List:
    """Stands for a subclass of list, or what is filled like one."""

    def __new__(cls, *args: Any) -> list[Any]:  # type: ignore[misc]
        return []


_BLANKS = {
    _Blank: (
        *("argparse.Namespace", "types.SimpleNamespace", "typing.Any"),
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "getattr", "int", "list", "object")),
        *(f"builtins.{name}" for name in ("str", "tuple")),
        *(f"datetime.{name}" for name in ("date", "datetime", "timedelta")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *("numpy.dtype", "numpy.ndarray"),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
        ),
        *("mmengine.logging.history_buffer.HistoryBuffer", "torch.torch_version.TorchVersion"),
        *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
        *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
        *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    ),
    _Dict: (
        *("addict.addict.Dict", "collections.defaultdict", "easydict.EasyDict", "yacs.config.CfgNode"),
        *("mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict"),
        *("lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"),
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ),
    _List: ("collections.deque",),
}
_STAND_INS: list[Any] = [(blank, name) for blank, names in _BLANKS.items() for name in names]


def load_tensors(path: Path) -> Any:
    """What a torch.save file holds, on the CPU: tensors in dictionaries and lists, with blanks for a trainer's objects.

    Raises:
        IasvitError: the file is no such, or holds an object of another class; the message names the class.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS), path.open("rb") as file:  # a path's suffix is not its format
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever their reader stumbles over
        text = str(error)
        if name := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text):
            raise IasvitError(
                f"checkpoint {path} holds an object of the class {name[1]}, which is not unpickled, since that may run "
                f'code; if you trust the file, convert it once: state = torch.load("{path.name}", '
                f'weights_only=False); torch.save(state["model"], "weights.pth"), with the key of the weights, or '
                f"state.state_dict() for a whole model"
            ) from None
        raise IasvitError(
            f"checkpoint {path} is neither a safetensors file nor a torch.save file of tensors alone ({_reason(error)})"
        ) from None


def _reason(error: BaseException) -> str:
    """What the reader said, without torch's advice to unpickle code."""
    if str(error).startswith("Weights only load failed") and error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split())
    return text.partition(". ")[0][:200] or type(error).__name__
