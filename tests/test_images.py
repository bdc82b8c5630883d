"Metrics of generated images and their figures at the edges: few, flat, broken or unequal images, odd texts"

import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from medvlp.data.labeller import read_labeller
from medvlp.encoders.image import ImageEncoder
from medvlp.figures.cycle import plot_cycles, plot_generated, plot_keywords, plot_real_synthetic
from medvlp.figures.style import cut_off_texts, overlapping_texts
from medvlp.project.config import ConfigError, validate
from medvlp.tasks.metrics.images import FeatureNetwork, FindingProbe, ImageMetricsOptions
from medvlp.tasks.metrics.images import aggd, check_images, cycle_findings, fid, fid_table, fit_finding_probe, fit_niqe
from medvlp.tasks.metrics.images import image_findings, image_scores, image_vectors, load_feature_network, mscn
from medvlp.tasks.metrics.images import nearest_neighbour_test, neighbour_table, niqe, niqe_features, niqe_table
from medvlp.tasks.metrics.images import side_labels
from medvlp.tasks.metrics.scores import TaskResult, save_results


def textured(n, height=48, width=48, seed=0):
    "Smoothed noise in 0..1"
    x = torch.rand(n, 1, height + 8, width + 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(x, 9, 1).sub(0.4).mul(5).clamp(0, 1)


def features(n, d=6, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, (n, d))


@pytest.mark.parametrize(
    "wrong, problem",
    [
        (textured(1), "1 image; a comparison needs at least 2"),
        (textured(3)[:, 0], "give [N,1,H,W]"),
        (textured(3).expand(-1, 3, -1, -1), "give [N,1,H,W]"),
        (textured(3) * torch.nan, "3 of 3 images hold NaN"),
        (textured(3) * 255, "scale the images to 0..1"),
        (textured(2), "all of one size"),
        (textured(3, 24), "all of one size"),
    ],
)
def test_images_that_cannot_be_compared(wrong, problem):
    with pytest.raises(ConfigError, match=problem.replace("[", r"\[").replace("]", r"\]")):
        check_images(dict(real=textured(3), generated=wrong))


def test_one_broken_pixel_is_named():
    x = textured(4)
    x[2, 0, 5, 5] = torch.inf
    with pytest.raises(ConfigError, match="generated: 1 of 4 images hold NaN or infinite"):
        check_images(dict(real=textured(4), generated=x))


@pytest.mark.parametrize("n, d", [(2, 2), (2, 40), (5, 40), (41, 40), (300, 3)])
def test_fid_is_that_of_singular_values_at_any_rank(n, d):
    a, b = features(n, d), features(n + 1, d, 0.3, 1)
    (x, y), shift = (v - v.mean(0) for v in (a, b)), a.mean(0) - b.mean(0)
    common = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((n - 1) * n)
    expected = shift @ shift + (x**2).sum() / (n - 1) + (y**2).sum() / n - 2 * common
    assert fid(a, b) == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert fid(a, b) == pytest.approx(fid(b, a), abs=1e-4)


def test_fid_of_constant_features():
    "Constant images have one feature vector: no covariance, and the distance of the means remains"
    assert fid(np.ones((4, 3)), np.full((5, 3), 3.0)) == pytest.approx(12)
    assert fid(np.ones((4, 3)), np.ones((4, 3))) == 0


@pytest.mark.parametrize("bad", [np.ones((1, 3)), np.full((3, 3), np.nan)])
def test_fid_refuses(bad):
    with pytest.raises(ConfigError, match="it needs 2 or more"):
        fid(features(5, 3), bad)


def test_fid_needs_no_torch_fidelity_and_takes_float32():
    a, b = features(50, 8), features(50, 8, 1, 1)
    assert fid(a.astype(np.float32), torch.from_numpy(b)) == pytest.approx(fid(a, b), rel=1e-5)


def test_fid_table_halves_keep_patients_apart_and_repeat():
    patients = np.repeat(np.arange(20), 2)
    systems = dict(real=features(40), generated=features(40, mean=1, seed=1))
    table = fid_table(systems, patients, "net (abc)", splits=4)
    pd.testing.assert_frame_equal(table, fid_table(systems, patients, "net (abc)", splits=4))
    assert table.note.str.contains("net").all() and table.note.str.contains("same|comparable only").all()
    assert table.set_index(["system", "measure"]).low["generated over real", "FID of halves"] > 0
    with pytest.raises(ConfigError, match="too few to halve"):
        fid_table(systems, np.zeros(40), "net", splits=2)


@pytest.mark.parametrize("height, width", [(48, 48), (33, 70), (32, 16)])
def test_niqe_at_other_sizes(height, width):
    f, sharpness = niqe_features(textured(3, height, width), 16)
    patches = (height // 16) * (width // 16)
    assert f.shape == (3, patches, 36) and sharpness.shape == (3, patches) and np.isfinite(f).all()


def test_niqe_patch_that_is_too_large_names_the_largest():
    for size, most in (((64, 64), 32), ((108, 108), 54), ((40, 100), 40), ((30, 31), 14)):
        with pytest.raises(ConfigError, match=f"at most {most}$"):
            niqe_features(textured(2, *size), 96)
        niqe_features(textured(2, *size), most)


def test_niqe_of_flat_and_partly_flat_images():
    model = fit_niqe(textured(40), 16)
    x = textured(4, seed=1)
    x[0], x[1, :, :32] = 0.5, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = niqe(x, model)
        table = niqe_table(dict(real=x), ["a", "b", "c", "d"], model, n_resamples=20)
    assert np.isnan(scores[0]) and np.isfinite(scores[1:]).all()
    assert "left out: 1 of 4 images with next to no texture" in table.note[0]
    assert "in-domain NIQE" in table.note[0]
    flat = niqe_table(dict(real=x * 0), ["a", "b", "c", "d"], model, n_resamples=20)
    assert np.isnan(flat.value[0]) and "left out: 4 of 4" in flat.note[0]


def test_niqe_cannot_be_fitted_on_too_little():
    for images in (textured(2), torch.zeros(50, 1, 48, 48)):
        with pytest.raises(ConfigError, match="sharp patches of 16 pixels .* its model needs 37"):
            fit_niqe(images, 16)


def test_niqe_rises_with_blur_and_noise():
    real, model = textured(20, seed=2), fit_niqe(textured(60), 16)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(real, 5, 1, 2)
    worse = [niqe(x, model).mean() for x in (blurred, 0.7 * real + 0.3 * noise)]
    assert niqe(real, model).mean() < min(worse)


def test_aggd_by_scale_and_mirror():
    x = np.random.default_rng(0).gamma(0.7, size=4000) * np.random.default_rng(1).choice([-1, 2], 4000)
    alpha, left, right = aggd(x)
    assert np.allclose(aggd(3 * x), (alpha, 3 * left, 3 * right))
    assert np.allclose(aggd(-x), (alpha, right, left))
    assert np.isnan(aggd(np.abs(x))).any() and np.isnan(aggd(np.zeros(9))).all()


def test_mscn_of_a_constant_image_is_zero():
    coefficients, deviation = mscn(np.full((1, 20, 20), 77.0))
    assert np.abs(coefficients).max() < 1e-4 and np.abs(deviation).max() < 1e-4


@pytest.mark.cuda
def test_images_on_a_gpu():
    x, network = textured(40), FeatureNetwork(ImageEncoder("resnet10t", image_size=32), 32, "resnet10t")
    on_cpu, on_gpu = image_vectors(network, x), image_vectors(network.cuda(), x.cuda())
    assert np.allclose(on_cpu, on_gpu, atol=1e-3)
    assert np.allclose(niqe(x.cuda(), fit_niqe(x.cuda(), 16)), niqe(x, fit_niqe(x, 16)))


@pytest.mark.parametrize("options", [dict(niqe_patch=15), dict(niqe_patch=8), dict(recall_ks=[]), dict(fid_splits=0)])
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        validate(ImageMetricsOptions, options, "tasks.cycle")


def test_feature_network_by_folder(tmp_path):
    from safetensors.torch import save_file

    encoder = ImageEncoder("resnet10t", image_size=32, patch_stride=8, prune=True)
    image = dict(name="resnet10t", image_size=32, patch_stride=8, prune=True)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="downstream", image=image)))
    save_file({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, tmp_path / "model.safetensors")
    network = load_feature_network(tmp_path)
    own = FeatureNetwork(encoder, 32, tmp_path.name)
    assert network.name == own.name and network.num_features == encoder.dim
    x = textured(5)
    assert np.allclose(image_vectors(network, x, 2), image_vectors(own, x), atol=1e-5)
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="holds no weights of an image encoder"):
        load_feature_network(tmp_path)


