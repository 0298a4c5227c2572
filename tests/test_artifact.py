"""Saving and loading quantized models: the same bits come back, in as few bytes as promised, or one clear sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import iasvit
from iasvit import artifact
from iasvit.artifact import pack, packed_bytes, unpack
from iasvit.errors import IasvitError
from iasvit.files import read_tensors, write_tensors
from iasvit.nn import quant_layers
from iasvit.quantizers import Quantizer

SPEC = "W3A4,*.fc1=W2A8,head*=W8A6"


def quantize(model: nn.Module, spec: str = SPEC, **options: Any) -> nn.Module:
    return iasvit.quantize(model, tiny_models.images(), spec, iterations=1, batch_size=5, lr=1e-2, **options)


@pytest.fixture
def quantized() -> nn.Module:
    """A quantized ViT."""
    return quantize(tiny_models.vit())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where to save, in a folder with nothing else in it."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "model.safetensors"


# ---- the same to the bit -------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back_to_the_bit(model: nn.Module, path: Path) -> None:
    quantized = quantize(model)
    iasvit.save(quantized, path)
    loaded = iasvit.load(path)
    x = tiny_models.images(3, seed=7)
    assert torch.equal(loaded(x), quantized(x))
    assert tiny_models.same_bits(loaded.state_dict(), quantized.state_dict())
    assert type(loaded) is type(quantized) is type(model)
    for made in ("method", "spec", "options", "architecture"):
        assert getattr(loaded.quantization, made) == getattr(quantized.quantization, made)
    data = quantized.quantization.data  # tuples come back as lists
    assert loaded.quantization.data == json.loads(json.dumps(data))
    assert data["mean"]
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert os.listdir(path.parent) == [path.name]


def test_a_loaded_model_saves_to_the_same_file(quantized: nn.Module, path: Path) -> None:
    iasvit.save(quantized, path)
    first = path.read_bytes()
    iasvit.save(iasvit.load(path), path)
    assert path.read_bytes() == first


def test_bits_of_single_layers_survive(swin: nn.Module, path: Path) -> None:
    iasvit.save(quantize(swin), path)
    loaded = iasvit.load(path)
    bits = {name: module.n_bits for name, module in loaded.named_modules() if isinstance(module, Quantizer)}
    assert bits["layers.0.blocks.1.mlp.fc1.weight_quantizer"] == 2
    assert bits["layers.0.blocks.1.mlp.fc1.input_quantizer"] == 8
    assert bits["layers.0.blocks.1.attn.matmul_av.left_quantizer"] == 4
    assert (bits["head.fc.weight_quantizer"], bits["head.fc.input_quantizer"]) == (8, 6)
    assert bits["layers.1.downsample.reduction.weight_quantizer"] == 3
    assert loaded.quantization.spec == SPEC


def test_a_file_outlives_the_method_that_made_it(
    quantized: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iasvit.save(quantized, path)
    monkeypatch.setattr(artifact, "list_methods", lambda *, by_name=False: [])
    assert tiny_models.same_bits(iasvit.load(path).state_dict(), quantized.state_dict())


# ---- size ----------------------------------------------------------------------------------------------------------


def test_codes_lie_end_to_end_least_significant_bit_first() -> None:
    codes = torch.tensor([1, 2, 7], dtype=torch.uint8)  # bits 100 010 11|1
    assert pack(codes, 3).tolist() == [1 + 16 + 64 + 128, 1]
    assert pack(codes, 8).tolist() == [1, 2, 7]


@given(st.integers(2, 8), st.integers(0, 50), st.integers(1, 3), st.integers(0, 2**32))
def test_packed_codes_unpack(n_bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**n_bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, n_bits)
    assert packed.numel() == -(-rows * columns * n_bits // 8)
    assert torch.equal(unpack(packed, n_bits, codes.shape), codes)


def test_a_file_takes_the_bits_of_its_codes_and_little_else(model: nn.Module, path: Path) -> None:
    quantized = quantize(model)
    iasvit.save(quantized, path)
    expected = 0
    weights = {f"{name}.weight": layer for name, layer in quant_layers(quantized)}
    for name, tensor in quantized.state_dict().items():
        if name in weights:
            expected += -(-tensor.numel() * weights[name].weight_quantizer.n_bits // 8)
        elif not name.endswith("_extra_state"):
            expected += tensor.numel() * tensor.element_size()
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert packed_bytes(quantized) == expected
    assert path.stat().st_size == 8 + header + expected


# ---- files that are no good ----------------------------------------------------------------------------------------


class _Malicious:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_nothing_is_unpickled(write: Callable, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    write({"model": _Malicious()}, path)
    with pytest.raises(IasvitError, match="not a quantized model"):
        iasvit.load(path)
    assert os.listdir(path.parent) == [path.name]


def complaint(path: Path) -> str:
    """What load says of a file: one line that names it."""
    with pytest.raises(IasvitError) as error:
        iasvit.load(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_no_quantized_model(quantized: nn.Module, path: Path, length: int) -> None:
    iasvit.save(quantized, path)
    path.write_bytes(path.read_bytes()[:length])
    assert "is not a quantized model; give a file that iasvit.save wrote" in complaint(path)


def test_other_things_than_files_of_save_are_refused(vit: nn.Module, path: Path) -> None:
    assert "does not exist" in complaint(path)
    assert "is not a quantized model" in complaint(path.parent)
    path.write_text("W3A3")
    assert "is not a quantized model" in complaint(path)
    save_file(vit.state_dict(), path)  # weights alone
    assert "is not a quantized model" in complaint(path)
    for header in ("{", "[]", "3", "{}"):
        save_file({}, path, {"iasvit": header})
        assert "is not a quantized model" in complaint(path)


def test_a_file_of_the_first_format_is_told_to_be_one(quantized: nn.Module, path: Path) -> None:
    iasvit.save(quantized, path)
    state, metadata = read_tensors(path)
    save_file(state, path, metadata)  # the header alone, as it was then
    assert "it is of an earlier version of iasvit, which wrote no checksums" in complaint(path)


def test_a_pipe_is_no_model(path: Path) -> None:
    os.mkfifo(path)
    assert "is not a quantized model" in complaint(path)


FC1 = "blocks.1.mlp.fc1"


def damage(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change the header and the tensors of a file, and its checksums with them."""
    state, metadata = read_tensors(path)
    header = json.loads(metadata["iasvit"])
    change(header, state)
    write_tensors(path, state, {"iasvit": json.dumps(header)})


