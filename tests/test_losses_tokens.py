"What every loss of patches and words promises, whatever it computes"

import math
from functools import partial
from typing import Callable, NamedTuple
import pytest, torch, torch.nn.functional as F
from medvlp.losses import ops
from medvlp.losses.gla import global_alignment, local_alignment, local_scores
from medvlp.losses.groups import group, group_alignment
from medvlp.losses.matching import patch_word, patch_word_scores
from medvlp.losses.ops import mask_padding
from medvlp.losses.pairwise import region_word, region_word_scores
from medvlp.losses.tokenwise import CrossAttention, cross_token_alignment, token_alignment


def tokens(patches, words, mask, temperature=0.1):
    "Words against contexts that depend on words and patches, each as query and as context"
    contexts = mask_padding(words, mask) * patches.mean(1, keepdim=True)
    both = (words, contexts), (contexts, words)
    return sum(token_alignment(*x, mask, temperature=temperature) for x in both) / 2


def cross(patches, words, mask, temperature=0.07, variant="paper"):
    attentions = (CrossAttention(words.shape[2], kind).to(words) for kind in ("learned", "cosine"))
    patch_weights, word_weights = (x.detach().square().sum(2) for x in (patches, words))
    return cross_token_alignment(
        patches,
        words,
        mask,
        words_to_patches=next(attentions),
        patches_to_words=next(attentions),
        patch_weights=patch_weights + 1e-3,
        word_weights=word_weights + 1e-3,
        temperature=temperature,
        variant=variant,
    )


def aga(patches, words, mask, temperature=0.3):
    "Groups at fixed thresholds, and groups with groups"
    words = mask_padding(words, mask)
    similarity = words @ patches.mT
    tgv = group(similarity, 0.3).to(patches) @ patches
    pgl = group(similarity.mT, 0.6, mask).to(words) @ words
    first, second = (CrossAttention(words.shape[2]).to(words) for _ in range(2))
    iga = group_alignment(patches, words, pgl, tgv, mask, temperature=temperature)
    bcga = cross_token_alignment(
        pgl, tgv, mask, words_to_patches=first, patches_to_words=second, temperature=temperature
    )
    return iga + bcga


def stacked(loss, patches, words, mask, **options):
    return torch.stack(loss(patches, words, mask, **options))


class Case(NamedTuple):
    loss: Callable
    pairs: bool  # every image against every report, or every study by itself
    temperatures: tuple = ("temperature",)
    weighted: bool = False  # by weights that depend on the tokens, without gradient


THREE = ("word_temperature", "sum_temperature", "batch_temperature")
CASES = {
    "token_alignment": Case(tokens, False),
    "cross_token_alignment": Case(cross, False, weighted=True),
    "cross_token_alignment, official": Case(partial(cross, variant="official"), False, weighted=True),
    "groups": Case(aga, False),
    "region_word": Case(partial(stacked, region_word), True, THREE),
    "region_word, mean": Case(partial(stacked, region_word, agg="mean"), True, THREE),
    "global_alignment": Case(global_alignment, True),
    "local_alignment": Case(local_alignment, True, THREE),
    "local_alignment, mean": Case(partial(local_alignment, agg="mean"), True, THREE),
    "patch_word": Case(partial(stacked, patch_word), True),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_pairwise_loss = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.pairs], ids=[name for name, c in CASES.items() if c.pairs]
)


@pytest.fixture(autouse=True, params=["padded", "packed"])
def form(request, monkeypatch):
    "All pairs in one block with padding, as they are so few, and without padding, each pair in a block of its own"
    if request.param == "packed":
        monkeypatch.setattr(ops, "CACHED_BLOCK", 1)


def studies(dtype=torch.float64):
    "Five images of six patches and their reports of one to seven words"
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(5, 6, 4, dtype=torch.float64, generator=generator).to(dtype)
    words = torch.randn(5, 7, 4, dtype=torch.float64, generator=generator).to(dtype)
    return patches, words, torch.arange(7) < torch.tensor([[7], [1], [3], [5], [2]])


def with_gradients(loss, patches, words, mask, **options):
    patches, words = (x.detach().clone().requires_grad_() for x in (patches, words))
    value = loss(patches, words, mask, **options)
    value.sum().backward()
    return value.detach(), patches.grad, words.grad


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@every_loss
def test_the_order_of_studies_does_not_matter(case):
    patches, words, mask = studies()
    order = torch.tensor([3, 0, 4, 1, 2])
    close(case.loss(patches[order], words[order], mask[order]), case.loss(patches, words, mask))


@every_loss
def test_the_order_of_patches_does_not_matter(case):
    if case.loss is global_alignment:
        pytest.skip("rows have an order")
    patches, words, mask = studies()
    close(case.loss(patches[:, [4, 2, 0, 5, 3, 1]], words, mask), case.loss(patches, words, mask))


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, math.nan])
@every_loss
def test_more_padding_changes_nothing_whatever_it_holds(case, junk):
    patches, words, mask = studies()
    value, of_patches, of_words = with_gradients(case.loss, patches, words, mask)
    padded = F.pad(words.masked_fill(~mask[..., None], junk), (0, 0, 0, 3), value=junk)
    again = with_gradients(case.loss, patches, padded, F.pad(mask, (0, 3)))
    close(again[0], value)
    close(again[1], of_patches, atol=1e-11)
    close(again[2][:, :7], of_words.masked_fill(~mask[..., None], 0), atol=1e-11)
    assert not again[2][:, 7:].any()


