"""The guides' code runs, and the reference has every public name."""

import inspect
import re
import runpy
from pathlib import Path

import keras
import numpy as np
import pytest

import tokenlearner_keras as tlk

DOCS = Path(__file__).parents[1] / "docs"
ROOMS = [tlk, *(room for _, room in inspect.getmembers(tlk, inspect.ismodule))]


@pytest.mark.parametrize(
    "room",
    [room for room in ROOMS if hasattr(room, "__all__")],
    ids=lambda room: room.__name__.split(".")[-1],
)
def test_the_reference_has_every_public_name(room):
    pages = sorted((DOCS / "api").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    section = text.split(f".. currentmodule:: {room.__name__}\n")[1].split("```")[0]
    documented = re.findall(
        r"^\.\. (?:auto\w+|py:data):: (\w+)$", section, re.MULTILINE
    )
    public = {
        name
        for name in room.__all__
        if name != "__version__" and not inspect.ismodule(getattr(room, name))
    }
    assert set(documented) == public
    assert len(documented) == len(public)
    # Data aside, each of them says what it is.
    for name in public:
        value = getattr(room, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = sorted(p.stem for p in DOCS.glob("*.md") if p.stem != "index")
    assert sorted(re.findall(r"^(\w+)$", index, re.MULTILINE)) == pages
    assert sorted(set(re.findall(r"\]\((\w+)\.md\)", index))) == pages
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^api/(\w+)$", reference, re.MULTILINE)) == sorted(
        p.stem for p in (DOCS / "api").glob("*.md")
    )


def test_the_figure_of_the_error_is_of_this_series():
    """The script that draws it uses functions that are not public."""
    script = runpy.run_path(str(DOCS / "figures" / "vector_attention_error.py"))
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 60, 2)).astype("float32")
    expected = script["definition"](*(x.astype("float64") for x in (q, k, v)))
    errors = [
        np.linalg.norm(script["series"](q, k, v, terms) - expected)
        for terms in (5, 15, 40)
    ]
    assert errors[0] > 100 * errors[1] > 10000 * errors[2]
    np.testing.assert_allclose(script["series"](q, k, v, 40), expected, atol=1e-5)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "page", ["images", pytest.param("quick_start", marks=pytest.mark.slow)]
)
def test_code_of_the_guides_runs(page, tmp_path, monkeypatch):
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    fitted = []
    monkeypatch.setattr(
        keras.Model,
        "fit",
        lambda self, x, **arguments: fitted.append((self, next(iter(x)))),
    )
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    for model, (x, y) in fitted:
        loss, _ = model.evaluate(x, y, verbose=0)
        assert loss == pytest.approx(2.3, abs=0.7)  # ten classes, untrained
    if page == "quick_start":
        assert (tmp_path / "attention_maps.png").is_file()
        assert (tmp_path / "exported" / "saved_model.pb").is_file()
    else:
        assert fitted