def _edit(*keys: str, value: Any) -> Callable[[dict, dict], None]:
    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def _drop(*keys: str) -> Callable[[dict, dict], None]:
    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


def _put(name: str, tensor: Tensor | None) -> Callable[[dict, dict], None]:
    def change(_: dict[str, Any], state: dict[str, Tensor]) -> None:
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_edit("format", value=1), "has format 1, but this version of iasvit reads format 2"),
        (_drop("spec"), "spec"),
        (_drop("method"), "method"),
        (_drop("quantizers"), "quantizers"),
        (_drop("quantizers", f"{FC1}.input_quantizer"), f"'{FC1}.input_quantizer' a quantizer of kind none"),
        (_edit("quantizers", f"{FC1}.input_quantizer", "kind", value="os"), "'os'; the known kinds are"),
        (_edit("quantizers", f"{FC1}.weight_quantizer", "n_bits", value=7), "damaged"),
        (_edit("quantizers", f"{FC1}.input_quantizer", "channel_dim", value=[1]), "has channel_dim '[1]'"),
        (_edit("quantizers", f"{FC1}.input_quantizer", "enabled", value="x"), "has enabled 'x'"),
        (_drop("architecture"), "architecture"),
        (_edit("architecture", "embed_dim", value=16), "has shape"),
        (_edit("architecture", "depth", value=1), "blocks.1"),
        (_edit("architecture", "depth", value=3), "blocks.2"),
        (_edit("shapes", FC1, value=[64, 64]), f"{FC1}.weight has shape (64, 64) for (128, 32)"),
        (_put(f"{FC1}.weight_codes", None), f"{FC1}.weight_codes"),
        (_put(f"{FC1}.weight_codes", torch.zeros(100, dtype=torch.uint8)), "damaged"),
        (_put(f"{FC1}.weight_quantizer.scale", torch.ones(3)), "damaged"),
        (_put(f"{FC1}.bias", None), f"{FC1}.bias"),
        (_put("norm.weight", torch.ones(5)), "norm.weight has shape (5,) for (32,)"),
        (_put("something.else", torch.ones(5)), "something.else"),
        (_edit("architecture", "depth", value=10**5), "more than"),
        (_edit("architecture", "embed_dim", value=2 * 10**6), "does not fit its architecture"),
        (_edit("architecture", "img_size", value=[10**5, 10**5]), "does not fit its architecture"),
        (_edit("architecture", "act", value="set_fused_attn"), "activation 'set_fused_attn' is not supported"),
        (_edit("architecture", "device", value="cpu"), "'device', which save does not describe"),
        (_edit("architecture", "no_such", value=1), "damaged"),
        (_edit("data", value=None), "its 'data' is NoneType, not dict"),
        (_edit("spec", value=["W4A4"]), "its 'spec' is list, not str"),
        (_edit("options", value={"lr": math.nan}), "is not a quantized model"),
        (_edit("quantizers", f"{FC1}.input_quantizer", "n_bits", value=3), "has 3 bits, but its spec says 8"),
        (_put(f"{FC1}.input_quantizer.scale", torch.tensor(0.0)), "has a scale of 0.0"),
        (_put(f"{FC1}.input_quantizer.scale", torch.tensor(-1.0)), "has a scale of -1.0"),
        (_put(f"{FC1}.input_quantizer.scale", torch.tensor(math.nan)), "has a scale of nan"),
        (_put(f"{FC1}.input_quantizer.scale", torch.ones((), dtype=torch.float64)), "has a scale of torch.float64"),
        (_put(f"{FC1}.input_quantizer.scale", torch.ones(64)), "has a scale of shape (64,)"),
        (_put(f"{FC1}.input_quantizer.zero_point", torch.tensor(1.5)), "has a zero_point of torch.float32"),
        (_put("norm.weight", torch.full((32,), math.inf)), "'norm.weight' holds NaN or Inf"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    quantized: nn.Module, path: Path, change: Callable[[dict, dict], None], named: str
) -> None:
    iasvit.save(quantized, path)
    damage(path, change)
    assert ("is damaged" if named == "damaged" else named) in complaint(path)


