"Fusion and the decoders behind it at the edges of their input"

import math
import pytest, torch, torch.nn.functional as F
from torch import nn
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.masked import encode_visible, patch_mask
from medvlp.fusion.coattention import CoAttention, build_fusion
from medvlp.fusion.gated import GatedCrossAttention
from medvlp.fusion.memory import KINDS, Fusion
from medvlp.generation.image_decoder import ImageDecoder
from medvlp.generation.report_decoder import ReportDecoder
from medvlp.losses.masked import pixel_loss, word_loss


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(params=(*KINDS, "co_attention"))
def fusion(request):
    torch.manual_seed(0)
    fusion = build_fusion(request.param, 8, 2, slots=3, layers=2).double()
    for p in fusion.parameters():
        p.data = torch.randn_like(p)
    return fusion


@pytest.fixture
def studies():
    torch.manual_seed(1)
    patches, words = torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)
    return patches, words, torch.arange(6) < torch.tensor([[6], [1], [3], [4]])


def test_studies_do_not_influence_each_other(fusion, studies):
    patches, words, mask = studies
    tokens, real = fusion(*studies)
    assert tokens.shape == (*real.shape, 8) and real.shape[1] == (6 if fusion.kind in ("text", "gap", "gmp") else 11)
    order = torch.tensor([2, 0, 3, 1])
    close(fusion(patches[order], words[order], mask[order])[0], tokens[order])
    close(fusion(patches[1:2], words[1:2], mask[1:2])[0], tokens[1:2])


def test_fused_patches_keep_their_order(fusion, studies):
    patches, words, mask = studies
    tokens, order = fusion(*studies)[0], torch.tensor([4, 2, 0, 1, 3])
    again = fusion(patches[:, order], words, mask)[0]
    close(again[:, -6:], tokens[:, -6:])
    if again.shape[1] > 6:
        close(again[:, :5], tokens[:, :5][:, order])


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, math.nan])
def test_more_padding_changes_nothing_whatever_it_holds(fusion, studies, junk):
    patches, words, mask = studies
    tokens, wide = fusion(*studies)[0].detach(), F.pad(mask, (0, 3))
    x, w = patches.clone(), F.pad(words.masked_fill(~mask[..., None], junk), (0, 0, 0, 3), value=junk)
    more, real = fusion(x.requires_grad_(), w.requires_grad_(), wide)
    if more.requires_grad:  # without the image there is nothing to learn
        (more * torch.randn_like(more)).sum().backward()
    T = tokens.shape[1]
    close(more[:, :T].detach(), tokens)
    assert not more[:, T:].any() and not real[:, T:].any()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (x, w))
    assert w.grad is None or not w.grad[~wide].any()
    for name, p in fusion.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_gradients_of_fusion(fusion, studies):
    patches, words, mask = studies
    small = patches[1:3, :2].clone().requires_grad_(), words[1:3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: fusion(x, w, mask[1:3, :3])[0], small)


def test_reports_without_words_and_large_numbers_stay_finite(fusion, studies):
    patches, words, mask = studies
    none, x = torch.zeros_like(mask), patches.clone().requires_grad_()
    tokens, real = fusion(x, words, none)
    if tokens.requires_grad:
        tokens.sum().backward()
    assert tokens.isfinite().all() and not tokens[~real].any() and (x.grad is None or x.grad.isfinite().all())
    close(tokens[:, :-6], fusion(patches, words[:, :2] + 1, none[:, :2])[0][:, :-2])
    patches, words = patches.float(), words.float()
    assert fusion.float()(1e4 * patches, words, mask)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert fusion(patches, words, mask)[0].isfinite().all()


def test_memory_that_draws_no_attention_is_no_memory(studies):
    fusion, plain = Fusion("ma_cmf", 8, heads=1, slots=3).double(), Fusion("cmf", 8, heads=1).double()
    plain.load_state_dict({k: v for k, v in fusion.state_dict().items() if "memory" not in k})
    for m in (fusion, plain):
        for attention in (m.of_patches, m.of_words):  # every query is (1, ..., 1)
            attention.in_proj_weight.data[:16] = torch.cat([torch.zeros(8, 8), torch.eye(8)])
            attention.in_proj_bias.data[:16] = torch.cat([torch.ones(8), torch.zeros(8)])
    fusion.image_memory.data.fill_(-1e3)
    fusion.word_memory.data.fill_(-1e3)
    close(fusion(*studies)[0], plain(*studies)[0])