def test_feature_network_without_weights_at_hand(monkeypatch):
    def offline(self, name):
        raise OSError("cannot connect\nand a long trace")

    monkeypatch.setattr(ImageEncoder, "load_pretrained", offline)
    with pytest.raises(ConfigError, match="fid_network: resnet10t: cannot connect. Give a folder"):
        load_feature_network("resnet10t")


LABELS = pd.DataFrame(
    {"effusion": [1, 0] * 20, "nodule": [0] * 40, "mass": [1, 1, 0, -1] * 10, "hernia": [np.nan] * 40}
)


def test_findings_with_one_class_unknown_and_uncertain_labels():
    x = np.c_[LABELS.effusion, LABELS.mass, np.zeros(40)] + 0.1 * features(40, 3)
    probe = fit_finding_probe(x, LABELS, (x, LABELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = image_findings(
            probe, dict(real=x, generated=x[::-1], shuffled=x), LABELS, np.arange(40), n_resamples=50
        )
    real = table[(table.system == "real") & (table.measure == "finding AUROC")].set_index("label")
    assert real.value["effusion"] == 1 and np.isnan(real.value[["nodule", "hernia"]]).all()
    assert "one class only" in real.note["nodule"] and real.n["mass"] == 30
    assert real.value["macro"] == pytest.approx(real.value[["effusion", "mass"]].mean())
    same = table[table.system == "shuffled over real"]
    assert np.allclose(same.value.dropna(), 0)


def test_thresholds_are_fitted_on_validation():
    y = pd.DataFrame({"effusion": [0, 1] * 30})
    x = y.to_numpy(float) + 0.2 * features(60, 1)
    moved = fit_finding_probe(x, y, (x + 2, y))
    assert isinstance(moved, FindingProbe) and moved.thresholds[0] > 0 and "validation" in moved.note
    table = image_findings(moved, dict(real=x + 2), y, np.arange(60), n_resamples=20).set_index(["measure", "label"])
    assert table.value["finding balanced accuracy", "effusion"] > 0.9
    assert fit_finding_probe(x, y).thresholds.tolist() == [0]


def test_sides_at_least():
    box = lambda x: [dict(label="effusion", box=[x, 0.1, x + 0.2, 0.3])]
    rows = [box(0.1), box(0.7), box(0.7), box(0.4), []]
    assert side_labels(rows)["effusion side"].fillna(-1).tolist() == [0, 1, 1, -1, -1]
    assert side_labels(rows, 2).shape == (5, 0)
    assert side_labels([[], []]).shape[1] == 0


def test_neighbours():
    one = features(60)
    e, chance = nearest_neighbour_test(one, one.copy(), np.arange(60), n_resamples=20)
    assert e.value <= 0.5 and chance == pytest.approx(59 / 119)
    assert nearest_neighbour_test(one, one * 0, np.arange(60), n_resamples=20)[0].value > 0.9  # a collapsed generator
    with pytest.raises(ConfigError, match="one vector for each study"):
        nearest_neighbour_test(one, one[:9], np.arange(60))


def test_tables_fit_a_task(tmp_path):
    systems = dict(real=features(40), generated=features(40, mean=1, seed=1))
    tables = [
        fid_table(systems, np.arange(40), "net", splits=2),
        neighbour_table(systems, np.arange(40), "net", n_resamples=9),
    ]
    scores = image_scores(pd.concat(tables))
    assert scores.metric.is_unique and {"FID", "real FID of halves", "real or synthetic"} <= set(scores.metric)
    result = TaskResult(scores, tables[0], headline={"FID": "FID"})
    saved = save_results({"cycle": result}, tmp_path / "x.csv", experiment="e", data="d", method="m", seed=0)
    assert len(saved) == len(scores)


def test_cycle_of_empty_reports_keeps_nothing():
    reports = ["Effusion.", "Nodule.", "Normal.", "Effusion and nodule."]
    options = dict(findings=["effusion", "nodule"], n_resamples=20)
    t = cycle_findings(reports, [""] * 4, [""] * 4, list("abcd"), read_labeller(), **options)
    t = t.set_index(["system", "measure", "label"])
    assert t.value["first", "finding F1", "micro"] == 0 and np.isnan(t.value["cycle", "kept finding F1", "micro"])
    assert t.note["cycle", "kept finding F1", "micro"] == "no first report affirms it"
    t = cycle_findings(reports, reports, reports, list("abcd"), read_labeller(), **options)
    assert t.set_index(["system", "measure", "label"]).value["cycle", "kept finding F1", "micro"] == 1


WORDS = "THE LUNGS SHOW NO CHANGE COMPARED WITH ____________________ AND COST 3 $ OR $ 4 (effusion) " * 12
PICTURE = np.random.default_rng(0).random((30, 50))


def odd(**changes):
    e = dict(image=PICTURE, real=PICTURE, generated=PICTURE.T, truth=WORDS, written=WORDS, second=WORDS, report=WORDS)
    patches = [("effusion", PICTURE[:4, :2])] * 9 + [
        (f"a very long name of a finding ${i}$ " * 3, PICTURE) for i in range(9)
    ]
    return (
        e | dict(keywords=["effusion", "a+b (c"], keypatches=patches, regions={"effusion": [-0.1, 0, 1.2, 1]}) | changes
    )


BARE = dict(keywords=[], keypatches=[], regions={}, truth="", written="", second="", report="")


@pytest.mark.parametrize("shown", [[odd()], [odd(**BARE)], [odd(), odd(**BARE), odd(truth="Größe 3 mm 肺部 清晰")]])
@pytest.mark.parametrize("kind", ["keywords", "generated", "cycles"])
def test_figures_of_odd_texts_and_shapes(kind, shown):
    draw = dict(keywords=plot_keywords, generated=plot_generated)
    draw |= dict(cycles=lambda shown, title: plot_cycles(shown, read_labeller().mentions, title))
    fig = draw[kind](shown, title="A method with a name that is rather long on a set with a long name " * 2)
    assert overlapping_texts(fig) == [] and cut_off_texts(fig) == []
    plt.close("all")


def test_map_of_few_and_of_constant_features():
    for x in (features(3), np.ones((6, 2))):
        fig = plot_real_synthetic(dict(real=x, generated=x), np.arange(len(x)))
        assert "chance" in fig.axes[0].get_title()
    plt.close("all")
