"""Checkpoints: which weights are taken from what people save, what is refused, and that nothing of theirs runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import random
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks import checkpoints
from tasks.checkpoints import describe_file, describe_weights, fill, head_size, read_checkpoint

State = dict[str, Tensor]
PLAIN: State = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([7.0, 8.0])}
AVERAGE: State = {key: value + 100 for key, value in PLAIN.items()}


@pytest.fixture(autouse=True)
def _forget_what_was_said() -> None:
    checkpoints._warn_once.cache_clear()


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def written(folder: Path, data: Any, name: str = "weights.pth") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else saved(data))
    return path


def assert_fills(path: Path, expected: State) -> None:
    model = nn.Linear(3, 2)
    fill(model, read_checkpoint(path), path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


# ---- wrappings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        *({key: PLAIN} for key in ("state_dict", "model", "model_state_dict", "net", "network", "module", "params")),
        {"model": {"state_dict": PLAIN}, "epoch": 3},
        {"state_dict": prefixed("module.", PLAIN)},
        {"state_dict": prefixed("model.", PLAIN), "hyper_parameters": {"lr": 0.1}},
        prefixed("_orig_mod.", PLAIN),
        prefixed("_orig_mod.module.", PLAIN),
        prefixed("module._orig_mod.", PLAIN),
        prefixed("model.module.", PLAIN),
        prefixed("model.net.", PLAIN),
        {"n_averaged": torch.tensor(3), **prefixed("module.", PLAIN)},
        collections.OrderedDict(PLAIN),
        {key: nn.Parameter(value) for key, value in PLAIN.items()},
        {"model": PLAIN, "model_ema": None},
        {"model": PLAIN, "ema": 0.999},
        {"model": PLAIN, "ema": {"decay": 0.999}},
        nn.Linear(3, 2).state_dict() | PLAIN,
    ],
    ids=lambda content: ",".join(content)[:40],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_usual_wrappings_are_taken_off(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = written(tmp_path, saved(content, _use_new_zipfile_serialization=zipped))
    assert_fills(path, PLAIN)
    assert describe_weights(path) == describe_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".bin", ".pth"])
@pytest.mark.parametrize("write", [safetensors, saved])
def test_the_content_says_the_format(tmp_path: Path, suffix: str, write: Callable[[State], bytes]) -> None:
    assert_fills(written(tmp_path, write(PLAIN), f"weights{suffix}"), PLAIN)


def test_submodules_that_were_compiled(tmp_path: Path) -> None:
    path = written(tmp_path, prefixed("0._orig_mod.", PLAIN))
    assert read_checkpoint(path).keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGE}, "state_dict_ema"),
        ({"model": PLAIN, "model_ema": AVERAGE}, "model_ema"),
        ({"model": PLAIN, "ema": {"module": prefixed("module.", AVERAGE), "decay": 0.9}}, "ema"),
        ({"state_dict": PLAIN, "ema_state_dict": AVERAGE}, "ema_state_dict"),
        ({"params": PLAIN, "params_ema": AVERAGE}, "params_ema"),
        ({"student": PLAIN, "teacher": AVERAGE}, "teacher"),
        ({"model_ema": AVERAGE}, "model_ema"),
        ({"state_dict_ema": prefixed("module.", AVERAGE)}, "state_dict_ema"),
    ],
)
def test_averaged_weights_are_taken_as_timm_does_and_it_is_said(
    tmp_path: Path, content: Any, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, content)
    assert_fills(path, AVERAGE)
    assert_fills(path, AVERAGE)
    assert len(caplog.messages) == 1
    assert "averaged (EMA) weights" in caplog.text
    assert f"'{key}'" in caplog.text
    assert describe_weights(path) == f"{describe_file(path)} {key}"  # a row tells them from the plain ones


def test_timm_takes_the_same(tmp_path: Path) -> None:
    from timm.models import load_state_dict

    for content in ({"state_dict": PLAIN, "state_dict_ema": AVERAGE}, {"model": PLAIN, "model_ema": AVERAGE}, PLAIN):
        path = written(tmp_path, content)
        theirs, ours = load_state_dict(str(path)), read_checkpoint(path)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("mark", [{"message_hub": {}}, {"meta": {"mmengine_version": "0.10.7"}}])
def test_mmengine_saves_the_average_under_state_dict(tmp_path: Path, mark: dict[str, Any]) -> None:
    """Its EMA hook swaps the two, so that state_dict is what the training evaluated."""
    content = {"state_dict": AVERAGE, "ema_state_dict": {"steps": torch.tensor(4), **prefixed("module.", PLAIN)}}
    path = written(tmp_path, {**content, **mark})
    assert_fills(path, AVERAGE)
    assert describe_weights(path) == describe_file(path)


# ---- what trainers save beside weights -------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, base: type, members: dict[str, Any]) -> Any:
    """A class that is pickled under the name of a library's, which need not be installed."""
    module, _, cls = name.rpartition(".")
    made = type(cls, (base,), {**members, "__module__": module})
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        package = ".".join(parts[:length])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    setattr(sys.modules[module], cls, made)
    return made