# co-attention


@pytest.fixture
def co_attention():
    torch.manual_seed(0)
    return CoAttention(8, heads=2, layers=3).double().eval()


def test_each_stream_of_co_attention_learns_from_both(co_attention, studies):
    patches, words, mask = studies
    x, w = patches.clone().requires_grad_(), words.clone().requires_grad_()
    for output in co_attention.attend(x, w, mask):
        for grad in torch.autograd.grad((output * torch.randn_like(output)).sum(), (x, w), retain_graph=True):
            assert (grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("junk", [0.0, math.nan])
def test_word_maps_ignore_padding_and_follow_the_patches(co_attention, studies, junk):
    patches, words, mask = studies
    maps, order = co_attention.word_maps(*studies), torch.tensor([4, 2, 0, 1, 3])
    close(maps.sum(2), mask.double())
    close(co_attention.word_maps(patches[:, order], words, mask), maps[..., order])
    wide = F.pad(words.masked_fill(~mask[..., None], junk), (0, 0, 0, 3), value=junk)
    again = co_attention.word_maps(patches, wide, F.pad(mask, (0, 3)))
    close(again[:, :6], maps)
    assert not again[:, 6:].any()
    assert not co_attention.word_maps(patches, words, torch.zeros_like(mask)).any()


def test_word_maps_are_what_the_last_layer_uses(co_attention, studies):
    inputs = []
    attention = co_attention.word_layers[-1].multihead_attn
    attention.register_forward_hook(lambda _, given, output: inputs.append(given))
    co_attention.attend(*studies)
    weights = attention(*inputs[0])[1]
    close(co_attention.word_maps(*studies), weights * studies[2][..., None])


def test_dropout_of_co_attention_acts_in_training_only(studies):
    torch.manual_seed(0)
    fusion = CoAttention(8, heads=2, layers=1, dropout=0.5).double()
    assert not torch.equal(fusion(*studies)[0], fusion(*studies)[0])
    fusion.eval()
    assert torch.equal(fusion(*studies)[0], fusion(*studies)[0])


# gated cross-attention


@pytest.fixture(params=[True, False], ids=["gate", "no_gate"])
def gated(request):
    torch.manual_seed(0)
    return GatedCrossAttention(8, heads=2, gate=request.param).double()


@pytest.fixture
def fused():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)


def test_gradients_of_gated_cross_attention(gated, fused):
    x, vocabulary = fused
    small = x[:2, :2].clone().requires_grad_(), vocabulary[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(gated, small)
    (gated(*small) * torch.randn(2, 2, 8)).sum().backward()
    for name, p in gated.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_the_vocabulary_is_a_set_and_tokens_stand_alone(gated, fused):
    x, vocabulary = fused
    out, answers, order = gated(*fused), torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 1])
    close(gated(x, vocabulary[answers]), out)
    close(gated(x[order], vocabulary), out[order])
    close(gated(x[1:2, 2:], vocabulary), out[1:2, 2:])
    gate, attention = gated.weights(*fused)
    close(gated.weights(x, vocabulary[answers])[1], attention[..., answers])
    assert (gate == 1).all() if gated.gate is None else ((gate > 0) & (gate < 1)).all()
    close(attention.sum(2), torch.ones(3, 4, dtype=torch.float64))


def test_answers_are_encoded_once_for_the_whole_batch(gated, fused):
    shapes = []
    gated.answers.register_forward_hook(lambda _, inputs, output: shapes.append(inputs[0].shape))
    gated.attention.register_forward_hook(lambda _, inputs, output: shapes.extend(i.shape for i in inputs))
    gated(*fused)
    assert shapes == [(1, 5, 8), (1, 12, 8), (1, 5, 8), (1, 5, 8)]


def test_evaluation_gives_what_training_computes(gated, fused):
    out = gated(*fused)
    with torch.no_grad():
        close(gated.eval()(*fused), out)
        gated.float()
        x, vocabulary = (t.float() for t in fused)
        assert gated(1e4 * x, vocabulary).isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert (gated(x, vocabulary) - out).abs().max() < 0.1


@pytest.mark.parametrize("answers", [0, 1])
def test_a_vocabulary_without_a_choice_is_an_error(gated, fused, answers):
    x, vocabulary = fused
    with pytest.raises(ValueError, match=f"vocabulary has {answers} entries, but needs at least 2; take it from"):
        gated(x, vocabulary[:answers])


