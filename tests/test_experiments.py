"Experiments name what exists, and those of the papers have the size that they should"

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from medvlp.generation.vqgan import build_vqgan
from medvlp.methods.base import build_method
from medvlp.project.config import read_experiment
from medvlp.project.plan import plan, resolve
from toy_project import TASKS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.yaml"))
BERT_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
VOCABULARY = {"emilyalsentzer/Bio_ClinicalBERT": 28_996, "microsoft/BiomedVLP-CXR-BERT-general": 30_522}


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_can_be_planned(file):
    resolved = resolve(file, need_data=False)
    assert resolved.experiment.experiment == file.stem
    stages = plan(resolved)
    assert len({stage.name for stage in stages}) == len(stages)


def test_params_yaml_is_the_demo():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "experiments/demo.yaml").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dvc_finds_what_its_templates_ask_for(file):
    "dvc.yaml loops over these lists, which therefore must be there"
    tree = read_experiment(file)
    assert all(list(tree["tasks"][task]) and {"data", "methods"} <= set(tree["tasks"][task]) for task in tree["tasks"])
    assert set(tree["tasks"]) == set(TASKS)
    assert all("folder" in values for values in tree["data"].values()) and tree["figures"]["data"] in tree["data"]


def method_of(experiment, name):
    "A method without its weights; a text encoder known by name gets its sizes, so that no network is needed"
    options = resolve(f"experiments/{experiment}.yaml", need_data=False).methods[name]
    image, text = options.image_encoder.model_dump(), options.text_encoder.model_dump()
    vocabulary = VOCABULARY[text["name"]]
    with torch.device("meta"):
        return build_method(
            options.method,
            image | dict(pretrained=False),
            text | dict(name=None, pretrained=False, options=BERT_BASE),
            vocabulary,
            **options.options,
        )


def weights_of(model):
    "How many weights each part has"
    names = ["image_encoder", "text_encoder", "prototypes", "heads", "fusion", "image_decoder", "report_decoder"]
    parts = dict.fromkeys(names, 0)
    for name, p in model.named_parameters():
        assert p.is_meta
        part = name.split(".")[0]
        parts[part if part in parts else "heads"] += p.numel()
    return {part: n for part, n in parts.items() if n}


def head(width, norm=False):
    "Linear, (batch norm,) linear"
    return width * width + width + 2 * width * norm + width * 128 + 128


ATTENTION = 2 * 4 * 128 * 128  # Q, K, V, O of words and of patches


@pytest.mark.parametrize(
    "name, image, heads",
    [
        ("mgca", 85_798_656, 4 * head(768, norm=True) + ATTENTION),
        ("mgca-resnet50", 23_508_032, sum(head(width, norm=True) for width in (2048, 768, 1024, 768)) + ATTENTION),
    ],
)
def test_mgca_has_its_size(name, image, heads):
    model = method_of("mgca", name)
    assert weights_of(model) == dict(image_encoder=image, text_encoder=107_719_680, prototypes=500 * 128, heads=heads)
    assert model.image_encoder.saliency == (name == "mgca")
    assert model.text_encoder.saliency and model.text_encoder.pool == "cls"


def test_aga_has_its_size():
    model = method_of("aga", "aga")
    heads = head(2048) + head(768) + head(1024, norm=True) + head(768, norm=True) + ATTENTION
    assert weights_of(model) == dict(image_encoder=23_508_032, text_encoder=107_719_680, heads=heads)
    with torch.device("meta"):
        assert model.image_encoder(torch.empty(1, 1, 299, 299)).grid == (19, 19)
    assert model.text_encoder.layers == 4


def transformer(width):
    "A block: attention, a network of four times the width, two norms"
    return 12 * width**2 + 13 * width


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


def test_ablations_change_what_they_name():
    methods = resolve("experiments/ablation-mpma.yaml", need_data=False).methods
    whole = methods["mpma"].options
    for name, options in methods.items():
        changed = {key for key, value in options.options.items() if value != whole[key]}
        kind = {"fusion"} if name[5:] in ("text", "gap", "gmp", "cmf") else {"weights"}
        assert changed == (kind if name != "mpma" else set()), name


def test_adamatch_has_its_size():
    moving = method_of("adamatch", "adamatch")
    three_stages = 44_725_696 - 10_995_712  # timm's PVTv2-B3 without its class head and its fourth stage
    # the offset layer, the layer that mixes the sampled points beyond the convolution's own size, and the size bias
    adaptive = sum(4 * C * C + C + 4 * C + 2 for C in (64, 128))
    heads = 768 * 320 + 320 + 1  # one linear layer on the text side, and the temperature
    assert weights_of(moving) == dict(image_encoder=three_stages + adaptive, text_encoder=107_719_680, heads=heads)
    with torch.device("meta"):
        assert moving.image_encoder(torch.empty(1, 1, 256, 256)).grid == (16, 16)


def test_adamatch_cyclic_has_the_size_that_it_should():
    "51,845 types of tokens, 256 of 1,024 an image; the language model is built from its published sizes"
    options = resolve("experiments/cyclic.yaml", need_data=False).tasks["cycle"].options
    dolly = dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10_240)
    types = options.language.text_vocab + options.vqgan.n_codes
    with torch.device("meta"):
        vqgan = build_vqgan(options.vqgan)
        language = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=types, **dolly))
    assert (types, vqgan.n_codes, vqgan.n_tokens, vqgan.image_size) == (51_845, 1024, 256, 256)
    assert sum(p.numel() for p in vqgan.parameters()) == 72_137_089
    assert sum(p.numel() for p in language.parameters()) == 2_783_098_880
    assert (options.language.learning_rate, options.language.batch_size, options.language.epochs) == (5e-6, 24, 5)
    assert options.codebook.model_dump(include={"kappa0", "kappa2", "kappa3", "n_keywords", "n_keypatches"}) == dict(
        kappa0=500, kappa2=1000, kappa3=20, n_keywords=15, n_keypatches=5
    )
