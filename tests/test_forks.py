"""Every recipe of .readme/forks applies to this checkout, does what it says, and at rest changes no weight."""

import itertools
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git, which applies the recipes, is not installed")


def weights(trainers):
    return [{name: value.numpy().tobytes() for name, value in t.sae.state_dict().items()} for t in trainers]


def penalties(trainer):
    return [row["penalty"] for row in trainer.metrics]


# ---------------------------------------------------------------------------------------------------
# All of them


def test_the_page_shows_every_recipe_as_it_is():
    shown = re.findall(r"```diff\n(.*?)```", (FORKS.parent / "forks.md").read_text(), re.DOTALL)
    assert sorted(shown) == sorted(path.read_text() for path in FORKS.glob("*.diff"))


def test_every_recipe_is_one_file_and_less_than_a_screen():
    for path in FORKS.glob("*.diff"):
        counted = subprocess.run(
            ["git", "apply", "--numstat", path], cwd=ROOT, capture_output=True, text=True, check=True
        )
        (line,) = counted.stdout.splitlines()
        added, removed, _ = line.split("\t")
        assert int(added) + int(removed) <= (60 if path.stem.startswith("what-") else 30)


AT_REST = {
    "late-penalty": ("--penalty-from", 0, "--penalty-until", 1),
    "one-side": ("--penalize", "both"),
    "group-lasso": ("--groups", 0),
    "decoupled-decay": ("--weight-decay", 0, "--weight-decay-until", 0.5),
    "frozen-decoder": ("--frozen", "no"),
    "jumprelu": (),
}


TRAINING = sorted(path.stem for path in FORKS.glob("*.diff") if "sae.py" in path.read_text())


