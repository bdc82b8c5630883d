"The phantom's command line: the same bytes from every process, and a set that prepare accepts"

import os, subprocess, sys
import pytest
from medvlp.data.prepare import DataOptions, prepare_studies
from medvlp.data.sources.base import read_source


def draw(folder, *options, hash_seed="0"):
    command = [sys.executable, "-m", "medvlp.phantom.dataset", folder, "--seed", "3", "--size", "64", *options]
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    assert draw(folder, "--studies", "12", hash_seed="1").returncode == 0
    return folder


def read(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_process_draws_the_same_bytes(folder, tmp_path):
    assert draw(tmp_path, "--studies", "12", hash_seed="2").returncode == 0
    files = read(folder)
    assert len(files) == 2 + 2 * 12 and files == read(tmp_path)


def test_prepare_accepts_the_set(folder):
    options = DataOptions(folder=str(folder), image_size=64)
    studies, quarantine = prepare_studies(read_source("imagefolder", options.folder), options)
    assert len(studies) == 12 and len(quarantine) == 0
    assert len(studies[0]["labels"]) == 17 and all(m.size == (64, 64) for m in studies["mask"])
    assert any(studies["questions"])


def test_an_unknown_hospital_is_refused_before_anything_is_written(tmp_path):
    out = draw(tmp_path / "none", "--hospitals", "A,C")
    assert out.returncode != 0 and "hospitals are A, C; give A, B or both" in out.stderr
    assert not (tmp_path / "none").exists()
