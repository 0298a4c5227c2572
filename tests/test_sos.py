"""I&S-ViT: what each of the three stages sees and changes, its ablations, its reproducibility."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from iasvit import sos
from iasvit.calibration import ActivationStore, enabled, store
from iasvit.errors import IasvitError
from iasvit.methods import get_method
from iasvit.models import find_pairs, segments
from iasvit.nn import QuantConv2d, QuantLinear, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import SOFTMAX_QUANTIZERS, Log2Quantizer, Quantizer, SULQuantizer, UniformQuantizer
from iasvit.reconstruction import SegmentJob
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec

W3A3 = QuantSpec(3, 3)
BATCH = 5


def quantize(model: nn.Module, images: Tensor, spec: QuantSpec = W3A3, checkpoint: Path | None = None, **options: Any):  # noqa: ANN201
    options = {"iterations": 3, "batch_size": BATCH, "lr": 1e-2, **options}
    return IASViT(**options).quantize(model, images, spec, Progress(checkpoint=checkpoint))


def affine(model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of the quantized layers, which alone are learnt."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
    state = model.state_dict()
    names = [f"{name}.{part}" for name in layers for part in ("weight", "bias")]
    return {name: state[name].clone() for name in names if name in state}


def rest(model: nn.Module) -> dict[str, Tensor]:
    """Everything else: LayerNorm parameters, quantizer parameters, embeddings, relative positions."""
    learnt = affine(model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in learnt}


@torch.no_grad()
def rerun(model: nn.Module, images: Tensor, end: int) -> Tensor:
    """The activations entering segment `end`, from the images anew."""
    outputs = []
    for x in images.split(BATCH):
        for segment in segments(model)[:end]:
            x = segment.run(x)
        outputs.append(x)
    return torch.cat(outputs)


@dataclass
class Stage:
    """What one call of `optimize` was given, and what it did."""

    index: int  # segment
    inputs: Tensor  # of all images
    expected_full: Tensor  # entering the segment in the full-precision model, re-run from the images
    expected_quantized: Tensor  # the same in the quantized model so far
    targets_are_full: bool
    iterations: int
    seed: int
    reached: list[Tensor] = field(default_factory=list)  # batches that ran through the segment
    passed_through: dict[str, bool] = field(default_factory=dict)  # quantizer → its output was its input
    channel_dims: dict[str, int | None] = field(default_factory=dict)
    affine: set[str] = field(default_factory=set)  # weights and biases of the whole model's quantized layers
    learnt: set[str] = field(default_factory=set)
    changed_else: set[str] = field(default_factory=set)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """Records each optimization of an I&S-ViT run; the run itself goes on as it would."""
    recorded: list[Stage] = []
    context: dict[str, Any] = {}
    plain_stream, plain_optimize = sos.stream, sos.optimize

    def stream(
        model: nn.Module, quantized: nn.Module, images: Tensor, fit: Callable, *args: Any, **kwargs: Any
    ) -> None:
        def watched(job: SegmentJob) -> None:
            given = images if isinstance(images, Tensor) else torch.cat(list(images.batches(BATCH)))
            context.update(model=model, quantized=quantized, images=given, job=job)
            fit(job)

        plain_stream(model, quantized, images, watched, *args, **kwargs)

    def optimize(
        run: Callable, parameters: Any, inputs: ActivationStore, targets: ActivationStore, **kwargs: Any
    ) -> None:
        model, quantized, images, job = (context[key] for key in ("model", "quantized", "images", "job"))
        full, quant = rerun(model, images, job.index), rerun(quantized, images, job.index)
        wanted = rerun(model, images, job.index + 1)
        entire = range(len(images))
        stage = Stage(
            job.index,
            inputs.gather(entire).clone(),
            full,
            quant,
            torch.equal(targets.gather(entire), wanted),
            kwargs["iterations"],
            kwargs["seed"],
        )
        hooks = []
        for weights in (True, False):
            for name, quantizer in job.segment.quantizers(weights=weights):

                def note(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                    stage.passed_through[name] = output is args[0]

                hooks.append(quantizer.register_forward_hook(note))
                stage.channel_dims[name] = getattr(quantizer, "channel_dim", None)
        learnt, other = affine(quantized), rest(quantized)

        def watched(x: Tensor) -> Tensor:
            stage.reached.append(x.detach().clone())
            return run(x)

        plain_optimize(watched, parameters, inputs, targets, **kwargs)
        for hook in hooks:
            hook.remove()
        stage.affine = set(learnt)
        stage.learnt = {name for name, tensor in affine(quantized).items() if not torch.equal(tensor, learnt[name])}
        stage.changed_else = {n for n, tensor in rest(quantized).items() if not torch.equal(tensor, other[n])}
        recorded.append(stage)

    monkeypatch.setattr(sos, "stream", stream)
    monkeypatch.setattr(sos, "optimize", optimize)
    return recorded


def by_segment(stages: list[Stage]) -> dict[int, list[Stage]]:
    result: dict[int, list[Stage]] = {}
    for stage in stages:
        result.setdefault(stage.index, []).append(stage)
    return result


def has_rows(whole: Tensor, batch: Tensor) -> bool:
    """Whether each image's activations in `batch` are those of one image in `whole`, none twice."""
    found = [next((i for i, row in enumerate(whole) if torch.equal(row, x)), None) for x in batch]
    return None not in found and len(set(found)) == len(found)


