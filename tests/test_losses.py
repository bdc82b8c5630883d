"Losses of studies, clusters, groups and reconstruction at the edges of their input"

import math
import pytest, torch, torch.nn.functional as F
from medvlp.losses.contrastive import info_nce
from medvlp.losses.groups import ThresholdGate, group
from medvlp.losses.masked import patchify, pixel_loss, word_loss
from medvlp.losses.ops import similarity
from medvlp.losses.prototypes import Prototypes, sinkhorn

JUNK = pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, -math.inf, math.nan])


def draw(*shape, seed=1, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# info_nce


def test_gradients_of_info_nce():
    a, b, t = draw(6, 5).requires_grad_(), draw(6, 5, seed=2).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, t: info_nce(a, b, temperature=t), (a, b, t.requires_grad_()))


@pytest.mark.parametrize("t", [1e-3, 1e3])
def test_info_nce_at_extreme_temperatures(t):
    a = draw(6, 5).float().requires_grad_()
    loss = info_nce(a, draw(6, 5, seed=2).float(), temperature=t)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()


# prototypes


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 1e3])
def test_codes_are_probabilities(epsilon):
    for scores in (draw(8, 5).tanh().float(), torch.eye(6), -torch.ones(3, 4), draw(64, 500).tanh().float()):
        codes = sinkhorn(scores, epsilon=epsilon)
        assert codes.isfinite().all() and (codes >= 0).all()
        close(codes.sum(1), torch.ones(len(scores)), atol=1e-4)


def test_codes_have_no_gradient_and_no_half_precision():
    scores = draw(8, 5).tanh().requires_grad_()
    assert not sinkhorn(scores).requires_grad
    for dtype in (torch.bfloat16, torch.float16):
        assert sinkhorn(scores.to(dtype)).dtype == torch.float32
    order = torch.randperm(8)
    close(sinkhorn(scores[order]), sinkhorn(scores)[order])


@pytest.fixture
def prototypes():
    torch.manual_seed(0)
    prototypes = Prototypes(5, 3).double()
    prototypes.weight.data = F.normalize(prototypes.weight.data, dim=1)  # of length 1 in float64 too
    return prototypes


def test_neither_order_nor_sides_matter_to_prototypes(prototypes):
    a, b = draw(6, 3), draw(6, 3, seed=2)
    order = torch.randperm(6)
    close(prototypes(a[order], b[order]), prototypes(a, b))
    close(prototypes(b, a), prototypes(a, b))


def test_codes_are_constants_in_the_gradient(prototypes):
    a, b = draw(6, 3).requires_grad_(), draw(6, 3, seed=2).requires_grad_()
    q, r = sinkhorn(prototypes.scores(b)), sinkhorn(prototypes.scores(a))

    def with_fixed_codes(a, b, w):
        s, t = ((similarity(x, w) / 0.2).log_softmax(1) for x in (a, b))
        return -((q * s).sum() + (r * t).sum()) / 12

    w = prototypes.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(with_fixed_codes, (a, b, w))
    ours = torch.autograd.grad(prototypes(a, b), (a, b, prototypes.weight))
    for x, y in zip(ours, torch.autograd.grad(with_fixed_codes(a, b, w), (a, b, w))):
        close(x, y)


def test_stored_lengths_matter_only_in_evaluation_and_are_restored_in_training(prototypes):
    a, b = draw(6, 3), draw(6, 3, seed=2)
    loss, before = prototypes(a, b).detach(), prototypes.weight.detach().clone()
    prototypes.weight.data *= torch.rand(5, 1) + 0.5
    stored = prototypes.weight.detach().clone()
    close(prototypes.eval()(a, b).detach(), loss)
    assert torch.equal(prototypes.weight, stored)
    close(prototypes.train()(a, b).detach(), loss)
    close(prototypes.weight.detach(), before)
    (prototypes(a, b) + prototypes(a[:3], b[:3])).backward()  # two batches, one backward


def test_weight_decay_does_not_rotate_frozen_prototypes(prototypes):
    a, b = draw(6, 3), draw(6, 3, seed=2)
    optimizer = torch.optim.AdamW(prototypes.parameters(), 0.1, weight_decay=0.5)
    before = prototypes.weight.detach().clone()
    for frozen in (True, True, False):
        optimizer.zero_grad()
        prototypes(a, b, frozen=frozen).backward()
        optimizer.step()
        changed = (F.normalize(prototypes.weight, dim=1) - before).abs().max() > 1e-6
        assert changed == (not frozen)


@pytest.mark.parametrize("t", [1e-3, 1e3])
def test_prototypes_at_extreme_temperatures(t):
    a, prototypes = draw(6, 3).float().requires_grad_(), Prototypes(50, 3, temperature=t, epsilon=1e-3)
    loss = prototypes(a, draw(6, 3, seed=2).float())
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and prototypes.weight.grad.isfinite().all()
    assert prototypes(torch.zeros(2, 3), torch.zeros(2, 3)).isfinite()


def test_prototypes_under_autocast():
    torch.manual_seed(0)
    prototypes, a, b = Prototypes(50, 16), torch.randn(32, 16), torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prototypes(a, b)
    assert loss.dtype == torch.float32
    close(loss, prototypes(a, b), atol=0.02)


# groups

MASK = torch.arange(6) < torch.tensor([[6], [3], [1], [4]])


