"Two processes give the loss and the gradient of one process on the whole batch"

import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from medvlp.encoders.masked import addressed_noise
from medvlp.losses.contrastive import info_nce
from medvlp.losses.gla import global_alignment, local_alignment
from medvlp.losses.groups import ThresholdGate, group, group_alignment
from medvlp.losses.itm import draw_negatives, matching_loss, text_keys
from medvlp.losses.matching import patch_word_losses, patch_word_scores
from medvlp.losses.ops import both_ways, gather, gather_tokens, gathered_scores, similarity
from medvlp.losses.pairwise import region_word, region_word_scores
from medvlp.losses.prototypes import Prototypes, sinkhorn
from medvlp.losses.soft import soft_alignment, soft_labels
from medvlp.losses.tokenwise import CrossAttention, cross_token_alignment
from medvlp.losses.transport import transport_distance
from medvlp.methods.base import build_method


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Heads(nn.Module):
    "Two projections, and a batch of eight studies for them"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList([nn.Linear(5, 4), nn.Linear(6, 4)])

    def batch(self):
        return draw(8, 5), draw(8, 6)


class Contrastive(Heads):
    "Negatives from all processes: each finds the loss of the whole batch"

    def forward(self, images, texts):
        return info_nce(gather(self.heads[0](images)), gather(self.heads[1](texts)), temperature=0.2)


class Prototypical(Heads):
    "Codes balanced over all processes; each process finds the loss of its own studies"

    def __init__(self):
        super().__init__()
        self.prototypes = Prototypes(3, 4)

    def forward(self, images, texts):
        return self.prototypes(self.heads[0](images), self.heads[1](texts))


class Tokens(Heads):
    "Patches and words; a process pads its reports no further than its longest, here 7 words and 6"

    def batch(self):
        return draw(8, 9, 5), draw(8, 7, 6), torch.arange(7) < torch.tensor([7, 1, 3, 5, 2, 4, 6, 3])[:, None]

    def forward(self, patches, words, mask):
        longest = mask.sum(1).max()
        return self.loss(self.heads[0](patches), self.heads[1](words[:, :longest]), mask[:, :longest])


class Tokenwise(Tokens):
    "Every study by itself"

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList([CrossAttention(4), CrossAttention(4)])

    def loss(self, patches, words, mask):
        return cross_token_alignment(
            patches, words, mask, words_to_patches=self.attention[0], patches_to_words=self.attention[1]
        )


class Regional(Tokens):
    "Every image against every report: each process scores its own reports, and finds the loss of the whole batch"

    def loss(self, patches, words, mask):
        return sum(both_ways(gathered_scores(region_word_scores, patches, words, mask), 0.1))


class Grouped(Tokens):
    "Every study by itself, except for the thresholds, which are common to all processes"

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList([CrossAttention(4), CrossAttention(4)])
        self.gates = nn.ModuleList([ThresholdGate(0.5), ThresholdGate(0.5)])

    def loss(self, patches, words, mask):
        words = words.masked_fill(~mask[..., None], 0)
        similarity = words @ patches.mT
        tgv = group(similarity, self.gates[0](similarity, rows=mask)) @ patches
        pgl = group(similarity.mT, self.gates[1](similarity.mT, mask=mask), mask) @ words
        return group_alignment(patches, words, pgl, tgv, mask, temperature=0.3) + cross_token_alignment(
            pgl, tgv, mask, words_to_patches=self.attention[0], patches_to_words=self.attention[1], temperature=0.1
        )


class Aligned(Tokens):
    "Every image with every report, by rows and by words: each process finds the loss of the whole batch"

    def loss(self, patches, words, mask):
        return global_alignment(patches[:, :5], words, mask, temperature=0.2) + local_alignment(patches, words, mask)


class Matched(Tokens):
    "Patches and words that choose each other, in every image with every report"

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.2))

    def loss(self, patches, words, mask):
        return sum(patch_word_losses(gathered_scores(patch_word_scores, patches, words, mask), self.temperature))


