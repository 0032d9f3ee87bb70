"""Every recipe in .readme/forks applies, at rest changes no weight, and does what it is for.

    python -m pytest .ci/check_forks.py

Each runs in a copy of the code of its own, on drawn digits and random activations.
"""

import os
import re
import sys

import pytest
from check_pages import (
    FORKS,
    PAGES,
    RECIPES,
    ROOT,
    SCRIPTS,
    commands,
    copy_of_the_code,
    run,
    run_python,
    sections,
)

from sae import ARCHS, PENALTIES

TRAINING = [name for name in RECIPES if "b/sae.py" in (FORKS / f"{name}.diff").read_text()]
PROGRAMS = [name for name in RECIPES if name not in TRAINING]

# Prints a line for each of several SAEs: its settings, and a hash of its weights. The first two
# arguments are the architectures and the penalties of the original.
WEIGHTS = """
import hashlib, itertools, sys
import torch
from sae import Hparams, Rows, train_sae
torch.set_num_threads(1)
x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
archs, penalties = sys.argv[1].split(), sys.argv[2].split()
for arch, tied in itertools.product(archs, (True, False)):
    settings = dict(arch=arch, tied_init=tied, unit_norm=tied, sparsity=0.1, dead_after=300)
    settings.update({name: 1e-3 for name in penalties})
    hp = Hparams(d_in=16, d_sae=64, k=4, batch_size=50, steps=110, warmup=3, lr=1e-2, **settings)
    weights = train_sae(hp, Rows(x), "cpu").state_dict()
    data = b"".join(weights[name].contiguous().numpy().tobytes() for name in sorted(weights))
    print(arch, tied, hashlib.sha256(data).hexdigest())
"""


def weights(folder):
    return run_python(WEIGHTS, folder, " ".join(ARCHS), " ".join(PENALTIES)).splitlines()


@pytest.fixture(scope="session")
def weights_without_recipes(tmp_path_factory):
    return weights(copy_of_the_code(tmp_path_factory.mktemp("original")))


def test_every_recipe_concerns_one_file_and_is_read_in_minutes():
    for name in RECIPES:
        counted = run(["git", "apply", "--numstat", FORKS / f"{name}.diff"], ROOT)
        (line,) = counted.splitlines()
        added, removed, _ = line.split("\t")
        assert int(added) + int(removed) <= 120, name


@pytest.mark.parametrize("order", [RECIPES, RECIPES[::-1]], ids=["forwards", "backwards"])
def test_all_recipes_together_at_rest_change_no_weight(order, tmp_path, weights_without_recipes):
    assert weights(copy_of_the_code(tmp_path, order)) == weights_without_recipes


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_at_rest_changes_no_weight(name, tmp_path, weights_without_recipes):
    assert weights(copy_of_the_code(tmp_path, [name])) == weights_without_recipes


# --------------------------------------------------------------------------------------------------
# Their commands, in a small version

SMALL_TEXT = (
    "--context 128 --tokens 20000 --d-sae 128 --k 8 --batch-size 256 --lr 1e-3 --warmup 5 "
    "--l2 0 1e-5 --seed 0 1 2 3 --device cpu"
)
SMALL = "--data glyphs --epochs 1 --d-sae 64 --batch-size 256 --lr 1e-3 --warmup 0 --device cpu"


def commands_of(name):
    """The commands in the section about a recipe, on the page of recipes."""
    found = []
    for text, recipes in sections(ROOT / ".readme" / "forks.md"):
        if recipes == [name]:
            found += commands(text)
    return found


def flags_of(name):
    """The flags with which the page trains, on images where it does, else on a language model."""
    lines = {"train_mnist": [], "train_pythia": []}
    for script, arguments in commands_of(name):
        if script in lines and "--model" not in arguments:
            lines[script].append(first_of_lists(arguments))
    return lines["train_mnist"] or lines["train_pythia"]


def run_script(folder, script, arguments):
    """What a script prints that runs to its end."""
    return run([sys.executable, f"{script}.py", *arguments], folder)


def first_of_lists(arguments):
    """The arguments of a command line, of several values for a flag the first alone."""
    kept = []
    for argument in arguments:
        value_before = len(kept) > 1 and kept[-2].startswith("--")
        if argument.startswith("--") or not value_before or kept[-1].startswith("--"):
            kept.append(argument)
    return kept


@pytest.mark.parametrize("name", TRAINING)
def test_the_first_command_of_a_recipe_trains(name, tmp_path):
    """The others are parsed, as all commands of the pages are."""
    folder = copy_of_the_code(tmp_path, [name])
    assert flags_of(name), "the page of recipes shows how it is used"
    flags = [*flags_of(name)[0], *SMALL.split(), "--out", "runs/small"]
    run_script(folder, "train_mnist", flags)
    (trained_run,) = (folder / "runs" / "small").glob("*_seed*")
    assert (trained_run / "quality.json").exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_recipe_that_is_a_program_runs_on_trained_saes(name, tmp_path):
    """Its arguments stay as on the page, but for the run folders and the images."""
    folder = copy_of_the_code(tmp_path, [name])
    if "load_images" in (FORKS / f"{name}.diff").read_text():
        line = f"{SMALL} --l2 0 1e-5 --seed 0 1 2 3 --out runs/mnist"
        run_script(folder, "train_mnist", line.split())
    elif "SAE_LM_DIR" in os.environ:
        model = os.environ["SAE_LM_DIR"]
        line = f"--model {model} --data {model}/val.bin {SMALL_TEXT} --out runs/sweep"
        run_script(folder, "train_pythia", line.split())
        run_script(folder, "evaluate", ["quality", "runs/sweep", "--tokens", "2000"])
    else:
        pytest.skip("reads a language model, and SAE_LM_DIR names none")
    runs = sorted((folder / "runs").glob("*/*_seed*"))
    used = False
    for script, arguments in commands_of(name):
        needs_language_model = any(argument.startswith("LM") for argument in arguments)
        if script in SCRIPTS or needs_language_model:
            continue
        used = True
        there = []
        for argument in arguments:
            if argument == "data":
                there.append("glyphs")
            elif argument.startswith("RUN"):
                parts = argument.split("_")[1:]
                there += [path for path in runs if set(parts) <= set(path.name.split("_"))]
            else:
                there.append(argument)
        assert run_script(folder, script, there).strip() or (folder / "runs" / "clean").exists()
    assert used, "the page of recipes shows how it is used"


