"""What README.md and the pages in .readme say can be done, with the code that is here."""

import re
import shlex

import pytest
from conftest import FORKS, ROOT

import evaluate
import steer
import train_mnist
import train_pythia

PAGES = [ROOT / "README.md", *sorted((ROOT / ".readme").glob("*.md"))]
COMMAND = re.compile(r"(?:python3?|torchrun [^`\n]*?) (\w+)\.py\b([^`\n|]*)")
PARSE = {module.__name__: module.parse for module in (train_mnist, train_pythia, evaluate, steer)}


def commands(text):
    """The command lines in a page: (script, arguments). An ellipsis stands for arguments given before."""
    text = re.sub(r"```diff\n.*?```", "", text, flags=re.DOTALL)  # code, with words of its own around commands
    return [(script, shlex.split(rest.replace(" ...", ""))) for script, rest in COMMAND.findall(text)]


def every_command():
    """Of all pages: the script, its arguments, and the recipes it needs: those of its section of forks.md, which are
    all of them where a section is no recipe's; none on other pages, but that the tutorial tries one, too."""
    for page in PAGES:
        for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
            recipes = re.findall(r"\A`([\w-]+)`", section) or [path.stem for path in sorted(FORKS.glob("*.diff"))]
            for script, arguments in commands(section):
                needed = recipes if page.stem == "forks" else ["group-lasso"] * ("--groups" in arguments)
                yield pytest.param(script, arguments, needed, id=f"{page.stem}: {script} {' '.join(arguments)}"[:90])


@pytest.mark.parametrize(("script", "arguments", "recipes"), list(every_command()))
def test_every_command_line_parses(script, arguments, recipes, fork, monkeypatch):
    if recipes:
        copy = fork(*recipes)
        if (copy.folder / f"{script}.py").exists() and script not in PARSE:
            return  # a script of the recipe's own
        parse = getattr(copy, script).parse
    elif script == "benchmark":
        assert set(arguments) <= set(re.findall(r"\"(\w+)\": \w+", (ROOT / "tests" / "benchmark.py").read_text()))
        return
    else:
        monkeypatch.setattr(train_pythia, "check_model", lambda args: 512)
        parse = PARSE[script]
    parse(arguments)


def slug(heading):
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page):
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)), target


def test_every_picture_is_shown_somewhere():
    shown = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in (ROOT / ".readme").glob("*.png") if f"{path.name})" not in shown] == []


def test_every_file_of_the_repository_that_is_named_is_there():
    ours = {path.name for path in ROOT.glob("*.*")} | {"pairs.png", "features.png"}
    for page in PAGES:
        for name in re.findall(r"`((?:tests/|\.readme/)?[\w.-]+\.(?:py|md|txt))`", page.read_text()):
            recipes = {f"{path.stem.replace('-', '_')}.py" for path in FORKS.iterdir()}
            assert name in ours | recipes or (ROOT / name).exists(), (page.name, name)


def test_the_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1800
