"""What README.md and the pages in .readme say can be done, tried with the code that is here.

    python -m pytest .ci/check_pages.py

Not a part of the tests: a fork changes the code, and need not change the pages.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import Hparams, Rows, train

ROOT = Path(__file__).resolve().parents[1]
FORKS = ROOT / ".readme" / "forks"
RECIPES = sorted(path.stem for path in FORKS.glob("*.diff"))
PAGES = [ROOT / "README.md", *sorted((ROOT / ".readme").glob("*.md"))]
SCRIPTS = ("train_mnist", "train_pythia", "evaluate", "steer")


def run(command, folder, text=""):
    """What a program prints that is run in `folder`, with `text` as its standard input."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    words = list(map(str, command))
    streams = {"input": text, "capture_output": True, "text": True}
    done = subprocess.run(words, cwd=folder, env=environment, check=False, **streams)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_python(code, folder, *arguments, text=""):
    """What a piece of Python prints that is run with the modules of `folder`, within it."""
    return run([sys.executable, "-c", code, *arguments], folder, text)


def copy_of_the_code(folder, recipes=()):
    """The folder, with our Python files and with recipes applied to them in their order."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in recipes:
        run(["git", "apply", FORKS / f"{name}.diff"], folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Commands

COMMAND = re.compile(r"(?:python3?|torchrun [^`\n]*?) ((?:tests/)?\w+)\.py\b([^`\n|]*)")


def commands(text):
    """The command lines in a text, as (script, arguments). An ellipsis stands for other flags."""
    text = re.sub(r"```diff\n.*?```", "", text, flags=re.DOTALL)
    found = []
    for script, rest in COMMAND.findall(text):
        rest = rest.split("#")[0].split("&&")[0].replace(" ...", " ")
        found.append((script, shlex.split(rest)))
    return found


def sections(page):
    """The text of a page in pieces, each with the recipes that it is about.

    On the page of recipes, a section whose heading names one is about that one, and the others are
    about all of them. Elsewhere a section is about those that it tells the reader to apply, or
    whose flags it uses.
    """
    for text in re.split(r"^(?=#+ )", page.read_text(), flags=re.MULTILINE):
        heading = text.partition("\n")[0]
        named = [name for name in RECIPES if f"`{name}`" in heading]
        if page.stem == "forks":
            yield text, named or RECIPES
        else:
            used = [name for name in RECIPES if f"{name}.diff" in text]
            yield text, used


def every_command():
    """{recipes: the commands of all pages that need them}."""
    found = {}
    for page in PAGES:
        for text, recipes in sections(page):
            for script, arguments in commands(text):
                found.setdefault(tuple(recipes), []).append((script, arguments))
    return found


# Standard input has the commands, as JSON. The width of a model's residual stream is the only thing
# that parsing one would look up elsewhere.
PARSE = """
import importlib, json, sys
for script, arguments in json.load(sys.stdin):
    module = importlib.import_module(script)
    if script == "train_pythia":
        module.check_model = lambda run: 512
    try:
        module.parse(arguments)
    except SystemExit:
        sys.exit(f"{script}.py {' '.join(arguments)}")
"""


@pytest.mark.parametrize(
    ("recipes", "found"), every_command().items(), ids=lambda value: "+".join(map(str, value))[:40]
)
def test_every_command_line_parses(recipes, found, tmp_path):
    folder = copy_of_the_code(tmp_path, recipes)
    write_files_that_pages_name(folder)
    ours = []
    for script, arguments in found:
        if script in SCRIPTS:
            ours.append((script, arguments))
        elif script == "tests/benchmark":
            parts = re.findall(r"\"(\w+)\": \w+", (ROOT / "tests" / "benchmark.py").read_text())
            assert set(arguments) <= set(parts)
        else:
            assert (folder / f"{script}.py").exists(), script
    run_python(PARSE, folder, text=json.dumps(ours))


def test_the_pages_have_commands():
    """So that the check above cannot pass because nothing was found."""
    scripts = [script for found in every_command().values() for script, _ in found]
    assert set(SCRIPTS) <= set(scripts)


# --------------------------------------------------------------------------------------------------
# Snippets of Python


def snippets(text):
    """The blocks of Python in a text, without their indentation."""
    found = []
    for indent, code in re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        found.append(re.sub(f"^{indent}", "", code, flags=re.MULTILINE))
    return found


def write_files_that_pages_name(folder):
    """The reader's own activations, which snippets and commands call acts.npy and acts.pt."""
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    np.save(folder / "acts.npy", x.numpy())
    torch.save(x, folder / "acts.pt")


