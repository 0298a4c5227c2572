"""COCO annotation files: what is put right, what is refused and how, and that nothing else can happen."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import CLASSES, content, predictions, write
from torch import Tensor

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from mmengine.structures import InstanceData
from pycocotools import mask as rle

from iasvit.errors import IasvitError
from tasks.detection.annotations import _decode, read_annotations
from tasks.detection.data import CocoImages
from tasks.detection.runner import percentages

Data = dict[str, Any]
SIZES = [(64, 48), (40, 60), (50, 50), (30, 70)]


@pytest.fixture
def data() -> Data:
    return content(SIZES)


@pytest.fixture
def root(tmp_path: Path, data: Data) -> Path:
    return write(tmp_path / "coco", data)


def nudged(generator: np.random.Generator, boxes: Tensor) -> Tensor:
    return boxes + torch.from_numpy(generator.normal(0, 1, boxes.shape)).float()


def annotated(root: Path, data: Any) -> CocoImages:
    text = data if isinstance(data, str) else json.dumps(data)
    (root / "annotations" / "instances_val2017.json").write_text(text)
    return CocoImages(root)


def score(images: CocoImages, answers: dict[int, InstanceData]) -> dict[str, float]:
    """The metrics, without the runner around them."""
    metric = images.metric(CLASSES)
    metric.dataset_meta = {"classes": CLASSES}
    for image_id in images.image_ids:
        found = answers[image_id]
        sample = {"img_id": image_id, "ori_shape": found.masks.shape[1:], "pred_instances": found.to_dict()}
        metric.process({}, [sample])
    return percentages(metric.evaluate(len(images)), metric)


def encoded(data: Data) -> list[Data]:
    """The annotations with run-length codes for masks: runs, and compressed ones."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    changed = []
    for annotation in data["annotations"]:
        size = sizes[annotation["image_id"]]
        code = rle.frPyObjects(annotation["segmentation"], *size)[0]
        counts = code["counts"].decode()
        if annotation["id"] % 2:
            pixels = rle.decode(code).flatten(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels]))).tolist()
            counts = np.diff([0, *edges, len(pixels)]).tolist()
        changed.append({**annotation, "segmentation": {"size": list(size), "counts": counts}})
    return changed


# ---- what must not change a result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda data: {**data, "categories": data["categories"][::-1]},
        lambda data: {**data, "categories": [{"id": 3, "name": "none of these"}, *data["categories"][1:2], *data["categories"][::2]]},  # noqa: E501
        lambda data: {**data, "images": data["images"][::-1]},
        lambda data: {**data, "annotations": [{**a, "id": a["id"] - 1} for a in data["annotations"]]},
        lambda data: {**data, "annotations": [{**a, "id": 7} for a in data["annotations"]]},
        lambda data: {**data, "annotations": [{**a, "id": -a["id"]} for a in data["annotations"]]},
        lambda data: {**data, "annotations": [{k: v for k, v in a.items() if k != "iscrowd"} for a in data["annotations"]]},  # noqa: E501
        lambda data: {**data, "annotations": [{**a, "segmentation": [[1, 2, 3, 4], *a["segmentation"]]} for a in data["annotations"]]},  # noqa: E501
        lambda data: {**data, "annotations": [{**a, "image_id": float(a["image_id"])} for a in data["annotations"]]},
        lambda data: {**data, "images": [{**i, "width": float(i["width"])} for i in data["images"]]},
        lambda data: {**data, "annotations": encoded(data)},
    ],
    ids=[
        *("categories reversed", "another category first", "images reversed", "ids from 0", "one id", "negative ids"),
        *("no iscrowd", "two-point polygons first", "float image ids", "float width", "run-length codes"),
    ],
)  # fmt: skip
def test_the_same_objects_have_the_same_metrics(root: Path, data: Data, change: Callable[[Data], Data]) -> None:
    images = CocoImages(root)
    answers = predictions(images, nudged, found=0.8)
    expected = score(images, answers)
    assert 20 < expected["bbox_mAP"] < 95
    assert score(annotated(root, change(data)), answers) == pytest.approx(expected, nan_ok=True)