def test_each_stage_reads_and_changes_what_it_should(model: nn.Module, images: Tensor, stages: list[Stage]) -> None:
    quantized = quantize(model, images)
    norms = {layer for pair in find_pairs(quantized) for layer in pair.linears}
    norm_sites = {f"{name}.input_quantizer" for name, module in quantized.named_modules() if module in norms}
    chain = segments(quantized)
    found = by_segment(stages)
    assert list(found) == [index for index, segment in enumerate(chain) if segment.modules]
    for index, run in found.items():
        activations = [name for name, _ in chain[index].quantizers(weights=False)]
        weights = [name for name, _ in chain[index].quantizers(weights=True)]
        assert len(run) == (2 if activations else 1)  # the patch embedding's image is not quantized
        for stage in run:
            assert stage.targets_are_full
            assert stage.changed_else == set()  # LayerNorm affine and quantizer parameters stay
            names = {name.removesuffix(".weight_quantizer") for name in weights}
            assert {name.rpartition(".")[0] for name in stage.learnt} == names
            assert stage.learnt == {name for name in stage.affine if name.rpartition(".")[0] in names}
            assert len(stage.reached) == stage.iterations == 3
            assert not any(stage.passed_through[name] for name in activations)  # activations are quantized in both
        last = run[-1]
        assert torch.equal(last.inputs, last.expected_quantized)
        assert not any(last.passed_through[name] for name in weights)
        assert all(last.channel_dims[name] == 0 for name in weights)
        assert all(last.channel_dims[name] is None for name in activations)
        assert all(has_rows(last.expected_quantized, batch) and len(batch) == BATCH for batch in last.reached)
        if len(run) == 1:
            continue
        first = run[0]
        assert torch.equal(first.inputs, first.expected_full)
        assert all(first.passed_through[name] for name in weights)  # weights in full precision
        assert {name for name in activations if first.channel_dims[name] == -1} == norm_sites & set(activations)
        assert all(has_rows(first.expected_full, batch) and len(batch) == BATCH for batch in first.reached)
        assert (first.expected_full - first.expected_quantized).abs().max() > 1e-2  # the two stages' inputs do differ


