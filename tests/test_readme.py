import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.tensorflow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The data sets whose table the README shows.
DATASETS = re.findall(r"<!-- (\w+) -->", README)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [code for name, code in BLOCKS if name == language]


def table_after(heading):
    """The rows of the first table behind a text, as lists of cells."""
    lines = README.split(heading)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_every_block_is_tested():
    assert {name for name, _ in BLOCKS} == {"bash", "python"}
    assert len(blocks("bash")) == 2


def test_python_blocks_run(tmp_path, monkeypatch):
    # In order and in one namespace, as a reader would paste them.
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["model"].output_shape == (None, 1000)
    assert f"{namespace['report'].total / 1e9:.1f}" == "1.9"
    assert namespace["maps"].shape == (4, 8, 12, 12)
    assert namespace["overlays"].shape == (4, 3, 384, 384, 3)
    assert namespace["outputs"]["probabilities"].shape == (1, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {
        "attention_maps.png",
        "exported_vit",
    }


def test_first_block_is_fifteen_lines():
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_commands():
    main_job, tests = (block.strip() for block in blocks("bash"))
    for command in (main_job, tests):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    extras = re.search(r'"\.\[(.*?)\]"', main_job)[1].split(",")
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in extras:
        assert re.search(rf"^{re.escape(extra)} = \[", pyproject, re.MULTILINE)
    script, *arguments = main_job.split(".venv/bin/python ")[1].split()
    source = (ROOT / script).read_text()
    ast.parse(source)
    assert arguments == []
    # CI runs the second command.
    run = re.search(r"\.venv/bin/python -m pytest .*", tests)[0]
    install = re.search(r'"\.\[.*?\]"', tests)[0]
    ci = (ROOT / ".ci" / "run").read_text()
    assert run in ci
    assert install in ci


def test_links_and_pictures_exist():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for name in re.findall(r"`((?:docs|examples)/[\w./]+|[A-Z]+\.md)`", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("dataset", DATASETS)
def test_result_tables_are_whole(dataset):
    rows = table_after(f"<!-- {dataset} -->")
    assert [row[0] for row in rows] == ["ViT", "TokenLearner ViT"]
    parameters = [int(row[1].replace(",", "")) for row in rows]
    gflops = [float(row[2]) for row in rows]
    assert parameters[0] < parameters[1]
    assert gflops[0] > gflops[1]
    if dataset == "digits":
        assert float(rows[1][4].rstrip("%")) >= 97


@pytest.mark.parametrize("dataset", DATASETS)
def test_result_tables_are_of_the_example(dataset):
    import importlib.util

    import keras

    path = ROOT / "examples" / "train_image_classifier.py"
    specification = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    arguments = example.parse_arguments(["--dataset", dataset])
    shape = (arguments.image_size, arguments.image_size, 1)
    images = example.tlk.data.ImageDataset("", {}, {}, tuple("0123456789"), shape)
    for row, name in zip(
        table_after(f"<!-- {dataset} -->"), example.MODELS, strict=True
    ):
        model = example.build(name, images, arguments)
        assert row[0] == example.MODELS[name]
        assert row[1] == f"{model.count_params():,}"
        flops = example.count_flops(model, convention="xla").total
        assert row[2] == f"{flops / 1e9:.5f}"
    keras.utils.clear_session()


@pytest.mark.slow
def test_table_1_is_what_count_flops_gives():
    import tokenlearner_keras as tlk

    rows = table_after("## The paper's Table 1")
    assert len(rows) == 9
    differing = []
    for name, call, paper, here in rows:
        code = f"vit({call.strip('`')}, input_shape=(384, 384, 3))"
        model = eval(code, {"vit": tlk.models.vit})
        total = tlk.count_flops(model, convention="xla").total
        assert here == f"{total / 1e9:.1f}", name
        if paper != here:
            differing.append(name)
    # The paper's two anomalies, which the text below the table explains.
    assert differing == ["ViT B/32", "TokenLearner B/16"]
