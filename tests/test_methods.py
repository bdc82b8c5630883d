"What holds for every method (gradients, padding, order, checkpoints, maps, unusual inputs), then each one's own cases"

import pytest
import torch
import torch.nn.functional as F

from medvlp.data.tokens import encode, train_tokenizer
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.losses.contrastive import info_nce
from medvlp.losses.gla import global_alignment, local_alignment
from medvlp.losses.groups import group, group_alignment
from medvlp.losses.masked import patchify, word_loss
from medvlp.losses.matching import patch_word, patch_word_scores
from medvlp.losses.pairwise import region_word
from medvlp.losses.tokenwise import cross_token_alignment
from medvlp.methods.adamatch import LinearHead, piece_ids
from medvlp.methods.base import build_method, load_method

REPORTS = ["Small left pleural effusion.", "No pneumothorax.", "Large right pleural effusion.", "Clear."]
TOKENIZER = train_tokenizer(REPORTS * 3, vocab_size=60)  # so small that words fall into pieces
TEXTS = encode(TOKENIZER, REPORTS)
READING = ("input_ids", "attention_mask", "word_ids")
TEXT = dict(
    saliency=True,
    options=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
)
RESNET = dict(name="resnet10t", image_size=64, patch_stride=16, options=dict(channels=[8, 16, 32, 64]))
VIT_SHAPE = dict(patch_size=16, embed_dim=32, depth=2, num_heads=2)
VIT = dict(name="vit_tiny_patch16_224", image_size=64, saliency=True, options=VIT_SHAPE)
PYRAMID = dict(
    name="pvt_v2_b0",
    image_size=64,
    patch_stride=16,
    prune=True,
    adapatch=[2, 3],
    options=dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1]),
)
MPMA = dict(rows=8, heads=2, slots=4, decoder_dim=32, decoder_heads=2, decoder_layers=1, ramp_epochs=0)
AMF = dict(fusion_dim=24, heads=2, layers=2)
SMALL = dict(  # method, or method-fused for the second pre-training: image encoder and options
    convirt=(RESNET, {}),
    mgca=(VIT, dict(n_prototypes=5)),
    gloria=(RESNET, {}),
    sparc=(RESNET, {}),
    aga=(RESNET, dict(gamma=0.9)),
    mpma=(VIT, MPMA),
    adamatch=(PYRAMID, {}),
    amf=(RESNET, AMF | dict(positive=3.0)),
) | {"amf-fused": (VIT, AMF | dict(phase="fuse"))}
METHODS = list(SMALL)
ALIGNING = [name for name in METHODS if name not in ("convirt", "amf")]


def small(name, image=None, **options):
    torch.manual_seed(0)
    options = dict(dim=16) | SMALL[name][1] | options
    return build_method(name.removesuffix("-fused"), image or SMALL[name][0], TEXT, len(TOKENIZER), **options)


def make_batch():
    images = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    return dict(images=images, **TEXTS, addresses=torch.tensor([11, 22, 33, 44]))


BATCH = make_batch()


def features(model, **changed):
    batch = BATCH | changed
    return model.image_encoder(batch["images"]), model.text_encoder(*(batch[k] for k in READING))


def gradients(model, **changed):
    "Those of a step"
    model.zero_grad()
    loss = model(**BATCH | changed)["loss"]
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def finite(model, **changed):
    "Whether loss and gradients are numbers"
    loss, grads = gradients(model, **changed)
    return bool(loss.isfinite()) and all(g.isfinite().all() for g in grads)


def assert_same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(x, y), name


def close(a, b, eps=1e-5):
    torch.testing.assert_close(a, b, atol=eps, rtol=0)


