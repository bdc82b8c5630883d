"Where things are: boxes and masks that move with the image, maps of encoders, and what the values of masks mean"

import json
from pathlib import Path

import datasets, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask
from transformers import set_seed

import small
from medvlp.data.images import eval_transform, seeded, train_transform
from medvlp.data.prepare import DataOptions, load_studies, png, prepare, read_manifest, study_features
from medvlp.data.sources.slake import slake
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.pretrained import DownstreamConfig, DownstreamModel
from medvlp.encoders.pyramid import Pyramid, encoder_maps, map_channels
from medvlp.phantom.dataset import write_study_set
from medvlp.phantom.signs import FINDINGS
from medvlp.project.config import ComputeOptions, ConfigError, validate
from medvlp.training.downstream import DownstreamOptions, Examples, PlacedExamples, fit

SHARED = Path(__file__).parents[2] / "shared"


# ---- transforms


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size[::-1]).astype(np.uint8))


def boxes_of(corners, size):
    corners = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return BoundingBoxes(corners, format="XYXY", canvas_size=size[::-1])


def transforms(side):
    return [eval_transform(side), train_transform(side, 0.0), train_transform(side), train_transform(side, 90.0, 0.5)]


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (32, 32), (20, 60)])
@pytest.mark.parametrize("kind", range(4))
def test_an_image_is_the_same_whatever_goes_with_it(size, kind):
    f, image, mask = transforms(32)[kind], picture(0, size), Mask(torch.ones(size[::-1], dtype=torch.uint8))
    for i in range(10):
        seen = []
        for more in ((), (mask,), (boxes_of([1, 2, 9, 8], size), mask), (boxes_of([], size),)):
            with seeded(0, i, kind):
                out = f(image, *more)
            seen.append(out[0] if more else out)
        with seeded(0, i, kind):
            seen.append(v2.Compose(f.transforms)(image))
        assert all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("kind", range(4))