def test_weights_of_a_group():
    similarity = draw(4, 5, 6)
    weights, order = group(similarity, 0.3, MASK), torch.tensor([2, 0, 3, 1])
    close(weights.sum(2), torch.ones(4, 5, dtype=torch.float64))
    assert (weights >= 0).all() and not weights.mT[~MASK].any()
    close(group(similarity[order], 0.3, MASK[order]), weights[order])
    assert torch.equal(group(similarity, 0.3, torch.ones_like(MASK)), group(similarity, 0.3))
    each = group(similarity, torch.tensor([0.3, 0.9, 0.3, 0.1])[:, None, None], MASK)
    assert torch.equal(each[1], group(similarity, 0.9, MASK)[1])
    assert torch.autograd.gradcheck(lambda x: group(x, 0.3, MASK), (similarity.requires_grad_(),))
    for dtype in (torch.float16, torch.bfloat16):
        assert group(similarity.to(dtype), 0.3).dtype == torch.float32
    with pytest.raises(ValueError, match="between 0 and 1"):
        group(similarity, math.nan)


@JUNK
def test_padding_is_in_no_group(junk):
    similarity = draw(4, 5, 6)
    x = F.pad(similarity.masked_fill(~MASK[:, None], junk), (0, 2), value=junk).requires_grad_()
    weights = group(x, 0.3, F.pad(MASK, (0, 2)))
    (weights * torch.arange(8.0)).sum().backward()
    close(weights[..., :6].detach(), group(similarity, 0.3, MASK))
    assert not weights[..., 6:].any() and x.grad.isfinite().all() and not x.grad[..., 6:].any()


@pytest.mark.parametrize(
    "row",
    [torch.zeros(5), torch.full((5,), -3e30), 1e4 + torch.tensor([0.0, 1e-3, 0.0])],
    ids=["0", "large", "rounding"],
)
def test_a_constant_row_takes_everything(row):
    x = row.expand(1, 2, -1).clone().requires_grad_()
    weights = group(x, 0.9)
    (weights * torch.arange(float(len(row)))).sum().backward()
    close(weights.detach(), torch.full_like(weights, 1 / len(row)), atol=1e-6)
    assert not x.grad.any()


def test_a_gate_ignores_padding_and_has_no_gradient():
    similarity, rows, mask = draw(4, 5, 6), torch.arange(5) < torch.tensor([[5], [2], [1], [3]]), MASK
    padded = similarity.masked_fill(~(rows[..., None] & mask[:, None]), math.nan)
    assert ThresholdGate(0.8)(padded, rows, mask) == ThresholdGate(0.8)(similarity, rows, mask)
    gate = ThresholdGate(0.8)
    assert not gate(similarity.requires_grad_()).requires_grad and not list(gate.parameters())


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_gamma_must_be_a_momentum(gamma):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ThresholdGate(gamma)


# reconstruction

IMAGE_MASK = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("normalise", [False, True])
def test_pixel_loss(normalise):
    images, prediction, order = draw(3, 2, 4, 6), draw(3, 6, 8, seed=2), torch.tensor([2, 0, 1])

    def f(x, images=images, mask=IMAGE_MASK):
        return pixel_loss(x, images, mask, patch_size=2, normalise=normalise)

    assert torch.autograd.gradcheck(f, (prediction.clone().requires_grad_(),))
    close(f(prediction[order], images[order], IMAGE_MASK[order]), f(prediction))
    for junk in (1e30, math.inf, math.nan):  # predictions for visible patches
        x = prediction.masked_fill(~IMAGE_MASK[..., None], junk).requires_grad_()
        loss = f(x)
        loss.backward()
        close(loss.detach(), f(prediction))
        assert x.grad.isfinite().all() and not x.grad[~IMAGE_MASK].any()
    for given in (dict(mask=torch.zeros_like(IMAGE_MASK)), dict(images=torch.full_like(images, 0.4))):
        x = prediction.clone().requires_grad_()
        loss = f(x, **given)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        assert f(prediction.to(dtype), images.float()).dtype == torch.float32


def test_pixel_loss_refuses_what_does_not_fit():
    images, prediction = draw(3, 2, 4, 6), draw(3, 6, 8)
    for given, mask, p, message in [
        (prediction[:, :5], IMAGE_MASK, 2, r"they must be \(3, 6, 8\) and \(3, 6\)"),
        (prediction, IMAGE_MASK[:, :5], 2, r"they must be \(3, 6, 8\)"),
        (prediction, IMAGE_MASK, 5, "cannot be cut"),
    ]:
        with pytest.raises(ValueError, match=message):
            pixel_loss(given, images, mask, patch_size=p)
    assert patchify(images, 2).shape == prediction.shape


def test_word_loss():
    logits, order = draw(3, 4, 6), torch.tensor([2, 0, 1])
    labels = torch.tensor([[-100, 2, 5, -100], [-100] * 4, [0, -100, -100, 3]])  # the second report is not masked
    loss = word_loss(logits, labels)
    assert torch.autograd.gradcheck(lambda x: word_loss(x, labels), (logits.clone().requires_grad_(),))
    close(word_loss(logits[order], labels[order]), loss)
    for junk in (0.0, 1e30, math.inf, math.nan):
        x = F.pad(logits.masked_fill(labels[..., None] == -100, junk), (0, 0, 0, 2), value=junk).requires_grad_()
        more = word_loss(x, F.pad(labels, (0, 2), value=-100))
        more.backward()
        close(more.detach(), loss)
        assert x.grad.isfinite().all() and not x.grad[:, 4:].any()