class Mined(Tokens):
    "Negatives by address, from all processes; reports 0, 5 and 6 have the same text, and report 1 has no words"

    def __init__(self):
        super().__init__()
        self.match = nn.Linear(4, 2)
        self.register_buffer("drawn", torch.zeros(8, 4))

    def batch(self):
        ids = torch.tensor([5, 9, 6, 7, 8, 5, 5, 4])[:, None].expand(8, 7)
        return *super().batch(), ids, torch.arange(100, 108)

    def forward(self, patches, words, mask, ids, addresses):
        mask = mask & (ids != 9)  # one report has no words
        longest = mask.sum(1).max()
        patches, words, mask = self.heads[0](patches), self.heads[1](words[:, :longest]), mask[:, :longest]
        images, texts = patches.mean(1), self.pooled(words, mask)
        whole, keys = (gather(images), gather(texts)), text_keys(ids[:, :2], torch.ones_like(ids[:, :2]))
        s = similarity(*whole).detach()
        labels = soft_labels(s, scale=5), soft_labels(s.T, scale=5)
        options = dict(temperature=0.5, excluded=keys[:, None] == gather(keys))
        place = (gather(addresses)[None] == addresses[:, None]).double()  # rows of this process
        noise = addressed_noise(addresses, 2, stream=2).T
        report, found = draw_negatives(place @ s, noise[0], soft_labels=place @ labels[0], **options)
        image, found_too = draw_negatives(place @ s.T, noise[1], soft_labels=place @ labels[1], **options)
        self.drawn.copy_(gather(torch.stack([report, found, image, found_too], 1)))

        all_words, all_mask = gather_tokens(words, mask)
        negative = self.pooled(all_words[report], all_mask[report])
        pairs = torch.cat([images * texts, images * negative, gather(patches)[image].mean(1) * texts])
        matched = torch.arange(3).repeat_interleave(len(images)) == 0
        counted = torch.cat([mask.any(1), found & mask.any(1), found_too])
        matching = matching_loss(self.match(pairs), matched, counted)
        transport = transport_distance(words, patches, mask).mean()
        return matching + transport + soft_alignment(*whole, labels, temperature=0.2)

    def pooled(self, words, mask):
        return words.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Whole(nn.Module):
    "A whole method: encoders, saliency, heads and all terms; batch norms evaluate, as syncing them needs GPUs"

    options, kind = {}, None
    image = dict(
        name="vit_tiny_patch16_224",
        image_size=32,
        saliency=True,
        options=dict(embed_dim=32, num_heads=2, depth=1),
    )

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        text = dict(saliency=True, options=sizes | dropout)
        self.method = build_method(
            self.kind or type(self).__name__.lower(), self.image, text, vocab_size=50, dim=8, **self.options
        )
        self.method.epoch = 1.0  # prototypes are trained from here on

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.eval()
        return self

    def batch(self):
        length, place = torch.tensor([9, 4, 3, 6, 5, 4, 3, 7])[:, None], torch.arange(9)
        ids = torch.randint(5, 50, (8, 9), generator=torch.Generator().manual_seed(2))
        return (
            draw(8, 1, 32, 32).sigmoid(),
            ids,
            (place < length).long(),
            torch.where((place > 0) & (place < length - 1), (place - 1) // 2, -1),
        )

    def forward(self, images, input_ids, attention_mask, word_ids):
        return self.method(images, input_ids, attention_mask, word_ids)["loss"]


class Mgca(Whole):
    options = dict(n_prototypes=5)


class Gloria(Whole):
    pass


class Sparc(Whole):
    pass


class Aga(Whole):
    options = dict(gamma=0.5)


class Mpma(Whole):
    "Studies keep their masks, whichever process has them; the processes have unequal numbers of masked tokens"

    options = dict(rows=5, heads=2, slots=3, decoder_dim=16, decoder_heads=2, decoder_layers=1)

    def batch(self):
        return *super().batch(), torch.arange(100, 108)

    def forward(self, *batch):
        return self.method(*batch)["loss"]


class Adamatch(Whole):
    image = dict(
        name="pvt_v2_b0",
        image_size=32,
        patch_stride=16,
        prune=True,
        adapatch=[2, 3],
        options=dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1]),
    )