@every_loss
def test_gradients_are_those_of_the_loss(case):
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    words = torch.randn(2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    if case.weighted:
        pytest.skip("a difference quotient would count the change of the weights")
    options = {case.temperatures[-1]: 1.0}
    assert torch.autograd.gradcheck(lambda p, w: case.loss(p, w, mask, **options), (patches, words))


@pytest.mark.parametrize("t", [1e-3, 1e3])
@every_loss
def test_extreme_temperatures_stay_finite(case, t):
    for name in case.temperatures:
        for x in with_gradients(case.loss, *studies(torch.float32), **{name: t}):
            assert x.isfinite().all(), name


@every_loss
def test_degenerate_tokens_stay_finite(case):
    patches, words, mask = studies(torch.float32)
    degenerate = {
        "one word per report": (patches, words[:, :1], mask[:, :1]),
        "equal patches": (patches[:, :1].expand_as(patches), words, mask),
        "zeros": (torch.zeros_like(patches), words, mask),
        "far apart in length": (1e6 * patches, 1e-6 * words, mask),
        "one study": (patches[:1], words[:1], mask[:1]),
    }
    for name, given in degenerate.items():
        for x in with_gradients(case.loss, *given):
            assert x.isfinite().all(), name


@every_loss
def test_a_report_without_words_takes_no_part(case):
    "A pairwise loss leaves the study out; elsewhere it counts as 0 in the mean"
    patches, words, mask = studies()
    mask[2] = False
    others = [0, 1, 3, 4]
    value, of_patches, of_words = with_gradients(case.loss, patches, words, mask)
    expected = case.loss(patches[others], words[others], mask[others])
    close(value, expected if case.pairs else expected * 4 / 5)
    assert of_patches.isfinite().all() and of_words.isfinite().all()
    assert not of_patches[2].any() and not of_words[2].any()


@every_loss
def test_a_batch_without_words_costs_nothing(case):
    patches, words, mask = studies()
    value, of_patches, of_words = with_gradients(case.loss, patches, words, torch.zeros_like(mask))
    assert not value.any() and not of_patches.any() and not of_words.any()


@every_pairwise_loss
def test_a_single_study_has_nothing_to_be_confused_with(case):
    patches, words, mask = studies()
    assert not case.loss(patches[:1], words[:1], mask[:1]).any()


@every_pairwise_loss
def test_nan_is_not_taken_for_a_missing_report(case):
    patches, words, mask = studies()
    patches[1] = math.nan
    assert case.loss(patches, words, mask).isnan().any()


@every_loss
def test_half_precision_comes_out_in_float32(case):
    assert case.loss(*studies(torch.bfloat16)).dtype == torch.float32


@every_loss
def test_autocast(case):
    "Pairwise losses leave it; the others stay finite"
    given = studies(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = case.loss(*given)
    assert value.dtype == torch.float32 and value.isfinite().all()
    if case.pairs:
        assert torch.equal(value, case.loss(*given))


@every_pairwise_loss
def test_what_cannot_be_compared_is_refused(case):
    patches, words, mask = studies()
    for given, message in [
        ((patches, words[:3], mask[:3]), "one report per image"),
        ((patches, words, mask[:, :3]), r"it must be \(5, 7\)"),
        ((patches, words[..., :2], mask), "with the same d"),
    ]:
        with pytest.raises(ValueError, match=message):
            case.loss(*given)
    for name in case.temperatures:
        with pytest.raises(ValueError, match=f"{name} is 0.0"):
            case.loss(patches, words, mask, **{name: 0.0})


@pytest.mark.parametrize("scores", [region_word_scores, local_scores, patch_word_scores])
def test_blocks_change_neither_scores_nor_gradients(scores):
    def squares(patches, words, mask, reports):
        return scores(patches, words, mask, reports=reports).square()

    whole = with_gradients(squares, *studies(), reports=5)
    for reports in (1, 2, 3):
        for a, b in zip(with_gradients(squares, *studies(), reports=reports), whole):
            close(a, b, atol=1e-11)


def test_the_gradient_of_a_learned_temperature_survives_a_missing_report():
    patches, words, mask = studies()
    mask[2] = False
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    stacked(patch_word, patches, words, mask, temperature=t).sum().backward()
    assert t.grad.isfinite()


def test_padding_never_wins_a_maximum():
    "Words that all point away from their patches: a padded 0 would be larger than any of them"
    patches, _, mask = studies()
    away = -patches[:, :1].expand(-1, 7, -1)
    scores = patch_word_scores(patches[:, :1], away, mask)
    close(scores.diagonal()[0], torch.full((5,), -1.0, dtype=torch.float64))


def test_weights_of_tokens_are_constants():
    patches, words, mask = studies()
    weights = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    words.requires_grad_()
    loss = token_alignment(words, words.roll(1, 2), mask, weights=weights, temperature=0.1)
    close(token_alignment(words, words.roll(1, 2), mask, weights=9 * weights, temperature=0.1), loss)
    loss.backward()
    assert weights.grad is None
