"""Rules of the house: imports run one way, importing is cheap, versions agree, make explains itself."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import d3lib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Every module may import its own layer and those before it. The first layer is everybody's.
LAYERS = [
    {"errors", "artefacts", "provenance", "masks"},
    {"data", "losses", "metrics", "details", "models"},
    {"distributed"},
    {"training", "evaluation", "baselines"},
    {"experiments", "records", "intervals", "notebooks"},
    {"execution"},
    {"scoring"},
    {"results", "gate"},
    {"costs"},
    {"batch"},
    {"figures", "claims"},
    {"predict", "bench", "naive"},
    {"cli", "__main__"},
]
TENSORS_ONLY = {"losses", "masks", "metrics", "models"}


def library() -> list[Path]:
    return sorted((ROOT / "d3lib").rglob("*.py"))


def room(path: Path) -> str:
    """`data` for every file of `d3lib/data`, `losses` for `d3lib/losses.py`."""
    return path.relative_to(ROOT / "d3lib").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of `d3lib` that a file imports from, at the top or inside functions."""
    package, names = ["d3lib", *path.relative_to(ROOT / "d3lib").parts[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("d3lib.")}


def test_imports_run_one_way():
    rooms = {room(path) for path in library() if not room(path).startswith("_")}
    allowed: set[str] = set()
    wrong = []
    for layer in LAYERS:
        allowed |= layer
        for path in library():
            if room(path) in layer:
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in imported(path) & rooms - allowed]
    assert not wrong


def test_losses_metrics_and_models_know_tensors_only():
    for name in TENSORS_ONLY & {path.stem for path in library()}:
        text = (ROOT / "d3lib" / f"{name}.py").read_text(encoding="utf-8")
        foreign = imported(ROOT / "d3lib" / f"{name}.py") & {"data", "artefacts", "training", "experiments"}
        assert not foreign, (name, foreign)
        assert not re.search(r"\bopen\(|\.cuda\(|Path\(", text), name


@pytest.mark.parametrize("command", [["-c", "import d3lib"], ["-m", "d3lib", "--help"]])
def test_importing_the_library_and_asking_for_help_load_nothing_heavy(command):
    # -X importtime lists every module on stderr, whatever way the process ends.
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "d3lib" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "h5py", "matplotlib", "pandas", "snakemake"}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines if line[:1] != "#"]
    assert all(found), "constraints.txt holds only name==version, without local labels or addresses"
    return {normal(match[1]): Version(match[2]) for match in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in ("batch", "slurm", "book", "dev") for line in extras[name])]
    return [Requirement(line) for line in lines]


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), requirement


def test_no_range_excludes_the_versions_that_colab_has():
    lines = (ROOT / "tests" / "colab.txt").read_text(encoding="utf-8").splitlines()
    colab = dict(line.split("==") for line in lines if "==" in line) | {"torch": "2.11.0", "torchvision": "0.26.0"}
    assert {"numpy", "pandas", "matplotlib", "h5py"} <= colab.keys()
    for requirement in requirements():
        if version := colab.get(requirement.name):
            assert requirement.specifier.contains(version), requirement


def test_the_conda_environment_installs_what_pyproject_asks_for():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (through_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    python = next(entry for entry in plain if entry.startswith("python=")).removeprefix("python=")
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains(f"{python}.0")
    assert {"pip", "make", "git"} <= set(plain)
    constraint, editable = through_pip
    assert (ROOT / constraint.removeprefix("-c ")).is_file()
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable)[1].split(",")
    assert set(extras) <= set(PYPROJECT["project"]["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f'-c {constraint.removeprefix("-c ")} -e ".[{",".join(extras)}]"' in makefile


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == d3lib.__version__
    assert f"## {d3lib.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def targets() -> dict[str, str]:
    """What `make` alone prints: target -> its line of help."""
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(re.findall(r"^make (\w+) +(\S.*)$", done.stdout, re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_alone_lists_every_target_with_a_line_of_help_and_the_readme_names_them():
    listed = targets()
    assert {"setup", "reproduce", "test", "batch", "book", "colab", "lint", "clean"} <= listed.keys()
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert set(phony) == listed.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    main = {"setup", "reproduce", "test", "batch", "book", "clean"}
    assert not {target for target in main if f"make {target}" not in readme}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_a_python_that_is_too_old_gets_one_clear_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "setup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11, 3.12 or 3.13 is needed" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_a_workflow_is_valid_asks_for_few_rights_and_calls_make(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow[True], "the key `on`, which YAML 1.1 reads as true"
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) if "uses" in step else step["run"]
    called = {target for step in steps for target in re.findall(r"\bmake (\w+)", step.get("run", ""))}
    assert called and called <= targets().keys()
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_the_page_of_promises_names_every_drill_and_no_other():
    page = (ROOT / "book" / "practice" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r'"([a-z0-9]+(?:_[a-z0-9]+){2,})"', page)
    tests = [f for path in (ROOT / "tests" / "drills").glob("test_*.py") for f in ast.parse(path.read_text()).body]
    tests = [f for f in tests if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    drills = [f.name.removeprefix("test_") for f in tests if any(a.arg == "drill" for a in f.args.args)]
    assert sorted(named) == sorted(drills)
