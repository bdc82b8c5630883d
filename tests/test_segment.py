"""Segmentation: same seed, same weights; killed and resumed, same weights; odd masks, classes and encoders.

As a script: train in FOLDER, to be killed.
"""

import os, subprocess, sys
from pathlib import Path

import datasets, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from transformers import set_seed

from medvlp.data.prepare import DataOptions, load_studies, png, prepare, read_manifest, study_features
from medvlp.encoders import image
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions
from medvlp.tasks.segment import Segmenter, SegmentOptions, Truth, find_truth, segment, segmented, survey
from medvlp.training.downstream import EarlyStopping, PlacedExamples, split_studies
from small import assert_equal_models, kill_at_first_checkpoint

CPU = ComputeOptions(device="cpu", precision="fp32")
TEXT = dict(options=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
IMAGE = dict(name="resnet10t", image_size=32, options=dict(channels=[8, 16, 24, 32], stem_width=8))
BUDGET = dict(epochs=3, min_steps=0, patience=0, batch_size=6, learning_rate=1e-2, n_resamples=10, fractions=[1.0])
MANIFEST = dict(masks=dict(train=20, val=6, test=6), mask_classes=dict(disc=1, bar=2), mask_ignore=[9])


def study(i, mask="drawn"):
    "Two bright shapes in noise, with a mask"
    r, values = np.random.default_rng(i), np.zeros((36, 40), np.uint8)
    y, x = r.integers(4, 20, 2)
    values[y : y + 10, x : x + 10] = 1
    values[28:34, x : x + 16] = 2 * (i % 2)
    values[:2] = 9
    pixels = r.integers(60, 120, values.shape) + 60 * (values % 9)
    mask = dict(drawn=values, empty=values * 0, ignored=values * 0 + 9, none=None)[mask]
    return dict(
        study_id=str(i),
        patient_id=str(i),
        view="PA",
        findings="",
        impression="",
        split="train" if i < 20 else "val" if i < 26 else "test",
        paired=False,
        image=png(Image.fromarray(pixels.astype(np.uint8))),
        mask=None if mask is None else png(Image.fromarray(mask)),
        boxes=[],
        questions=[],
    )


def make(masks=lambda i: "drawn", n=32):
    rows = [study(i, masks(i)) for i in range(n)]
    return datasets.Dataset.from_list(rows, features=study_features([]))


def make_method(image=IMAGE):
    torch.set_num_threads(1)
    set_seed(0)
    return build_method("convirt", image, TEXT, 60, dim=16)


def run(folder, studies=None, manifest=MANIFEST, seed=0, image=IMAGE, **changes):
    "The task, with checkpoints in FOLDER/checkpoints; call again to resume"
    options = SegmentOptions(**(BUDGET | dict(decoder_channels=[16, 8, 8, 8], output_stride=2) | changes))
    place = dict(seed=seed, compute=CPU, checkpoints=folder / "checkpoints", output=folder / "model")
    return segment(make_method(image), make() if studies is None else studies, manifest, options, **place)


def train(folder, **options):
    result = run(folder, **options)
    assert not result.reason
    return Segmenter.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The segmenter, trained without an interruption"
    return train(tmp_path_factory.mktemp("whole"))


def test_seed_decides_weights(whole, tmp_path):
    assert_equal_models(train(tmp_path), whole)
    other = train(tmp_path, seed=1).state_dict()
    assert any(not torch.equal(x, other[name]) for name, x in whole.state_dict().items())


def test_encoder_is_unchanged_unless_it_is_fine_tuned(whole, tmp_path):
    before = make_method().image_encoder
    assert_equal_models(whole.encoder, before)  # batch statistics included
    tuned = train(tmp_path, encoder_learning_rate=1e-3).encoder.state_dict()
    assert any(not torch.equal(x, tuned[name]) for name, x in before.named_parameters())


@pytest.mark.parametrize("step", [6, 9])  # of 12, four in an epoch
def test_crashed_training_resumes_to_equal_weights(whole, step, tmp_path, monkeypatch):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(EarlyStopping, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert list(tmp_path.rglob("complete"))
    assert_equal_models(train(tmp_path), whole)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_killed_process_resumes_to_equal_weights(whole, tmp_path):
    kill_at_first_checkpoint(tmp_path, __file__, tmp_path)
    assert_equal_models(train(tmp_path), whole)


def test_trainings_that_have_finished_are_kept(tmp_path, monkeypatch):
    steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(EarlyStopping, "on_train_begin", on_train_begin)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fractions=[0.5, 1.0])
    run(tmp_path, fractions=[0.5, 1.0])
    assert len(steps) == 3  # the last one alone was trained again


def test_saved_segmenter_predicts_the_same_elsewhere(whole, tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        Image.fromarray(np.asarray(make()[26 + i]["image"])).resize((90, 70 + 40 * i)).save(file)
    whole.save_pretrained(tmp_path / "segmenter")
    elsewhere = "import numpy as np, sys; from medvlp.tasks.segment import Segmenter\n"
    elsewhere += "masks = Segmenter.from_pretrained('segmenter').predict(sys.argv[1:])\n"
    elsewhere += "np.savez('masks.npz', *masks)\n"
    package = str(Path(sys.modules[Segmenter.__module__].__file__).parents[2])
    process = [sys.executable, "-c", elsewhere, *files]
    subprocess.run(process, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=package), check=True)
    here, there = whole.predict(files), list(np.load(tmp_path / "masks.npz").values())
    assert [m.shape for m in here] == [(70, 90), (110, 90)]
    assert all(np.array_equal(a, b) for a, b in zip(here, there))


def test_batch_size_changes_no_logits(whole):
    pictures = [make()[i]["image"] for i in range(5)]
    one, four = (list(whole.logits(pictures, batch_size=n)) for n in (1, 4))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, four))


