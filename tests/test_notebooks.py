"""Every notebook is short, is committed with its outputs, and runs top to bottom.

A cell that raises fails here, and so does a false assert in it. The notebooks that train for more
than a few seconds run with `pytest -m slow`. The fourth needs a language model and runs in no test.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = ["01_smoa_from_scratch"]
SLOW = ["02_rank_support_anchor", "02_appendix", "03_shakespeare", "04_appendix"]
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|mnt|work|Users)/|\b[A-Z]:\\\w")

RUN = """
import sys
import matplotlib
import nbformat
from IPython.core.interactiveshell import InteractiveShell

matplotlib.use("Agg")
shell = InteractiveShell.instance()
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    if cell.cell_type == "code":
        shell.run_cell(cell.source).raise_error()
"""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def text_of(output):
    """All of an output that is text; a picture is not."""
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return "\n".join(str(data[kind]) for kind in data if not kind.startswith("image/"))


@pytest.mark.parametrize(
    "name", QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
)
def test_notebook_runs_top_to_bottom(name):
    """In a process of its own, without a kernel and its messages."""
    command = [sys.executable, "-c", RUN, f"{name}.ipynb"]
    ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


@each_notebook
def test_notebook_is_committed_as_it_ran(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in [output for cell in cells for output in cell.outputs]:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not MACHINE_PATH.search(text_of(output)), text_of(output)


@each_notebook
def test_notebook_has_at_most_60_short_cells(path):
    assert len(read(path).cells) <= 60
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 15
