"""Runs the notebooks, as a reader would from top to bottom."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.tensorflow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"
# What each prints, with the least value of its last number: the accuracy in percent.
# The least is far above chance and below what was seen with several seeds.
PRINTED = {
    "quick_start": (r"test accuracy: (\S+) %", 80),
    "video": (r"test accuracy: (\S+) %", 60),
    "faster_vit": (r"after distillation: (\S+) %", 70),
}
nbformat = pytest.importorskip("nbformat")


def test_all_are_here_without_outputs():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PRINTED)
    for name in PRINTED:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert cell.outputs == []
                assert cell.execution_count is None


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_documents_lead_to_them(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in PRINTED:
        assert f"examples/notebooks/{name}.ipynb" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_runs(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    printed = "".join(out.get("text", "") for out in outputs)
    pattern, least = PRINTED[name]
    assert float(re.search(pattern, printed)[1]) >= least
    pictures = [
        kind
        for out in outputs
        for kind in out.get("data", ())
        if kind.startswith("image/")
    ]
    if name == "video":
        assert "image/gif" in pictures
    if name != "faster_vit":
        assert "image/png" in pictures
    # Nothing is left behind.
    assert list(tmp_path.iterdir()) == []