def test_ignored_pixels_change_no_loss(whole):
    images, masks = torch.rand(2, 1, 32, 32), torch.randint(-1, 3, (2, 32, 32))
    with torch.no_grad():
        loss = whole(images, masks)["loss"]
        assert whole(images, torch.full_like(masks, -1))["loss"] == 0
        assert whole(images, masks.short())["loss"] == loss


def test_masks_move_with_their_images():
    rows = [study(i) for i in range(10)]
    rows = [row | dict(image=row["mask"]) for row in rows]  # each image is its own mask
    studies = datasets.Dataset.from_list(rows, features=study_features([]))
    truth, options = Truth(["disc", "bar"], [1, 2], [9]), SegmentOptions(degrees=20.0, contrast=0.0)
    examples = PlacedExamples(studies, truth, 32, options)
    for i in range(10):
        item = examples[3, i]
        seen = (item["image"][0] * 255).round()
        agree = (seen == item["mask"].clamp(min=0)) | (item["mask"] < 0) | (seen > 2)
        assert (
            item["mask"] == 1
        ).sum() > 20 and agree.float().mean() > 0.9  # the image is interpolated, the mask is not


@pytest.mark.parametrize(
    "masks, reason",
    [
        (lambda i: "none", "training studies with a mask: 0, but at least 2 are needed"),
        (lambda i: "ignored", "training studies with a mask: 0, but at least 2 are needed"),
        (lambda i: "empty", "no train study has any of the classes disc, bar"),
        (lambda i: "empty" if i > 25 else "drawn", "no test study has any of the classes disc, bar"),
        (lambda i: "none" if i > 25 else "drawn", "test patients with a mask: 0, but intervals need at least 2"),
        (lambda i: "none" if 20 <= i < 26 else "drawn", ""),
        (lambda i: "empty" if 20 <= i < 26 else "drawn", ""),
        (lambda i: "ignored" if i % 3 == 0 else "drawn", ""),
    ],
)
def test_sets_that_lack_masks(masks, reason, tmp_path):
    result = run(tmp_path, make(masks), epochs=1)
    assert result.reason == reason
    assert (tmp_path / "model/no-model.txt").is_file() == bool(reason)
    if not reason:
        assert result.scores[result.scores.overall].value.notna().all()