def test_stage_two_changes_nothing_but_the_granularity(vit: nn.Module, images: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    plain = sos.reparameterize

    def watched(pair: Any) -> None:
        x = torch.randn(8, 17, 32, generator=torch.Generator().manual_seed(0))
        for linear in pair.linears:
            assert not linear.weight_quantizer.enabled
        before = [linear(pair.norm(x)) for linear in pair.linears]
        plain(pair)
        seen.extend(zip(before, [linear(pair.norm(x)) for linear in pair.linears], strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sos, "reparameterize", watched)
        quantize(vit, images)
    assert len(seen) == 4
    for before, after in seen:
        near = (before - after).abs() < 1e-3  # but for values on a rounding tie, of which float32 makes a few
        assert near.float().mean() > 0.99


def test_without_sos_there_is_one_stage_per_tensor_of_twice_the_steps(
    model: nn.Module, images: Tensor, stages: list[Stage]
) -> None:
    quantized = quantize(model, images, sos=False)
    for stage in stages:
        assert torch.equal(stage.inputs, stage.expected_quantized)
        assert stage.iterations == 6
        assert not any(stage.passed_through.values())
        assert all(
            dim == (0 if name.endswith("weight_quantizer") else None) for name, dim in stage.channel_dims.items()
        )
        assert stage.changed_else == set()
    assert [stage.index for stage in stages] == [i for i, s in enumerate(segments(quantized)) if s.modules]
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(quantized.get_submodule(name).weight, module.weight)  # not reparameterized


@pytest.mark.parametrize("name", SOFTMAX_QUANTIZERS)
def test_the_option_softmax_names_the_quantizer_of_attention_maps_and_of_nothing_else(
    vit: nn.Module, images: Tensor, name: str
) -> None:
    quantized = quantize(vit, images, softmax=name, iterations=1)
    expected = SOFTMAX_QUANTIZERS[name](3)
    assert (type(expected) is SULQuantizer) == (name == "sulq")
    own = {f"blocks.{index}.attn.matmul_av.left_quantizer" for index in range(2)}
    for path, module in quantized.named_modules():
        if isinstance(module, Quantizer):
            assert (module.config() == expected.config()) if path in own else (type(module) is UniformQuantizer)


def test_without_sulq_the_papers_log2_takes_its_place(vit: nn.Module, images: Tensor) -> None:
    """Its scale is the largest value seen, and its last code is a power of two, not 0."""
    method = get_method("ias_vit[-sulq]", iterations=0)
    quantized = method.quantize(vit, images, W3A3, Progress())
    quantizer = quantized.blocks[0].attn.matmul_av.left_quantizer
    assert type(quantizer) is Log2Quantizer
    values = quantizer.decode(torch.arange(8))
    assert torch.equal(values, quantizer.scale * 2.0 ** -torch.arange(8.0))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "sulq"),
        ({"recipe": "fast"}, "log2"),
        ({"recipe": "fast", "softmax": "sulq"}, "sulq"),
        ({"softmax": "adalog"}, "adalog"),
    ],
)
def test_the_recipe_says_the_softmax_quantizer_where_no_option_does(
    vit: nn.Module, images: Tensor, options: dict[str, Any], kind: str
) -> None:
    quantized = quantize(vit, images, iterations=0, **options)
    found = [quantizer for name, quantizer in quantizers_of(quantized, weights=False) if "matmul_av.left" in name]
    assert {quantizer.kind for quantizer in found} == {kind}
    if kind == "log2":
        assert all(quantizer.zero_code and len(quantizer.percentiles) > 1 for quantizer in found)


def test_an_unknown_softmax_quantizer_is_refused() -> None:
    with pytest.raises(IasvitError, match="softmax is 'sqrt', but there are sulq, log2, log2_searched"):
        IASViT(softmax="sqrt")


@pytest.mark.parametrize("sos", [True, False])
def test_quantizers_are_initialised_by_one_pass_of_the_quantized_model(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, sos: bool
) -> None:
    """Weights in full precision, nothing learnt: with all quantizers on, the pass gives each the same input again."""
    given: dict[int, Tensor] = {}
    calibrate = Quantizer.calibrate

    def noted(self: Quantizer, x: Tensor) -> None:
        given.setdefault(id(self), x.clone())
        calibrate(self, x)

    seen: list[bool] = []

    def check(_model: nn.Module, quantized: nn.Module, given_images: ActivationStore, *_args: Any, **kw: Any) -> None:
        kw["start"](given_images)
        activations = dict(quantizers_of(quantized, weights=False))
        again: dict[int, Tensor] = {}
        for quantizer in activations.values():
            quantizer.register_forward_pre_hook(lambda module, args: again.update({id(module): args[0].clone()}))
        with enabled(list(quantizers_of(quantized, weights=True)), False), torch.no_grad():
            quantized(given_images.gather(range(7)))
        assert given.keys() == again.keys() == {id(quantizer) for quantizer in activations.values()}
        assert all(torch.equal(again[key], x) for key, x in given.items())
        assert all(quantizer.enabled for quantizer in activations.values())
        seen.append(True)

    monkeypatch.setattr(Quantizer, "calibrate", noted)
    monkeypatch.setattr("iasvit.sos.stream", check)
    quantize(model, images, init_size=7, sos=sos)
    assert seen


