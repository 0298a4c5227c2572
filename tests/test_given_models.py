"""Models as users bring them: quantized right, or refused in one sentence before any work, never silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import iasvit
from iasvit import api
from iasvit.errors import IasvitError
from iasvit.inspection import layer_errors, with_same_names
from iasvit.models import adapter_for, why_not_saved

FAST = {"ias_vit": {"iterations": 1, "batch_size": 5}, "base_ptq": {"candidates": 5}, "ptq4vit": {"candidates": 5}}


def quantize(model: nn.Module, images: Any, method: str = "minmax", spec: str = "W4A4") -> nn.Module:
    return iasvit.quantize(model, images, spec, method, **FAST.get(method, {}))


@pytest.fixture
def images() -> Tensor:
    """4 images, 4×3×32×32."""
    return tiny_models.images(4)


def same(one: nn.Module, other: nn.Module) -> bool:
    return tiny_models.same_bits(one.state_dict(), other.state_dict())


def refusal(call: Callable[[], object]) -> str:
    """The one sentence that a call is refused with."""
    with pytest.raises(IasvitError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


# ---- forwards and hooks --------------------------------------------------------------------------------------------


class OwnForward(VisionTransformer):
    """Normalises its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x - 0.5)


class OwnPositions(VisionTransformer):
    """Does something between two modules."""

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks(x.flip(1)))


class SameForward(VisionTransformer):
    """Written anew, and the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Dictionary(VisionTransformer):
    """Puts out no tensor."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def of_class(cls: type[nn.Module]) -> nn.Module:
    model = tiny_models.vit()
    model.__class__ = cls
    return model


def test_a_forward_of_its_own_is_refused_with_the_module_at_fault(images: Tensor) -> None:
    text = refusal(lambda: quantize(of_class(OwnForward), images))
    assert "OwnForward given computes something other than the chain of its segments" in text
    assert "from module 'patch_embed.proj' on, because of the code of OwnForward, a hook or a changed part" in text
    assert "from module 'blocks.0.norm1' on" in refusal(lambda: quantize(of_class(OwnPositions), images))
    assert "Dictionary given outputs a dict, not a tensor" in refusal(lambda: quantize(of_class(Dictionary), images))


def test_a_forward_of_its_own_that_computes_the_same_is_as_good(vit: nn.Module, images: Tensor) -> None:
    quantized = quantize(of_class(SameForward), images)
    assert type(quantized) is SameForward
    assert same(quantized, quantize(vit, images))


def normalised(x: Tensor) -> Tensor:
    return 2 * x - 0.5


@pytest.mark.parametrize("method", iasvit.list_methods())
def test_a_model_that_normalises_its_input_in_a_hook(vit: nn.Module, images: Tensor, method: str) -> None:
    kwargs = method == "rtn"  # both kinds of hooks, and every method once
    expected = quantize(vit, normalised(images), method)
    if kwargs:
        vit.register_forward_pre_hook(lambda _m, args, kw: ((normalised(args[0]),), kw), with_kwargs=True)
    else:
        vit.register_forward_pre_hook(lambda _m, args: normalised(args[0]))
    quantized = quantize(vit, images, method)
    assert same(quantized, expected)
    assert torch.equal(quantized(images), expected(normalised(images)))


@pytest.mark.parametrize("method", ["ias_vit", "ptq4vit", "minmax"])
def test_a_model_that_changes_its_logits_in_a_hook(vit: nn.Module, images: Tensor, method: str) -> None:
    expected = quantize(vit, images, method)
    vit.register_forward_hook(lambda _m, _args, logits: logits + 2)  # the same labels are likely as before
    torch.testing.assert_close(quantize(vit, images, method)(images), expected(images) + 2, atol=1e-3, rtol=1e-3)


def test_labels_are_drawn_from_what_a_hook_makes_of_logits(vit: nn.Module, images: Tensor) -> None:
    inputs = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(0))
    hooked = copy.deepcopy(vit)
    hooked.register_forward_hook(lambda _m, _args, logits: 4 * logits)
    with torch.no_grad():
        vit.head.weight.mul_(4)
        vit.head.bias.mul_(4)
    values = [adapter_for(m).log_likelihood(m, inputs, torch.Generator().manual_seed(1)) for m in (hooked, vit)]
    assert torch.equal(*values)


