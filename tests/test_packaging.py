"""The built wheel, installed into a fresh environment elsewhere, holds everything and works from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ("fp8repro", "kernels", "conf", "results", "pyproject.toml", "README.md")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's bin folder, with the wheel in it; dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A plain path: the .pth files inside it, an editable install's among them, are not read.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return python.parent


def test_the_wheel_is_what_is_imported_and_holds_kernels_configs_and_sources(installed: Path, tmp_path: Path) -> None:
    program = """
import json
from importlib.resources import files
import fp8repro, fp8repro.kernels, fp8repro.conf
from fp8repro.paper.reported import paper_figures
print(json.dumps({
    "homes": [module.__file__ for module in (fp8repro, fp8repro.kernels, fp8repro.conf)],
    "native": sorted(entry.name for entry in files("fp8repro.engines.cpu").iterdir()),
    "kernels": sorted(entry.name for entry in files("fp8repro.kernels").iterdir()),
    "figures": len(paper_figures()["figures"]),
}))
"""
    found = json.loads(run(installed / "python", "-c", program, cwd=tmp_path))
    for home in found["homes"]:
        assert Path(home).is_relative_to(installed.parent)
    for name in ("native", "kernels"):
        home = ROOT / "fp8repro" / "engines" / "cpu" if name == "native" else ROOT / "kernels"
        assert {path.name for path in home.iterdir() if path.is_file()} <= set(found[name])
    assert found["figures"] == 5


def test_every_config_of_the_repository_is_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = "import fp8repro.conf; print(fp8repro.conf.__path__[0])"
    conf = Path(run(installed / "python", "-c", program, cwd=tmp_path).strip())
    shipped = {path.relative_to(conf): path.read_text() for path in conf.rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "conf"): path.read_text() for path in (ROOT / "conf").rglob("*.yaml")}


def test_the_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    printed = yaml.safe_load(run(installed / "fp8repro", "train", "--cfg", "job", "model=resnet34", cwd=tmp_path))
    assert (printed["model"]["name"], printed["data"]["name"], printed["precision"]["name"]) == (
        "resnet34",
        "digits",
        "fp8",
    )
    assert "fp8_hybrid" in run(installed / "fp8repro", "--help", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fp8repro").rglob("__init__.py")}
    kernels = (path.parent.relative_to(ROOT).parts for path in (ROOT / "kernels").rglob("__init__.py"))
    found |= {".".join(("fp8repro", *parts)) for parts in kernels}
    found.add("fp8repro.conf")
    assert set(settings["packages"]) == found


def test_constraints_pin_every_dependency_by_name_and_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator, line
        assert version
        assert not set(line) & set("@/; "), line
        pinned[name.lower().replace("_", "-")] = version
    assert len(pinned) == len(lines)
    extras = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *extras["dev"], *extras["fairseq"]):
        name = requirement.split(";")[0].split(">=")[0].split("==")[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement
