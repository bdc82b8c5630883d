"The phantom's command line: the same bytes from every process, and a set that prepare accepts"

import os, subprocess, sys
from medvlp.data.prepare import DataOptions, prepare_studies
from medvlp.data.sources.base import read_source


def draw(folder, hash_seed):
    command = [sys.executable, "-m", "medvlp.phantom.dataset", folder, "--studies", "12", "--seed", "3", "--size", "64"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_draw_the_same_bytes_and_prepare_reads_them(tmp_path):
    one, two = (draw(tmp_path / name, name) for name in ("1", "2"))
    assert len(one) == 2 + 2 * 12 and one == two
    options = DataOptions(folder=str(tmp_path / "1"), image_size=64)
    studies, quarantine = prepare_studies(read_source("imagefolder", options.folder), options)
    assert len(studies) == 12 and len(quarantine) == 0
    assert len(studies[0]["labels"]) == 17 and all(m.size == (64, 64) for m in studies["mask"])
    assert any(questions for questions in studies["questions"])
