"Soft labels, transport and matching at the edges of their input"

import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from medvlp.encoders.masked import addressed_noise
from medvlp.losses.contrastive import info_nce
from medvlp.losses.itm import draw_negatives, matching_loss, text_keys
from medvlp.losses.ops import similarity
from medvlp.losses.soft import soft_alignment, soft_contrastive, soft_labels
from medvlp.losses.transport import ipot, transport_distance


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# soft


def test_gradients_of_the_soft_loss():
    a, b, t = draw(6, 5).requires_grad_(), draw(6, 5, seed=2).requires_grad_(), draw(1).square().requires_grad_()
    targets = soft_labels(draw(6, 6).tanh(), scale=5), soft_labels(draw(6, 6, seed=3).tanh(), scale=5)
    assert torch.autograd.gradcheck(lambda a, b, t: soft_alignment(a, b, targets, temperature=t[0]), (a, b, t))
    assert torch.autograd.gradcheck(lambda a, b, t: soft_alignment(a, b, temperature=t[0]), (a, b, t))


def test_hard_labels_have_the_gradient_of_info_nce():
    a, b = draw(6, 5).requires_grad_(), draw(6, 5, seed=2).requires_grad_()
    hard = torch.autograd.grad(soft_alignment(a, b, (torch.eye(6), torch.eye(6)), temperature=0.07), (a, b))
    for x, y in zip(hard, torch.autograd.grad(info_nce(a, b, temperature=0.07), (a, b))):
        close(x, y)


def test_soft_labels_of_more_columns_than_rows_and_of_a_huge_lambda():
    wide = soft_labels(draw(3, 7), scale=2.0)
    close(wide.sum(1), torch.ones(3, dtype=torch.float64))
    close(soft_labels(draw(4, 4), scale=1.0, positive=1e4), torch.eye(4, dtype=torch.float64))
    close(
        soft_contrastive(draw(4, 4), torch.eye(4), temperature=1e-3), -draw(4, 4).div(1e-3).log_softmax(1).trace() / 4
    )


def test_the_soft_loss_is_float32_under_autocast():
    a, b = draw(6, 5).float(), draw(6, 5, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_alignment(a, b, temperature=0.07)
    close(loss, soft_alignment(a, b, temperature=0.07), atol=1e-6)


# transport


def bags(seed=1):
    return draw(4, 7, 6, seed=seed), draw(4, 9, 6, seed=seed + 1), torch.arange(7) < torch.tensor([[7], [4], [1], [0]])


def test_the_distance_is_float32_under_autocast():
    words, patches, mask = bags()
    with torch.autocast("cpu", torch.bfloat16):
        found = transport_distance(words.float(), patches.float(), mask)
    close(found, transport_distance(words, patches, mask).float(), atol=1e-5)


def test_junk_in_the_padding_has_no_influence_on_distance_or_gradient():
    words, patches, mask = bags()
    grads = []
    for junk in (0.0, torch.nan, torch.inf, 1e30):
        w, p = words.masked_fill(~mask[..., None], junk).requires_grad_(), patches.clone().requires_grad_()
        distance = transport_distance(w, p, mask)
        assert distance[3] == 0
        grads.append(torch.autograd.grad(distance.sum(), (w, p)))
        assert (grads[-1][0][~mask] == 0).all() and (grads[-1][1][3] == 0).all()
        for x, y in zip(grads[-1], grads[0]):
            close(x, y)


def test_a_constant_added_to_the_costs_of_a_patch_changes_nothing():
    words, patches, mask = bags()
    cost = 1 - similarity(words, patches)
    close(ipot(cost + draw(4, 1, 9), mask), ipot(cost, mask), atol=1e-10)


@pytest.mark.parametrize("factor", [-1e4, 1e4])
def test_plans_of_large_costs_are_plans(factor):
    words, patches, mask = bags()
    plan = ipot(factor * (1 - similarity(words, patches)), mask, iterations=200)
    close(plan.sum((1, 2)), torch.tensor([1.0, 1, 1, 0], dtype=torch.float64), atol=1e-6)
    assert (plan >= 0).all() and not plan.requires_grad


# matching


def hard_rows(rows=4000, columns=256):
    g = torch.Generator().manual_seed(1)
    s = torch.randn(rows, columns, generator=g).tanh()
    excluded = torch.rand(rows, columns, generator=g) < torch.rand(rows, 1, generator=g)
    excluded[::3, -40:] = True  # nothing to draw at the end, where rounding would end up
    excluded[1::3, 1:] = True
    soft = torch.rand(rows, columns, generator=g).round(decimals=1)
    return s, excluded, soft


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, 1 - 2**-23, 1 - 2**-24, None])
@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1e3])
def test_what_is_excluded_is_never_drawn(u, temperature):
    s, excluded, soft = hard_rows()
    noise = addressed_noise(torch.arange(len(s)), 1, stream=2)[:, 0] if u is None else torch.full((len(s),), u)
    for labels in (None, soft):
        index, found = draw_negatives(s, noise, temperature=temperature, excluded=excluded, soft_labels=labels)
        possible = ~excluded if labels is None else ~excluded & (labels < 1)
        assert torch.equal(found, possible.any(1))
        assert possible.gather(1, index[:, None])[found].all() and found.sum() > 2000


