"""The mini zoo: layout, checkpoints, training, statistics, hardening."""

from __future__ import annotations

import csv
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from iasvit.errors import IasvitError
from tasks.mini import hard, observation, scenes, zoo
from tasks.studies import activations, train
from tasks.studies.training import backbone_data, optimization
from tasks.studies.training.recipes import BACKBONE_RECIPES, BackboneRecipe

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "real_vit_activations.csv"
NAMES = list(zoo.MINI_BACKBONES)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def stirred(name: str) -> nn.Module:
    """An untrained backbone with LayerNorm weights and biases as uneven as training makes them."""
    model = zoo.build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.exp(0.3 * torch.randn(module.weight.shape, generator=generator)))
                module.bias.add_(0.2 * torch.randn(module.bias.shape, generator=generator))
    return model


# ---- layout --------------------------------------------------------------------------------------------------------


def test_classes_are_those_of_the_scenes() -> None:
    assert len(scenes.CLASSES) == zoo.NUM_CLASSES


def layout(model: nn.Module) -> list[tuple[int, bool, float, bool]]:
    """For each block: heads, shifted or not, MLP ratio, qkv bias."""
    return [
        (
            block.attn.num_heads,
            any(getattr(block, "shift_size", (0,))),
            block.mlp.fc1.out_features / block.mlp.fc1.in_features,
            block.attn.qkv.bias is not None,
        )
        for block in observation.blocks_of(model)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_the_real_backbones(name: str) -> None:
    with torch.device("meta"):
        real = timm.create_model(zoo.MINI_BACKBONES[name].counterpart, pretrained=False)
    mini = zoo.build(name)
    assert type(mini) is type(real)
    assert layout(mini) == layout(real)
    # The same modules in the same places: an adapter that knows the real one knows the mini one.
    skip = ("drop_path",)  # stochastic depth, idle in both
    kinds = [
        [(n, type(m)) for n, m in model.named_modules() if not any(s in n for s in skip)] for model in (mini, real)
    ]
    assert kinds[0] == kinds[1]
    assert {n for n, _ in mini.named_parameters()} == {n for n, _ in real.named_parameters()}
    norms = [{m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} for model in (mini, real)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", ["deit_t", "deit_s", "deit_b", "vit_s", "vit_b"])
def test_vit_sees_197_tokens(name: str) -> None:
    model = zoo.build(name)
    assert model.pos_embed.shape[1] == 197
    assert model.forward_features(images(1)).shape[1] == 197


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b"])
def test_swin_maps_and_windows(name: str) -> None:
    stages = zoo.build(name).layers
    assert [stage.output_resolution[0] for stage in stages] == [28, 14, 7, 4]
    assert [{block.window_size[0] for block in stage.blocks} for stage in stages] == [{7}, {7}, {7}, {4}]
    shifted = stages[2].blocks[1]
    assert shifted.attn_mask.shape == (1, 49, 49)  # what meets across the map's edge is masked
    assert (shifted.attn_mask < 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_size_config_and_seed(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    path = zoo.checkpoint_path(name, tmp_path)
    zoo.save(model, path, {"top1": 0.0})
    assert path.stat().st_size <= zoo.MAX_BYTES
    assert model(images(2)).shape == (2, zoo.NUM_CLASSES)
    config = resolve_data_config(model=model)
    assert config["input_size"] == (3, 56, 56)
    assert config["crop_pct"] == 1.0
    assert config["mean"] == ((0.5, 0.5, 0.5) if name.startswith("vit") else (0.485, 0.456, 0.406))
    same, other = zoo.build(name), zoo.build(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_build_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    zoo.build("deit_t")
    assert torch.equal(before, torch.random.get_rng_state())


def test_timm_transform_changes_nothing_but_scale() -> None:
    """Training normalises by hand; timm's evaluation transform must give the same tensor."""
    model = zoo.build("deit_t")
    pixels, _ = scenes.render_images("val", 0, 1)
    from PIL import Image

    transformed = create_transform(**resolve_data_config(model=model))(Image.fromarray(pixels[0]))
    torch.testing.assert_close(transformed, observation.scene_images(model, "val", 1)[0], atol=1e-6, rtol=0)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_load_gives_the_rounded_weights(tmp_path: Path) -> None:
    model = zoo.build("deit_t", seed=3)
    zoo.save(model, zoo.checkpoint_path("deit_t", tmp_path), {"top1": 12.5})
    loaded = zoo.load("deit_t", folder=tmp_path)
    for (key, was), now in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert now.dtype == torch.float32
        assert torch.equal(was.half().float(), now), key
    assert not loaded.training
    assert zoo.read_metadata("deit_t", tmp_path)["top1"] == 12.5
    assert os.listdir(tmp_path) == ["deit_t.safetensors"]


def test_unknown_backbone_names_those_there_are() -> None:
    for call in (zoo.build, zoo.load):
        with pytest.raises(IasvitError, match=r"'resnet'.*vit_s.*swin_b"):
            call("resnet")


def test_missing_checkpoint_names_those_there_are(tmp_path: Path) -> None:
    zoo.save(zoo.build("deit_t"), zoo.checkpoint_path("deit_t", tmp_path), {})
    with pytest.raises(IasvitError, match=r"swin_t\.safetensors does not exist; checkpoints there: deit_t;"):
        zoo.load("swin_t", folder=tmp_path)


def test_checkpoint_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    path = zoo.checkpoint_path("deit_t", tmp_path)
    state = zoo.as_stored(zoo.build("deit_t"))
    del state["blocks.3.attn.qkv.bias"]
    state["extra"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(7)
    save_file(state, path)
    with pytest.raises(IasvitError) as caught:
        zoo.load("deit_t", folder=tmp_path)
    for part in (
        "blocks.3.attn.qkv.bias is missing",
        "extra is not in the model",
        "head.bias has shape (7,) for (16,)",
    ):
        assert part in str(caught.value)


def test_checkpoint_cut_short_is_no_safetensors_file(tmp_path: Path) -> None:
    path = zoo.checkpoint_path("deit_t", tmp_path)
    zoo.save(zoo.build("deit_t"), path, {})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IasvitError, match="not a readable safetensors file"):
        zoo.load("deit_t", folder=tmp_path)


# ---- training ------------------------------------------------------------------------------------------------------

SHORT = ["--backbone", "deit_t", "--steps", "3", "--train-images", "40", "--val-images", "12", "--batch-size", "16"]
SHORT += ["--workers", "1", "--evaluations", "1"]


def test_training_runs_and_repeats_to_the_bit(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, ("5", "5", "6"), strict=True):
        assert train.main([*SHORT, "--seed", seed, "--out", str(folder), "--data", str(tmp_path / "data")]) == 0
    first, again, other = (zoo.checkpoint_path("deit_t", folder).read_bytes() for folder in folders)
    assert first == again
    assert first != other
    metadata = zoo.read_metadata("deit_t", folders[0])
    assert (metadata["step"], metadata["seed"], metadata["images"], metadata["val_images"]) == (3, 5, 40, 12)
    with (folders[0] / train.LOG_NAME).open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["top1"]) == metadata["top1"]
    assert row["final"] == "1"
    # The row's accuracy is that of what is stored.
    pixels, labels = backbone_data.load_split(tmp_path / "data", "val", torch.device("cpu"))
    measured = train.accuracy(zoo.load("deit_t", folder=folders[0]), pixels, labels)
    assert measured == pytest.approx(metadata["top1"], abs=0.006)
    untrained, trained = zoo.build("deit_t", 5).state_dict(), load_file(zoo.checkpoint_path("deit_t", folders[0]))
    assert not torch.equal(untrained["blocks.0.mlp.fc1.weight"].half(), trained["blocks.0.mlp.fc1.weight"])


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    zoo.save(zoo.build("deit_t", 9), path, {})
    arguments = [*SHORT, "--lr", "1e-12", "--weight-decay", "0", "--data", str(tmp_path / "data")]
    for folder, more in (("random", []), ("started", ["--init", str(path)])):
        assert train.main([*arguments, "--out", str(tmp_path / folder), *more]) == 0
    given = load_file(path)
    random, started = (load_file(zoo.checkpoint_path("deit_t", tmp_path / name)) for name in ("random", "started"))
    key = "blocks.0.mlp.fc1.weight"
    assert torch.equal(started[key], given[key])  # so small a rate moves nothing that half precision keeps
    assert not torch.equal(random[key], given[key])
    starts = []
    for folder in ("random", "started"):
        with (tmp_path / folder / train.LOG_NAME).open() as file:
            starts += [row["start"] for row in csv.DictReader(file)]
    assert starts == ["random", "first"]
    assert zoo.read_metadata("deit_t", tmp_path / "started")["start"] == "first"


def test_what_training_cannot_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swin_t.safetensors"
    zoo.save(zoo.build("swin_t"), path, {})
    arguments = [*SHORT, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    for more, message in (
        (["--init", str(path)], "swin_t.safetensors does not fit the model: cls_token is missing"),
        (["--init", str(tmp_path / "none.safetensors")], "none.safetensors"),
        (
            ["--init", str(path), "--backbone", "swin_t"],
            "--init holds one backbone, but 2 are asked for: deit_t",
        ),
    ):
        assert train.main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data").exists()


def test_rendering_by_several_processes_is_rendering(tmp_path: Path) -> None:
    backbone_data.render_split(tmp_path, "train", 7, workers=2, chunk=3)
    got, labels = backbone_data.load_split(tmp_path, "train", torch.device("cpu"), chunk=3)
    want, want_labels = scenes.render_images("train", 0, 7, 56)
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1), want)
    np.testing.assert_array_equal(labels, want_labels)


def test_training_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SHORT, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    assert train.main([*arguments, "--batch-size", "64"]) == 2
    assert "--train-images 40 do not fill a batch of 64" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert train.main([*arguments, "--device", "cuda"]) == 2
        assert "no usable CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*arguments, "--train-images", "0"])
    assert not (tmp_path / "out").exists()


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = optimization.make_schedule(optimizer, BackboneRecipe(lr=1.0, warmup=0.1)), []
    for progress in np.linspace(0, 1, 101):
        schedule.step_update(progress)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] < 0.02
    assert max(rates) == rates[10] == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_clock_starts_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    clock = train.Clock(None, deadline=200.0)
    assert clock.progress(1) == 0.0
    now[0] = 150.0  # compilation took half of it
    assert clock.progress(10) == 0.0
    now[0] = 175.0
    assert clock.progress(20) == pytest.approx(0.5)
    now[0] = 300.0
    assert clock.progress(30) == 1.0


def test_augmentation_is_shift_and_flip() -> None:
    """Without jitter every augmented image is the image moved by up to `shift`, mirrored or not."""
    recipe = BackboneRecipe(shift=1, jitter=0.0)
    pixels = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = backbone_data.Batches(pixels, recipe, (0.0,) * 3, (1.0,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        augmented = batches(torch.arange(4).repeat(32))
    padded = nn.functional.pad(pixels.float() / 255, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, y : y + 56, x : x + 56] for y in range(3) for x in range(3)]
    moved = torch.stack([*moved, *(image.flip(3) for image in moved)])  # 18×4×3×56×56
    seen = set()
    for i, image in enumerate(augmented):
        matches = [m for m in range(18) if torch.allclose(moved[m, i % 4], image, atol=1e-5)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 18


def test_weight_decay_spares_norms_biases_and_positions() -> None:
    for name in ("deit_t", "swin_t"):
        model = zoo.build(name)
        optimizer = optimization.make_optimizer(model, BackboneRecipe(weight_decay=0.1))
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        for key, parameter in model.named_parameters():
            plain = parameter.ndim == 1 or key in ("pos_embed", "cls_token") or "position_bias" in key
            assert (id(parameter) in decayed) != plain, key


def test_every_backbone_has_a_recipe_and_vit_s_its_own_seed() -> None:
    assert set(BACKBONE_RECIPES) == set(zoo.MINI_BACKBONES)
    assert BACKBONE_RECIPES["vit_s"].seed != BACKBONE_RECIPES["deit_s"].seed


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_attention_statistics_of_a_worked_example() -> None:
    values = torch.tensor([2.0**-8, 2.0**-7, 0.5, 0.25])
    row = activations.attention_row(values)
    assert (row["n"], row["headline"], row["extreme"]) == (4, "0.2500", "0.5")  # 2^-7 itself is not below
    assert row["q50"] == "0.129"  # (0.0078125 + 0.25) / 2


def test_channel_statistics_of_a_worked_example() -> None:
    row = activations.channel_row(torch.tensor([2.0, 1.0, 4.0, 12.0, 2.0]))
    assert (row["n"], row["headline"], row["q50"], row["extreme"]) == (5, "6.00", "1.000", "0.500")


def test_observed_ranges_and_attention_are_those_of_a_plain_run() -> None:
    model, x = stirred("deit_t"), images(3)
    attention, ranges = observation.observe(model, x)
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        block = model.blocks[0]
        normed = block.norm1(tokens)
        q, k, _ = block.attn.qkv(normed).reshape(3, 197, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    flat = normed.reshape(-1, 48)
    torch.testing.assert_close(ranges[0], flat.max(0).values - flat.min(0).values)
    torch.testing.assert_close(attention[0], weights.flatten()[::17], atol=1e-6, rtol=1e-4)
    assert model.blocks[0].attn.fused_attn == zoo.build("deit_t").blocks[0].attn.fused_attn  # as it was
    assert not any(module._forward_hooks for module in model.modules())


def test_measure_has_the_references_rows(tmp_path: Path) -> None:
    rows = activations.measure(zoo.build("deit_t"), images(2), "deit_t")
    assert [(row["block"], row["site"]) for row in rows[:3]] == [(0, "attention"), (0, "norm1->qkv"), (0, "norm2->fc1")]
    assert len(rows) == 36
    swin = activations.measure(zoo.build("swin_t"), images(2), "swin_t")
    assert [row["block"] for row in swin if row["site"] == "downsample.norm->reduction"] == [2, 4, 10]
    path = tmp_path / "a.csv"
    activations.write(rows, path)
    activations.write(swin, path)
    activations.write(rows, path)  # replaces, does not add
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) + len(swin)
    if REFERENCE.is_file():
        with REFERENCE.open() as file:
            assert csv.DictReader(file).fieldnames == list(written[0])


# ---- mini-hard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hardening_keeps_the_output_and_sets_the_spread(name: str) -> None:
    model, x = stirred(name), images(8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hardened = hard.harden(model, seed=0, images=x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # left untouched
    with torch.inference_mode():
        was, now = model(images(4, seed=9)), hardened(images(4, seed=9))
    assert float((was - now).abs().max()) <= 1e-5
    _, ranges = observation.observe(hardened, x)
    depth, spread, spread_out = len(observation.blocks_of(model)), hard.read_spread(), 0
    for (block, site, _, _), values in zip(observation.norm_linear_sites(hardened), ranges, strict=True):
        real = spread[site if site in spread else "norm2->fc1"][round(block * 11 / (depth - 1))]
        ratios = values / values.median()
        assert float(ratios.max()) == pytest.approx(real[-1], rel=1e-3)
        assert float(ratios.min()) == pytest.approx(real[0], rel=1e-3)
        spread_out += float(ratios.max()) >= 2.5
    assert spread_out >= 0.8 * len(ranges)


def test_hardening_keeps_channels_in_order_and_follows_the_seed() -> None:
    model, x = stirred("deit_t"), images(4)
    first, again, other = (hard.harden(model, seed=seed, images=x) for seed in (0, 0, 1))
    assert torch.equal(first.blocks[5].norm1.weight, again.blocks[5].norm1.weight)
    assert not torch.equal(first.blocks[5].norm1.weight, other.blocks[5].norm1.weight)
    for was, now in zip(observation.observe(model, x)[1], observation.observe(first, x)[1], strict=True):
        assert torch.equal(was.argsort(), now.argsort())


def test_drawn_ratios_have_the_measured_quantiles() -> None:
    ratios = hard.read_spread()["norm1->qkv"][0]
    draws = [hard.draw_ratios(ratios, 384, np.random.default_rng(seed)).numpy() for seed in range(50)]
    for drawn in draws:
        assert (np.diff(drawn) >= 0).all()
        assert (drawn[0], drawn[-1]) == (ratios[0], ratios[-1])
        assert drawn[191] == 1
    quantiles = np.mean([np.quantile(drawn, (0.01, 0.5, 0.99, 0.999)) for drawn in draws], axis=0)
    assert quantiles == pytest.approx(ratios[1:5], rel=0.03)


def test_embedded_spread_is_the_references() -> None:
    if not REFERENCE.is_file():
        pytest.skip("the reference measurement is not beside this checkout")
    with REFERENCE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"].startswith("vit_small") and row["n"] == "384"]
    spread = hard.read_spread()
    assert len(rows) == 24
    for row in rows:
        want = [float(row[key]) for key in ("extreme", "q01", "q50", "q99", "q999", "headline")]
        assert spread[row["site"]][int(row["block"])] == want


# ---- the checkpoints in the repository -----------------------------------------------------------------------------


COMMITTED = [name for name in sorted(zoo.MINI_BACKBONES) if zoo.checkpoint_path(name).is_file()]


@pytest.mark.parametrize("path", [zoo.checkpoint_path(name) for name in COMMITTED], ids=COMMITTED)
def test_committed_checkpoint_loads_and_classifies(path: Path) -> None:
    model = zoo.load(path.stem)
    assert path.stat().st_size <= zoo.MAX_BYTES
    stated = zoo.read_metadata(path.stem)["top1"]
    pixels, labels = scenes.render_images("val", 0, 150)
    measured = train.accuracy(model, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels))
    assert abs(measured - stated) < 12  # 150 images: three standard errors are under 9 points
    with torch.inference_mode():
        x = observation.scene_images(model, "val", 4).double()  # what is compared are weights, not float32's rounding
        hardened = hard.harden(zoo.load(path.stem), seed=0)
        assert float((model.double()(x) - hardened.double()(x)).abs().max()) <= 1e-5