class Amf(Whole):
    "Two views of each study; the average of the weights moves once"

    options = dict(fusion_dim=12, heads=2, layers=1, positive=3.0)
    image = Whole.image | dict(saliency=False)

    def batch(self):
        images, *tokens = super().batch()
        return images, *tokens, torch.arange(100, 108), images.flip(3), *(x.flip(0) for x in tokens)

    def forward(self, images, ids, attention, words, addresses, *view):
        names = ("view_images", "view_input_ids", "view_attention_mask", "view_word_ids")
        return self.method(images, ids, attention, words, addresses, **dict(zip(names, view)))["loss"]


class Fused(Amf):
    "The second pre-training: negatives from the other process"

    options, kind = Amf.options | dict(phase="fuse"), "amf"


LOSSES = [
    Contrastive,
    Prototypical,
    Tokenwise,
    Regional,
    Grouped,
    Aligned,
    Matched,
    Mined,
    Mgca,
    Gloria,
    Sparc,
    Aga,
    Mpma,
    Adamatch,
    Amf,
    Fused,
]


def scores():
    return draw(8, 3).tanh()


def worker(rank, world, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {}
    for loss in LOSSES:
        model = nn.parallel.DistributedDataParallel(loss().double().train())
        value = model(*(x.chunk(world)[rank] for x in model.module.batch()))
        value.backward()
        found[loss.__name__] = (
            value.item(),
            [p.grad.tolist() for p in model.parameters() if p.requires_grad],
            [b.tolist() for b in model.module.buffers()],
        )
    found["codes"] = sinkhorn(scores().split([5, 3])[rank]).tolist()
    results[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What each of two processes found"
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (2, tmp_path_factory.mktemp("gloo") / "rendezvous", results), nprocs=2)
        assert set(results.keys()) == {0, 1}
        return [results[0], results[1]]


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_equal_one(processes, loss):
    alone = loss().double().train()
    value = alone(*alone.batch())
    value.backward()
    values, grads, buffers = zip(*(found[loss.__name__] for found in processes))
    assert abs(sum(values) / 2 - value.item()) < 1e-12
    if loss in (Contrastive, Regional, Aligned, Matched):
        assert abs(values[0] - values[1]) < 1e-12
    for found in grads:
        for g, p in zip(found, (p for p in alone.parameters() if p.requires_grad), strict=True):
            torch.testing.assert_close(torch.tensor(g, dtype=torch.float64), p.grad, atol=1e-12, rtol=0)
    for found in buffers:
        for b, own in zip(found, alone.buffers(), strict=True):
            torch.testing.assert_close(torch.tensor(b, dtype=torch.float64), own, atol=1e-12, rtol=0, check_dtype=False)


def test_gathered_scores_give_the_loss_of_region_word():
    alone = Regional().double()
    patches, words, mask = alone.batch()
    patches, words = alone.heads[0](patches), alone.heads[1](words)
    torch.testing.assert_close(
        alone.loss(patches, words, mask), sum(region_word(patches, words, mask)), atol=1e-12, rtol=0
    )


def test_a_gate_averages_over_all_processes(processes):
    "The threshold is not what one process's own studies would give"
    alone = Grouped().double()
    patches, words, mask = (x[:4] for x in alone.batch())
    alone(patches, words, mask)
    assert abs(alone.gates[0].sigma.item() - processes[0]["Grouped"][2][0]) > 1e-3


def test_codes_of_two_processes_with_unequal_numbers_of_studies(processes):
    codes = torch.tensor(processes[0]["codes"] + processes[1]["codes"], dtype=torch.float64)
    torch.testing.assert_close(codes, sinkhorn(scores()), atol=1e-12, rtol=0)
    assert not torch.allclose(codes[:5], sinkhorn(scores()[:5]), atol=1e-3)


def test_negatives_come_from_the_other_process_and_never_have_the_same_text():
    alone = Mined().double()
    alone(*alone.batch())
    report, found, image, found_too = alone.drawn.long().T
    assert found.all() and found_too.all()
    assert (report // 4 != torch.arange(8) // 4).any() and (image // 4 != torch.arange(8) // 4).any()
    keys = alone.batch()[3][:, 0]
    assert (keys[report] != keys).all() and (keys[image] != keys).all()
