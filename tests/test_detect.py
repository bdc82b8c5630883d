"""Detection: average precision on odd sets, the trained detector elsewhere, killed and resumed, bad input.

As a script: train in FOLDER, to be killed.
"""

import json, os, subprocess, sys
from pathlib import Path

import datasets, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from transformers import set_seed

from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions, ConfigError, validate
from medvlp.tasks.detect import Detector, DetectOptions, detect, detected, true_boxes
from medvlp.tasks.metrics.boxes import COCO_IOUS, CORNERS, average_precisions, box_frame, mean_average_precision
from medvlp.tasks.yolo import YoloHead, detections, fit_anchors, prediction_grid, yolo_loss
from medvlp.training.downstream import EarlyStopping
from small import BERT, PVT, RESNET, VIT, assert_equal_models, kill_at_first_checkpoint

CPU = ComputeOptions(device="cpu", precision="fp32")
BUDGET = dict(epochs=3, min_steps=0, patience=0, batch_size=6, learning_rate=1e-2, n_resamples=10, fractions=[1.0])
SMALL = dict(strides=[4, 8], anchors_per_stride=2, width=4)


def study(i):
    "A bright or a dark square with a box"
    r = np.random.default_rng(i)
    pixels, label = r.integers(90, 150, (36, 40)), ["dark", "bright"][i % 2]
    x, y = r.integers(4, 22, 2)
    pixels[y : y + 12, x : x + 12] = 20 + 200 * (i % 2)
    box = dict(label=label, box=[x / 40, y / 36, (x + 12) / 40, (y + 12) / 36])
    split = "train" if i < 20 else "val" if i < 26 else "test"
    names = dict(study_id=str(i), patient_id=str(i), view="PA", findings="", impression="", split=split)
    image = png(Image.fromarray(pixels.astype(np.uint8)))
    return names | dict(paired=False, image=image, mask=None, boxes=[box] if i % 5 else [], questions=[])


def make(image=RESNET):
    "Studies and an untrained method, the same in every process"
    torch.set_num_threads(1)
    studies = datasets.Dataset.from_list([study(i) for i in range(40)], features=study_features([]))
    tokenizer = train_tokenizer(["A large effusion. The lungs are clear."] * 2, 80)
    set_seed(0)
    return studies, build_method("convirt", image, BERT, len(tokenizer), dim=16)


def run(folder, studies=None, image=RESNET, seed=0, **changes):
    "The whole task; call again to resume"
    own, method = make(image)
    options = DetectOptions(**BUDGET | SMALL | changes)
    place = dict(seed=seed, compute=CPU, checkpoints=folder / "checkpoints", output=folder / "model")
    return detect(method, studies or own, options, **place)


def trained(folder, **changes):
    run(folder, **changes)
    return Detector.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a detector, trained without an interruption"
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


# Training


def test_seed_decides_weights(whole, tmp_path):
    detector = Detector.from_pretrained(whole / "model")
    assert_equal_models(trained(tmp_path / "again"), detector)
    with pytest.raises(AssertionError):
        assert_equal_models(trained(tmp_path / "other", seed=1), detector)


def test_crashed_run_resumes_to_equal_weights(whole, tmp_path, monkeypatch):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:  # of 12, four in an epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(EarlyStopping, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert list(tmp_path.rglob("complete"))
    assert_equal_models(trained(tmp_path), Detector.from_pretrained(whole / "model"))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_killed_process_resumes_to_equal_weights(whole, tmp_path):
    kill_at_first_checkpoint(tmp_path, __file__, tmp_path)
    assert_equal_models(trained(tmp_path), Detector.from_pretrained(whole / "model"))


@pytest.mark.parametrize("image", [RESNET, PVT, VIT], ids=["resnet", "pvt", "vit"])
def test_frozen_encoder_is_unchanged(image, tmp_path):
    detector, (_, method) = trained(tmp_path, image=image, epochs=1), make(image)
    assert_equal_models(detector.encoder, method.image_encoder)  # batch statistics included


def test_encoder_learns_where_it_has_a_rate(tmp_path):
    detector, (_, method) = trained(tmp_path, epochs=1, encoder_learning_rate=1e-3), make()
    with pytest.raises(AssertionError):
        assert_equal_models(detector.encoder, method.image_encoder)


ELSEWHERE = """
import json
from medvlp.tasks.detect import Detector
detector = Detector.from_pretrained("model")
print(json.dumps([table.to_dict("list") for table in detector.predict(["0.png", "1.png"], min_score=0.0)]))
"""


