"""results/detections.png: `python -m tasks.studies.detections`. What a detector finds before and after quantization."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib as mpl

mpl.use("Agg")

import torch
import typer
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import iasvit
from iasvit.cli import main
from iasvit.methods import method_options
from iasvit.spec import QuantSpec
from tasks.coco import CocoTask
from tasks.detection.setup import MINI, Data, make_setup
from tasks.mini.scenes import CLASSES

ENLARGED = 4  # pixels a side for one of the image's
FONT = str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
COLOURS = [tuple(int(255 * part) for part in mpl.colormaps["tab20"](label)[:3]) for label in range(len(CLASSES))]

app = typer.Typer(add_completion=False)


@torch.inference_mode()
def detect(network: nn.Module, task: CocoTask, model: str, image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (k, 4) in pixels, labels (k,), scores (k,) and masks (k, H, W) of one validation image, best first.

    Args:
        network: the detector, or a quantized one.
        task: mini COCO.
        model: the detector's name.
        image: number of the validation image.
    """
    packed = task.images.dataset(task.models.config(model))[image]
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    found = network.test_step(batch)[0].pred_instances.to("cpu")
    return found.bboxes, found.labels, found.scores, found.masks


def drawn(image: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, masks: Tensor) -> Tensor:
    """An image (3, H, W) uint8, enlarged, with boxes, masks and names drawn into it."""

    def enlarged(x: Tensor) -> Tensor:
        return x.repeat_interleave(ENLARGED, dim=-1).repeat_interleave(ENLARGED, dim=-2)

    if not len(labels):
        return enlarged(image)
    colours = [COLOURS[label] for label in labels.tolist()]
    names = [f"{CLASSES[label]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]
    canvas = draw_segmentation_masks(enlarged(image), enlarged(masks), alpha=0.35, colors=colours)
    return draw_bounding_boxes(canvas, ENLARGED * boxes, names, colours, width=2, font=FONT, font_size=13)


@app.command()
def draw(
    detector: Annotated[str, typer.Option(help="A mini detector.")] = "cascade_mask_rcnn_swin_t",
    method: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: ias_vit, minmax]")] = None,
    bits: Annotated[str, typer.Option(help="Bits of the quantized detectors.")] = "W4A4",
    image: Annotated[int, typer.Option(help="Number of the validation image.")] = 2,
    threshold: Annotated[float, typer.Option(help="Lowest score that is drawn.")] = 0.5,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("results/detections.png"),
) -> None:
    """Draw what a mini detector finds in a validation image, in full precision and quantized."""
    task = CocoTask(make_setup(Data.mini))
    spec = QuantSpec.parse(bits)
    networks = {"full precision": task.load_model(detector)}
    calibration = task.calibration(detector, MINI.calib_size, seed=0)
    for name in method or ["ias_vit", "minmax"]:
        options = {key: value for key, value in MINI.options(spec).items() if key in method_options(name)}
        networks[f"{name} {spec}"] = iasvit.quantize(task.load_model(detector), calibration, spec, name, **options)
    pixels = task.images.dataset(task.models.config(detector))[image]["inputs"].flip(0)  # read as BGR
    figure, axes = plt.subplots(1, len(networks), figsize=(4.2 * len(networks), 4.6), layout="constrained")
    for axis, (title, network) in zip(axes, networks.items(), strict=True):
        boxes, labels, scores, masks = detect(network, task, detector, image)
        kept = scores >= threshold
        axis.imshow(drawn(pixels, boxes[kept], labels[kept], scores[kept], masks[kept]).permute(1, 2, 0))
        axis.set_title(f"{title}: {int(kept.sum())} found", fontsize=11)
        axis.set_axis_off()
    figure.suptitle(textwrap.shorten(f"{detector}, mini COCO, validation image {image}, score ≥ {threshold:g}", 120))
    figure.savefig(out, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main(app)