def test_a_drawn_negative_does_not_depend_on_the_batch_and_has_no_gradient():
    s, excluded, soft = (x[:8] for x in hard_rows())
    noise = addressed_noise(torch.arange(8), 1, stream=2)[:, 0]
    options = dict(temperature=torch.tensor(0.1, requires_grad=True))
    whole, _ = draw_negatives(s.requires_grad_(), noise, excluded=excluded, soft_labels=soft, **options)
    part, _ = draw_negatives(s[5:6], noise[5:6], excluded=excluded[5:6], soft_labels=soft[5:6], **options)
    assert whole[5] == part[0]


def test_the_order_of_studies_does_not_change_how_often_each_is_drawn():
    s, excluded, soft = (x[:1, :6].expand(20000, 6) for x in hard_rows())
    excluded, order = torch.zeros_like(excluded), torch.tensor([3, 1, 5, 0, 4, 2])
    noise = addressed_noise(torch.arange(20000), 1, stream=2)[:, 0]
    a, _ = draw_negatives(s, noise, temperature=0.5, excluded=excluded, soft_labels=soft)
    b, _ = draw_negatives(s[:, order], noise, temperature=0.5, excluded=excluded, soft_labels=soft[:, order])
    p, q = a.bincount(minlength=6) / 20000, order[b].bincount(minlength=6) / 20000
    weight = (s[0] / 0.5).exp() * (1 - soft[0])
    for found in (p, q):
        close(found, weight / weight.sum(), atol=0.015)


def test_gradients_of_matching():
    logits = draw(6, 2).mul(10).requires_grad_()
    matched, counted = torch.tensor([1, 0, 1, 0, 0, 1]).bool(), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    assert torch.autograd.gradcheck(lambda x: matching_loss(x, matched, counted), logits)
    grad = torch.autograd.grad(matching_loss(logits, matched, counted), logits)[0]
    assert ((grad != 0).any(1) == counted).all()


def test_keys_of_long_texts():
    ids = torch.randint(30000, (2000, 512), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[torch.arange(2000), torch.arange(2000) % 512] += 1  # one token of each
    everything = torch.ones_like(ids)
    keys = torch.cat([text_keys(ids, everything), text_keys(changed, everything)])
    assert len(keys.unique()) == 4000
    longer = [torch.nn.functional.pad(x, (0, 64), value=v) for x, v in ((ids, 9), (everything, 0))]
    assert torch.equal(text_keys(*longer), keys[:2000])


def test_nothing_waits_for_numbers():
    "Fake tensors have no numbers: reading one, which would wait for the GPU, is an error"
    with FakeTensorMode():
        a, b, tau = torch.randn(6, 5), torch.randn(6, 5), torch.ones(())
        ids, mask = torch.ones(6, 7, dtype=torch.long), torch.ones(6, 7, dtype=torch.bool)
        patches, words = torch.randn(6, 9, 5), torch.randn(6, 7, 5)
        labels = soft_labels(similarity(a, b), scale=tau)
        excluded = text_keys(ids, mask)[:, None] == text_keys(ids, mask)
        noise = addressed_noise(ids[:, 0], 1, stream=2)[:, 0]
        draw_negatives(similarity(a, b), noise, temperature=tau, excluded=excluded, soft_labels=labels)
        soft_alignment(a, b, (labels, labels), temperature=tau)
        transport_distance(words, patches, mask, torch.ones(6, 9, dtype=torch.bool))
        matching_loss(a[:, :2], mask[:, 0], mask[:, 1])
        with pytest.raises(Exception, match="data-dependent|DataDependent|_local_scalar_dense"):
            noise.sum().item()