def test_the_result_is_quantized_through_and_through(model: nn.Module, images: Tensor) -> None:
    original = tiny_models.bits_of(model)
    quantized = quantize(model, images, QuantSpec.parse("W3A4,*.fc1=W2A8"))
    for name, module in quantized.named_modules():
        if isinstance(module, Quantizer):
            assert module.enabled
            assert module.calibrated
            assert module.n_bits == (
                2 if name.endswith("fc1.weight_quantizer") else 8 if ".fc1." in name else module.n_bits
            )
            if hasattr(module, "zero_point"):
                assert module.zero_point.dtype == torch.int32
        if isinstance(module, (QuantLinear, QuantConv2d)):
            codes = module.weight_quantizer.encode(module.weight)
            assert codes.max() < 2**module.weight_quantizer.n_bits
            assert torch.equal(module.weight_quantizer.decode(codes), module.weight)
    reparameterized = {f"{pair.name}.{part}" for pair in find_pairs(quantized) for part in ("weight", "bias")}
    for name, tensor in rest(quantized).items():
        if name in original:  # quantizers are not
            assert torch.equal(tensor, original[name]) == (name not in reparameterized), name
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert torch.isfinite(quantized(images)).all()


def test_learning_brings_the_output_nearer_to_the_full_precision_models(model: nn.Module, images: Tensor) -> None:
    target = model(images)
    errors = {}
    for iterations in (0, 60):
        output = quantize(model, images, iterations=iterations, lr=2e-3)(images)
        errors[iterations] = (output - target).square().mean().item()
    assert errors[60] < 0.7 * errors[0]


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "steps"), [("W3A3", 1000), ("W4A4", 1000), ("W8A4", 1000), ("W6A6", 200), ("W8A8", 200)]
)
def test_default_steps_are_the_papers(
    vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, spec: str, steps: int
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(sos, "optimize", lambda *_args, **kwargs: calls.append(kwargs))
    IASViT().quantize(vit, images, QuantSpec.parse(spec), Progress())
    assert {call["iterations"] for call in calls} == {steps}
    assert {(call["lr"], call["batch_size"]) for call in calls} == {(4e-5, 64)}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"recipe": "fast"}, (75, 225)),
        ({"recipe": "fast", "iterations": 4}, (2, 6)),
        ({"recipe": "fast", "iterations": 4, "stage1_share": 0.5}, (4, 4)),
        ({"iterations": 4, "stage1_share": 0.0}, (0, 8)),
        ({"iterations": 4, "stage1_share": 0.25, "sos": False}, (8,)),
    ],
)
def test_stage1_share_divides_the_steps_and_the_bar_counts_them(
    vit: nn.Module,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    steps: tuple[int, ...],
) -> None:
    calls: list[int] = []
    said: list[int] = []
    plain = sos.stream

    def stream(*args: Any, steps: int, **kwargs: Any) -> None:
        said.append(steps)
        plain(*args, steps=steps, **kwargs)

    monkeypatch.setattr(sos, "stream", stream)
    monkeypatch.setattr(sos, "optimize", lambda *_args, iterations, **_kwargs: calls.append(iterations))
    quantized = IASViT(**options).quantize(vit, images, W3A3, Progress())
    count = sum(bool(segment.modules) for segment in segments(quantized))
    assert said == [count * sum(steps)]
    assert calls[-len(steps) :] == list(steps)
    assert len(calls) == count * len(steps) - (len(steps) - 1)  # the patch embedding has no stage 1


def test_quantizers_are_initialised_on_the_first_images_only(vit: nn.Module, images: Tensor) -> None:
    others = torch.cat([images[:4], 3 * tiny_models.images(5, seed=1)])
    first = quantize(vit, images, iterations=0, init_size=4)
    second = quantize(vit, others, iterations=0, init_size=4)
    assert tiny_models.same_bits(first.state_dict(), second.state_dict())
    third = quantize(vit, images, iterations=0, init_size=12)
    assert not tiny_models.same_bits(first.state_dict(), third.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"init_size": 0}, "init_size is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"stage1_share": 1.5}, "stage1_share is 1.5"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IasvitError, match=message):
        IASViT(**options)


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_suffice(swin: nn.Module, count: int) -> None:
    assert torch.isfinite(quantize(swin, tiny_models.images(count), batch_size=64)(tiny_models.images(2))).all()


# ---- reproducibility -----------------------------------------------------------------------------------------------


