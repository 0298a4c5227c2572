"""Save and load quantized models: packed integer codes in one safetensors file, nothing pickled."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from iasvit.architecture import check_architecture
from iasvit.errors import IasvitError, StorageError, reason
from iasvit.files import DamagedError, read_tensors, replacing, write_tensors
from iasvit.label import label
from iasvit.methods import list_methods, load_method_class, split_variant
from iasvit.models import Site, build, insert_quantizers
from iasvit.nn import quant_layers
from iasvit.quantizers import Quantizer
from iasvit.spec import QuantSpec

FORMAT = 2  # 1 had no checksums
CODES = "weight_codes"


@dataclass(frozen=True)
class Quantization:
    """How a quantized model was made; `iasvit.quantize` puts it on the model as `.quantization`.

    Attributes:
        method: name of the method.
        spec: bit-widths, as text.
        options: options given to the method.
        architecture: what `iasvit.models.build` makes the unquantized model from.
        data: what timm's `resolve_data_config` says of the images that the model takes.
        transforms: what was done to the network before, in order: name, options and exact of `iasvit.transforms.Step`.
    """

    method: str
    spec: str
    options: dict[str, Any]
    architecture: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    transforms: list[dict[str, Any]] = field(default_factory=list)


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Codes of n_bits bits, end to end, least significant bit first: any shape, uint8 → 1-D uint8.

    The last byte is filled up with zeros; ceil(numel·n_bits / 8) bytes in all.
    """
    bits = codes.reshape(-1, 1).bitwise_right_shift(torch.arange(n_bits, dtype=torch.uint8, device=codes.device)) & 1
    bits = bits.reshape(-1)
    bits = torch.cat([bits, bits.new_zeros(-bits.numel() % 8)]).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (bits * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, n_bits: int, shape: torch.Size) -> Tensor:
    """The codes that `pack` packed, uint8 in this shape."""
    bits = packed.view(-1, 1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    bits = bits.reshape(-1)[: shape.numel() * n_bits].view(-1, n_bits)
    weights = 2 ** torch.arange(n_bits, dtype=torch.uint8, device=packed.device)
    return (bits * weights).sum(dim=1, dtype=torch.uint8).view(shape)


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a quantized model with packed codes in place of the weights that have a quantizer."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("._extra_state")}
    for name, layer in quant_layers(model):
        codes = layer.weight_quantizer.encode(layer.weight.detach())
        del state[f"{name}.weight"]
        state[f"{name}.{CODES}"] = pack(codes, layer.weight_quantizer.n_bits)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that `save` writes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed_state(model).values())


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one safetensors file: codes packed to their bits, the rest in float32.

    Before the file is renamed into place it is read again. The loaded model must give the same output as `model` for a
    random image, bit for bit. This finds an architecture that the adapter does not describe.

    Args:
        model: what `iasvit.quantize` returned.
        path: where to write; the file is written beside and renamed. Of a link, the file that it points to.

    Raises:
        IasvitError: the model is not quantized, or its architecture cannot be rebuilt.
        StorageError: the file cannot be written there.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise IasvitError(f"the {type(model).__name__} given to save is not quantized; save what quantize returned")
    configs = {name: module.config() for name, module in model.named_modules() if isinstance(module, Quantizer)}
    shapes = {name: list(layer.weight.shape) for name, layer in quant_layers(model)}
    header = {"format": FORMAT, **asdict(quantization), "quantizers": configs, "shapes": shapes}
    path = Path(path)
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, packed_state(model), {"iasvit": json.dumps(header)})
            _check_saved(model, temporary, quantization.architecture)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written: {reason(error)}") from error


