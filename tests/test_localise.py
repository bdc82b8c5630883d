"Zero-shot localisation: contrast, overlap and boxes of maps, and what a set may lack"

import math
from types import SimpleNamespace
import datasets, numpy as np, PIL.Image, pytest, torch
from torch import nn
from torchvision.ops import box_iou
from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.encoders.features import ImageFeatures, TextFeatures, grid_boxes
from medvlp.data.tokens import word_mask
from medvlp.project.config import ConfigError, validate
from medvlp.tasks.evaluate import EvaluateOptions, evaluate
from medvlp.tasks.localise import LocaliseOptions, all_questions, best_cuts, contrast, level_pixels, localise
from medvlp.tasks.localise import localise_scores, map_box, mean_truths, other_patients, pixel_map, scaled, truths
from medvlp.tasks.metrics.masks import dice, iou
from medvlp.tasks.pointing import WordMap
from medvlp.tasks.zero_shot import ZeroShotOptions

datasets.disable_progress_bars()
GRID = grid_boxes((4, 4)).numpy()


def random_case(seed, size=12):
    "A map and a region"
    r = np.random.default_rng(seed)
    return r.random((size, size)), r.random((size, size)) < r.uniform(0.1, 0.9)


@pytest.mark.parametrize("seed", range(20))
def test_contrast_against_sums_written_out(seed):
    x, region = random_case(seed)
    inside, outside = ([float(v) for v, r in zip(x.ravel(), region.ravel()) if r == side] for side in (True, False))
    mean = lambda values: math.fsum(values) / len(values)
    variance = lambda values: math.fsum((v - mean(values)) ** 2 for v in values) / len(values)
    expected = (mean(inside) - mean(outside)) / math.sqrt(variance(inside) + variance(outside))
    assert contrast(x, region) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale, shift", [(1e-6, 0), (1e6, 0), (3, -7), (1e-3, 1)])
def test_scale_and_shift_of_a_map_change_nothing(seed, scale, shift):
    x, region = random_case(seed)
    y = scale * x + shift
    assert contrast(y, region) == pytest.approx(contrast(x, region), rel=1e-6)
    assert contrast(-y, region) == pytest.approx(-contrast(x, region), rel=1e-6)
    assert np.allclose(scaled(y), scaled(x), atol=1e-6)
    cuts = [0.213, 0.517]
    assert np.allclose(iou(level_pixels(y, region, cuts)), iou(level_pixels(x, region, cuts)))
    assert np.allclose(map_box(y, 0.517)[0], map_box(x, 0.517)[0])


@pytest.mark.parametrize("level", [0, 1e-12, 1 / 49, 1, 1e9])
def test_a_constant_map(level):
    x, region = np.full((6, 6), level), np.zeros((6, 6), bool)
    region[2:4, 1:5] = True
    x[0, 0] += level * 1e-12  # a rounding error
    assert contrast(x, region) == 0 and map_box(x, 0.1) is None
    assert (dice(level_pixels(x, region, [0.0, 0.5])) == 0).all()


def test_a_region_that_covers_everything_or_nothing():
    x, region = random_case(0)
    for whole in (region | True, region & False):
        assert math.isnan(contrast(x, whole))
    assert math.isnan(contrast(x, region, ~region))  # nothing of it is known
    assert np.isnan(iou(level_pixels(x, region & False, [0.5]))).all()
    assert iou(level_pixels(x, region | True, [0.25])) == pytest.approx((scaled(x) > 0.25).mean())


@pytest.mark.parametrize("seed", range(10))
def test_ignored_pixels_take_no_part(seed):
    x, region = random_case(seed)
    known = np.random.default_rng(99 + seed).random(x.shape) < 0.7
    other = np.where(known, x, 1e3)
    assert contrast(other, region, known) == pytest.approx(contrast(x, region, known))
    flat = x[known][None], region[known][None]
    assert contrast(x, region, known) == pytest.approx(contrast(*flat))
    assert np.allclose(iou(level_pixels(other, region, [0.3], known)), iou(level_pixels(*flat, [0.3])))


