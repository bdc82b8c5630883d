"""A language model of reports and images: what it may write, resuming, loading, bad input.

As a script: train or draw in FOLDER, to be killed.
"""

import json, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from medvlp.generation.bidirectional import Bidirectional, Decoding, LanguageModelOptions, build_bidirectional
from medvlp.generation.instructions import HEADINGS, InstructionPairs, PairCollate, train_bpe
from medvlp.project.config import ComputeOptions, ConfigError
from medvlp.training.downstream import EarlyStopping
from medvlp.training.language import LanguageOptions, Pairs, train_language

CPU = ComputeOptions(device="cpu", precision="fp32")
SIZES = dict(name="", hidden_size=16, layers=1, heads=2, bpe_vocab=340, context=256)
WORDS = "no small large left right effusion opacity heart lung clear normal enlarged".split()
WAYS = dict(
    greedy=Decoding(max_tokens=12),
    beams=Decoding(beams=4, max_tokens=12),
    no_repeat=Decoding(no_repeat=2, max_tokens=12),
    sampling=Decoding(temperature=1.5, seed=1, max_tokens=12),
    nucleus=Decoding(temperature=1.0, top_k=50, top_p=0.9, max_tokens=12),
)


def studies(n, seed=0, longest=9):
    draw = np.random.default_rng(seed)
    reports = [" ".join(draw.choice(WORDS, draw.integers(1, longest))) for _ in range(n)]
    keywords = [list(draw.choice(WORDS, draw.integers(0, 4))) for _ in range(n)]
    keypatches = [torch.from_numpy(draw.integers(0, 8, (draw.integers(0, 3), 2))) for _ in range(n)]
    return Pairs(torch.from_numpy(draw.integers(0, 8, (n, 6))), reports, keywords, keypatches)


def untrained(**changes):
    torch.manual_seed(0)
    options = LanguageModelOptions(**SIZES | changes)
    return build_bidirectional(options, studies(60).reports, n_codes=8, grid=(2, 3)).eval()


@pytest.fixture(scope="module")
def model():
    return untrained()


def train(folder, seed=0, **changes):
    torch.set_num_threads(1)
    options = LanguageOptions(**SIZES | dict(epochs=3, batch_size=8, learning_rate=1e-2, unconditional=0.2) | changes)
    how = dict(n_codes=8, grid=(2, 3), seed=seed, compute=CPU, checkpoints=folder / "checkpoints")
    return train_language(studies(18), studies(5, 1), options, **how)


def assert_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# decoding


@pytest.mark.parametrize("way", WAYS)
def test_thousand_random_prompts(model, way, monkeypatch):
    "Six codes in each image, and nothing but text in each report, of a model that would rather write anything"
    written, generate = [], Bidirectional.generate
    monkeypatch.setattr(Bidirectional, "generate", lambda *args: written.append(generate(*args)) or written[-1])
    s, to = studies(1000, 2), model.instructions
    how = dict(decoding=WAYS[way], batch_size=250)
    drawn = model.draw_images(s.reports, s.keypatches, **how)
    assert drawn.shape == (1000, 6) and all(x.shape[1] == 6 for x in written)
    codes = torch.cat(written)
    assert codes.min() >= to.text_vocab and codes.max() < to.text_vocab + 8
    written.clear()
    model.write_reports(s.images, s.keywords, **how)
    text = torch.cat([x.flatten() for x in written])
    assert text.max() < len(model.tokenizer)
    phrases = [t for t in model.tokenizer.added_tokens_decoder if t != to.stop]
    assert len(phrases) == 16 and not torch.isin(text, torch.tensor(phrases)).any()


@pytest.mark.parametrize("way", WAYS)
def test_batches_of_different_lengths_equal_one_by_one(model, way):
    s = studies(12, 3, longest=30)
    model = model.double()  # sums in another order must not decide between tokens
    for draw, args in ((model.draw_images, (s.reports, s.keypatches)), (model.write_reports, (s.images, s.keywords))):
        together, alone = (draw(*args, decoding=WAYS[way], batch_size=size) for size in (12, 1))
        assert list(map(str, together)) == list(map(str, alone))
    model.float()


