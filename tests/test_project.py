"The project keeps its own rules"

import shutil
import subprocess
import sys
from pathlib import Path

from medvlp.project.code import imports_of

ROOT = Path(__file__).parent.parent
ORDER = ["project", "data", "phantom", "encoders", "losses", "fusion", "generation", "methods", "training", "tasks"]
ORDER += ["figures", "tables", "benchmarks"]


def test_notebooks_are_clean_and_the_package_is_in_step(tmp_path):
    unused = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "medvlp"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unused)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True, capture_output=True)
    for path in sorted((tmp_path / "nbs").rglob("*.ipynb")):
        name = path.relative_to(tmp_path)
        assert path.read_bytes() == (ROOT / name).read_bytes(), f"{name} is not clean: run make export"
    ours = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "medvlp").rglob("*.py")}
    made = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "medvlp").rglob("*.py")}
    assert ours.keys() == made.keys()
    for path in ours:
        assert ours[path] == made[path], f"{path} is not in step with its notebook: run make export"


def test_a_loss_costs_no_more_than_torch():
    modules = sorted(f"medvlp.losses.{p.stem}" for p in (ROOT / "medvlp/losses").glob("*.py") if p.stem != "__init__")
    assert "medvlp.losses.contrastive" in modules
    others = ("transformers", "timm", "matplotlib", "datasets", "pandas", "sklearn")
    code = f"import sys, {', '.join(modules)}; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_data_flow_one_way():
    "A module imports from its own folder and from earlier ones"
    for path in (ROOT / "medvlp").rglob("*.py"):
        parts = path.relative_to(ROOT / "medvlp").with_suffix("").parts
        if parts[0] not in ORDER or path.name == "__init__.py":
            continue
        package = ".".join(("medvlp", *parts[:-1]))
        names = {name for name in imports_of(path.read_text(), package) if name.startswith("medvlp.")}
        used = {name.split(".")[1] for name in names} & set(ORDER)
        later = [name for name in used if ORDER.index(name) > ORDER.index(parts[0])]
        assert not later, f"{path.relative_to(ROOT)} imports from {later}"


def test_readme_is_short_and_its_tables_are_those_of_the_index():
    import nbformat

    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    cells = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells
    shown = [output.data["text/markdown"] for cell in cells for output in cell.get("outputs", ())]
    rows = [row for text in shown for row in text.splitlines() if row.startswith("|")]
    assert rows and not set(rows) - set(lines), "run make readme"


def test_every_stage_notebook_has_its_parameters_cell():
    import nbformat

    for path in sorted((ROOT / "nbs/stages").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        assert len(tagged) == 1, path
        assert not any(cell.get("outputs") for cell in cells), f"{path} has saved outputs: run make export"
