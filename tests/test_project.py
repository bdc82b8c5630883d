"The project keeps its own rules"

import shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent


def test_notebooks_are_clean_and_the_package_is_in_step(tmp_path):
    for name in ("nbs", "medvlp"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True, capture_output=True)
    for path in sorted((tmp_path / "nbs").rglob("*.ipynb")):
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), (
            f"{path.relative_to(tmp_path)} is not clean: run make export"
        )
    ours = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "medvlp").rglob("*.py")}
    made = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "medvlp").rglob("*.py")}
    assert ours.keys() == made.keys()
    for path in ours:
        assert ours[path] == made[path], f"{path} is not in step with its notebook: run make export"


@pytest.mark.parametrize(
    "params", sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")])
)
def test_params_and_presets_fit_the_stages(params):
    done = subprocess.run(
        [sys.executable, "-m", "medvlp.project.stage", "--check", "--params", params],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_loss_costs_no_more_than_torch():
    modules = sorted(
        f"medvlp.losses.{p.stem}" for p in (ROOT / "medvlp" / "losses").glob("*.py") if p.stem != "__init__"
    )
    assert "medvlp.losses.contrastive" in modules
    code = f"import sys, {', '.join(modules)}; print([m for m in ('transformers', 'timm', 'matplotlib', 'datasets', 'pandas', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_data_flow_one_way():
    "A module imports from lower-numbered folders only"
    order = ["data", "encoders", "losses", "fusion", "generation", "methods", "training", "tasks", "figures"]
    from medvlp.project.stage import imported

    for path in (ROOT / "medvlp").rglob("*.py"):
        folder = path.parent.name
        if folder not in order or path.name == "__init__.py":
            continue
        used = {
            name.split(".")[1] for name in imported(path.read_text(), f"medvlp.{folder}") if name.startswith("medvlp.")
        } & set(order)
        assert all(order.index(u) <= order.index(folder) for u in used), f"{path.name} of {folder} imports from {used}"
