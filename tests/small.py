"A study set and a training run small enough for tests. As a script: FOLDER RUN METHOD MINUTES DEVICE"

import multiprocessing, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image

LEVELS = ["black", "dark", "grey", "light", "pale", "bright", "white", "clear"]


def write_studies(folder, n=48):
    "Grey squares whose reports name the level; 8 levels, 3 splits, one label"
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        name = f"images/{i:03}.png"
        Image.fromarray((30 * (i % 8) + rng.integers(0, 20, (48, 56))).astype(np.uint8)).save(folder / name)
        rows.append(
            dict(
                file_name=name,
                study_id=f"s{i}",
                patient_id=f"p{i}",
                view="PA",
                findings=f"A {LEVELS[i % 8]} field is seen.",
                impression=f"Field {LEVELS[i % 8]}.",
                split="train" if i < n * 2 // 3 else "val" if i < n * 5 // 6 else "test",
                label_bright=int(i % 8 > 3),
            )
        )
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


def prepare(source, output):
    from medvlp.data.prepare import DataOptions
    from medvlp.data.prepare import prepare as prepare_set

    prepare_set(DataOptions(folder=str(source), image_size=40), output)


def write_clip(folder, tokenizer):
    "A CLIP with random weights, and its preprocessing, as a model is on the hub"
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    layer = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=0)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12) | ids | layer
    config = CLIPConfig(text_config=text, vision_config=dict(image_size=32, patch_size=8) | layer, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


RESNET = dict(name="resnet10t", image_size=32)
VIT = dict(
    name="vit_tiny_patch16_224",
    image_size=32,
    options=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2),
)
PVT = dict(
    name="pvt_v2_b0",
    image_size=32,
    patch_stride=16,
    prune=True,
    adapatch=[2, 3],
    options=dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1]),
)
BERT = dict(options=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
MPMA = dict(rows=16, heads=2, slots=4, decoder_dim=32, decoder_heads=2, decoder_layers=1)
AMF = dict(fusion_dim=24, heads=2, layers=1)
OPTIONS = {"mgca": dict(n_prototypes=4), "mpma": MPMA, "amf": AMF, "amf-fused": AMF | dict(phase="fuse")}


def train(folder, run, method="convirt", minutes=5.0, device="cpu", seed=0, image=None, precision="fp32", **changes):
    "Pre-train on FOLDER/prepared into FOLDER/RUN, with a checkpoint every few `minutes`; call again to resume"
    from transformers import set_seed
    from medvlp.data.prepare import load_studies
    from medvlp.data.tokens import build_tokenizer
    from medvlp.methods.base import build_method
    from medvlp.project.config import ComputeOptions
    from medvlp.training.pretrain import PretrainOptions, pretrain

    torch.set_num_threads(1)
    folder = Path(folder)
    studies = {s: load_studies(folder / "prepared", s, ["findings"]) for s in ("train", "val")}
    tokenizer = build_tokenizer(studies["train"], ["findings"], 100)
    workers = 0
    if device == "cuda":
        workers = 1
        multiprocessing.set_start_method("fork", force=True)  # a fork server's child would import all for each loader
    image, own = image or dict(mpma=VIT, adamatch=PVT).get(method, RESNET), OPTIONS.get(method, {})
    method = method.removesuffix("-fused")
    set_seed(seed)
    model = build_method(method, image, BERT, len(tokenizer), dim=16, **own)
    options = dict(
        method=method,
        epochs=10.0,
        batch_size=8,
        sections=["findings"],
        augment=dict(degrees=5.0, contrast=0.2),
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup=0.1,
        max_grad_norm=1.0,
        checkpoint_steps=3,
        log_steps=1,
        optimizer="lamb" if method == "adamatch" else "adamw",
    )
    pretrain(
        model,
        tokenizer,
        studies,
        PretrainOptions(**options | changes),
        seed=seed,
        compute=ComputeOptions(device=device, precision=precision, checkpoint_minutes=float(minutes), workers=workers),
        output=folder / run / "model",
        curves=folder / run / "curves",
        checkpoints=folder / run / "checkpoints",
    )


def kill_at_first_checkpoint(folder, *command):
    "Start Python, and kill it when a checkpoint is complete, in the middle of a training"
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list(folder.rglob("complete")):
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((folder / "checkpoints").iterdir()), "it had finished before it was killed"


def assert_equal_models(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


if __name__ == "__main__":
    train(*sys.argv[1:])
