"Presets name methods, options and encoders that exist, and those of MGCA, AGA, MPMA and AdaMatch have the size that they should (that the sections fit the stages: test_project.py)"

from pathlib import Path
import pytest, torch
from medvlp.encoders.image import image_config
from medvlp.methods.base import build_method, find_method
from medvlp.project.config import validate
from medvlp.project.stage import read_mapping

ROOT = Path(__file__).parent.parent
BERT_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
VOCABULARY = {
    "emilyalsentzer/Bio_ClinicalBERT": 28_996,
    "microsoft/BiomedVLP-CXR-BERT-general": 30_522,
}  # BERT-base both, cased and uncased


@pytest.mark.parametrize(
    "params", ["params.yaml", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "presets").glob("*.yaml"))]
)
def test_methods_options_and_encoders_exist(params):
    tree = read_mapping(ROOT / params)
    assert set(tree["run"]["methods"]) <= set(tree["methods"])
    for name, section in tree["methods"].items():
        validate(find_method(section["method"]).Options, section["options"], f"{params}: methods.{name}.options")
        image_config((tree["pretrain"] | section)["image_encoder"]["name"])


def method_of(preset, name):
    "A method of a preset without its weights; what would come by a text encoder's name comes by sizes, so that no network is needed"
    tree = read_mapping(ROOT / "presets" / f"{preset}.yaml")
    settings = tree["pretrain"] | tree["methods"][name]
    image, text = (
        {k: v for k, v in settings[k].items() if k != "pretrained"} for k in ("image_encoder", "text_encoder")
    )
    vocabulary = VOCABULARY[text.pop("name")]
    with torch.device("meta"):
        return build_method(settings["method"], image, text | BERT_BASE, vocabulary, **settings["options"])


def weights_of(model):
    "How many weights each part has"
    parts = dict.fromkeys(
        ["image_encoder", "text_encoder", "prototypes", "heads", "fusion", "image_decoder", "report_decoder"], 0
    )
    for name, p in model.named_parameters():
        assert p.is_meta
        part = name.split(".")[0]
        parts[part if part in parts else "heads"] += p.numel()
    return {part: n for part, n in parts.items() if n}


def head(width, norm=False):
    return width * width + width + 2 * width * norm + width * 128 + 128  # linear, (batch norm,) linear


ATTENTION = 2 * 4 * 128 * 128  # Q, K, V, O of words and of patches


@pytest.mark.parametrize(
    "name, image, heads",
    [
        ("mgca", 85_798_656, 2 * head(768) + 2 * head(768, norm=True) + ATTENTION),
        (
            "mgca_resnet50",
            23_508_032,
            head(2048) + head(768) + head(1024, norm=True) + head(768, norm=True) + ATTENTION,
        ),
    ],
)
def test_mgca_has_its_size(name, image, heads):
    model = method_of("mgca", name)
    assert weights_of(model) == dict(image_encoder=image, text_encoder=107_719_680, prototypes=500 * 128, heads=heads)
    assert (
        model.image_encoder.saliency == (name == "mgca")
        and model.text_encoder.saliency
        and model.text_encoder.pool == "cls"
    )


def test_aga_has_its_size():
    model = method_of("aga", "aga")
    assert weights_of(model) == dict(
        image_encoder=23_508_032,
        text_encoder=107_719_680,
        heads=head(2048) + head(768) + head(1024, norm=True) + head(768, norm=True) + ATTENTION,
    )
    with torch.device("meta"):
        assert model.image_encoder(torch.empty(1, 1, 299, 299)).grid == (19, 19)
    assert model.text_encoder.layers == 4


def transformer(width):
    return 12 * width**2 + 13 * width  # a block: attention, network of four times the width, two norms


def test_mpma_has_its_size():
    model = method_of("mpma", "mpma")
    D, V = 768, 30_522
    attention = 4 * D**2 + 4 * D
    assert weights_of(model) == dict(
        image_encoder=85_799_424,
        text_encoder=108_891_648,
        heads=2 * head(D, norm=True) + 196 * 110,
        fusion=2 * (attention + 16 * D),
        image_decoder=(D + 1) * 512 + 512 + 4 * transformer(512) + 2 * 512 + 513 * 16**2,
        report_decoder=(V + 1) * D + 512 * D + 2 * D + 4 * (transformer(D) + attention + 2 * D) + 2 * D + V,
    )
    with torch.device("meta"):
        assert model.image_encoder(torch.empty(1, 1, 224, 224)).grid == (14, 14)


@pytest.mark.parametrize(
    "name", ["mpma-image", "mpma-gap", "mpma-rebuild", "mpma-gmp", "mpma-cmf", "mpma-mlm1", "mpma-mlm10", "mpma-local5"]
)
def test_ablations_of_mpma_change_what_they_name(name):
    tree = read_mapping(ROOT / "presets/mpma.yaml")["methods"]
    options = tree["mpma"]["options"]
    assert {k for k, v in tree[name]["options"].items() if v != options[k]} == (
        {"fusion"} if name[5:] in ("gap", "gmp", "cmf") else {"weights"}
    )


def test_adamatch_has_its_size():
    plain, moving = (method_of("adamatch", name) for name in ("adamatch-fixed", "adamatch"))
    three_stages = 44_725_696 - 10_995_712  # timm's PVTv2-B3 without its class head, without its fourth stage
    assert weights_of(plain)["image_encoder"] == three_stages
    assert weights_of(moving) == weights_of(plain) | dict(
        image_encoder=three_stages + sum(4 * C * C + C + 4 * C + 2 for C in (64, 128))
    )  # what looks, what moves, what sizes; the mixing is the convolution's size
    assert moving.temperature.shape == () and moving.image_encoder.dim == 320
    grids = dict(adamatch=(14, 14)) | {"adamatch-stage2": (28, 28), "adamatch-stage4": (7, 7)}
    for name, grid in grids.items():
        assert method_of("adamatch", name).eval().image_encoder.patch_dim == {14: 320, 28: 128, 7: 512}[grid[0]]