def mean(self: Any) -> float:
    return float(self.log.mean())


mean.__module__, mean.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer.mean"


@pytest.mark.parametrize("zipped", [True, False])
def test_trainers_objects_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    settings = pretend(monkeypatch, "yacs.config.CfgNode", dict, {})(a=1)  # a dict with attributes
    settings.frozen = True
    # Arrays, and functions in its state.
    history = pretend(monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer", object, {"mean": mean})()
    history.log, history.methods = np.arange(3.0), {"mean": mean}
    content = {
        "model": PLAIN,
        "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("out"), more=types.SimpleNamespace(a=1)),
        "best": np.float64(81.2),
        "counts": np.arange(4),
        "flags": np.array([True, False]),
        "config": settings,
        "message_hub": {"log_scalars": collections.OrderedDict(loss=history)},
        "groups": collections.defaultdict(list, a=[1]),
        "last": collections.deque([1.0, 2.0], maxlen=5),
        "when": datetime.datetime(2024, 1, 1),
        "names": {"a", "b"},
        "optimizer": torch.optim.AdamW(nn.Linear(3, 2).parameters()).state_dict(),
    }
    data = saved(content, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert_fills(written(tmp_path, data), PLAIN)


def test_real_mmengine_checkpoints(tmp_path: Path) -> None:
    logging = pytest.importorskip("mmengine.logging", reason="the coco extra is not installed")
    hub = {"log_scalars": collections.OrderedDict(loss=logging.HistoryBuffer([1.0, 2.0], [1, 1])), "runtime_info": {}}
    assert_fills(written(tmp_path, {"state_dict": PLAIN, "message_hub": hub, "meta": {"epoch": 12}}), PLAIN)


class Custom:
    """A class of a user's."""


RAN: list[str] = []


class Runs:
    """Would call a function as it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("stranger", "name"),
    [
        (Custom(), r"test_checkpoints\.Custom"),
        (nn.Linear(3, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (Runs(os.system, "true"), r"posix\.system"),
        (Runs(eval, "1"), r"eval"),
        (Runs(os.getcwd), r"posix\.getcwd"),
        (Runs(RAN.append, "ran"), None),
        (Runs(Runs, print), r"test_checkpoints\.Runs"),
    ],
)
def test_a_class_of_theirs_is_named_and_not_run(tmp_path: Path, stranger: Any, name: str | None) -> None:
    path = written(tmp_path, {"model": PLAIN, "more": stranger})
    if name is None:  # a method: what getattr gives is a blank, which cannot be called
        with pytest.raises(IasvitError, match="unrecognized function"):
            read_checkpoint(path)
    else:
        with pytest.raises(IasvitError, match=rf"weights\.pth holds an object of the class {name}, which is not") as e:
            read_checkpoint(path)
        assert 'state = torch.load("weights.pth", weights_only=False); torch.save(state["model"], ' in str(e.value)
    assert RAN == []


def test_blanks_are_for_this_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path, {"model": PLAIN, "args": argparse.Namespace()})
    assert_fills(path, PLAIN)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


def cyclic() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


QUANTIZED = torch.quantize_per_tensor(PLAIN["weight"], 0.1, 0, torch.qint8)
REFUSED: list[tuple[Any, str]] = [
    (b"", "is empty; was its download cut off"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer and not the file"),
    (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
    (b"epoch,loss\n1,0.5\n" * 40, "is neither a safetensors file nor a torch.save file"),
    (bytes(range(256)) * 8, "is neither"),
    (saved(PLAIN)[:600], "is neither"),
    (saved(PLAIN, _use_new_zipfile_serialization=False)[:-3], "is neither"),
    (safetensors(PLAIN)[:-3], "is not a complete safetensors file"),
    (pickle.dumps(PLAIN), "is neither"),
    (pickle.dumps({"a": 1}, 2), "is neither"),
    ([PLAIN], "neither at its top nor under a key such as 'state_dict', 'model' or 'model_ema'; it holds a list"),
    (3, "it holds a int"),
    ({}, "it is empty"),
    ({"model": {}}, "its keys are 'model'"),
    (cyclic(), "its keys are 'model'"),
    ({0: PLAIN["bias"]}, "among its tensors is the key 0, which is no text"),
    ({**PLAIN, "epoch": 3}, "among its tensors 'epoch' is a int"),
    ({"state_dict": {**PLAIN, "epoch": 3}}, "among its tensors 'epoch' is a int"),
    ({"weight": PLAIN["weight"].to("meta")}, r"its tensor 'weight' has no values \(it is on the meta device\)"),
    ({"weight": PLAIN["weight"].to_sparse()}, "its tensor 'weight' is sparse"),
    ({"weight": PLAIN["weight"].to_sparse_csr()}, "its tensor 'weight' is sparse"),
    ({"weight": QUANTIZED}, "its tensor 'weight' is of a quantized type"),
    ({"weight": torch.ones(1).expand(10**9, 10**6)}, "its tensor 'weight' repeats its values to the shape"),
    ({"module.a": PLAIN["bias"], "a": PLAIN["bias"]}, "has several tensors for 'a', under prefixes of wrappers"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(IasvitError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"checkpoint {path}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": PLAIN["weight"].to(torch.int8)}, "weight is of type int8, but floating-point values are expected"),
        ({"weight": PLAIN["weight"].to(torch.complex64)}, "weight is of type complex64"),
        ({"bias": torch.tensor([1.0, float("nan")])}, "bias has values that are NaN or infinite"),
        ({"bias": torch.tensor([1.0, 1e300], dtype=torch.float64)}, "bias has values that are NaN or infinite"),
        ({"bias": torch.tensor(1.0)}, r"bias has shape \(\) for \(2,\)"),
        ({"more": PLAIN["bias"]}, "more is not in the model"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_model_changes(
    tmp_path: Path, changes: State, message: str
) -> None:
    path, model = written(tmp_path, PLAIN | changes), nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(IasvitError, match=rf"weights\.pth does not fit the model: .*{message}"):
        fill(model, read_checkpoint(path), path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_floating_point_types_fit(tmp_path: Path, dtype: torch.dtype) -> None:
    assert_fills(written(tmp_path, {key: value.to(dtype) for key, value in PLAIN.items()}), PLAIN)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(IasvitError, match=r"cannot be read: (it is not a file|No such file)"):
        read_checkpoint(path)


def test_a_classifier_without_a_size() -> None:
    assert head_size({"head.weight": torch.tensor(1.0)}, "head") is None
    assert head_size({"head.weight": torch.ones(5, 2)}, "head.fc") == 5


# ---- anything at all -------------------------------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, zeroed, cut, removed or doubled."""
    changed, at = bytearray(data), draw.randrange(len(data))
    length = draw.choice([1, 4, 16, 200])
    match draw.randrange(5):
        case 0:
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 1:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case 2:
            del changed[at:]
        case 3:
            del changed[at : at + length]
        case _:
            changed[at:at] = changed[at : at + length]
    return bytes(changed)


def anything(draw: random.Random, depth: int = 3) -> Any:
    """A value as a checkpoint might hold it, weights and wrappers more often than not."""
    leaves: list[Callable[[], Any]] = [
        lambda: PLAIN,
        lambda: dict(draw.sample(sorted(PLAIN.items()), 1)),
        lambda: draw.choice([PLAIN["weight"], torch.tensor(3), torch.zeros(0), torch.ones(2, 3, dtype=torch.bool)]),
        lambda: draw.choice([PLAIN["weight"].to("meta"), PLAIN["weight"].to_sparse(), QUANTIZED]),
        lambda: torch.full((2, 3), draw.choice([float("nan"), 1.0]), dtype=draw.choice([torch.half, torch.double])),
        lambda: draw.choice([None, 1, 2.5, "text", b"bytes", True, [], (), {}, argparse.Namespace(a=1), np.float32(1)]),
    ]
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(leaves)()
    names: list[Any] = [
        *checkpoints.AVERAGED,
        *checkpoints.PLAIN,
        "weight",
        "bias",
        "module.weight",
        "meta",
        0,
        None,
        "",
    ]
    if draw.random() < 0.15:
        return [anything(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(names): anything(draw, depth - 1) for _ in range(draw.randint(0, 4))}


def read_or_refuse(path: Path, case: str) -> bool:
    """Whether a checkpoint fills a model; anything but that and an IasvitError of one line fails the test."""
    describe_file.cache_clear()
    started, refusal = time.process_time(), ""
    try:
        fill(nn.Linear(3, 2), read_checkpoint(path), path)
    except IasvitError as error:
        refusal = str(error)
    assert len(refusal.encode().splitlines()) <= 1, case
    assert time.process_time() - started < 5, case
    return not refusal


FORMATS = {
    "zip": saved({"model": PLAIN, "args": argparse.Namespace(lr=0.1), "best": np.float64(3)}),
    "legacy": saved({"model": PLAIN, "epoch": 3}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors(PLAIN),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_any_damage_to_the_bytes_is_read_or_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    draw = random.Random(0)
    results = [
        read_or_refuse(written(tmp_path, damaged(FORMATS[kind], draw)), f"{kind}, case {case}") for case in range(300)
    ]
    assert results.count(True) < 250


def test_any_structure_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    draw, results = random.Random(1), []
    for _ in range(250):
        content = anything(draw)
        results.append(read_or_refuse(written(tmp_path, content), repr(content)))
    assert 10 < results.count(True) < 200