def test_what_is_put_right_or_likely_not_meant_is_said(
    root: Path, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third, fourth, fifth = data["annotations"][:5]
    second["id"] = first["id"]
    third["segmentation"].append([1, 2, 3, 4])
    fourth["bbox"][2] = 0
    fifth["bbox"][0] = 60
    data["annotations"][5]["ignore"] = 1
    data["annotations"][7]["area"] = 0
    data["annotations"][6]["segmentation"] = [[-9, -9, -5, -9, -5, -5]]
    annotated(root, data)
    said = [message.partition(".json: 1 annotations (of 12) ")[2] for message in caplog.messages]
    assert said == [
        "repeat the id of another; each counts as an object of its own (such as 1)",
        "have polygons of fewer than three points, which are left out of their masks (such as 3)",
        "have a box of no width or no height, which counts as an object that nobody finds (such as 4)",
        "have a box that reaches beyond its image; bbox is [x, y, width, height] in pixels (such as 5)",
        "have polygons that lie outside their image; their masks are empty (such as 7)",
        "have the area 0, but a box that is not empty; they count as small objects (such as 8)",
        "are marked 'ignore', which COCO's evaluation does not know: they count as objects (such as 6)",
    ]


def test_a_clean_file_is_read_without_a_word(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotations = CocoImages(root)._annotations
    assert caplog.messages == []
    assert annotations.category_ids(CLASSES[::-1]) == [20, 9, 5]
    assert [image["id"] for image in annotations.images] == [979, 986, 993, 1000]
    assert [entry["id"] for entry in annotations.objects] == list(range(1, 13))


def test_evaluation_leaves_the_annotations_as_they_are(root: Path) -> None:
    images = CocoImages(root)
    before = copy.deepcopy(images._annotations.objects)
    answers = predictions(images, nudged)
    assert score(images, answers) == pytest.approx(score(images, answers), nan_ok=True)
    assert images._annotations.objects == before


def test_compressed_run_length_codes_are_decoded_as_pycocotools_does() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        pixels = (generator.random((17, 23)) < generator.random()).astype(np.uint8)
        runs = _decode(rle.encode(np.asfortranarray(pixels))["counts"].decode())
        assert runs is not None
        values = np.repeat(np.arange(len(runs)) % 2, runs)
        np.testing.assert_array_equal(values, pixels.flatten(order="F"))


# ---- what is refused -------------------------------------------------------------------------------------------------


def first(part: str, **fields: Any) -> Callable[[Data], Data]:
    """Changes fields of the first entry of a part."""
    return lambda data: {**data, part: [{**data[part][0], **fields}, *data[part][1:]]}


RUNS = {"size": [48, 64], "counts": [48 * 64]}
REFUSED: list[tuple[Callable[[Data], Any], str]] = [
    (first("images", id="a"), r"entry 0 of 'images' has the id 'a', but a whole number is expected"),
    (first("images", id=True), r"entry 0 of 'images' has the id True"),
    (first("images", id=993), r"the id 993 belongs to several images"),
    (first("images", file_name=3), r"image 1000 has the file_name 3, but a file's name is expected"),
    (first("images", file_name="a\0"), r"image 1000 has the file_name 'a\\x00'"),
    (first("images", width="64"), r"image 1000 has the width '64', but a whole number from 1 on is expected"),
    (first("images", width=-1), r"image 1000 has the width -1"),
    (first("images", height=0.5), r"image 1000 has the height 0\.5"),
    (first("images", height=None), r"image 1000 has the height None"),
    (first("images", width=65), r"image .*1000\.png has 64×48 pixels, but annotation file .* gives 65×48 .*id 1000"),
    (first("images", width=48, height=64), r"1000\.png has 64×48 pixels, but annotation file .* gives 48×64"),
    (first("categories", id=[5]), r"entry 0 of 'categories' has the id \[5\]"),
    (first("categories", id=9), r"the id 9 belongs to several categories"),
    (first("categories", name=None), r"category 5 has the name None, but a text is expected"),
    (first("annotations", id={}), r"entry 0 of 'annotations' has the id {}"),
    (first("annotations", id=1e300), r"entry 0 of 'annotations' has the id 1000000"),
    (first("annotations", category_id=[]), r"annotation 1 has the category_id \[\]"),
    (first("annotations", image_id="1000"), r"annotation 1 has the image_id '1000'"),
    (first("annotations", iscrowd=2), r"annotation 1 has the iscrowd 2, but 0 or 1 is expected"),
    (first("annotations", iscrowd="0"), r"annotation 1 has the iscrowd '0'"),
    (first("annotations", bbox=None), r"annotation 1 has the bbox None, but \[x, y, width, height\] in pixels"),
    (first("annotations", bbox=[1, 2, 3]), r"annotation 1 has the bbox \[1, 2, 3\]"),
    (first("annotations", bbox=[1, 2, 3, "4"]), r"annotation 1 has the bbox"),
    (first("annotations", bbox=[1, 2, 3, float("nan")]), r"annotation 1 has the bbox \[1, 2, 3, nan\]"),
    (first("annotations", bbox=[1, 2, -3, 4]), r"bbox \[1, 2, -3, 4\], but a width and a height of 0 or more"),
    (first("annotations", area="big"), r"annotation 1 has the area 'big', but a number of pixels is expected"),
    (first("annotations", area=-1), r"annotation 1 has the area -1"),
    (first("annotations", area=float("inf")), r"annotation 1 has the area inf"),
    (first("annotations", segmentation=[]), r"annotation 1 has the segmentation \[\], but an outline, a polygon of"),
    (first("annotations", segmentation=[[1, 2, 3, 4]]), r"annotation 1 .* but an outline, a polygon of three points"),
    (first("annotations", segmentation=None), r"annotation 1 has the segmentation None, but polygons"),
    (first("annotations", segmentation=[1, 2, 3, 4, 5, 6]), r"annotation 1 .* but polygons \[\[x, y, x, y, …\], …\]"),
    (first("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"annotation 1 .* but polygons"),
    (first("annotations", segmentation=[[1, 2, 3, 4, 5, 2e8]]), r"annotation 1 .* but polygons"),
    (first("annotations", segmentation={**RUNS, "size": [64, 48]}), r"size \[64, 48\], but its image's size"),
    (first("annotations", segmentation={**RUNS, "counts": [48 * 64, 1]}), r"segmentation's counts .* of 3072 pixels"),
    (first("annotations", segmentation={**RUNS, "counts": "b'WPV1"}), r"segmentation's counts \"b'WPV1\", but runs of"),
    (first("annotations", segmentation={**RUNS, "counts": "o"}), r"segmentation's counts 'o', but runs of 3072"),
    (first("annotations", segmentation={"size": [48, 64]}), r"segmentation's counts None"),
    (lambda data: {**data, "annotations": [{k: v for k, v in a.items() if k != "area"} for a in data["annotations"]]},
     r"an entry of 'annotations' has no 'area' \(id 1\)"),
    (lambda data: "[" * 100_000, r"is not JSON"),
    (lambda data: '{"images": ' + "9" * 5000 + "}", r"is not JSON"),
    (lambda data: {**data, "annotations": [{**a, "bbox": [0.1, 0.2, 0.5, 0.5]} for a in data["annotations"]]},
     r"all boxes lie within the first pixel .* in pixels, not in parts of the image"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_evaluated_is_named(root: Path, data: Data, change: Callable, message: str) -> None:
    with pytest.raises(IasvitError, match=message) as error:
        annotated(root, change(data))
    assert "instances_val2017.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_class_of_two_categories_is_refused(root: Path, data: Data) -> None:
    data["categories"][0]["name"] = CLASSES[1]
    with pytest.raises(IasvitError, match="has no category 'circle'"):
        annotated(root, data).check_classes(CLASSES)
    data["categories"].append({"id": 77, "name": CLASSES[0]})
    images = annotated(root, data)
    with pytest.raises(IasvitError, match="has 2 categories 'box', which the model knows"):
        images.check_classes(CLASSES)
    with pytest.raises(IasvitError, match="has 2 categories 'box'"):
        images.metric(CLASSES)


def test_a_pipe_is_no_annotation_file(root: Path) -> None:
    path = root / "annotations" / "instances_val2017.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(IasvitError, match=r"instances_val2017\.json cannot be read \(it is not a file\)"):
        CocoImages(root)


def test_a_byte_order_mark_does_not_matter(root: Path, data: Data) -> None:
    assert len(annotated(root, "\ufeff" + json.dumps(data))) == 4


# ---- anything at all -------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, -1e-308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *("", "a", "0", "\0", "\ud800", "../x", [], {}, [[]], [[0, 0, 5, 0, 5, 5]], [[1, 2, 3, 4]], [0, 0, 5, 5], {"a": 1}),
    *({"size": [48, 64], "counts": [3072]}, {"size": [48, 64], "counts": "PPn2"}, {"size": [], "counts": ""}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(data: Data, draw: random.Random) -> str:
    """The file's text with a few values moved, removed, doubled or replaced, or with a few characters changed."""
    changed = copy.deepcopy(data)
    if draw.random() < 0.2:
        text = bytearray(json.dumps(changed).encode())
        for _ in range(draw.randint(1, 3)):
            text[draw.randrange(len(text))] = draw.randrange(32, 127)
        return text.decode()
    for _ in range(draw.randint(1, 2)):
        *path, last = draw.choice(places(changed))
        parent = changed
        for key in path:
            parent = parent[key]
        kind = draw.random()
        if isinstance(parent[last], int) and kind < 0.5:
            parent[last] += draw.randint(-20, 20)
        elif kind < 0.6:
            del parent[last]
        elif kind < 0.7 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(changed)


def test_any_change_of_a_file_is_evaluated_or_refused_in_one_sentence(root: Path, data: Data) -> None:
    draw = random.Random(0)
    data["annotations"] = data["annotations"][:8] + encoded(data)[8:]
    images = annotated(root, data)
    answers = predictions(images, nudged)
    score(images, answers)  # imports what takes seconds
    evaluated = 0
    for _ in range(200):
        text, started, refusal = mutated(data, draw), time.process_time(), ""
        try:
            images = annotated(root, text)
            score(images, {image_id: answers.get(image_id, answers[1000]) for image_id in images.image_ids})
            evaluated += 1
        except IasvitError as error:
            refusal = str(error)
        assert len(refusal.encode().splitlines()) <= 1, text
        assert time.process_time() - started < 5, text
    assert 10 < evaluated < 100


def test_reading_takes_seconds_for_cocos_size(tmp_path: Path) -> None:
    """A tenth of instances_val2017.json in seconds, on a busy machine too: only a wrong algorithm misses it."""
    polygon = [round(100 + 0.37 * k % 99, 2) for k in range(70)]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(500)]
    entry = {"category_id": 1, "bbox": [1.5, 2, 30, 40], "area": 1200, "iscrowd": 0, "segmentation": [polygon]}
    annotations = [{**entry, "id": i, "image_id": i % 500} for i in range(3_678)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": annotations}))
    started = time.process_time()
    read_annotations(path)
    assert time.process_time() - started < 5