def test_a_seed_decides_every_bit(model: nn.Module, images: Tensor) -> None:
    first = quantize(model, images, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = quantize(copy.deepcopy(model), images.clone(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_models.same_bits(first.state_dict(), again.state_dict())
    other = quantize(model, images, seed=4)
    assert not tiny_models.same_bits(first.state_dict(), other.state_dict())
    assert not torch.equal(first(images), other(images))


def test_segments_and_stages_draw_different_batches(vit: nn.Module, images: Tensor, stages: list[Stage]) -> None:
    quantize(vit, images)
    quantize(vit, images, seed=1)
    seeds = [stage.seed for stage in stages]
    assert len(set(seeds)) == len(seeds) == 2 * 7


def test_memory_decides_nothing(swin: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantize(swin, images)
    monkeypatch.setattr(store, "default_memory_budget", lambda device=None: 0)
    spilled: list[int] = []
    plain = ActivationStore._spilled
    monkeypatch.setattr(ActivationStore, "_spilled", lambda *args: (spilled.append(1), plain(*args))[1])
    assert tiny_models.same_bits(expected.state_dict(), quantize(swin, images).state_dict())
    assert spilled


class Interrupted(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("sos_on", [True, False])
def test_resumed_in_the_middle_of_a_block_it_gives_the_same_bits(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sos_on: bool
) -> None:
    expected = quantize(model, images, sos=sos_on)
    plain = sos.optimize
    calls: list[int] = []

    def cut(run: Callable, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) % 3:
            return plain(run, *args, **kwargs)

        steps: list[int] = []

        def until_interrupted(x: Tensor) -> Tensor:
            steps.append(1)
            if len(steps) == 2:
                raise Interrupted
            return run(x)

        return plain(until_interrupted, *args, **kwargs)

    monkeypatch.setattr(sos, "optimize", cut)
    runs, quantized = 0, None
    while quantized is None:
        runs += 1
        try:
            quantized = quantize(model, images, checkpoint=tmp_path, sos=sos_on)
        except Interrupted:
            continue
    assert runs >= 2
    assert tiny_models.same_bits(expected.state_dict(), quantized.state_dict())
    assert torch.equal(expected(images), quantized(images))
    assert all(not parameter.requires_grad for parameter in quantized.parameters())


def test_each_stage_is_a_phase_of_its_own(vit: nn.Module, images: Tensor) -> None:
    for options, absent in ({"sos": True}, set()), ({"sos": False}, {1, 2}):
        progress = Progress()
        IASViT(iterations=1, batch_size=BATCH, **options).quantize(vit, images, W3A3, progress)
        for stage in (1, 2, 3):
            name = f"reconstruction, stage {stage}"
            assert (name in progress.seconds) == (stage not in absent)
            assert stage in absent or progress.seconds[name] > 0


def test_autocast_learns_as_float32_does(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are in bfloat16; parameters stay in float32, the loss falls, and what is learnt is about the same."""
    images = tiny_models.images(40)  # of a dozen, what is learnt is the noise of single images
    losses: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    products: dict[bool, set[torch.dtype]] = {False: set(), True: set()}
    optimize = sos.optimize

    def watched(run: Callable, parameters: list, inputs: ActivationStore, targets: ActivationStore, **kwargs: Any):  # noqa: ANN202
        def noted(x: Tensor) -> Tensor:
            y = run(x)
            products[kwargs["autocast"]].add((x @ x.mT).dtype)
            return y

        def error() -> float:
            with torch.no_grad():
                return float((run(inputs.gather(range(12))) - targets.gather(range(12))).square().sum())

        before = error()
        optimize(noted, parameters, inputs, targets, **kwargs)
        losses[kwargs["autocast"]].append((before, error()))
        assert all(parameter.dtype == torch.float32 for parameter in parameters)

    monkeypatch.setattr(sos, "optimize", watched)
    models = [
        quantize(vit, images, QuantSpec(6, 6), iterations=30, batch_size=8, lr=1e-3, autocast=autocast)
        for autocast in (False, True)
    ]
    assert products == {False: {torch.float32}, True: {torch.bfloat16}}
    assert all(p.dtype == torch.float32 for p in models[1].parameters())
    assert sum(after for _, after in losses[True]) < 0.95 * sum(before for before, _ in losses[True])
    with torch.no_grad():
        full, plain, cast = (model(images) for model in (vit, *models))
    assert not torch.equal(plain, cast)
    assert (cast - plain).square().mean() < 0.1 * full.var()
    assert (cast - full).square().mean() < 1.5 * (plain - full).square().mean()