def test_a_class_that_no_mask_has(tmp_path):
    manifest = MANIFEST | dict(mask_classes=dict(disc=1, heart=5))
    table = run(tmp_path, manifest=manifest, epochs=1).table.set_index(["measure", "label"])
    assert "no test study has it, left out of the mean; no training study has it" in table.note["Dice", "heart"]
    assert np.isnan(table.value["Dice", "heart"]) and table.value["Dice", "macro"] == table.value["Dice", "disc"]
    assert table.chance["Dice all", "heart"] == 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "pvt_v2_b0"])
def test_encoders_of_other_kinds(name, tmp_path):
    vit = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    pvt = dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1])
    config = dict(name=name, image_size=32, options=vit if "vit" in name else pvt)
    model = train(tmp_path, image=config, epochs=1)
    assert_equal_models(model.encoder, make_method(config).image_encoder)
    assert model.predict(make()[0]["image"])[0].shape == (36, 40)


def test_an_encoder_without_maps_is_an_error(tmp_path, monkeypatch):
    def without_maps(*args):
        net = build(*args)
        net.feature_info = []
        return net

    build = image._build
    monkeypatch.setattr(image, "_build", without_maps)
    with pytest.raises(ValueError, match="does not give its feature maps, which this task needs"):
        run(tmp_path)


def test_masks_of_another_size_are_prepared(tmp_path):
    "At half the scale it gets the picture's stored size, with other proportions it is set aside"
    rows, r = [], np.random.default_rng(0)
    for i, size in enumerate([(123, 101), (61, 50), (123, 60), (123, 101)]):
        Image.fromarray(r.integers(0, 255, (101, 123)).astype(np.uint8)).save(tmp_path / f"{i}.png")
        values = np.zeros(size[::-1], np.uint8)
        values[10:30, 10:40] = 1
        Image.fromarray(values).save(tmp_path / f"mask-{i}.png")
        rows.append(
            dict(file_name=f"{i}.png", patient_id=i, findings="Some words here.", mask_file_name=f"mask-{i}.png")
        )
    pd.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    prepare(DataOptions(folder=str(tmp_path), image_size=48, mask_classes=dict(lung=1)), tmp_path / "prepared")
    studies, manifest = load_studies(tmp_path / "prepared"), read_manifest(tmp_path / "prepared")
    truth = find_truth(studies, manifest, SegmentOptions())
    has = {row: h for row, h in zip(studies["study_id"], survey(truth, studies).has[:, 0])}
    assert sum(h == 1 for h in has.values()) == 3 and sum(np.isnan(h) for h in has.values()) == 1
    for row in studies:
        assert row["mask"] is None or row["mask"].size == row["image"].size
    assert "proportions differ" in (tmp_path / "prepared/quarantine.csv").read_text()


COVID = Path(__file__).parents[2] / "shared/datasets/covid-chestxray"


@pytest.mark.skipif(not COVID.is_dir(), reason="needs ../shared/datasets/covid-chestxray")
def test_lungs_of_covid_chestxray(tmp_path):
    "Real masks with an ignore value, read through the source"
    prepare(DataOptions(source="covid_chestxray", folder=str(COVID), image_size=48), tmp_path / "prepared")
    studies, manifest = load_studies(tmp_path / "prepared"), read_manifest(tmp_path / "prepared")
    truth = find_truth(studies, manifest, SegmentOptions())
    assert (truth.labels, truth.ignore) == (["lung"], [127])
    found = survey(truth, studies)
    assert np.nansum(found.has) == sum(manifest["masks"].values())
    assert (found.grids[~np.isnan(found.has[:, 0])] == -1).any()
    parts = split_studies(studies)
    assert all(s["mask"].size == s["image"].size for s in parts["test"] if s["mask"])
    result = run(tmp_path, studies, manifest, epochs=1)
    assert not result.reason and 0.3 < result.table.chance[0] < 0.9
    model = Segmenter.from_pretrained(tmp_path / "model")
    assert len(segmented(model, parts["test"], truth)) == manifest["masks"]["test"]


if __name__ == "__main__":
    train(Path(sys.argv[1]))