# Every method


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_weight(name):
    model = small(name).train()
    model.epoch = 1.0
    gradients(model)
    assert [n for n, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mpma"])
def test_four_studies_are_learnt(name):
    model = small(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        losses.append(gradients(model)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] * 0.7


@pytest.mark.parametrize("name", METHODS)
def test_padding_and_order_change_no_term(name):
    model = small(name).train()
    model(**BATCH)  # batch statistics and thresholds are no longer the initial ones
    model.eval()
    longer = {k: F.pad(TEXTS[k], (0, 5), value=-1 if k == "word_ids" else 0) for k in READING}
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        terms = model(**BATCH)["terms"]
        others = [BATCH | longer]
        if name != "amf-fused":  # a negative is drawn by its place in the batch
            others.append({k: v[order] for k, v in BATCH.items()})
        for other in others:
            for term, value in model(**other)["terms"].items():
                close(value, terms[term])


@pytest.mark.parametrize("name", METHODS)
def test_encoders_in_parts_change_no_gradient(name):
    model = small(name, image=VIT if SMALL[name][0] is RESNET else None).double().train()
    model.epoch = 1.0
    start = {key: value.clone() for key, value in model.state_dict().items()}
    whole = gradients(model, images=BATCH["images"].double())
    model.load_state_dict(start)  # thresholds and averages of weights move in a step
    for module in model.modules():
        if isinstance(module, (ImageEncoder, TextEncoder)):
            module.at_once = 3
    parts = gradients(model, images=BATCH["images"].double())
    close(whole[0], parts[0], 1e-9)
    for a, b in zip(whole[1], parts[1], strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_is_restored(name, tmp_path):
    model = small(name).train()
    model(**BATCH)
    model.eval().save_pretrained(tmp_path)
    again = load_method(tmp_path)
    assert_same_weights(model, again)
    assert (again.options, again.capabilities) == (model.options, model.capabilities)
    with torch.no_grad():
        assert torch.equal(again(**BATCH)["loss"], model(**BATCH)["loss"])


@pytest.mark.parametrize("name", ALIGNING)
def test_maps_are_distributions_over_real_tokens(name):
    model = small(name).eval()
    image, text = features(model)
    equal = image._replace(patches=torch.ones_like(image.patches))
    for patches in (image, equal):
        to_patches, to_words = model.token_maps(patches, text)
        (batch, n), words = image.patches.shape[:2], text.mask.shape[1]
        assert (to_patches.shape, to_words.shape) == ((batch, words, n), (batch, n, words))
        assert not to_patches.requires_grad and not to_words.requires_grad
        assert (to_patches >= 0).all() and (to_words >= 0).all()
        close(to_patches.sum(2), text.mask.float())  # 0 on padding
        close(to_words.sum(2), torch.ones(batch, n))
        assert not to_words.mT[~text.mask].any()
    if name != "amf-fused":  # its terms need further draws
        with torch.no_grad():
            assert all(term().isfinite() for term in model.terms(equal, text).values())


@pytest.mark.parametrize("name", METHODS)
def test_extreme_temperatures_are_finite(name):
    fields = type(small(name).options).model_fields
    for t in (1e-3, 1e3):
        assert finite(small(name, **{k: t for k in fields if k.endswith("temperature") and k != "min_temperature"}))


@pytest.mark.parametrize("name", METHODS)
def test_unusual_studies_are_finite(name):
    flat = BATCH["images"].clone()
    flat[1] = 0.5
    for model in (small(name).train(), small(name).eval()):
        assert finite(model, **encode(TOKENIZER, ["Clear", "Effusion", "Clear", "Left"]))  # one word each
        assert finite(model, **encode(TOKENIZER, ["Clear.", "", "Left effusion.", "No."]))
        assert finite(model, images=flat)
    assert finite(small(name).eval(), **{k: v[:1] for k, v in BATCH.items()})
    with torch.autocast("cpu", torch.bfloat16):
        assert finite(small(name))


@pytest.mark.parametrize("name", ["convirt", "mgca", "gloria", "sparc", "aga"])
def test_one_study_is_too_few_to_standardise(name):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        small(name).train()(**{k: v[:1] for k, v in BATCH.items()})


@pytest.mark.parametrize("name", METHODS)
def test_temperatures_and_terms_are_checked(name):
    for key in type(small(name).options).model_fields:
        if key.endswith("temperature"):
            with pytest.raises(
                ValueError,
                match=f"method {name.removesuffix('-fused')}: options.{key}: 0.0: input should be greater than 0",
            ):
                small(name, **{key: 0.0})
    with pytest.raises(ValueError, match='there is no term "nonsense"'):
        small(name, weights=dict(nonsense=1.0))


# GLoRIA


@pytest.mark.parametrize("agg", ["sum", "mean"])
def test_gloria_is_region_word(agg):
    temperatures = dict(word_temperature=0.3, sum_temperature=0.5, batch_temperature=2.0)
    model = small("gloria", agg=agg, **temperatures).eval()
    image, text = features(model)
    local = sum(region_word(*model.tokens(image, text), text.mask, agg=agg, **temperatures)) / 2
    close(model(**BATCH)["terms"]["local"], local)


# AGA


def test_aga_is_made_of_its_groups():
    model = small("aga", gate="fixed", sigma_tg=0.2, sigma_vg=0.7).eval()
    image, text = features(model)
    patches, words = model.tokens(image, text)
    tgv = group(words @ patches.mT, 0.2) @ patches
    pgl = group(patches @ words.mT, 0.7, text.mask) @ words
    terms = model(**BATCH)["terms"]
    close(terms["iga"], group_alignment(patches, words, pgl, tgv, text.mask, temperature=0.3))
    attention = dict(words_to_patches=model.words_to_patches, patches_to_words=model.patches_to_words)
    close(terms["bcga"], cross_token_alignment(pgl, tgv, text.mask, **attention, temperature=0.1))
    v, t = model.image_projection(image.pooled), model.text_projection(text.pooled)
    close(terms["global"], info_nce(v, t, temperature=0.3))


def test_aga_updates_its_thresholds_once_per_step():
    def thresholds(**weights):
        model = small("aga", gamma=0.5, sigma_tg=0.5, weights=weights).train()
        model(**BATCH)
        return model.curves()

    assert thresholds(iga=0) == thresholds(bcga=0) == thresholds()
    assert thresholds(iga=0, bcga=0) == dict(sigma_tg=0.5, sigma_vg=0.0)


# MPMA


@pytest.mark.parametrize(
    "options",
    [
        dict(fusion="gap"),
        dict(fusion="gmp"),
        dict(fusion="cmf"),
        dict(rows=1),
        dict(agg="mean", normalise=True, vision="visible"),
    ],
)
def test_variants_of_mpma(options, tmp_path):
    model = small("mpma", **options).train()
    assert finite(model) and finite(model, **encode(TOKENIZER, ["Clear.", "", "Left effusion.", "No."]))
    assert finite(model, images=torch.full((4, 1, 64, 64), 0.5))
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    for a, b in zip(load_method(tmp_path).reconstruct(**BATCH).values(), model.reconstruct(**BATCH).values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape",
    [
        dict(class_token=False, global_pool="avg", fc_norm=False),
        dict(global_pool="avg", fc_norm=False),
        dict(reg_tokens=2),
    ],
)
def test_vits_of_mpma(shape):
    model = small("mpma", dict(VIT, saliency=False, options=VIT_SHAPE | shape))
    gradients(model)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_mpma_with_a_colour_encoder_reconstructs_one_channel():
    assert finite(small("mpma", VIT | dict(in_chans=3)))


def test_mpma_without_addresses_takes_the_place_in_the_batch():
    model = small("mpma").eval()
    plain = {k: v for k, v in BATCH.items() if k != "addresses"}
    with torch.no_grad():
        assert torch.equal(model(**plain)["loss"], model(**plain, addresses=torch.arange(4))["loss"])
        for term in ("global", "local"):  # alignment does not depend on the masks
            assert torch.equal(model(**BATCH)["terms"][term], model(**plain)["terms"][term])
    masked = model.masks(BATCH["input_ids"], BATCH["word_ids"], torch.arange(4))[0]
    assert torch.equal(model.reconstruct(**plain)["mask"], masked)


def test_mpma_is_made_of_its_losses():
    model = small("mpma").eval()
    image, text = features(model)
    patches, words = model.tokens(image, text)
    masked, ids, labels = model.masks(BATCH["input_ids"], BATCH["word_ids"], BATCH["addresses"])
    terms, made = model(**BATCH)["terms"], model.reconstruct(**BATCH)
    close(terms["global"], global_alignment(model.rows(patches), words, text.mask, temperature=0.07))
    close(terms["local"], local_alignment(patches, words, text.mask, word_temperature=0.1, sum_temperature=0.1))
    close(terms["mlm"], word_loss(model.logits(image.patches, ids, BATCH["attention_mask"]), labels))
    assert masked.sum(1).tolist() == [12] * 4 and torch.equal(made["labels"], labels)
    std = sum(model.image_encoder.std) / len(model.image_encoder.std)
    error = (made["pixels"] - patchify(BATCH["images"], 16))[masked].square().mean()
    close(terms["mim"], error / std**2, 1e-4)  # pixels are returned in the scale of the images
    scores = model.similarity(model.embed_images(BATCH["images"]), model.embed_texts(**TEXTS))
    close(terms["global"], sum(F.cross_entropy(s / 0.07, torch.arange(4)) for s in (scores, scores.T)))


def test_mpma_restores_mean_and_deviation_of_normalised_patches():
    model = small("mpma", normalise=True).eval()
    made, truth = model.reconstruct(**BATCH), patchify(BATCH["images"], 16)
    deviation = (made["pixels"] - truth) / truth.std(2, keepdim=True)
    close(model(**BATCH)["terms"]["mim"], deviation[made["mask"]].square().mean(), 1e-3)


# AdaMatch


@pytest.mark.parametrize("heads", ["linear", "mlp"])
@pytest.mark.parametrize("tokens", ["pieces", "words"])
def test_adamatch_is_patch_word_and_ranks_by_its_scores(heads, tokens):
    model = small("adamatch", heads=heads, tokens=tokens).eval()
    image, text = features(model, word_ids=model.token_ids(TEXTS["word_ids"]))
    assert torch.equal(text.mask.sum(1), (TEXTS["word_ids"] >= 0).sum(1)) == (tokens == "pieces")
    tokens = model.tokens(image, text)
    for term, loss in zip(model.terms(image, text).values(), patch_word(*tokens, text.mask), strict=True):
        close(term(), loss, 1e-6)
    with torch.no_grad():
        images, texts = model.embed_images(BATCH["images"]), model.embed_texts(**TEXTS)
        for n in (1, 3, 128):
            expected = patch_word_scores(*tokens, text.mask).mean(2)
            close(model.similarity(images, texts, images_at_once=n), expected, 1e-6)
    no_words = torch.zeros_like(texts)
    close(model.similarity(images, no_words), torch.full((4, 4), -1.0))


def test_adamatch_maps_of_a_word_of_one_piece_are_those_of_the_piece():
    model, ids = small("adamatch").eval(), TEXTS["word_ids"]
    by_word = model.token_maps(*features(model))[0]
    by_piece = model.token_maps(*features(model, word_ids=piece_ids(ids)))[0]
    for words, found, expected in zip(ids.tolist(), by_word, by_piece):
        pieces = [w for w in words if w >= 0]
        for word in set(pieces):
            if pieces.count(word) == 1:
                close(found[word], expected[pieces.index(word)])


def test_adamatch_linear_heads_have_the_gradient_of_their_formula():
    torch.manual_seed(0)
    head, patches = LinearHead(3, 2).double(), torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    tokens, mask = torch.randn(3, 5, 3, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [1], [3]])

    def loss(patches, tokens, weight, bias):
        words = torch.func.functional_call(head, dict(weight=weight, bias=bias), (tokens, mask))
        return sum(patch_word(patches, words, mask, temperature=0.5))

    inputs = (patches, tokens.requires_grad_(), head.weight, head.bias)
    assert torch.autograd.gradcheck(loss, inputs)
    assert (torch.autograd.grad(loss(*inputs), tokens)[0][~mask] == 0).all()


def test_adamatch_takes_patches_of_its_width_as_they_are():
    assert sum(p.numel() for p in small("adamatch", dim=24).patch_projection.parameters()) == 0
    assert small("adamatch", dim=16).patch_projection.weight.shape == (16, 24)


def test_adamatch_keeps_its_temperature_above_the_minimum_and_learns_it():
    model = small("adamatch", temperature=1e-3).train()
    gradients(model)
    assert model.temperature.item() >= 0.01 - 1e-9 and model.temperature.grad.abs() > 0


def test_adamatch_measures_its_boxes_in_training_only():
    model = small("adamatch").train()
    model(**BATCH)
    before = model.curves()
    close(torch.tensor(list(before.values())), torch.tensor([0.07, 0.5]), 1e-6)
    model.eval()(**BATCH | dict(images=1 - BATCH["images"]))
    assert model.curves() == before
    assert list(small("adamatch", dict(PYRAMID, adapatch=[])).curves()) == ["temperature"]


def test_adamatch_of_one_study_has_nothing_to_confuse():
    assert small("adamatch").train()(**{k: v[:1] for k, v in BATCH.items()})["loss"].item() == 0


def test_adamatch_with_fixed_patches_is_another_network(tmp_path):
    fixed = dict(PYRAMID, adapatch=[])
    assert finite(small("adamatch", fixed)) and finite(small("adamatch", RESNET))
    for saved, described in ((fixed, PYRAMID), (PYRAMID, fixed)):
        small("adamatch", saved).save_pretrained(tmp_path)
        small("adamatch", described).config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="missing keys"):
            load_method(tmp_path)