def write_runs_that_a_snippet_names(folder, code):
    """A small SAE, and the covariance of its data, in every run folder that a snippet reads."""
    for name in re.findall(r"\"(RUN\w*|runs/[^\"]+)\"", code):
        d_in = 784 if "mnist" in name or "glyphs" in name else 512
        x = torch.rand(100, d_in, generator=torch.Generator().manual_seed(0))
        hp = Hparams(d_in=d_in, d_sae=64, k=4, batch_size=50, steps=5, warmup=0)
        train({folder / name: hp}, Rows(x), "cpu")
        np.save(folder / name / "covariance.npy", np.cov(x.T))


def small_version(code):
    """A snippet with the reader's activations in place of an ellipsis, and in fewer steps."""
    code = re.sub(r"= \.\.\.", "= __import__('torch').load('acts.pt')", code)
    return re.sub(r"\bsteps=[\d_]+", "steps=20", code)


WHOLE, PARTS = [], []
for page in PAGES:
    for code in snippets(page.read_text()):
        whole = re.search(r"^(import|from) ", code, re.MULTILINE)
        (WHOLE if whole else PARTS).append(pytest.param(code, id=f"{page.stem}: {code[:30]}"))


@pytest.mark.parametrize("code", WHOLE)
def test_a_snippet_that_imports_something_runs(code, tmp_path):
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if not (ROOT / f"{name}.py").exists():
            pytest.importorskip(name)
    folder = copy_of_the_code(tmp_path)
    write_files_that_pages_name(folder)
    write_runs_that_a_snippet_names(folder, code)
    run_python(small_version(code), folder)


@pytest.mark.parametrize("code", PARTS)
def test_every_line_of_another_snippet_is_in_the_code_or_in_a_recipe(code):
    files = "".join(path.read_text() for path in ROOT.glob("*.py"))
    added = "".join((FORKS / f"{name}.diff").read_text() for name in RECIPES)
    lines = {line.lstrip("+").strip() for line in (files + added).splitlines()}
    for line in code.splitlines():
        assert not line.strip() or line.strip() in lines, line


def test_the_example_at_the_head_of_sae_runs(tmp_path):
    folder = copy_of_the_code(tmp_path)
    write_files_that_pages_name(folder)
    example = re.search(r"\n\n((?: {4}.+\n)+)", (ROOT / "sae.py").read_text())[1]
    code = re.sub("^ {4}", "", example, flags=re.MULTILINE)
    run_python("from sae import *\n" + small_version(code), folder)


# --------------------------------------------------------------------------------------------------
# Links, pictures, names of files


def anchor(heading):
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, name = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if name:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert name in map(anchor, headings), target


def test_every_picture_is_shown_somewhere():
    shown = "".join(page.read_text() for page in PAGES)
    pictures = [path.name for path in (ROOT / ".readme").rglob("*.png")]
    assert [name for name in pictures if f"{name})" not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_file_and_recipe_that_is_named_is_there(page):
    text = page.read_text()
    scripts = {f"{name.replace('-', '_')}.py" for name in RECIPES}
    for name in re.findall(r"`((?:tests/|\.ci/|\.readme/)?[\w.-]+\.(?:py|md))`", text):
        assert name in scripts or (ROOT / name).exists() or (page.parent / name).exists(), name
    for name in re.findall(r"\.readme/forks/([\w-]+)\.diff", text):
        assert name in RECIPES or name == "NAME", name
