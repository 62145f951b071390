"""Every notebook for Colab, top to bottom, in an environment like Colab's: its versions, and none of our extras.

On request, `pytest -m colab`: it builds the environment first (minutes) and executes all pages.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "book" / "colab").rglob("*.ipynb"))
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
print(sum(cell.cell_type == "code" and cell.execution_count is not None for cell in notebook.cells))
"""

pytestmark = pytest.mark.colab


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The interpreter of the environment; `D3LIB_COLAB_ENV` names one that is kept from an earlier time."""
    place = Path(os.environ.get("D3LIB_COLAB_ENV") or tmp_path_factory.mktemp("colab") / "env")
    found = place / "bin" / "python3"
    if not found.exists():
        pins = re.findall(r"^torch(?:vision)?==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
        install = [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([*install, *pins, "-r", ROOT / "tests" / "colab.txt"], check=True)
        subprocess.run([*install, "--no-deps", "-e", ROOT], check=True)
    return found


def test_the_environment_has_none_of_our_extras(python):
    probe = "import importlib.util as u; print([m for m in ('papermill', 'snakemake', 'myst_nb') if u.find_spec(m)])"
    assert subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "book/colab").as_posix()[:-6])
def test_a_notebook_runs_from_top_to_bottom(python, tmp_path, notebook):
    here = {key: value for key, value in os.environ.items() if not key.startswith("D3LIB_")}
    done = subprocess.run(
        [python, "-c", EXECUTE, notebook], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0