@torch.no_grad()
def _check_saved(model: nn.Module, path: Path, architecture: dict[str, Any]) -> None:
    device = next(model.parameters()).device
    height, width = architecture["img_size"]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, architecture["in_chans"], height, width, generator=generator).to(device)
    message = f"the {type(model).__name__} given to save has parts that a file cannot rebuild; not saved"
    try:
        loaded = load(path).to(device)
    except IasvitError as error:
        text = str(error)
        what = f"its file{text.removeprefix(str(path))}" if text.startswith(str(path)) else text
        raise IasvitError(f"{message} ({what})") from error
    if not torch.equal(loaded(image), model(image)):
        raise IasvitError(message)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read what `save` wrote. The model is in eval mode on the CPU, and its outputs equal the saved model's bit for
    bit.

    Raises:
        IasvitError: no such file, not a file of `save`, or one whose tensors do not fit (the message says which).
    """
    path = Path(path)
    try:
        state, metadata = read_tensors(path)
        header = json.loads(metadata["iasvit"], parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise IasvitError(f"{path} does not exist; give a file that iasvit.save wrote") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        why = f" ({reason(error)})" if isinstance(error, DamagedError) else ""
        raise IasvitError(f"{path} is not a quantized model{why}; give a file that iasvit.save wrote") from error
    try:
        if header["format"] != FORMAT:
            raise IasvitError(
                f"{path} has format {header['format']!r}, but this version of iasvit reads format {FORMAT}"
            )
        return _rebuild(header, state, path)
    except IasvitError as error:
        if str(error).startswith(str(path)):
            raise
        raise IasvitError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever a header or tensors that were changed lead to
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise IasvitError(f"{path} is damaged ({what}); give a file that iasvit.save wrote") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in JSON")


FIELDS = {"method": str, "spec": str, "options": dict, "architecture": dict, "data": dict, "quantizers": dict}
FIELDS |= {"transforms": list}  # added later


def _rebuild(header: dict[str, Any], state: dict[str, Tensor], path: Path) -> nn.Module:
    header.setdefault("transforms", [])  # files of before have none
    for name, kind in {**FIELDS, "shapes": dict}.items():
        if not isinstance(header[name], kind):
            raise IasvitError(f"{path} is damaged: its {name!r} is {type(header[name]).__name__}, not {kind.__name__}")
    spec = QuantSpec.parse(header["spec"])
    classes = _quantizer_classes(header["method"])
    shapes = {name: torch.Size(shape) for name, shape in header["shapes"].items()}
    check_architecture(header["architecture"], state, shapes, path)
    model = insert_quantizers(build(header["architecture"]), spec, _Placeholder.of, _Placeholder.of)
    for name, module in list(model.named_modules()):
        if isinstance(module, _Placeholder):
            parent, _, attribute = name.rpartition(".")
            quantizer = _quantizer(classes, header["quantizers"], name, path)
            if quantizer.n_bits != module.n_bits:
                raise IasvitError(
                    f"{path} is damaged: {name!r} has {quantizer.n_bits} bits, but its spec says {module.n_bits}"
                )
            setattr(model.get_submodule(parent), attribute, quantizer)
    for name, layer in quant_layers(model):
        packed, n_bits = state.pop(f"{name}.{CODES}"), layer.weight_quantizer.n_bits
        if packed.dtype != torch.uint8 or packed.shape != (-(-shapes[name].numel() * n_bits // 8),):
            raise IasvitError(f"{path} is damaged: {name!r} has no codes of {n_bits} bits for its weight")
        layer.codes = unpack(packed, n_bits, shapes[name])
        state[f"{name}.weight"] = torch.zeros(shapes[name])
    extra = {
        f"{name}._extra_state": m.get_extra_state() for name, m in model.named_modules() if isinstance(m, Quantizer)
    }
    missing, unexpected = model.load_state_dict({**state, **extra}, strict=False)
    if missing or unexpected:
        raise IasvitError(f"{path} does not fit its architecture: {', '.join((missing + unexpected)[:4])}")
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and (problem := module.problem()):
            raise IasvitError(f"{path} is damaged: {name!r} has {problem}")
    for _, layer in quant_layers(model):
        layer.weight.data.copy_(layer.weight_quantizer.decode(layer.codes))
        del layer.codes
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise IasvitError(f"{path} is damaged: {name!r} holds NaN or Inf")
    names = ("method", "spec", "options", "architecture", "data", "transforms")
    label(model, Quantization(**{name: header[name] for name in names}))
    return model.requires_grad_(False).eval()


class _Placeholder(Quantizer):
    """Stands where a quantizer goes until the file's configuration says which."""

    kind = ""
    parameters_ = ()

    @classmethod
    def of(cls, site: Site) -> _Placeholder:
        return cls(site.n_bits)


def _quantizer_classes(method: str) -> dict[str, type[Quantizer]]:
    base, *_ = split_variant(method)
    if base in list_methods(by_name=True):
        load_method_class(base)  # a third party's method brings its own quantizers
    classes: dict[str, type[Quantizer]] = {}
    stack = [Quantizer]
    while stack:
        for cls in stack.pop().__subclasses__():
            stack.append(cls)
            if cls is not _Placeholder and "kind" in vars(cls):  # a class without one is abstract
                classes[cls.kind] = cls
    return classes


def _quantizer(classes: dict[str, type[Quantizer]], configs: dict[str, Any], name: str, path: Path) -> Quantizer:
    config = configs.get(name)
    if config is None or config["kind"] not in classes:
        kind = "none" if config is None else repr(config["kind"])
        raise IasvitError(
            f"{path} has for {name!r} a quantizer of kind {kind}; the known kinds are {', '.join(sorted(classes))}"
        )
    quantizer = classes[config["kind"]](config["n_bits"])
    known = quantizer.config()
    for key, value in config.items():
        if key not in known or not _alike(value, known[key]):
            raise IasvitError(f"{path} is damaged: {name!r} has {key} {str(value)[:40]!r}")
    quantizer.configure(config)
    return quantizer


def _alike(value: Any, known: Any) -> bool:
    """Whether a value of a configuration has a type that the known one can have."""
    if isinstance(known, list):
        return isinstance(value, list) and all(type(each) in (int, float) for each in value)
    if known is None or value is None:  # a dimension, or none
        return (type(value), type(known)) in ((int, type(None)), (type(None), int), (type(None), type(None)))
    return type(value) is type(known)