@pytest.mark.parametrize("seed", range(10))
def test_overlap_against_sets_of_pixels(seed):
    x, region = random_case(seed)
    low, high = x.min(), x.max()
    for cut in (0.1, 0.5, 0.9):
        above = {i for i, v in enumerate(x.ravel()) if (v - low) / (high - low) > cut}
        true = set(np.flatnonzero(region))
        assert iou(level_pixels(x, region, [cut]))[0] == pytest.approx(len(above & true) / len(above | true))
        assert dice(level_pixels(x, region, [cut]))[0] == pytest.approx(
            2 * len(above & true) / (len(above) + len(true))
        )


def test_the_box_is_that_of_the_largest_part():
    x = np.zeros((20, 30))
    x[2:5, 3:9] = 0.8
    x[10:12, 20:24] = 1
    assert np.allclose(map_box(x, 0.5)[0], [3 / 30, 2 / 20, 9 / 30, 5 / 20])
    assert np.allclose(map_box(x, 0.9)[0], [20 / 30, 10 / 20, 24 / 30, 12 / 20])
    assert map_box(x, 0.5)[1] == pytest.approx(0.8 / x.mean())


def test_patches_to_pixels():
    weights = np.random.default_rng(0).random(16)
    m = WordMap(weights / weights.sum(), GRID, (4, 4))
    assert np.allclose(pixel_map(m, 4), m.weights.reshape(4, 4))
    assert pixel_map(m, 64).mean() == pytest.approx(1 / 16)
    order = np.random.default_rng(1).permutation(16)
    shifted = GRID + 1e-3  # adaptive patches in any order
    painted = [pixel_map(WordMap(m.weights[o], shifted[o], (4, 4)), 32) for o in (np.arange(16), order)]
    assert np.allclose(*painted)
    assert np.allclose(painted[0].reshape(4, 8, 4, 8)[:, 4, :, 4], m.weights.reshape(4, 4))
    assert not pixel_map(WordMap(np.ones(1), np.array([[2, 2, 3, 3.0]]), (1, 1)), 8).any()  # outside the square


# A set with known answers: the word effusion attends to bright squares