# the image decoder


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_tiny_patch16_224", 96, options=dict(depth=1)).eval()
    return encoder, ImageDecoder(192, (6, 6), 16, dim=64, heads=2, depth=2).eval()


def test_image_decoder(autoencoder):
    encoder, decoder = autoencoder
    images, mask, order = torch.rand(4, 1, 96, 96), patch_mask(torch.arange(4), 36, 0.75), torch.tensor([2, 0, 3, 1])
    prediction = decoder(encode_visible(encoder, images, mask), mask)
    again = decoder(encode_visible(encoder, images[order], mask[order]), mask[order])
    close(again, prediction[order], atol=1e-5)
    pixel_loss(prediction, images, mask, patch_size=16).backward()
    for model in autoencoder:
        for name, w in model.named_parameters():
            assert w.grad is not None and w.grad.any(), name
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(encode_visible(encoder, images, mask), mask).shape == prediction.shape
    twin = ImageDecoder(192, (6, 6), 16, dim=64, heads=2, depth=2).eval()
    twin.load_state_dict(decoder.state_dict())
    tokens = encode_visible(encoder, images, mask)
    assert torch.equal(twin(tokens, mask), decoder(tokens, mask))


def test_no_two_places_of_a_grid_are_alike():
    places = ImageDecoder(8, (3, 5), 4, dim=32, heads=2).places
    assert places.shape == (15, 32) and torch.cdist(places, places).add(torch.eye(15)).min() > 0.1


# the report decoder

IDS = torch.tensor([[2, 7, 50, 9, 50, 3], [2, 50, 3, 0, 0, 0]])
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
LABELS = torch.tensor([[-100, -100, 8, -100, 5, -100], [-100, 7, -100, -100, -100, -100]])


@pytest.fixture
def reporter():
    "As if trained: the image has an influence"
    torch.manual_seed(0)
    decoder, fusion = ReportDecoder(50, 16, max_tokens=8).double(), Fusion("ma_cmf", 16).double()
    for layer in decoder.layers:
        nn.init.normal_(layer.multihead_attn.out_proj.weight, std=0.1)
    return decoder, fusion, torch.randn(2, 9, 16, dtype=torch.float64)


def predict(decoder, fusion, patches, ids=IDS, mask=MASK):
    embedded = decoder.embed(ids)
    return decoder(embedded, mask, *fusion(patches, embedded, mask))


def test_report_decoder(reporter):
    decoder, fusion, patches = reporter
    logits = predict(*reporter)
    for n in (1, 2):
        wide = predict(*reporter, F.pad(IDS, (0, n), value=5), F.pad(MASK, (0, n)))
        close(wide[:, :6][MASK], logits[MASK])
    close(predict(decoder, fusion, patches.flip(0), IDS.flip(0), MASK.flip(0)).flip(0), logits)
    close(predict(decoder, fusion, patches[1:], IDS[1:, :3], MASK[1:, :3]), logits[1:, :3])
    assert (predict(decoder, fusion, -patches) - logits).abs().max() > 1e-3  # the image matters
    assert (logits[0, 2] - logits[0, 4]).abs().max() > 1e-3  # and so does the position of a masked token
    for kind in (fusion, Fusion("gap", 16).double()):
        assert predict(decoder, kind, patches, mask=torch.zeros_like(MASK)).isfinite().all()


@pytest.mark.parametrize("junk", [math.inf, math.nan])
def test_padding_of_reports_and_of_fused_tokens_has_no_influence(reporter, junk):
    decoder, fusion, patches = reporter
    embedded = decoder.embed(IDS)
    tokens, real = fusion(patches, embedded, MASK)
    e = embedded.masked_fill(~MASK[..., None], junk).detach().requires_grad_()
    t = tokens.masked_fill(~real[..., None], junk).detach().requires_grad_()
    logits = decoder(e, MASK, t, real)
    close(logits[MASK], predict(*reporter)[MASK])
    logits[MASK].sum().backward()
    assert e.grad.isfinite().all() and not e.grad[~MASK].any()
    assert t.grad.isfinite().all() and not t.grad[~real].any()


def test_every_weight_of_the_report_decoder_learns(reporter):
    decoder, fusion, _ = reporter
    word_loss(predict(*reporter), LABELS).backward()
    for name, p in [*decoder.named_parameters(), *fusion.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert decoder.pieces.weight.grad[decoder.mask_id].any()