def uneven(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output * torch.linspace(0.5, 1.5, output.shape[-1])


@pytest.mark.parametrize(
    ("family", "path"),
    [("vit", "blocks"), ("vit", "blocks.1.attn"), ("vit", "head"), ("swin", "layers.0"), ("swin", "head.fc")],
)
def test_a_hook_that_quantization_would_lose_is_refused_by_name(family: str, path: str, images: Tensor) -> None:
    model = tiny_models.MODELS[family]()
    model.get_submodule(path).register_forward_hook(uneven)
    expected = model(images)
    text = refusal(lambda: quantize(model, images))
    assert f"from module {path!r} on, because of a hook or a changed part" in text
    assert torch.equal(model(images), expected)
    assert len(model.get_submodule(path)._forward_hooks) == 1  # those that looked on are gone
    assert not model.blocks[0]._forward_hooks if family == "vit" else not model.layers[1]._forward_hooks


def test_hooks_that_look_on_and_hooks_of_blocks_do_no_harm(vit: nn.Module, images: Tensor) -> None:
    expected = quantize(vit, images)
    seen: list[Tensor] = []
    for path in ("blocks", "blocks.0.attn", "head"):
        vit.get_submodule(path).register_forward_hook(lambda _m, _args, output: seen.append(output))
    assert same(quantize(vit, images), expected)
    assert seen
    vit.blocks[0].register_forward_hook(uneven)  # a block is called as a whole, with its hook
    hooked = quantize(vit, images)
    assert not same(hooked, expected)
    assert torch.isfinite(hooked(images)).all()


def test_what_a_hook_left_in_an_attribute_does_not_stop_the_copy(vit: nn.Module, images: Tensor) -> None:
    expected = quantize(vit, images)
    vit.blocks[0].register_forward_hook(lambda module, _args, output: setattr(module, "last", output))
    vit(images)
    assert vit.blocks[0].last.grad_fn is not None
    assert same(quantize(vit, images), expected)


# ---- parts deleted or replaced -------------------------------------------------------------------------------------

PARTS = {
    "vit": ("patch_embed", "pos_embed", "cls_token", "blocks", "norm", "fc_norm", "head", "blocks.1.mlp.act"),
    "swin": ("patch_embed", "layers", "norm", "head", "head.fc", "layers.1.downsample", "layers.0.blocks.1.attn.qkv"),
}


@pytest.mark.parametrize(("family", "path"), [(family, path) for family, paths in PARTS.items() for path in paths])
def test_a_model_that_lacks_a_part_is_refused(family: str, path: str, images: Tensor) -> None:
    model = tiny_models.MODELS[family]()
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    assert f"no attribute {name!r}" in refusal(lambda: quantize(model, images))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "blocks", nn.ModuleList(m.blocks)), 'ModuleList] is missing the required "forward"'),
        (lambda m: setattr(m, "head", None), "'NoneType' object is not callable"),
        (lambda m: setattr(m, "blocks", nn.Sequential()), "expected at least one block"),
        (lambda m: m.blocks.__setitem__(1, nn.Identity()), "module 'blocks.1' is a Identity"),
        (lambda m: setattr(m.blocks[1].mlp, "fc1", nn.Linear(32, 7)), "mat1 and mat2 shapes cannot be multiplied"),
        (
            lambda m: setattr(m, "head", nn.Sequential(nn.Dropout(), nn.Linear(32, 5))),
            "'head.1' (Linear) is not in a place",
        ),
        (
            lambda m: setattr(m.blocks[0].attn, "qkv", Adapted(32, 96)),
            "'blocks.0.attn.qkv' is a test_given_models.Linear;",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_refused(
    vit: nn.Module, images: Tensor, change: Callable[[nn.Module], None], named: str
) -> None:
    change(vit)
    assert named in refusal(lambda: quantize(vit, images))


class Adapted(nn.Linear):
    """A layer such as peft's, which is called Linear too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


Adapted.__name__ = Adapted.__qualname__ = "Linear"


def test_a_model_that_lost_its_last_block_is_quantized_as_it_is(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    vit.blocks = vit.blocks[:1]
    quantized = quantize(vit, images)
    iasvit.save(quantized, tmp_path / "m")
    assert quantized.quantization.architecture["depth"] == 1
    assert torch.equal(iasvit.load(tmp_path / "m")(images), quantized(images))


HEADS = {
    "linear": ("head", nn.Linear(32, 5)),
    "no bias": ("head", nn.Linear(32, 5, bias=False)),
    "none": ("head", nn.Identity()),
}
SWIN_HEADS = {"fc": ("head.fc", nn.Linear(32, 5)), "fc, no bias": ("head.fc", nn.Linear(32, 5, bias=False))}


@pytest.mark.parametrize(
    ("family", "path", "head"),
    [
        *((family, *head) for family in ("vit", "swin") for head in HEADS.values()),
        *(("swin", *head) for head in SWIN_HEADS.values()),
    ],
)
def test_a_replaced_head_is_described_from_the_model(
    family: str, path: str, head: nn.Module, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_models.MODELS[family]()
    model.set_submodule(path, copy.deepcopy(head))
    quantized = quantize(model, images)
    iasvit.save(quantized, tmp_path / "model")
    loaded = iasvit.load(tmp_path / "model")
    assert loaded.quantization.architecture["num_classes"] == getattr(head, "out_features", 0)
    assert torch.equal(loaded(images), quantized(images))
    assert loaded(images).shape == model(images).shape
    assert not caplog.records


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_size_of_images_is_the_models_not_its_configurations(family: str) -> None:
    model = tiny_models.MODELS[family](img_size=64)
    model.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (0.1, 0.2, 0.3)}
    data = quantize(model, tiny_models.images(2, size=64)).quantization.data
    assert data["input_size"] == (3, 64, 64)
    assert data["mean"] == (0.1, 0.2, 0.3)


def test_what_cannot_be_saved_is_told_before_the_work(
    vit: nn.Module, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit.blocks[1].mlp.act = nn.ReLU()  # the description has one activation for all blocks
    seen: list[int] = []
    method = iasvit.methods.get_method("minmax")
    work = method.quantize
    monkeypatch.setattr(method, "quantize", lambda *args: seen.append(len(caplog.records)) or work(*args))
    quantized = iasvit.quantize(vit, images, "W4A4", method)
    assert seen == [1]
    assert "VisionTransformer given can be quantized but not saved: a model of its weights" in caplog.text
    text = refusal(lambda: iasvit.save(quantized, tmp_path / "model"))
    assert "no model can be built from its description: a model of its weights" in text
    assert not list(tmp_path.iterdir())


def test_the_checks_leave_random_state_and_model_as_they_were(model: nn.Module, images: Tensor) -> None:
    before, state = torch.get_rng_state(), tiny_models.bits_of(model)
    image, _ = api._checked(model, images, iasvit.QuantSpec(4, 4))
    assert why_not_saved(model, image) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_models.same_bits(model.state_dict(), state)


# ---- values that are shared or computed ----------------------------------------------------------------------------


def share_weight(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.qkv.weight = model.blocks[0].attn.qkv.weight


def share_block(model: nn.Module) -> None:
    model.blocks[1] = model.blocks[0]


def share_norm(model: nn.Module) -> None:
    model.blocks[1].norm2 = model.blocks[1].norm1


@pytest.mark.parametrize(
    ("share", "named", "method"),
    [
        (share_weight, "blocks.1.attn.qkv.weight", "ias_vit"),
        (share_block, "blocks.1", "repq_vit"),
        (share_norm, "blocks.1.norm2", "repq_vit"),
    ],
)
def test_shared_parameters_give_what_the_same_values_unshared_give(
    vit: nn.Module,
    images: Tensor,
    share: Callable[[nn.Module], None],
    named: str,
    method: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    share(vit)
    plain = tiny_models.vit(seed=3)
    plain.load_state_dict(vit.state_dict())
    names = [name for name, _ in vit.named_parameters()]
    assert len(names) < len(list(plain.parameters()))
    quantized = quantize(vit, images, method)
    assert f"{named} shared values with others in the model given and have their own now" in caplog.text
    assert same(quantized, quantize(plain, images, method))
    assert [name for name, _ in vit.named_parameters()] == names  # the model given shares them still


def prune_all(model: nn.Module) -> None:
    for block in model.blocks:
        prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
        prune.random_unstructured(block.attn.qkv, "bias", 0.5)


def prune_twice(model: nn.Module) -> None:
    prune_all(model)
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.2)


def normed(model: nn.Module) -> None:
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    parametrizations.spectral_norm(model.blocks[1].attn.proj)


def normed_in_hooks(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.blocks[0].mlp.fc1)
    nn.utils.spectral_norm(model.blocks[1].attn.proj)


@pytest.mark.parametrize("reparameterize", [prune_all, prune_twice, normed, normed_in_hooks])
def test_computed_weights_are_taken_as_they_are_used(
    vit: nn.Module, images: Tensor, reparameterize: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    reparameterize(vit)
    expected = vit(images)  # also leaves weights behind that autograd computed
    plain = tiny_models.vit()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path, _, tensor = name.rpartition(".")
            parameter.copy_(getattr(vit.get_submodule(path), tensor))
    names = list(vit.state_dict())
    quantized = quantize(vit, images, "repq_vit")
    assert same(quantized, quantize(plain, images, "repq_vit"))
    assert list(vit.state_dict()) == names
    assert torch.equal(vit(images), expected)
    assert ("pruning masks are folded into" in caplog.text) == ("prune" in reparameterize.__name__)
    assert all(row["own"] < 1 for row in layer_errors(with_same_names(vit), quantized, images))


# ---- wrappers, modes and devices -----------------------------------------------------------------------------------


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.blocks[0].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
        compiled_in_place,
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
    ],
    ids=["DataParallel", "AveragedModel", "compile", "compile in place", "training", "frozen"],
)
def test_wrappers_and_modes_do_not_matter(
    vit: nn.Module, images: Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    expected = quantize(vit, images)
    quantized = quantize(wrap(vit), images)
    assert type(quantized) is VisionTransformer
    assert same(quantized, expected)
    assert not any(module.training for module in quantized.modules())


@pytest.mark.parametrize("surroundings", ["autocast", "default dtype", "default device"])
def test_the_callers_defaults_do_not_matter(vit: nn.Module, images: Tensor, surroundings: str) -> None:
    expected = quantize(vit, images, "ias_vit")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=surroundings == "autocast"):
            if surroundings == "default dtype":
                torch.set_default_dtype(torch.float64)
            if surroundings == "default device":
                torch.set_default_device("meta")
            quantized = quantize(vit, images, "ias_vit")
            assert torch.is_autocast_enabled("cpu") == (surroundings == "autocast")
            assert (torch.get_default_dtype() == torch.float64) == (surroundings == "default dtype")
            assert (torch.empty(0).device.type == "meta") == (surroundings == "default device")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert same(quantized, expected)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_checkpointing_does_not_matter(family: str, images: Tensor) -> None:
    expected = quantize(tiny_models.MODELS[family](), images, "repq_vit")
    model = tiny_models.MODELS[family]()
    model.set_grad_checkpointing(True)
    assert same(quantize(model, images, "repq_vit"), expected)


def test_channels_last_in_memory_does_not_matter(swin: nn.Module, images: Tensor, tmp_path: Path) -> None:
    expected = quantize(swin, images)
    quantized = quantize(swin.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(quantized(images), expected(images), atol=1e-3, rtol=1e-3)
    iasvit.save(quantized, tmp_path / "model")
    assert torch.equal(iasvit.load(tmp_path / "model")(images), quantized(images))


@pytest.mark.parametrize("method", ["repq_vit", "ptq4vit"])
def test_parameters_made_in_inference_mode(vit: nn.Module, images: Tensor, method: str) -> None:
    with torch.inference_mode():
        model = tiny_models.vit()
    assert next(model.parameters()).is_inference()
    assert same(quantize(model, images, method), quantize(vit, images, method))


def test_a_wrapper_with_a_hook_is_refused(vit: nn.Module, images: Tensor) -> None:
    wrapped = nn.DataParallel(vit)
    wrapped.register_forward_hook(uneven)
    assert "DataParallel around the model given has hooks" in refusal(lambda: quantize(wrapped, images))


def sparse_head(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    return model


def lazy_head(model: nn.Module) -> nn.Module:
    model.head = nn.LazyLinear(5)
    return model


def partly_on_meta(model: nn.Module) -> nn.Module:
    model.head.to("meta")
    return model


class Packed(nn.Parameter):
    """A tensor such as other quantizers have in place of parameters."""


def packed_head(model: nn.Module) -> nn.Module:
    model.head.weight = Packed(model.head.weight.detach())
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.bfloat16(), "bfloat16 parameters; give it in float32"),
        (lambda m: m.to("meta"), "'cls_token' of the model given is on the meta device and has no values"),
        (partly_on_meta, "'head.weight' of the model given is on the meta device"),
        (sparse_head, "'head.weight' of the model given is a torch.sparse_coo tensor"),
        (packed_head, "'head.weight' of the model given is a Packed"),
        (lazy_head, "'head.weight' of the model given has no shape yet"),
        (lambda m: "model.pth", "the model given is a str; give a torch.nn.Module"),
        (lambda m: m.state_dict(), "the model given is a OrderedDict; give a torch.nn.Module"),
        (lambda m: nn.Sequential(nn.Identity()), "model Sequential has no supported attention"),
        (lambda m: nn.Sequential(nn.Identity(), m), "model Sequential has no supported attention"),
    ],
)
def test_what_is_no_ordinary_model_is_refused(
    vit: nn.Module, images: Tensor, change: Callable[[nn.Module], Any], named: str
) -> None:
    assert named in refusal(lambda: quantize(change(vit), images))


# ---- calibration ---------------------------------------------------------------------------------------------------

WRONG = {
    "another size": ((2, 3, 48, 48), "3×48×48 (Input height (48) doesn't match model (32).)"),
    "channels last": ((2, 32, 32, 3), "32×32×3 ("),
    "one channel": ((2, 1, 32, 32), "1×32×32 ("),
    "four channels": ((2, 4, 32, 32), "4×32×32 ("),
    "no pixels": ((2, 3, 0, 0), "3×0×0 ("),
}


@pytest.mark.parametrize("method", ["ias_vit", "rtn"])
@pytest.mark.parametrize(("shape", "named"), WRONG.values(), ids=WRONG)
def test_images_of_a_wrong_shape_are_told_what_is_wrong(
    model: nn.Module, shape: tuple[int, ...], named: str, method: str
) -> None:
    text = refusal(lambda: quantize(model, torch.zeros(shape), method))
    assert f"{type(model).__name__} given cannot run on calibration images of {named}" in text


@pytest.mark.parametrize("form", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_a_later_batch_of_a_wrong_shape_is_refused_before_the_work(
    vit: nn.Module, images: Tensor, form: Callable[[list[Tensor]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iasvit.sos.calibrate_in_stream", lambda *_: pytest.fail("the work has begun"))
    text = refusal(lambda: quantize(vit, form([images[:0], images, torch.zeros(1, 3, 40, 40)]), "ias_vit"))
    assert "cannot run on calibration images of 3×40×40" in text
    text = refusal(lambda: quantize(vit, form([images, images.to(torch.uint8)]), "ias_vit"))
    assert "not made of float tensors" in text


def test_a_model_of_any_size_takes_images_of_several(images: Tensor) -> None:
    model = tiny_models.vit(dynamic_img_size=True)
    quantized = quantize(model, [images, tiny_models.images(2, size=48)])
    assert quantized(tiny_models.images(1, size=48)).shape == (1, 10)


# ---- states and dtypes of the quantized model ----------------------------------------------------------------------


def test_a_state_of_other_bits_or_another_method_is_refused_whole(images: Tensor) -> None:
    target = quantize(tiny_models.vit(), images, spec="W8A8")
    before = tiny_models.bits_of(target)
    made = quantize(tiny_models.vit(seed=1), images)
    text = refusal(lambda: target.load_state_dict(made.state_dict()))
    assert "comes from a model quantized by minmax at W4A4, but is loaded into one by minmax at W8A8" in text
    text = refusal(lambda: target.load_state_dict(quantize(tiny_models.vit(), images, "repq_vit", "W8A8").state_dict()))
    assert "by repq_vit at W8A8, but is loaded into one by minmax at W8A8" in text
    unlabelled = {key: value for key, value in made.state_dict().items() if not key.startswith("quantization.")}
    text = refusal(lambda: target.load_state_dict(unlabelled))
    assert "'patch_embed.proj.weight_quantizer' a quantizer 'uniform' of 4 bits" in text
    assert "holds no quantizers" in refusal(lambda: target.load_state_dict(tiny_models.vit().state_dict()))
    assert tiny_models.same_bits(target.state_dict(), before)


def test_a_state_of_its_own_kind_brings_its_options(images: Tensor, tmp_path: Path) -> None:
    made = iasvit.quantize(tiny_models.vit(seed=1), images, "W4A4", "minmax", init_size=3)
    target = copy.deepcopy(quantize(tiny_models.vit(), images))
    target.load_state_dict(made.state_dict())
    assert target.quantization.options == made.quantization.options
    assert torch.equal(target(images), made(images))
    iasvit.save(target, tmp_path / "model")
    loaded = iasvit.load(tmp_path / "model")
    assert loaded.quantization.options["init_size"] == 3
    loaded.load_state_dict(made.state_dict())  # a loaded model asks the same
    assert "at W8A8" in refusal(lambda: loaded.load_state_dict(quantize(made_of(1), images, spec="W8A8").state_dict()))
    whole = nn.ModuleDict({"net": target})  # inside another model too
    whole.load_state_dict(nn.ModuleDict({"net": made}).state_dict())


def made_of(seed: int) -> nn.Module:
    return tiny_models.vit(seed=seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quantized_model_stays_in_float32(model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    quantized = quantize(model, images)
    expected = quantized(images)
    text = refusal(lambda: quantized.to(dtype))
    assert f"a quantized model stays in float32, but {dtype} is asked for" in text
    assert torch.equal(quantized(images), expected)
    assert copy.deepcopy(quantized).double()(images.double()).dtype == torch.float64
