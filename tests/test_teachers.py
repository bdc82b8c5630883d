"Teachers at the edges: odd images and texts, models of other kinds, broken files; open_clip where it is installed"

import json
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor
from medvlp.data.tokens import train_tokenizer
from medvlp.encoders.teachers import load_teacher
from medvlp.project.config import ConfigError
from small import write_clip

LAYER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(image_size=32, patch_size=8) | LAYER


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["no pleural effusion is seen", "a large pleural effusion on the left"], 60, 1)


@pytest.fixture(scope="module")
def clip(tokenizer, tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), tokenizer)


def grey(*shape, dtype=np.uint8):
    return Image.fromarray(np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype))


def test_images_of_any_kind_and_iterators(clip):
    teacher, images = load_teacher(str(clip)), [grey(1, 1), grey(3, 500), grey(40, 30, dtype=np.uint16)]
    images += [grey(32, 32), grey(32, 32).convert("RGB"), grey(32, 32).convert("RGBA")]
    a, b = teacher.embed(iter(images), (text for text in ["left"] * 3), batch_size=4)
    assert a.shape == (6, 8) and b.shape == (3, 8) and a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a[3:], a[3].expand(3, -1))
    assert a.isfinite().all() and not a.requires_grad
    (a.requires_grad_() @ b.T).sum().backward()  # no inference tensors


def test_only_what_the_model_reads_counts(clip):
    teacher = load_teacher(clip.as_posix())
    long = "a large effusion on the left " * 50
    _, b = teacher.embed([grey(32, 32)], [long, long + "no effusion", "left", "left" + " " * 500, "\u4e2d\u2603"])
    assert torch.equal(b[0], b[1]) and torch.equal(b[2], b[3]) and b.isfinite().all()
    assert not torch.equal(b[0], b[2])


def test_a_teacher_of_another_family(tokenizer, tmp_path):
    "SigLIP pools the last of its tokens, so texts have to be padded to full length"
    torch.manual_seed(0)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12, projection_size=16) | LAYER
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).eval()
    model.save_pretrained(tmp_path)
    SiglipProcessor(SiglipImageProcessor(size=dict(height=32, width=32)), tokenizer).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    a, b = teacher.embed([grey(50, 20)], ["left", "no effusion"])
    ids = tokenizer(["left", "no effusion"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        by_hand = model.get_text_features(ids.input_ids, attention_mask=ids.attention_mask).pooler_output
    torch.testing.assert_close(b, F.normalize(by_hand, dim=1))
    assert a.shape == (1, 16) and teacher.scale == pytest.approx(model.logit_scale.exp().item())


def damage(folder, what):
    if what == "weights":
        (folder / "model.safetensors").write_bytes(b"junk")
    elif what == "config":
        (folder / "config.json").write_text("{")
    elif what == "code":
        (folder / "config.json").write_text('{"model_type": "medclip", "auto_map": {"AutoModel": "model.MedCLIP"}}')
    else:
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize("what", ["weights", "config", "code", "processor"])
def test_a_broken_folder_is_one_line(clip, tmp_path, what):
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path, what)
    with pytest.raises(ConfigError) as e:
        load_teacher(str(tmp_path))
    assert "\n" not in str(e.value) and str(e.value).startswith(f"teacher '{tmp_path}': ")
    assert "Give the name of a CLIP-like model" in str(e.value)


# open_clip


def save_open_clip(folder, weights="open_clip_model.safetensors"):
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vision = dict(image_size=32, layers=1, width=16, head_width=8, patch_size=8)
    config = dict(embed_dim=8, vision_cfg=vision)
    config["text_cfg"] = dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1)
    preprocessing = dict(mean=[0.5] * 3, std=[0.25] * 3)
    text = json.dumps(dict(model_cfg=config, preprocess_cfg=preprocessing))
    (folder / "open_clip_config.json").write_text(text)
    model = CLIP(**config).eval()
    save = save_file if weights.endswith("safetensors") else torch.save
    save({name: x.contiguous() for name, x in model.state_dict().items()}, folder / weights)
    return model


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_from_a_folder(tmp_path, weights):
    open_clip = pytest.importorskip("open_clip", reason="the extra teachers is not installed")
    model, image = save_open_clip(tmp_path, weights), grey(32, 32)
    teacher = load_teacher(f"local-dir:{tmp_path}")
    texts = ["left", "a large effusion " * 20, ""]
    a, b = teacher.embed([image, grey(100, 64)], texts, batch_size=1)
    pixels = (torch.from_numpy(np.array(image)).expand(1, 3, -1, -1) / 255 - 0.5) / 0.25
    with torch.no_grad():
        ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
        torch.testing.assert_close(a[:1], F.normalize(model.encode_image(pixels), dim=1))
        torch.testing.assert_close(b, F.normalize(model.encode_text(ids), dim=1))
    assert ids.shape == (3, 12) and teacher.scale == pytest.approx(1 / 0.07)


class Code:
    "What a malicious pickle holds"

    def __reduce__(self):
        return pytest.fail, ("code ran",)


def test_open_clip_runs_no_code_and_says_what_is_missing(tmp_path):
    pytest.importorskip("open_clip", reason="the extra teachers is not installed")
    with pytest.raises(ConfigError, match="config file missing.* Give the name of a CLIP-like model"):
        load_teacher(f"local-dir:{tmp_path}")
    save_open_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="could not be loaded. Give the name"):
        load_teacher(f"local-dir:{tmp_path}")
    torch.save(dict(weights=Code()), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="a pickle that can run code is not read"):
        load_teacher(f"local-dir:{tmp_path}")