def test_samples_differ_by_seed_and_row(model):
    draw = [model.draw_images([""] * 20, decoding=Decoding(temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert len(draw[0].unique(dim=0)) > 10


def test_each_step_reads_one_token(model, monkeypatch):
    lengths, forward = [], model.language_model.forward
    monkeypatch.setattr(
        model.language_model, "forward", lambda *a, **k: lengths.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    model.draw_images(["no effusion"] * 2)
    assert lengths[0] > 6 and lengths[1:] == [1] * 5


# the loss


def test_padding_does_not_count(model):
    s = studies(6, 4, longest=30)
    pairs = list(InstructionPairs(model.instructions, s.images, s.reports, s.keywords, s.keypatches))
    model = model.double()
    with torch.no_grad():
        losses = model(**PairCollate()(pairs))["losses"]
        alone = torch.cat([model(**PairCollate()([pair]))["losses"] for pair in pairs])
    model.float()
    assert torch.allclose(losses, alone, rtol=0, atol=1e-12)


def test_examples_by_hand(model):
    to = model.instructions
    pairs = InstructionPairs(to, torch.tensor([[1, 2]]), ["no effusion"], [["heart"]], [torch.tensor([[3]])])
    t, (prompt, response) = to.text_vocab, pairs[0]
    ids = to.openings["report"][0] + [t - 2, t + 1, t + 2, t - 1] + to.headings["keywords"]
    assert prompt == ids + to.texts(["heart"])[0] + to.headings["response"]
    assert response == to.texts(["no effusion"])[0] + [to.stop]
    prompt, response = pairs[1]
    ids = to.openings["image"][0] + to.texts(["no effusion"])[0] + to.headings["keypatches"]
    assert prompt == ids + [t - 2, t + 3, t - 1] + to.headings["response"]
    assert response == [t - 2, t + 1, t + 2, t - 1, to.stop]


def test_hints_can_be_left_out():
    plain = untrained(keywords=False, keypatches=False)
    s = studies(3)
    with_hints, without = (
        InstructionPairs(plain.instructions, s.images, s.reports, *h) for h in ((s.keywords, s.keypatches), ())
    )
    assert list(with_hints) == list(without)
    assert "Keywords" not in plain.instructions.show(without[0][0])


# resuming


def crash_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(EarlyStopping, "on_step_end", on_step_end)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_seed_decides_weights(whole, tmp_path):
    assert_equal(train(tmp_path), whole)
    other = train(tmp_path, seed=1).state_dict()
    assert any(not torch.equal(x, other[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize("step", [7, 10])  # of 15, five in an epoch
def test_crashed_training_resumes_to_equal_weights(whole, step, tmp_path, monkeypatch):
    crash_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert list(tmp_path.rglob("complete"))
    monkeypatch.undo()
    assert_equal(train(tmp_path), whole)


def kill(task, folder, sign):
    "Run this file and kill it as soon as there is a sign of work"
    process = subprocess.Popen(
        [sys.executable, __file__, task, folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not sign():
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_training_resumes_to_equal_weights(whole, tmp_path):
    kill("train", tmp_path, lambda: list(tmp_path.rglob("complete")))
    assert list((tmp_path / "checkpoints").iterdir()), "it had finished before it was killed"
    assert_equal(train(tmp_path), whole)


def draw(folder, batch_size=10):
    torch.set_num_threads(1)
    how = dict(decoding=Decoding(temperature=1.0, seed=4), batch_size=batch_size)
    return untrained().draw_images(studies(600, 5).reports, parts=folder / "images.jsonl", **how)


def test_killed_generation_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "images.jsonl"

    def lines():
        return len(file.read_text().splitlines()) if file.is_file() else 0

    kill("draw", tmp_path, lambda: lines() > 5)
    done, calls, generate = lines(), [], Bidirectional.generate
    assert 5 < done < 60
    monkeypatch.setattr(Bidirectional, "generate", lambda *args: calls.append(1) or generate(*args))
    drawn = draw(tmp_path)
    assert 60 - done <= len(calls) <= 62 - done
    assert torch.equal(drawn, draw(tmp_path / "elsewhere"))


def test_parts_of_other_weights_or_decoding_are_not_used(model, tmp_path):
    file, texts = tmp_path / "images.jsonl", ["no effusion"] * 4
    model.draw_images(texts, parts=file)
    other = untrained()
    torch.nn.init.normal_(other.language_model.get_output_embeddings().weight)
    assert torch.equal(other.draw_images(texts, parts=file), other.draw_images(texts))
    greedy = Decoding()
    assert torch.equal(other.draw_images(texts, parts=file, decoding=greedy), other.draw_images(texts, decoding=greedy))


# published models


def publish(folder, kind, rows=0):
    "A folder as of a published model: GPT-2 shares input and output embeddings, Llama does not"
    tokenizer = train_bpe(studies(60).reports, 330)
    common = dict(vocab_size=rows or len(tokenizer), eos_token_id=0, bos_token_id=0, pad_token_id=0)
    if kind == "gpt2":
        config = GPT2Config(**common, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    else:
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        config = LlamaConfig(**common, **sizes, max_position_embeddings=256)
    torch.manual_seed(3)
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("rank", [0, 4])
def test_published_model_is_trained_saved_and_loaded(kind, rank, tmp_path):
    network = publish(tmp_path / kind, kind, rows=400)
    options = dict(name=str(tmp_path / kind), lora_rank=rank, learning_rate=1e-2)
    fresh = LanguageModelOptions(**SIZES | dict(name=options["name"]))
    s, start = studies(3), build_bidirectional(fresh, [""], n_codes=8, grid=(2, 3))
    assert start.config.text_vocab == 402 and start.language_model.get_input_embeddings().num_embeddings == 410
    old = network.get_input_embeddings().weight
    assert torch.equal(start.language_model.get_input_embeddings().weight[:400], old)
    model = train(tmp_path, **options)
    names = dict(model.language_model.named_parameters())
    body = [n for n in names if "mlp" in n]
    trained = [n for n in names if names[n].requires_grad]
    assert bool(set(body) & set(trained)) == (rank == 0)
    assert not torch.equal(
        model.language_model.get_input_embeddings().weight[402:],
        start.language_model.get_input_embeddings().weight[402:],
    )
    model.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    loaded = Bidirectional.from_pretrained(tmp_path / "saved")
    assert_equal(loaded, model)
    assert loaded.write_reports(s.images, s.keywords) == model.write_reports(s.images, s.keywords)
    assert torch.equal(loaded.draw_images(s.reports), model.draw_images(s.reports))


# bad input


def build(**changes):
    return build_bidirectional(LanguageModelOptions(**SIZES | changes), studies(60).reports, n_codes=8, grid=(2, 3))


def test_missing_weights(tmp_path):
    with pytest.raises(ConfigError, match="language.name: .*nowhere: no causal language model .* could be loaded"):
        build(name=str(tmp_path / "nowhere"))


def test_no_room_for_image_tokens(tmp_path):
    publish(tmp_path, "llama")
    with pytest.raises(ConfigError, match="language.text_vocab: 300: image tokens would take numbers of text tokens"):
        build(name=str(tmp_path), text_vocab=300)


def test_tokenizer_without_end(tmp_path):
    publish(tmp_path, "llama")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := tmp_path / name).is_file():
            facts = {k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}
            file.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        build(name=str(tmp_path))


def test_unknown_lora_targets():
    with pytest.raises(ConfigError, match="language.lora_targets: .*Layers of this model: .*query_key_value"):
        build(lora_rank=2, lora_targets=["q_proj"])


def test_report_longer_than_the_context(tmp_path):
    long = Pairs(torch.zeros(3, 6, dtype=torch.long), ["no", "effusion " * 300, "no"])
    options = LanguageOptions(**SIZES)
    with pytest.raises(ConfigError, match="study 1 makes an example of .* context is 256; raise language.context"):
        train_language(long, None, options, n_codes=8, grid=(2, 3), compute=CPU, checkpoints=tmp_path)
    with pytest.raises(ConfigError, match="exceed the model's context of 256"):
        untrained().draw_images(["effusion " * 300])


def test_images_of_another_vqgan(model):
    with pytest.raises(ConfigError, match="the language model knows 0 to 7; use its own VQ-GAN"):
        model.write_reports(torch.tensor([[1, 2, 3, 4, 5, 8]]))


def test_format_in_a_report_is_text(model):
    report = "no" + HEADINGS["response"] + model.tokenizer.eos_token + " effusion"
    ids = model.instructions.texts([report])[0]
    assert model.tokenizer.decode(ids) == report
    assert not set(ids) & set(model.tokenizer.added_tokens_decoder)


if __name__ == "__main__":
    dict(train=train, draw=draw)[sys.argv[1]](Path(sys.argv[2]))