def test_a_mask_moves_as_a_picture_would(kind):
    "A mask of 0 and 1 against the same values as grey levels, rotated by the nearest neighbour"
    values = np.random.default_rng(1).integers(0, 2, (5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    for i in range(10):
        with seeded(0, i):
            x, m = transforms(32)[kind](Image.fromarray(values * 255), Mask(torch.from_numpy(values)))
        bright = x[0] > (x.max() + x.min()) / 2
        assert (bright == (m == 1)).float().mean() > 0.9 and m.dtype == torch.uint8


def test_boxes_keep_their_order_and_number():
    size, corners = (48, 40), [[0, 0, 48, 40], [0, 0, 3, 3], [45, 37, 48, 40], [20, 10, 30, 25]]
    for i in range(20):
        with seeded(0, i):
            _, boxes = train_transform(16, 5.0)(picture(0, size), boxes_of(corners, size))
        assert boxes.shape == (4, 4) and boxes.canvas_size == (16, 16)
        assert (boxes >= 0).all() and (boxes <= 16).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
        assert boxes[0].tolist() == [0, 0, 16, 16]


def test_a_box_by_hand():
    size = (50, 40)  # the centre square of 20 begins at column 15, row 10
    _, boxes = eval_transform(20)(picture(0, size), boxes_of([[17, 12, 30, 20], [0, 0, 20, 40]], size))
    assert boxes.tolist() == [[2, 2, 15, 10], [0, 0, 5, 20]]
    _, boxes = eval_transform(60)(picture(0, size), boxes_of([[0, 0, 50, 40]], size))  # padded by 5 and 10
    assert boxes.tolist() == [[5, 10, 55, 50]]


def test_values_above_255_survive():
    mask = Mask(torch.full((40, 40), 60_000, dtype=torch.int32))
    for f in transforms(32):
        assert f(picture(0, (40, 40)), mask)[1].max() == 60_000


# ---- examples


class Corner:
    "A box, its class and a mask, at a place that the study's number gives"

    def __init__(self, side=10):
        self.side = side

    def __call__(self, study):
        width, height = study["image"].size
        x = int(study["study_id"]) % 20
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[5 : 5 + self.side, x : x + self.side] = 1
        box = boxes_of([x, 5, x + self.side, 5 + self.side], (width, height))
        return dict(boxes=box, classes=torch.tensor([7]), name=study["study_id"], mask=Mask(mask))


def rows(n=24):
    form = dict(view="", findings="", impression="", split="train", paired=False, mask=None, boxes=[], questions=[])
    table = [form | dict(study_id=str(i), patient_id=str(i), image=png(picture(i, (44, 40 + i % 3)))) for i in range(n)]
    return datasets.Dataset.from_list(table, features=study_features([]))


def as_they_are(items):
    return items


def test_workers_make_no_difference_and_images_are_those_of_examples():
    studies, options = rows(), DownstreamOptions(degrees=10.0)
    data, plain = PlacedExamples(studies, Corner(), 32, options, 3), Examples(studies, [0] * 24, 32, options, 3)
    order = [(epoch, i) for epoch in range(2) for i in range(24)]
    read = [
        [item for batch in DataLoader(data, 6, sampler=order, num_workers=n, collate_fn=as_they_are) for item in batch]
        for n in (0, 2)
    ]
    for key, one, two in zip(order, *read):
        assert list(one) == ["image", "boxes", "classes", "name", "mask"]
        assert one["name"] == two["name"] == str(key[1]) and one["classes"].tolist() == [7]
        assert all(torch.equal(one[k], two[k]) for k in ("image", "boxes", "classes", "mask"))
        assert torch.equal(one["image"], plain[key]["image"])
    assert len(data) == 24 and torch.equal(data[5]["mask"], data[0, 5]["mask"])


def test_a_study_without_boxes_keeps_an_empty_list():
    class Nothing:
        def __call__(self, study):
            return dict(boxes=boxes_of([], study["image"].size), classes=torch.zeros(0, dtype=torch.long))

    item = PlacedExamples(rows(2), Nothing(), 32, DownstreamOptions())[0, 1]
    assert item["boxes"].shape == (0, 4) and item["classes"].shape == (0,)


class _Places(DownstreamModel):
    "Predicts the mask of `Corner` from the finest map"

    config_class = type("_PlacesConfig", (DownstreamConfig,), dict(model_type="places-test"))

    def __init__(self, config):
        super().__init__(config)
        self.encoder = ImageEncoder(**config.image)
        self.pyramid = Pyramid(map_channels(self.encoder), [8])
        self.head = torch.nn.Conv2d(self.pyramid.channels[0], 1, 1)
        self.post_init()

    def forward(self, images, labels):
        (fine,) = self.pyramid(encoder_maps(self.encoder, images))
        logits = self.head(fine)[:, 0]
        target = torch.nn.functional.avg_pool2d(labels[:, None], 8)[:, 0]
        return dict(loss=torch.nn.functional.binary_cross_entropy_with_logits(logits, target), logits=logits)


class _Stack:
    def __call__(self, items):
        masks = torch.stack([o["mask"].as_subclass(torch.Tensor) for o in items]).float()
        return dict(images=torch.stack([o["image"] for o in items]), labels=masks)


@pytest.mark.parametrize("image", [small.RESNET, small.VIT, small.PVT], ids=["resnet", "vit", "pvt"])
def test_the_downstream_trainer_takes_them(tmp_path, image):
    options = DownstreamOptions(epochs=2, min_steps=0, batch_size=8, learning_rate=1e-2, encoder_learning_rate=0.0)
    train, val = PlacedExamples(rows(), Corner(), 32, options), PlacedExamples(rows(6), Corner(), 32)

    def run():
        set_seed(0)
        model = _Places(_Places.config_class(image=image, stored_size=40))
        start = {k: v.clone() for k, v in model.encoder.state_dict().items()}
        compute = ComputeOptions(device="cpu", precision="fp32")
        fit(model, train, val, options, collate=_Stack(), compute=compute, checkpoints=tmp_path)
        assert all(torch.equal(v, start[k]) for k, v in model.encoder.state_dict().items())
        return model.state_dict()

    one, two = run(), run()
    assert all(torch.equal(one[k], two[k]) for k in one)


# ---- maps of encoders

ENCODERS = dict(
    resnet18=dict(name="resnet18"),
    resnet18_16=dict(name="resnet18", patch_stride=16),
    resnet18_pruned=dict(name="resnet18", patch_stride=16, prune=True),
    resnet_demo=dict(
        name="resnet18",
        patch_stride=16,
        options=dict(layers=[1, 1, 1, 1], channels=[16, 32, 96, 192], stem_type="deep", stem_width=8),
    ),
    resnet50=dict(name="resnet50"),
    resnet_dilated=dict(name="resnet18", options=dict(output_stride=16)),
    convnext=dict(name="convnext_atto"),
    efficientnet=dict(name="efficientnet_b0"),
    densenet=dict(name="densenet121"),
    pvt=dict(small.PVT, patch_stride=None, prune=False, adapatch=[]),
    pvt_adaptive=dict(small.PVT, prune=False),
    pvt_pruned=small.PVT,
    swin=dict(
        name="swin_tiny_patch4_window7_224",
        options=dict(img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    ),
    vit=small.VIT,
    vit_saliency=dict(small.VIT, saliency=True),
    vit_registers=dict(small.VIT, options=small.VIT["options"] | dict(reg_tokens=2, global_pool="avg")),
    vit_14=dict(name="vit_small_patch14_dinov2", options=dict(embed_dim=32, depth=1, num_heads=2)),
)


def build(name, seed=0):
    torch.manual_seed(seed)
    side = 56 if name == "vit_14" else 64
    return ImageEncoder(**ENCODERS[name] | dict(image_size=side)).eval(), torch.rand(3, 1, side, side)


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_have_the_widths_and_sizes_that_are_announced(name):
    encoder, x = build(name)
    with torch.no_grad():
        maps, features = encoder_maps(encoder, x), encoder(x)
    strides = list(maps)
    assert strides == sorted(strides) and {s: m.shape[1] for s, m in maps.items()} == map_channels(encoder)
    assert all(m.shape[2:] == (x.shape[2] // s, x.shape[3] // s) for s, m in maps.items())
    own = maps[x.shape[2] // features.grid[0]]
    assert torch.equal(own.flatten(2).mT, features.patches)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_study_does_not_depend_on_its_batch(name):
    encoder, x = build(name)
    pyramid, order = Pyramid(map_channels(encoder), [4, 8, 16, 32]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        for m, other in zip(pyramid(encoder_maps(encoder, x)), pyramid(encoder_maps(encoder, x[order]))):
            torch.testing.assert_close(m[order], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_encoder_and_new_layers(name):
    encoder, x = build(name)
    pyramid = Pyramid(map_channels(encoder), [8, 16, 32])
    sum(m.square().mean() for m in pyramid(encoder_maps(encoder.train(), x))).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in pyramid.parameters())
    first = next(p for p in encoder.parameters() if p.dim() > 1)
    assert first.grad.isfinite().all() and first.grad.abs().max() > 0


def test_adaptive_patches_keep_no_boxes_of_the_batch():
    encoder, x = build("pvt_adaptive")
    encoder_maps(encoder, x)
    assert all(stage.downsample.last_boxes is None for stage in encoder.net.stages[1:3])
    assert encoder(x).boxes is not None


@pytest.mark.parametrize("values", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", ["resnet18", "pvt_pruned", "vit"])
def test_flat_and_extreme_images_give_finite_maps(name, values):
    encoder, x = build(name)
    pyramid = Pyramid(map_channels(encoder), [4, 8, 16, 32])
    assert all(m.isfinite().all() for m in pyramid(encoder_maps(encoder, x * 0 + values)))


def test_half_precision():
    encoder, x = build("vit")
    with torch.autocast("cpu", torch.bfloat16):
        maps = Pyramid(map_channels(encoder), [2, 4, 8, 16])(encoder_maps(encoder, x))
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("wanted", [[8, 16, 32], [32, 8, 16], [16], [2, 64]])
def test_order_and_strides(wanted):
    pyramid = Pyramid({4: 8, 8: 16, 16: 24, 32: 32}, wanted)
    assert pyramid.strides == wanted
    maps = {s: torch.rand(1, c, 128 // s, 128 // s) for s, c in {4: 8, 8: 16, 16: 24, 32: 32}.items()}
    for m, stride, channels in zip(pyramid(maps), wanted, pyramid.channels):
        assert m.shape == (1, channels, 128 // stride, 128 // stride)


def test_sides_that_are_odd_are_rounded_up_as_by_a_convolution():
    assert Pyramid({16: 4}, [32])({16: torch.rand(1, 4, 7, 5)})[0].shape == (1, 4, 4, 3)


def test_weights_can_be_saved_and_loaded():
    pyramid, other = (Pyramid({16: 8}, [4, 8, 16, 32]) for _ in range(2))
    other.load_state_dict(pyramid.state_dict())
    x = {16: torch.rand(2, 8, 4, 4)}
    assert all(torch.equal(a, b) for a, b in zip(pyramid(x), other(x)))


# ---- what the values of masks mean


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(mask_classes=dict(a=3, b=4, c=3)),
            "data.own: mask_classes: c is 3, and so is a. Give each class a value",
        ),
        (dict(mask_classes=dict(a=0)), "mask_classes: a is 0, and so is the background"),
        (dict(mask_classes=dict(a=5), mask_ignore=[5]), "mask_classes: a is 5, and so is what mask_ignore leaves out"),
        (dict(mask_classes=dict(a=-1)), "mask_classes: a is -1, but a mask has values from 1 to 65535"),
        (dict(mask_ignore=[65536]), "mask_ignore: 65536 is no value of a mask. Give values from 1 to 65535"),
        (dict(mask_classes=dict(a="255")), "data.own.mask_classes"),
        (dict(mask_classes=["lung"]), "data.own.mask_classes"),
        (dict(mask_ignore=127), "data.own.mask_ignore"),
    ],
)
def test_a_value_means_one_thing(options, message):
    with pytest.raises(ConfigError) as e:
        validate(DataOptions, options, "params.yaml: data.own")
    assert "params.yaml: data.own" in str(e.value) and message in str(e.value)


def write_masked(folder, values):
    "Small studies, the first of which have masks: a list of values, each of which fills a strip"
    folder = small.write_studies(folder)
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    for i, strips in values.items():
        mask = np.zeros((48, 56), np.uint16)
        for k, value in enumerate(strips):
            mask[8 * k : 8 * k + 8] = value
        Image.fromarray(mask).save(folder / f"mask-{i}.png")
        table.loc[i, "mask_file_name"] = f"mask-{i}.png"
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


def test_the_manifest_counts_classes_by_split(tmp_path, capsys):
    values = {0: [1, 300], 1: [1, 9], 33: [300], 41: [1, 2, 2, 77]}  # two in train, one in val, one in test
    folder = write_masked(tmp_path / "data", values)
    classes = dict(left=1, right=2, upper=300, none=4)
    prepare(DataOptions(folder=str(folder), image_size=40, mask_classes=classes, mask_ignore=[9]), tmp_path / "own")
    manifest = read_manifest(tmp_path / "own")
    assert manifest["mask_classes"] == classes and manifest["mask_ignore"] == [9]
    counts = {split: list(n.values()) for split, n in manifest["masks_by_class"].items()}
    assert counts == dict(train=[2, 0, 1, 0], val=[0, 0, 1, 0], test=[1, 1, 0, 0])
    assert manifest["unnamed_values"] == [77]
    assert "values of masks that count as background: 77" in capsys.readouterr().out
    assert manifest["boxes_by_class"] == dict(train={}, val={}, test={})
    assert set(np.unique(load_studies(tmp_path / "own", "train")[0]["mask"])) == {0, 1, 300}


def test_masks_without_names_are_remarked_upon(tmp_path, capsys):
    folder = write_masked(tmp_path / "data", {0: range(1, 7), 1: range(7, 12)})
    prepare(DataOptions(folder=str(folder), image_size=40), tmp_path / "own")
    manifest = read_manifest(tmp_path / "own")
    assert manifest["mask_classes"] == {} and manifest["unnamed_values"] == list(range(1, 9))
    assert "1, 2, 3, 4, 5, 6, 7, 8. The option mask_classes gives them names" in capsys.readouterr().out


def test_the_values_of_the_phantom_are_the_numbers_of_its_findings(tmp_path):
    table = write_study_set(tmp_path / "phantom", 40, size=96, progress=False)
    classes = {name: k for k, name in enumerate(FINDINGS, 1)}
    prepare(DataOptions(folder=str(tmp_path / "phantom"), image_size=96, mask_classes=classes), tmp_path / "own")
    manifest, studies = read_manifest(tmp_path / "own"), load_studies(tmp_path / "own")
    assert manifest["unnamed_values"] == [] and sum(manifest["masks"].values()) == len(table) == 40
    for study in studies:
        shown = {name for name, value in classes.items() if value in np.unique(study["mask"])}
        assert shown <= {o["label"] for o in study["boxes"]}


def write_slake(folder, modality="CT", mask_txt="70:Liver\n175:Liver Cancer\n"):
    form = dict(q_lang="en", question="What is it?", answer="Liver", answer_type="OPEN", content_type="Organ")
    for i, part in enumerate(("train", "validate", "test")):
        image = folder / f"imgs/xmlab{i}"
        image.mkdir(parents=True)
        picture(i, (60, 50)).save(image / "source.jpg")
        mask = np.zeros((50, 60), np.uint8)
        mask[10:40, 10:30], mask[20:25, 15:20] = 70, 175 * (i == 0)
        Image.fromarray(mask).convert("RGB").save(image / "mask.png")
        (image / "detection.json").write_text('[{"Liver": [10, 10, 20, 30]}]')
        about = dict(form, img_name=f"xmlab{i}/source.jpg", location="Abdomen", modality=modality)
        (folder / f"{part}.json").write_text(json.dumps([about]))
    if mask_txt is not None:
        (folder / "mask.txt").write_text(mask_txt)
    return folder


def test_organs_of_slake(tmp_path):
    folder = write_slake(tmp_path / "slake", mask_txt="70:Liver\n\n175: Liver Cancer \n30:Left Humerus Head")
    prepare(DataOptions(source="slake", folder=str(folder), image_size=50), tmp_path / "own")
    manifest = read_manifest(tmp_path / "own")
    assert manifest["mask_classes"] == dict(liver=70, liver_cancer=175)  # no humerus in this set
    assert manifest["masks_by_class"]["train"] == dict(liver=1, liver_cancer=1)
    assert manifest["masks_by_class"]["test"] == dict(liver=1, liver_cancer=0)
    assert manifest["boxes_by_class"] == {split: dict(liver=1) for split in ("test", "train", "val")}
    assert set(np.unique(load_studies(tmp_path / "own", "train")[0]["mask"])) == {0, 70, 175}


def test_options_override_the_source(tmp_path):
    folder = write_slake(tmp_path / "slake")
    options = dict(source="slake", folder=str(folder), image_size=50)
    for given, classes, unnamed in [
        (dict(mask_classes=dict(tumour=175)), dict(tumour=175), [70]),
        (dict(mask_ignore=[70]), dict(liver_cancer=175), []),
    ]:
        prepare(DataOptions(**options, **given), tmp_path / "own")
        manifest = read_manifest(tmp_path / "own")
        assert (manifest["mask_classes"], manifest["unnamed_values"]) == (classes, unnamed)


def test_the_picture_beside_an_xray_of_slake_is_no_mask(tmp_path):
    studies = slake(write_slake(tmp_path, "X-Ray", mask_txt=None))
    assert studies["mask"].tolist() == [""] * 3 and studies.attrs["mask_classes"] == {}


def test_chest_xrays_of_slake(tmp_path):
    if not (SHARED / "datasets/slake").is_dir():
        pytest.skip(f"{SHARED / 'datasets/slake'} is absent")
    options = DataOptions(source="slake", folder=str(SHARED / "datasets/slake"), where={"modality": "X-Ray"})
    prepare(options.model_copy(update=dict(image_size=64)), tmp_path / "xray")
    manifest = read_manifest(tmp_path / "xray")
    findings = "atelectasis cardiomegaly effusion infiltrate mass nodule pneumonia pneumothorax".split()
    assert all(list(n) == findings for n in manifest["boxes_by_class"].values())
    assert sum(sum(n.values()) for n in manifest["boxes_by_class"].values()) == 192
    assert {s: n["studies"] for s, n in manifest["splits"].items()} == dict(test=30, train=122, val=27)
    assert manifest["boxes"] == dict(test=30, train=122, val=27) and not manifest["quarantine"]
    assert manifest["mask_classes"] == {} and not sum(manifest["masks"].values())
