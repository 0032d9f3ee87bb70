"""train_mnist.py: images, order of batches, sweeps, interruption; as a user runs it, and on real MNIST where given."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import stop_at_checkpoint

import train_mnist
from sae import SAE, UserError
from train_mnist import DATA, batches, draw_glyphs, load_images, parse

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--data", "glyphs", "--d-sae", "64", "--epochs", "1", "--batch-size", "1000"]
REAL_MNIST = os.environ.get("SAE_MNIST_DIR")
needs_mnist = pytest.mark.skipif(not REAL_MNIST, reason="SAE_MNIST_DIR names no folder with MNIST/raw in it")


def command(*arguments, **others):
    line = [sys.executable, "train_mnist.py", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, **others)


def settings(*line):
    """The Hparams of a command line for one SAE."""
    (hp,) = parse([*line])[1].values()
    return hp


def weights(folder):
    return (Path(folder) / "sae_weights.safetensors").read_bytes()


# --- images


def test_glyphs_are_the_same_every_time_and_all_different():
    images = draw_glyphs(500)
    assert images.shape == (500, 784)
    assert torch.equal(images, draw_glyphs(500))
    assert not torch.equal(images, draw_glyphs(500, seed=1))
    assert len(images.unique(dim=0)) == 500
    assert images.min() == 0
    assert images.max() > 0.9
    ink = images.view(-1, 28, 28)
    assert (ink.sum((1, 2)) > 10).all(), "every image shows something"
    edge = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], 1)
    assert (edge.sum(1) > 0).float().mean() < 0.05, "digits stay inside the frame"


def test_every_epoch_shows_every_image_once_in_another_order():
    images = torch.arange(1050.0)[:, None]
    hp = settings("--batch-size", "100")
    stream = batches(images, hp)
    epochs = [torch.cat([next(stream) for _ in range(11)]).flatten() for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, images.flatten())
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


@pytest.mark.parametrize("first", [1, 10, 11, 25])
def test_batches_can_start_anywhere_in_the_stream(first):
    images, hp = torch.randn(1050, 2), settings("--batch-size", "100")
    stream, later = batches(images, hp), batches(images, hp, first)
    for _ in range(first):
        next(stream)
    for _ in range(15):
        assert torch.equal(next(stream), next(later))


def test_seed_and_data_seed_act_apart(tmp_path):
    seen = {}
    images = draw_glyphs(2000)
    for seed, data_seed in ((0, 0), (1, 0), (0, 1)):
        hp = settings(*TINY, "--seed", str(seed), "--data-seed", str(data_seed))
        trainer = train_mnist.Trainer(hp)
        stream = batches(images, hp)
        seen[seed, data_seed] = trainer.sae.W_dec.detach().clone(), torch.stack([next(stream) for _ in range(4)])
    weights, order = 0, 1
    assert torch.equal(seen[0, 0][order], seen[1, 0][order])
    assert not torch.equal(seen[0, 0][weights], seen[1, 0][weights])
    assert torch.equal(seen[0, 0][weights], seen[0, 1][weights])
    assert not torch.equal(seen[0, 0][order], seen[0, 1][order])


@pytest.mark.parametrize("n", [3, 8, 11, 16, 40])
def test_partners_stand_below_their_features_whatever_their_number(n, monkeypatch):
    saes = []
    for order in (torch.arange(n), torch.arange(n).flip(0)):
        saes.append(SAE(784, n, "relu"))
        rows = torch.randn(n, 784, generator=torch.Generator().manual_seed(0))[order]
        with torch.no_grad():
            saes[-1].encoder.copy_(rows)
            saes[-1].W_dec.copy_(rows)
    drawn = []
    monkeypatch.setattr(train_mnist, "draw_tiles", lambda *args: drawn.append(args))
    groups = [{"label": "name", "saes": saes}]
    train_mnist.plot_pairs(groups)
    _, features, titles, columns, _ = drawn[0]
    shown = [place for place, title in enumerate(titles) if title]
    assert len(shown) == min(8, n)
    for place in shown:
        assert torch.equal(features[place], features[place + columns])
    monkeypatch.undo()
    train_mnist.plot_pairs(groups * 3)  # and it can be drawn, in rows of two


# --- sweeps and settings


def test_lists_sweep_their_product_once_each():
    line = ["--arch", "relu", "topk", "--k", "8", "16", "--l2", "0", "1e-5", "--seed", "0", "1", "1"]
    names = {folder.name for folder in parse(line)[1]}
    assert len(names) == 2 * 2 * 1 + 2 * 2 * 2  # relu does not know k
    assert "topk_k16_l2-1e-05_seed1" in names
    assert "relu_l2-0_seed0" in names
    (both,) = parse(["--tied-init", "--unit-norm", "--epochs", "2"])[1]
    assert both.name == "relu_l2-0_tied-init_unit-norm_2-epochs_seed0"
    assert len(parse(["--tied-init", "off", "on", "--clip", "0", "1"])[1]) == 4


def test_the_defaults_are_the_study():
    hp = settings()
    assert (hp.arch, hp.d_in, hp.d_sae, hp.sparsity, hp.lr, hp.batch_size) == ("relu", 784, 1568, 0.1, 1e-3, 512)
    assert (hp.steps, hp.warmup, hp.decay, hp.clip) == (100 * 118, 0, 0, 0)
    assert (hp.reduction, hp.l1, hp.l2, hp.dead_after) == ("mean", 0, 0, 300_000)
    assert (hp.tied_init, hp.unit_norm, hp.biases) == (False, False, False)
    tied = settings("--tied-init", "--unit-norm")
    assert (tied.tied_init, tied.unit_norm, tied.biases) == (True, True, True)
    glyphs = settings("--data", "glyphs")
    assert (glyphs.d_sae, glyphs.batch_size, glyphs.steps) == (512, 128, 20 * 157)


def test_a_longer_run_of_relu_starts_as_the_shorter_one():
    """At a constant rate and without k to anneal; so figures at 20 epochs are those of a 100-epoch run on its way."""
    images = draw_glyphs(2000)
    saes = []
    for epochs in (1, 3):
        hp = settings(*TINY, "--epochs", str(epochs), "--l2", "1e-5")
        trainer, stream = train_mnist.Trainer(hp), batches(images, hp)
        for _ in range(15):
            trainer.train_step(next(stream))
        saes.append(trainer.sae)
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)


# --- the whole command


def test_the_command_trains_measures_draws_and_compares(tmp_path, capsys):
    line = [*TINY, "--arch", "relu", "matryoshka", "--l2", "0", "1e-5", "--seed", "0", "1", "--k", "4"]
    train_mnist.main([*line, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    runs = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert len(runs) == 8
    for run in runs:
        wanted = {
            "cfg.json",
            "sae_weights.safetensors",
            "hparams.json",
            "metrics.jsonl",
            "quality.json",
            "covariance.npy",
            "features.png",
        }
        assert {p.name for p in run.iterdir()} == wanted
        assert json.loads((run / "hparams.json").read_text())["complete"] is True
        result = json.loads((run / "quality.json").read_text())
        assert result["inputs"] == 2000
        assert 0 < result["l0"] < 64
        assert SAE.load(run).metadata["hook_name"] == "pixels"
    assert len(json.loads((tmp_path / "consistency.json").read_text())["groups"]) == 4
    assert (tmp_path / "pairs.png").exists()
    assert out.count("always shared") == 1
    assert "| matryoshka, l2 1e-5 " in out
    before = {run: weights(run) for run in runs}
    times = {run: (run / "sae_weights.safetensors").stat().st_mtime_ns for run in runs}
    train_mnist.main([*line, "--out", str(tmp_path)])  # nothing is trained again
    assert "training" not in capsys.readouterr().out
    for run in runs:
        assert weights(run) == before[run]
        assert (run / "sae_weights.safetensors").stat().st_mtime_ns == times[run]


def test_interrupted_and_repeated_ends_with_the_same_weights(tmp_path):
    # CHECKPOINT_SECONDS is patched so that a kill finds a checkpoint of a short run
    patched = "import train_mnist, sae; sae.CHECKPOINT_SECONDS = 0.2; sae.run_command(train_mnist.main)"

    def start(out):
        line = [sys.executable, "-c", patched, *TINY, "--epochs", "15", "--l2", "1e-5", "--tied-init"]
        others = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        return subprocess.Popen([*line, "--out", str(tmp_path / out)], cwd=ROOT, text=True, **others)

    hows = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    whole, running = start("whole"), {how: start(how.name) for how in hows}
    stop_at_checkpoint({how: (process, tmp_path / how.name) for how, process in running.items()})
    assert whole.communicate()[1] is not None
    assert whole.returncode == 0
    said = {how: process.communicate()[1] for how, process in running.items()}
    assert running[signal.SIGINT].returncode == 1
    assert said[signal.SIGINT].strip().splitlines()[-1].startswith("interrupted: the same command goes on")
    assert "Traceback" not in said[signal.SIGINT]
    assert not list(tmp_path.glob("SIG*/*/sae_weights.safetensors"))
    again = [start(how.name) for how in hows]
    for process in again:
        process.communicate()
        assert process.returncode == 0
    (expected,) = (tmp_path / "whole").glob("relu*")
    for how in hows:
        run = tmp_path / how.name / expected.name
        assert weights(run) == weights(expected)
        assert (run / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
        assert not (run / "checkpoint.pt").exists()


# --- bad input: one line, its exit status, nothing written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "gated"], "--arch gated: choose from relu, topk, batchtopk, matryoshka"),
        (["--l2", "-1"], "--l2 -1.0: give a number from 0 to"),
        (["--arch", "topk", "--k", "100"], "--k 100: give a number from 1 to --d-sae, which is 64"),
        (["--epochs", "0"], "--epochs: 0: give 1 or more"),
        (["--batch-size", "0"], "--batch-size 0: give a number from 1"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--device", "abacus"], "--device abacus"),
        (["--l3", "1"], "unrecognized arguments: --l3"),
        (["--data", "nowhere"], "--data nowhere: no nowhere/MNIST/raw"),
    ],
)
def test_a_command_line_that_cannot_work_says_why_and_writes_nothing(arguments, message, tmp_path, refusal):
    assert message in refusal(train_mnist.main, [*TINY, "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_with_exit_status_two_for_the_command_line_and_one_for_all_else(tmp_path):
    done = command(*TINY, "--l1", "-3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --l1 -3.0: give a number from 0 to")
    (tmp_path / "file").write_text("")
    other = command(*TINY, "--out", tmp_path / "file" / "runs")
    assert other.returncode == 1
    assert other.stderr.startswith("error: nothing can be written in")
    assert [done.stderr.count("\n"), other.stderr.count("\n")] == [1, 1]


def test_a_folder_of_another_run_is_left_alone(tmp_path, capsys):
    train_mnist.main([*TINY, "--out", str(tmp_path)])
    (run,) = (p for p in tmp_path.iterdir() if p.is_dir())
    found = json.loads((run / "hparams.json").read_text())
    found["hparams"]["clip"] = 5.0
    (run / "hparams.json").write_text(json.dumps(found))
    before = weights(run)
    with pytest.raises(UserError, match=r"--clip 5\.0 instead of 0\.0: give another --out"):
        train_mnist.main([*TINY, "--out", str(tmp_path)])
    assert weights(run) == before


def test_a_loss_that_becomes_nan_ends_with_one_line_and_keeps_what_is_finished(tmp_path):
    train_mnist.main([*TINY, "--out", str(tmp_path)])
    done = command(*TINY, "--l2", "1e38", "--epochs", "10", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: the loss is not finite at step 100: lower --lr")
    assert "Traceback" not in done.stderr
    finished = [p for p in tmp_path.iterdir() if (p / "sae_weights.safetensors").exists()]
    assert len(finished) == 1


def test_no_network_offers_the_glyphs(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(UserError, match="--data glyphs, which needs no network"):
        load_images("mnist")


def test_a_folder_without_mnist_is_not_filled_from_the_network(tmp_path):
    with pytest.raises(UserError, match=r"no .*train-images-idx3-ubyte\.gz: give a folder with MNIST/raw in it"):
        load_images(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_archive_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in torchvision.datasets.MNIST.resources:
        (raw / name).write_bytes(gzip.compress(b"\0" * 1000)[:-10])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_images(str(tmp_path))


def test_an_unpacked_file_cut_short_is_no_traceback(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in torchvision.datasets.MNIST.resources:
        (raw / name).with_suffix("").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(UserError, match="no MNIST to be had"):
        load_images(str(tmp_path))


# --- the real thing


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist") / "copy"
    shutil.copytree(REAL_MNIST, folder)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    return folder


@needs_mnist
def test_real_mnist_loads_as_two_tensors_of_pixels(mnist):
    train, test = load_images(str(mnist))
    assert train.shape == (DATA["mnist"][0], 784)
    assert test.shape == (10_000, 784)
    assert (train.min(), train.max()) == (0, 1)
    assert train.mean().item() == pytest.approx(0.1307, abs=1e-4)  # the well-known mean of MNIST


@needs_mnist
def test_real_mnist_is_learnt_in_one_epoch(mnist, tmp_path):
    line = ["--data", mnist, "--epochs", 1, "--d-sae", 256, "--tied-init", "--l2", "1e-5", "--out", tmp_path]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    (run,) = (p for p in tmp_path.iterdir() if p.is_dir())
    result = json.loads((run / "quality.json").read_text())
    assert result["inputs"] == 10_000
    assert result["fve"] > 0.75