def test_a_header_that_asks_for_much_costs_nothing(quantized: nn.Module, path: Path) -> None:
    iasvit.save(quantized, path)
    damage(path, _edit("architecture", "depth", value=10**9))
    start = time.process_time()
    complaint(path)
    assert time.process_time() - start < 5


def test_a_deep_header_is_refused(path: Path) -> None:
    write_tensors(path, {}, {"iasvit": "[" * 100_000})
    assert "is not a quantized model" in complaint(path)


def test_a_changed_file_is_never_another_model(quantized: nn.Module, path: Path, images: Tensor) -> None:
    """Flipped bits, zeroed ranges, cut and lengthened files: the same outputs, or one sentence."""
    iasvit.save(quantized, path)
    data, expected = path.read_bytes(), quantized(images[:1])
    generator = random.Random(0)
    refused = 0
    for number in range(150):
        changed, start = bytearray(data), generator.randrange(len(data))
        if number % 5 == 4:
            start = generator.randrange(8 + int.from_bytes(data[:8], "little"))  # in the header
        if number % 5 in (0, 4):
            changed[start] ^= 1 << generator.randrange(8)
        elif number % 5 == 1:
            changed[start : start + 64] = bytes(len(changed[start : start + 64]))
        elif number % 5 == 2:
            del changed[start:]
        else:
            changed += bytes(generator.randrange(1, 9))
        path.write_bytes(changed)
        try:
            loaded = iasvit.load(path)
        except IasvitError as error:
            refused += "\n" not in str(error)
        else:
            assert torch.equal(loaded(images[:1]), expected)
    assert refused > 130


VALUES = (None, True, 0, -1, 3, 10**9, 1.5, 1e300, "", "x", "sulq", [], [1], [10**6, 10**6], {}, {"a": 1})


def _leaves(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(leaf for key, each in items for leaf in _leaves(each, (*path, key)))]