def study(i, split, boxes=True, report=True, mask=None):
    "A bright square at one of 16 places, which the report calls an effusion"
    r = np.random.default_rng(i)
    picture, cell = r.integers(60, 100, (64, 64)).astype(np.uint8), int(r.integers(16))
    y, x = 16 * (cell // 4), 16 * (cell % 4)
    picture[y : y + 16, x : x + 16] = 255
    box = dict(label="effusion", box=[x / 64, y / 64, (x + 16) / 64, (y + 16) / 64])
    names = dict(study_id=str(i), patient_id=f"p{i // 2}", view="PA", split=split, paired=report, questions=[])
    texts = dict(findings=f"Film {i}. Large effusion." if report else "", impression="")
    places = dict(boxes=[box] if boxes else [], mask=mask and png(PIL.Image.fromarray(mask(y, x))))
    return names | texts | places | dict(image=png(PIL.Image.fromarray(picture)), labels=dict(effusion=1))


def study_set(**options):
    rows = [study(i, ["train", "val", "test", "test"][i // 2 % 4], **options) for i in range(48)]
    return datasets.Dataset.from_list(rows, features=study_features(["effusion"]))


STUDIES = study_set()
TOKENIZER = train_tokenizer(STUDIES["findings"][:], vocab_size=120)


class Lamp(nn.Module):
    "All words attend to bright patches; with sign=-1 to dark ones"

    capabilities, device = {"token_maps"}, torch.device("cpu")
    config = SimpleNamespace(image=dict(image_size=64))

    def __init__(self, sign=1.0):
        super().__init__()
        self.sign = sign

    def image_encoder(self, images):
        patches = nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).mT
        return ImageFeatures(patches.mean(1), patches, (4, 4))

    def text_encoder(self, input_ids, attention_mask, word_ids):
        mask = word_mask(word_ids)
        return TextFeatures(mask.float().sum(1, keepdim=True), mask[..., None].float(), mask)

    def token_maps(self, image, text):
        logits = 8 * self.sign * text.words @ image.patches.mT
        return logits.softmax(2) * text.mask[..., None], logits.mT.softmax(2)


def overall(table):
    return table[table.label == "macro"].set_index("measure")


def test_a_method_that_knows_where():
    table = overall(localise(Lamp(), TOKENIZER, STUDIES, n_resamples=50))
    assert table.value["signed CNR"] == table.value["CNR"] > 1.5
    assert table.value["map Dice"] > 0.8 and table.value["map box mAP"] > 0.8
    assert (table.value > table[["other", "usual"]].max(axis=1)).all()
    assert (table.gain_low > 0).all() and (table.n == 24).all()
    assert ((table.low <= table.value) & (table.value <= table.high)).all()


def test_a_method_that_points_away():
    table = overall(localise(Lamp(-1), TOKENIZER, STUDIES, n_resamples=50))
    assert table.value["signed CNR"] < -0.5 and table.value["CNR"] > 0.5
    assert table.value["map box mAP"] < 0.05 and table.gain_high["mIoU"] < 0


def test_a_method_that_knows_nothing():
    table = overall(localise(Lamp(0), TOKENIZER, STUDIES, n_resamples=50))
    assert (table[["value", "low", "high", "other"]] == 0).all(axis=None)


def test_masks_take_precedence_over_boxes():
    def mask(y, x):
        out = np.zeros((64, 64), np.uint8)
        out[y : y + 8, x : x + 16] = 255
        out[y + 8 : y + 16, x : x + 16] = 127
        return out

    studies = study_set(mask=mask)
    manifest = dict(mask_classes=dict(effusion=255), mask_ignore=[127])
    for (_, boxed), (_, masked) in zip(truths(studies, 64), truths(studies, 64, manifest), strict=True):
        assert masked["effusion"].region.sum() == 128 and boxed["effusion"].region.sum() == 256
        assert (~masked["effusion"].known).sum() == 128 and boxed["effusion"].known.all()
        assert np.array_equal(masked["effusion"].region | ~masked["effusion"].known, boxed["effusion"].region)
        assert np.allclose(masked["effusion"].boxes, boxed["effusion"].boxes)
    no_boxes = study_set(mask=mask, boxes=False)
    for _, found in truths(no_boxes, 64, manifest):
        (x0, y0, x1, y1) = 64 * found["effusion"].boxes[0]
        assert (x1 - x0, y1 - y0) == (16, 8)
    assert not list(truths(no_boxes, 64))
    assert not list(truths(no_boxes, 64, dict(mask_classes=dict(effusion=127), mask_ignore=[127])))
    table = overall(localise(Lamp(), TOKENIZER, no_boxes, manifest=manifest, n_resamples=20))
    assert table.value["signed CNR"] > 1.5 and (table.n == 24).all()


def test_a_mask_of_16_bits_and_another_size():
    wide = PIL.Image.fromarray(np.full((60, 90), 700, np.uint16))
    image = png(PIL.Image.fromarray(np.zeros((60, 90), np.uint8)))
    row = study(0, "test") | dict(image=image, mask=png(wide), boxes=[])
    studies = datasets.Dataset.from_list([row], features=study_features(["effusion"]))
    ((_, found),) = truths(studies, 60, dict(mask_classes=dict(lung=700)))
    assert found["lung"].region.all() and found["lung"].boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("lacking", [dict(boxes=False), dict(report=False)])
def test_a_set_without_boxes_or_words(lacking):
    studies = study_set(**lacking)
    table = localise(Lamp(), TOKENIZER, studies)
    assert not len(table) and not len(localise_scores(table))


def test_a_prompt_where_there_is_no_report():
    some = datasets.concatenate_datasets([study_set(report=False).select(range(24)), STUDIES.select(range(24, 48))])
    reports = all_questions(Lamp(), TOKENIZER, some)
    both = all_questions(Lamp(), TOKENIZER, some, prompt="{finding}.")
    assert [q["study"] for q in reports] == list(range(24, 48))
    assert sorted(q["study"] for q in both) == list(range(48))
    assert [q["words"] for q in both if q["study"] < 24] == [[0]] * 24
    assert not all_questions(Lamp(), TOKENIZER, some, ["nodule"], "{finding}.")
    table = localise(Lamp(), TOKENIZER, some, options=LocaliseOptions(prompt="{finding}."), n_resamples=20)
    assert overall(table).n["mIoU"] == 24
    with pytest.raises(ConfigError, match="prompt"):
        validate(LocaliseOptions, dict(prompt="effusion"), "tasks.evaluate: localise")
    with pytest.raises(ConfigError, match="thresholds"):
        validate(LocaliseOptions, dict(thresholds=[1.5]), "tasks.evaluate: localise")


def test_no_training_and_no_validation_studies():
    test = STUDIES.filter(lambda s: s["split"] == "test")
    table = overall(localise(Lamp(), TOKENIZER, test, n_resamples=20))
    assert table.usual.isna().all() and table.gain.isna().all() and table.value.notna().all()
    scores = localise_scores(localise(Lamp(), TOKENIZER, test, n_resamples=20))
    gains = scores[scores.metric.str.contains("gain")]
    assert (gains.note == "no training study has a place of it").all()


def test_the_order_of_studies_changes_nothing_but_the_other_patient():
    order = np.random.default_rng(0).permutation(len(STUDIES))
    one, two = (localise(Lamp(), TOKENIZER, s, n_resamples=30) for s in (STUDIES, STUDIES.select(order)))
    for column in ("value", "low", "high", "n"):
        assert np.allclose(one[column], two[column], equal_nan=True), column
    ranked = one.measure == "map box mAP"  # the boxes of the usual place tie, and rank in the order of the set
    assert np.allclose(one.gain[~ranked], two.gain[~ranked], equal_nan=True)


def test_one_patient_has_no_other():
    found = [dict(study=i, label="effusion") for i in range(3)]
    assert other_patients(found, ["a", "a", "a"]) == [None] * 3
    assert other_patients(found, ["a", "b", "a"]) == [1, 2, 1]


def test_the_threshold_comes_from_validation():
    usual = mean_truths(STUDIES.filter(lambda s: s["split"] == "train"), 64)
    val = all_questions(Lamp(), TOKENIZER, STUDIES.filter(lambda s: s["split"] == "val"))
    cuts = best_cuts(val, usual, 64)
    maps = [(pixel_map(q["map"], 64), q["truth"].region) for q in val]
    means = [np.mean([dice(level_pixels(x, r, [c]))[0] for x, r in maps]) for c in np.arange(1, 20) / 20]
    assert cuts["words"] == cuts["other"] == pytest.approx((np.argmax(means) + 1) / 20)
    assert best_cuts([], usual, 64) == dict(words=0.5, usual=0.5, other=0.5)


def test_boxes_of_squares_overlap_with_the_truth():
    val = all_questions(Lamp(), TOKENIZER, STUDIES.filter(lambda s: s["split"] == "val"))
    for q in val:
        box = torch.tensor(map_box(pixel_map(q["map"], 64), 0.5)[0])[None]
        assert box_iou(box, torch.tensor(q["boxes"])).item() > 0.6


def test_evaluate_gives_the_same(monkeypatch):
    from medvlp.tasks import evaluate as module

    calls, original = [], module.all_questions
    monkeypatch.setattr(module, "all_questions", lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(module, "set_vectors", lambda *a: None)
    for name in ("_probe", "_retrieval", "_zero_shot", "_reconstruction"):
        monkeypatch.setattr(module, name, lambda *a: None)
    options = EvaluateOptions(n_resamples=30, zero_shot=ZeroShotOptions(prompts=""))
    results = evaluate(Lamp(), TOKENIZER, STUDIES, options=options)
    assert len(calls) == 2  # test and validation; pointing needs no maps of its own
    alone = localise(Lamp(), TOKENIZER, STUDIES, ["effusion"], n_resamples=30)
    assert np.allclose(results["localise"].table.value, alone.value)
    assert not results["localise"].headline
    assert results["pointing"].table.hit_rate.tolist() == [1, 1]
    assert set(results["localise"].scores.metric) >= {"CNR", "CNR effusion", "mIoU", "map box mAP", "map Dice"}
    blind = Lamp()
    blind.capabilities = set()
    assert evaluate(blind, TOKENIZER, STUDIES, options=options)["localise"].reason.startswith(
        "the method does not align"
    )