# --------------------------------------------------------------------------------------------------
# What some of them are for. Each is a piece of Python that runs with the recipe applied.

START = """
import dataclasses, torch
import sae
from sae import Hparams, Rows, Trainer, train_sae, weight_penalty
torch.set_num_threads(1)
sae.LOG_EVERY = 10
x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
common = dict(d_in=16, d_sae=64, k=4, batch_size=20, steps=40, warmup=0, lr=1e-2, arch="relu")

def trained(**settings):
    hp = Hparams(**{**common, **settings})
    trainer = Trainer(hp)
    batches = Rows(x).batches(hp, 0, {})
    for _ in range(hp.steps):
        trainer.train_step(next(batches))
    return trainer

def norms(trainer):
    return [W.norm(dim=1).sum().item() for W in (trainer.sae.encoder, trainer.sae.W_dec)]
"""
WHAT_FOR = {
    "late-penalty": """
late = trained(l2=1e-3, penalty_from=0.5).metrics
early = trained(l2=1e-3, penalty_until=0.5).metrics
assert [row["penalty"] > 0 for row in late] == [False, False, True, True]
assert [row["penalty"] > 0 for row in early] == [True, True, False, False]
""",
    "one-side": """
free, encoder, decoder = map(norms, (trained(), trained(l2_encoder=1), trained(l2_decoder=1)))
assert encoder[0] < 0.8 * free[0]
assert decoder[1] < 0.8 * free[1]
by_hand = trained(l2_encoder=0.5)
square = by_hand.sae.encoder.square().sum()
assert torch.allclose(weight_penalty(by_hand.sae, by_hand.hp), 0.5 * square)
""",
    "group-lasso": """
shrunk = trained(groups=0.1)
assert norms(shrunk)[0] < 0.8 * norms(trained())[0]
assert abs(weight_penalty(shrunk.sae, shrunk.hp).item() / (0.1 * sum(norms(shrunk))) - 1) < 1e-5
""",
    "decoupled-decay": """
decayed = trained(weight_decay=5.0, weight_decay_until=0.5)
assert norms(decayed)[0] < 0.9 * norms(trained())[0]
assert all(row["penalty"] == 0 for row in decayed.metrics)
by_hand = Trainer(dataclasses.replace(decayed.hp, weight_decay=0.0))
batches = Rows(x).batches(by_hand.hp, 0, {})
for step in range(40):  # the decay takes a share of the weights as they are before the step
    matrices = (by_hand.sae.encoder, by_hand.sae.W_dec)
    before = [W.data.clone() for W in matrices]
    rate = sae.learning_rate(by_hand.hp, step)
    by_hand.train_step(next(batches))
    for W, old in zip(matrices, before):
        W.data -= rate * 5 * old * (step < 20)
for a, b in zip(decayed.sae.parameters(), by_hand.sae.parameters()):
    assert torch.allclose(a, b, atol=2e-3)
""",
    "frozen-decoder": """
for arch in ("relu", "topk"):
    for choice, alike in (("own", False), ("one", True)):
        pair = [trained(arch=arch, frozen=choice, seed=seed) for seed in (0, 1)]
        for trainer in pair:
            start = Trainer(trainer.hp).sae
            assert torch.equal(trainer.sae.W_dec, start.W_dec)
            assert not torch.equal(trainer.sae.encoder, start.encoder)
        assert torch.equal(pair[0].sae.W_dec, pair[1].sae.W_dec) == alike
        assert not torch.equal(pair[0].sae.encoder, pair[1].sae.encoder)
""",
    "gated": """
trainer = trained(arch="gated", sparsity=0.1)
saved, live = sae.finished_sae(trainer, 1.0), trainer.sae
projected = (x - live.b_dec) @ live.W_enc
magnitude = (projected * live.r_mag.exp() + live.b_mag).relu()
by_hand = magnitude * (projected + live.b_enc > 0)
assert saved.arch == "jumprelu"
assert torch.allclose(saved.encode(x), by_hand, atol=1e-4)
assert torch.allclose(live.encode(x), by_hand, atol=1e-4)
assert live.r_mag.any() and live.b_mag.any()
""",
    "archetypal": """
# Without relaxation, all rows are mixtures of three centres, which may be linearly dependent.
hp = Hparams(**{**common, "arch": "topk"}, archetypes=3, relaxation=0.0)
assert torch.linalg.matrix_rank(train_sae(hp, Rows(x), "cpu").W_dec, rtol=1e-4) <= 3
""",
}


@pytest.mark.parametrize("name", [name for name in WHAT_FOR if name in RECIPES])
def test_a_recipe_does_what_it_is_for(name, tmp_path):
    run_python(START + WHAT_FOR[name], copy_of_the_code(tmp_path, [name]))


def test_a_page_that_shows_a_recipe_shows_it_as_it_is():
    diffs = [(FORKS / f"{name}.diff").read_text() for name in RECIPES]
    for page in PAGES:
        for shown in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
            assert any(shown.strip() in diff for diff in diffs), page.name