@pytest.mark.parametrize("method", ["ptq4vit", "ias_vit[softmax=log2_searched]"])
def test_a_forged_header_is_refused_or_runs(method: str, path: Path, images: Tensor) -> None:
    """Any value changed, added or taken away, with checksums that fit: one sentence, or a model that answers."""
    steps = {"iterations": 1} if method.startswith("ias") else {"candidates": 3}
    iasvit.save(iasvit.quantize(tiny_models.vit(depth=1), images[:2], "W3A4", method, **steps), path)
    state, metadata = read_tensors(path)
    numbers, said = random.Random(0), []
    for number in range(60):
        header = json.loads(metadata["iasvit"])
        *parents, last = numbers.choice(_leaves(header))
        place = header
        for key in parents:
            place = place[key]
        if number % 4 == 0:
            del place[last]
        elif number % 4 == 1 and isinstance(place, dict):
            place["extra"] = numbers.choice(VALUES)
        else:
            place[last] = numbers.choice(VALUES)
        write_tensors(path, dict(state), {"iasvit": json.dumps(header)})
        try:
            loaded = iasvit.load(path)
        except IasvitError as error:
            said.append(str(error))
        else:
            assert torch.isfinite(loaded(images[:1])).all(), (*parents, last)
    assert 10 < len(said) < 60
    assert all(text.startswith(str(path)) and "\n" not in text for text in said)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_edit("spec", value="W9"), "bits 'W9'"),
        (_edit("quantizers", f"{FC1}.weight_quantizer", "n_bits", value=70), "n_bits is 70"),
        (_edit("architecture", "adapter", value="os"), "architecture 'os'"),
    ],
)
def test_a_header_that_asks_for_what_does_not_exist_is_refused(
    quantized: nn.Module, path: Path, change: Callable[[dict, dict], None], named: str
) -> None:
    iasvit.save(quantized, path)
    damage(path, change)
    with pytest.raises(IasvitError, match=named):
        iasvit.load(path)


# ---- saving that fails ---------------------------------------------------------------------------------------------


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as a disk does that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("old", [None, b"the model before"])
def test_a_full_disk_leaves_the_folder_as_it_was(quantized: nn.Module, path: Path, old: bytes | None) -> None:
    if old:
        path.write_bytes(old)
    with full_disk(after=10_000), pytest.raises(IasvitError, match=f"{path.name} cannot be written: "):
        iasvit.save(quantized, path)
    assert os.listdir(path.parent) == ([path.name] if old else [])
    assert not old or path.read_bytes() == old


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_save_that_stops_before_the_renaming_leaves_the_old_file(
    quantized: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    iasvit.save(quantized, path)
    before = path.read_bytes()

    def stop(source: Path, target: Path) -> None:
        assert Path(source).stat().st_size > 20_000  # all of it is written beside
        raise error

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises((IasvitError, KeyboardInterrupt)) as raised:
        iasvit.save(quantize(tiny_models.vit(seed=1)), path)
    assert isinstance(raised.value, KeyboardInterrupt) or "Permission denied" in str(raised.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_named(quantized: nn.Module, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IasvitError, match=rf"{folder}/model\.safetensors cannot be written: "):
        iasvit.save(quantized, tmp_path / folder / "model.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_that_a_file_cannot_rebuild_is_not_saved(quantized: nn.Module, path: Path) -> None:
    quantized.blocks[1].mlp.act = nn.ReLU()  # the description has one activation for all blocks
    with pytest.raises(IasvitError, match="has parts that a file cannot rebuild; not saved"):
        iasvit.save(quantized, path)
    quantized.blocks[1].mlp.act = nn.GELU()
    quantized.extra = nn.Linear(2, 2)
    with pytest.raises(IasvitError, match=r"cannot rebuild; not saved \(its file .*extra\.weight"):
        iasvit.save(quantized, path)
    assert os.listdir(path.parent) == []


def test_what_is_not_quantized_is_not_saved(vit: nn.Module, path: Path) -> None:
    with pytest.raises(IasvitError, match="VisionTransformer given to save is not quantized; save what quantize"):
        iasvit.save(vit, path)
    assert os.listdir(path.parent) == []


def test_the_mode_of_a_file_follows_the_umask(quantized: nn.Module, path: Path) -> None:
    old = os.umask(0o027)
    try:
        iasvit.save(quantized, path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_file_that_a_link_points_to_is_written(quantized: nn.Module, path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    iasvit.save(quantized, link)
    assert link.is_symlink()
    assert path.is_file()


def test_pipes_and_folders_are_not_replaced(quantized: nn.Module, tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for target in (pipe, folder, Path("/dev/null")):
        mode = target.stat().st_mode
        with pytest.raises(IasvitError, match=f"{target} cannot be written: .* but a file is expected"):
            iasvit.save(quantized, target)
        assert target.stat().st_mode == mode


@pytest.mark.parametrize("name", ["x" * 300, os.fsdecode(b"caf\xe9.safetensors"), "a\0b"])
def test_a_path_that_no_file_can_have_is_blamed_and_not_the_model(
    quantized: nn.Module, tmp_path: Path, name: str
) -> None:
    with pytest.raises(IasvitError, match="cannot be written: "):
        iasvit.save(quantized, tmp_path / name)