def test_saved_detector_finds_the_same_elsewhere(whole):
    detector, files = Detector.from_pretrained(whole / "model"), [whole / "0.png", whole / "1.png"]
    for i, file in enumerate(files):
        Image.new("RGB", (90, 70), (80 + 110 * i,) * 3).save(file)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=whole, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(json.loads(done.stdout.splitlines()[-1]), detector.predict(files, min_score=0.0)):
        pd.testing.assert_frame_equal(pd.DataFrame(a), b, check_dtype=False, atol=1e-4)


def test_stored_images_and_files_are_read_alike(whole):
    picture, detector = make()[0][30]["image"], Detector.from_pretrained(whole / "model")
    picture.save(whole / "stored.png")
    a, b = (detector.predict(x, min_score=0.0)[0] for x in (picture, whole / "stored.png"))
    pd.testing.assert_frame_equal(a, b)
    assert a[CORNERS].to_numpy().min() >= 0 and (a.x1 <= 40).all() and (a.y1 <= 36).all()


# Sets that lack something


def changed(boxes):
    "The studies with `boxes(i, boxes)` in place of their boxes"
    studies = make()[0]
    new = [boxes(i, b) for i, b in enumerate(studies["boxes"])]
    return studies.remove_columns("boxes").add_column("boxes", new, feature=studies.features["boxes"])


def test_set_without_boxes_has_no_result(tmp_path):
    result = run(tmp_path, changed(lambda i, b: []))
    assert result.reason == "the set has no boxes; give them in the column boxes of metadata.csv"
    assert (tmp_path / "model/no-model.txt").is_file()


def test_split_without_boxes_has_no_result(tmp_path):
    reason = run(tmp_path, changed(lambda i, b: b if i >= 20 else [])).reason
    assert reason.startswith("annotated training studies: 20, with a box in the encoder's square: 0;")
    reason = run(tmp_path, changed(lambda i, b: b if i < 26 else [])).reason
    assert reason == "no test study has a box of these classes: bright, dark"


def test_validation_split_may_lack_boxes(tmp_path):
    assert not run(tmp_path, changed(lambda i, b: [] if 20 <= i < 26 else b), epochs=1).reason


def test_class_that_training_lacks_is_left_out_with_a_note(tmp_path):
    studies = changed(lambda i, b: [o | dict(label="mass") for o in b] if i in (31, 32) else b)
    table = run(tmp_path, studies, epochs=1).table
    assert set(table.label) == {"bright", "dark", "macro"}
    assert "without a box in the training split, left out: mass" in table.note.iloc[-1]
    with pytest.raises(ConfigError, match='labels: no training study has a box "mass"'):
        run(tmp_path / "named", studies, labels=["bright", "mass"])


def test_class_that_the_test_split_lacks_has_no_value(tmp_path):
    table = run(tmp_path, changed(lambda i, b: b if i < 26 or i % 2 else []), epochs=1).table.set_index("label")
    assert table.value["dark"].isna().all()
    assert (table.note["dark"] == "no box in the test split, left out of the mean").all()
    assert (table.value["macro"].to_numpy() == table.value["bright"].to_numpy()).all()
    assert table.note["macro"].iloc[0].startswith("mean of 1 of 2 labels")


def test_boxes_outside_the_square_are_no_boxes(tmp_path):
    far = [dict(label="bright", box=[0.0, 0.0, 0.04, 1.0])]  # 1.6 of 40 pixels; the square begins at 4
    studies = changed(lambda i, b: far)
    assert not any(map(len, true_boxes(studies, 32)))
    assert run(tmp_path, studies).reason.startswith("the set has no boxes")
    assert not run(tmp_path, changed(lambda i, b: b + far), epochs=1).reason


def test_encoder_without_maps_is_an_error(tmp_path):
    studies, method = make()
    del method.image_encoder.net.feature_info
    with pytest.raises(ValueError, match="does not give its feature maps"):
        detect(method, studies, DetectOptions(), checkpoints=tmp_path, output=tmp_path / "model")


def test_only_annotated_studies_count(tmp_path):
    table = run(tmp_path, epochs=1, annotated="with_boxes").table
    assert (table.n_labelled == 16).all() and (table.n_test == 12).all()