@pytest.mark.parametrize("names", [*([name] for name in TRAINING), TRAINING, TRAINING[::-1]], ids=" ".join)
def test_at_rest_the_weights_are_those_of_the_original_also_with_recipes_together(names, fork):
    usual = ("--l2", 1e-3, "--arch", "relu", "topk", "batchtopk", "--k", 8, "--tied-init", "on", "off")
    flags = [flag for name in names for flag in AT_REST[name]]
    assert weights(fork().train(*usual)) == weights(fork(*names).train(*usual, *flags))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("late-penalty", ("--penalty-from", 1.5), "--penalty-from 1.5: give a number from 0 to 1"),
        ("late-penalty", ("--penalty-from", 0.5, "--penalty-until", 0.5), "give less than --penalty-until 0.5"),
        ("one-side", ("--penalize", "left"), "--penalize left: choose from both, enc, dec"),
        ("group-lasso", ("--groups", -1), "--groups -1.0: give a number from 0"),
        ("frozen-decoder", ("--frozen", "solid"), "--frozen solid: choose from no, own, one"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, flags, message, fork, capsys):
    with pytest.raises(SystemExit) as stop:
        fork(name).train("--l2", 1e-3, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------
# Each by itself: training


def test_a_late_penalty_is_zero_outside_its_window(fork):
    copy = fork("late-penalty")
    (late,) = copy.train("--l2", 1e-3, "--penalty-from", 0.5)
    (early,) = copy.train("--l2", 1e-3, "--penalty-until", 0.5)
    assert [bool(penalty) for penalty in penalties(late)] == [False, False, True, True]
    assert [bool(penalty) for penalty in penalties(early)] == [True, True, False, False]


def test_the_side_that_bears_no_penalty_shrinks_no_faster_than_without_one(fork):
    copy = fork("one-side")
    free, enc, dec = (
        copy.sizes("--l2", l2, "--penalize", side) for l2, side in ((0, "enc"), (0.1, "enc"), (0.1, "dec"))
    )
    assert enc.enc < 0.8 * free.enc
    assert enc.dec > 0.98 * free.dec
    assert dec.dec < 0.8 * free.dec
    assert dec.enc > 0.98 * free.enc


def test_the_group_lasso_is_the_sum_of_norms_and_takes_features_away(fork):
    copy = fork("group-lasso")
    free, shrunk = (copy.sizes("--groups", groups) for groups in (0, 0.1))
    assert shrunk.enc < 0.8 * free.enc
    (trainer,) = copy.train("--groups", 0.1)
    by_hand = sum(
        float(np.sqrt((row.numpy() ** 2).sum())) for W in (trainer.sae.encoder, trainer.sae.W_dec) for row in W.data
    )
    assert copy.sae.weight_penalty(trainer.sae, trainer.hp).item() == pytest.approx(0.1 * by_hand, rel=1e-5)


def test_decoupled_decay_shrinks_weights_without_a_penalty_in_the_loss(fork):
    copy = fork("decoupled-decay")
    free, shrunk = (copy.sizes("--weight-decay", decay) for decay in (0, 5))
    assert max(shrunk.enc / free.enc, shrunk.dec / free.dec) < 0.8
    (trainer,) = copy.train("--weight-decay", 5)
    assert penalties(trainer) == [0, 0, 0, 0]


def test_decoupled_decay_takes_a_share_of_the_weights_each_step_until_it_stops(fork):
    copy = fork("decoupled-decay")
    (decayed,) = copy.train("--weight-decay", 5, "--weight-decay-until", 0.5, "--tied-init")
    hp = decayed.hp
    by_hand = copy.sae.Trainer(replace(hp, weight_decay=0.0))
    for x in itertools.islice(copy.train_mnist.batches(copy.splits[0], hp), hp.steps):
        matrices = (by_hand.sae.encoder, by_hand.sae.W_dec)  # biases are left alone
        before = [W.data.clone() for W in matrices]
        by_hand.train_step(x)
        for W, old in zip(matrices, before):
            W.data -= hp.lr * 5 * old * (by_hand.step <= 20)
    for a, b in zip(decayed.sae.parameters(), by_hand.sae.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_a_frozen_decoder_stays_as_it_was_drawn(arch, fork):
    copy = fork("frozen-decoder")
    for choice, alike in (("own", False), ("one", True)):
        trainers = copy.train("--frozen", choice, "--arch", arch, "--k", 8, "--tied-init", "--seed", 0, 1)
        for trainer in trainers:
            assert torch.equal(trainer.sae.W_dec, copy.sae.Trainer(trainer.hp).sae.W_dec)
            assert not torch.equal(trainer.sae.W_enc, copy.sae.Trainer(trainer.hp).sae.W_enc)
        a, b = (trainer.sae for trainer in trainers)
        assert torch.equal(a.W_dec, b.W_dec) == alike
        assert not torch.equal(a.W_enc, b.W_enc)


def test_jumprelu_learns_its_thresholds_resumes_and_is_compared_across_seeds(fork, tmp_path, monkeypatch, capsys):
    copy = fork("jumprelu")
    trainers = copy.train(
        "--arch", "jumprelu", "--sparsity", 0.1, "--l2", 0, 1e-3, "--seed", 0, 1, save=tmp_path / "runs"
    )
    assert not any(torch.equal(t.sae.threshold, torch.full((64,), 0.01)) for t in trainers)
    copy.evaluate.main(["seeds", str(tmp_path / "runs")])
    assert "l2 0.001" in capsys.readouterr().out
    # Stopped half way and gone on with: the same weights
    whole, hp = trainers[0], trainers[0].hp
    first = copy.sae.Trainer(hp)
    for _, x in zip(range(20), copy.train_mnist.batches(copy.splits[0], hp)):
        first.train_step(x)
    copy.sae.save_checkpoint(first, tmp_path / "half")
    second = copy.sae.Trainer(hp)
    copy.sae.resume(second, tmp_path / "half")
    copy.sae.fit({tmp_path / "half": second}, copy.train_mnist.batches(copy.splits[0], hp, first=20))
    assert weights([second]) == weights([whole])


def test_the_gradient_of_a_jumprelu_threshold_is_that_of_the_paper(fork):
    copy = fork("jumprelu")
    pre_acts, threshold = torch.tensor([[0.5, 0.511], [0.49, 0.2]]), torch.tensor([0.5, 0.5], requires_grad=True)
    acts = pre_acts.relu() * copy.sae.Above.apply(pre_acts, threshold)
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (acts * gradient).sum().backward()
    # -threshold / bandwidth times the gradient, summed over inputs within half a bandwidth, but with the input's own
    # value in place of the threshold, from which it is at most half a bandwidth away
    by_hand = [-(1.0 * 0.5 + 3.0 * 0.49) / 0.03, -(2.0 * 0.511) / 0.03]
    assert threshold.grad.tolist() == pytest.approx(by_hand, rel=1e-5)


# ---------------------------------------------------------------------------------------------------
# Each by itself: analysis


@pytest.fixture
def two_seeds(tmp_path):
    """For a copy, the folders of four runs: l2 0 and 0.001 of seeds 0 and 1."""

    def trained(copy):
        copy.train("--l2", 0, 1e-3, "--seed", 0, 1, "--tied-init", save=tmp_path / "runs")
        return sorted((tmp_path / "runs").iterdir(), key=lambda run: ("l2-0.001" in run.name, run.name))

    return trained


def test_a_cleaned_encoder_does_the_same_to_data_and_nothing_where_there_are_none(
    fork, two_seeds, tmp_path, monkeypatch, capsys
):
    copy = fork("clean-encoder")
    runs = two_seeds(copy)
    copy.script("clean_encoder.py", monkeypatch, capsys, 1e-6, tmp_path / "clean", "glyphs", *runs)
    for run in runs:
        before, after = copy.sae.SAE.load(run), copy.sae.SAE.load(tmp_path / "clean" / run.name)
        never = copy.splits[1].std(0) == 0  # pixels that always have one value
        assert never.any()
        assert after.W_enc[never].abs().max() < 1e-4 < before.W_enc[never].abs().max()
        assert torch.allclose(after.pre_acts(copy.splits[1]), before.pre_acts(copy.splits[1]), atol=0.01)
        assert torch.equal(after.W_dec, before.W_dec)
    copy.evaluate.main(["seeds", str(tmp_path / "clean")])
    assert "l2 0.001" in capsys.readouterr().out


def test_what_died_counts_the_lost_and_what_they_were_worth(fork, two_seeds, tmp_path, monkeypatch, capsys):
    copy = fork("what-died")
    plain, penalised = two_seeds(copy)[::2]
    said = copy.script("what_died.py", monkeypatch, capsys, "glyphs", plain, penalised)
    a, b = copy.sae.SAE.load(plain), copy.sae.SAE.load(penalised)
    rows = [torch.nn.functional.normalize(s.W_dec[copy.evaluate.alive_by_weight(s)]).detach() for s in (a, b)]
    lost = [i for i, row in enumerate(rows[0]) if all(abs(float(row @ other)) <= 0.5 for other in rows[1])]
    assert f"{len(lost)} lost" in said
    x = copy.splits[1]
    for features, name in (([], "nothing"), (lost, "the lost")):
        acts = a.encode(x).detach()
        acts[:, copy.evaluate.alive_by_weight(a).nonzero().flatten()[features]] = 0
        error = (a.decode(acts).detach() - x).square().sum() / (x - x.mean(0)).square().sum()
        assert float(re.search(rf"without {name}: fve (\S+)", said)[1]) == pytest.approx(1 - error.item(), abs=1e-4)


def test_what_they_carry_divides_the_features_that_fire_among_three_classes(fork, two_seeds, monkeypatch, capsys):
    copy = fork("what-they-carry")
    runs = two_seeds(copy)
    said = copy.script("what_they_carry.py", monkeypatch, capsys, "glyphs", *runs)
    form = r"(\w+) shared: (\d+) features, alone \[\s*(\S+?)\], as many alike \[\s*(\S+?)\]"
    rows = [re.search(form, line).groups() for line in said.splitlines()]
    assert [row[0] for row in rows] == ["always", "sometimes", "never"] * 2
    x = copy.splits[1]
    fired = [int((copy.sae.SAE.load(run).encode(x) > 0).any(0).sum()) for run in runs]
    for found, of_seeds in zip((rows[:3], rows[3:]), (fired[:2], fired[2:])):
        assert sum(int(row[1]) for row in found) == pytest.approx(np.mean(of_seeds), abs=1.5)
        for _, n, alone, alike in found:
            if n == "0":
                assert alone == alike  # nothing is as good as nothing