def test_fractions_are_of_patients_and_nested(tmp_path):
    result = run(tmp_path, epochs=1, fractions=[0.1, 0.5, 1.0], subset_seeds=2)
    sizes = result.table.groupby("fraction").n_labelled.first()
    assert sizes.is_monotonic_increasing and sizes[1.0] == 20
    assert set(result.table.subset_seeds) == {1, 2}
    overall = result.scores[result.scores.overall]
    assert len(overall) == 9 and {"mAP 10 %", "COCO mAP 50 %", "AP50 100 %"} <= set(overall.metric)
    assert result.headline == {"mAP 100 %": "mAP"}
    names = DetectOptions(fractions=[0.1, 0.5, 1.0]).metric_names()["detect"]
    assert set(overall.metric) <= set(names)


def test_detected_judges_each_image(whole):
    studies, detector = make()[0], Detector.from_pretrained(whole / "model")
    for example, boxes in zip(detected(detector, studies.select(range(26, 40))), studies["boxes"][26:]):
        assert np.isnan(example["score"]) == (not boxes) and len(example["truth"]) == len(boxes)


@pytest.mark.parametrize("wrong", [dict(strides=[]), dict(fractions=[0.0]), dict(nms_iou=1.5), dict(annotated="some")])
def test_bad_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        validate(DetectOptions, wrong, "params.yaml: tasks.detect")


# Average precision


@pytest.mark.parametrize("seed", range(6))
def test_weighted_form_equals_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    labels, truths, predictions = ["a", "b", "c"][: 1 + seed % 3], [], []
    for _ in range(12):
        n, p = rng.integers(0, 6), rng.integers(0, 9)
        boxes = [np.c_[c, c + rng.uniform(8, 30, (len(c), 2))] for c in (rng.uniform(0, 40, (k, 2)) for k in (n, p))]
        boxes[1][: min(n, p)] = boxes[0][: min(n, p)] + rng.normal(0, 1.5, (min(n, p), 4))
        truths.append(box_frame(rng.choice(labels, n), boxes[0]))
        predictions.append(box_frame(rng.choice(labels, p), boxes[1], rng.random(p)))
    a = average_precisions(predictions, truths, labels, COCO_IOUS)
    b = average_precisions(predictions, truths, labels, COCO_IOUS, np.ones((1, 12)))[:, 0]
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_more_than_a_hundred_predictions():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 40, (300, 2))
    boxes = np.c_[boxes, boxes + 15]
    truth, found = [box_frame(["a"] * 5, boxes[::60])], [box_frame(["a"] * 300, boxes, rng.random(300))]
    a, b = average_precisions(found, truth, ["a"])[0], average_precisions(found, truth, ["a"], counts=[[1]])[0, 0]
    assert a == pytest.approx(b, abs=1e-12) and 0 < a < 1


def test_interval_without_patients_or_predictions():
    truth, none = box_frame(["a"], [[0, 0, 9, 9]]), box_frame([], [], [])
    table = mean_average_precision([none] * 3, [truth] * 3, ["a"], patient_ids=list("abc"), n_resamples=20)
    assert table[["value", "low", "high"]].eq(0).all(axis=None)


# The head


@pytest.mark.parametrize("size", [32, 40, 57])
def test_head_of_any_size(size):
    maps = [torch.rand(2, 8, -(-size // s), -(-size // s)) for s in (8, 16, 32)]
    shapes = fit_anchors(torch.rand(30, 2) * 20 + 4, 9).view(3, 3, 2)
    logits = YoloHead([8, 8, 8], 2, 3, width=4)(maps)
    grid = prediction_grid([tuple(m.shape[2:]) for m in maps], [8, 16, 32], shapes)
    assert logits.shape[1] == len(grid.cells)
    boxes = torch.tensor([[[size - 9.0, size - 7.0, size, size]]]).expand(2, -1, -1)
    loss = sum(yolo_loss(logits, boxes, torch.zeros(2, 1, dtype=torch.long), grid, size).values())
    loss.backward()
    assert loss.isfinite()
    for found in detections(logits, grid, size, min_score=0.0):
        assert (found.boxes >= 0).all() and (found.boxes <= size).all() and len(found.boxes) <= 100


def test_gradient_of_the_loss():
    shapes = torch.tensor([[[6.0, 6.0], [12.0, 9.0]]]).double()
    grid = prediction_grid([(2, 2)], [16], shapes)
    boxes = torch.tensor([[[3.0, 4.0, 9.0, 11.0], [14.0, 14.0, 30.0, 29.0], [0, 0, 0, 0]]]).double()
    labels = torch.tensor([[1, 0, -1]])
    logits = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    loss = lambda x: sum(yolo_loss(x, boxes, labels, grid, 32).values())
    assert torch.autograd.gradcheck(loss, logits)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
