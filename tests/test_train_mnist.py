"""train_mnist.py: images, settings, whole commands; real MNIST where SAE_MNIST_DIR is set."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import evaluate
import sae
import train_mnist
from sae import ARCHS, SAE, Rows, Trainer, UserError
from train_mnist import draw_glyphs, load_images, parse

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--data", "glyphs", "--d-sae", "64", "--batch-size", "200", "--device", "cpu"]
REAL_MNIST = os.environ.get("SAE_MNIST_DIR")
needs_mnist = pytest.mark.skipif(
    not REAL_MNIST, reason="SAE_MNIST_DIR names no folder with MNIST/raw in it"
)


@pytest.fixture
def few_glyphs(monkeypatch):
    """A tenth of the drawn digits, for commands that take a second."""
    tenth = train_mnist.IMAGE_SETS["glyphs"]._replace(n_train=2000, epochs=2)
    monkeypatch.setitem(train_mnist.IMAGE_SETS, "glyphs", tenth)
    monkeypatch.setattr(train_mnist, "N_TEST_GLYPHS", 500)


def settings(*line):
    """The Hparams of a command line for one SAE."""
    (hp,) = parse([*map(str, line)])[1].values()
    return hp


def command(out, *line):
    """Run a command of few, tiny SAEs; the run folders that there are then."""
    train_mnist.main([*TINY, "--out", str(out), *map(str, line)])
    return sorted(path for path in out.iterdir() if path.is_dir())


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
    centre = (ink.sum((0, 1)) * torch.arange(28)).sum() / ink.sum()
    assert centre.item() == pytest.approx(13.5, abs=0.5)


def write_idx(path, images):
    """Images [n, 28, 28] of bytes in MNIST's format, packed where the name says so."""
    content = struct.pack(">IIII", 2051, *images.shape) + images.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with images that pass for MNIST here, as archives; and the images."""
    generator = np.random.default_rng(0)
    images, hashes = {}, {}
    for name in train_mnist.MNIST_FILES:
        images[name] = generator.integers(0, 256, (30, 28, 28), dtype=np.uint8)
        hashes[name] = write_idx(tmp_path / "MNIST" / "raw" / f"{name}.gz", images[name])
    monkeypatch.setattr(train_mnist, "MNIST_FILES", hashes)
    return tmp_path, images


@pytest.mark.parametrize("packed", [True, False])
def test_images_are_read_from_archives_and_from_unpacked_files(packed, small_mnist):
    folder, images = small_mnist
    if not packed:
        for name in images:
            write_idx(folder / "MNIST" / "raw" / name, images[name])
            (folder / "MNIST" / "raw" / f"{name}.gz").unlink()
    for loaded, original in zip(load_images(str(folder)), images.values()):
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, torch.from_numpy(original.reshape(30, 784)) / 255)


def test_a_file_that_cannot_be_read_is_named_and_not_its_archive(small_mnist):
    folder, images = small_mnist
    name = min(images)
    (folder / "MNIST" / "raw" / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is damaged .*: delete it"):
        load_images(str(folder))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_other_images_in_mnists_format_do_not_pass_for_mnist(suffix, small_mnist):
    folder, images = small_mnist
    for name in images:
        other = images[name].copy()
        other[7, 3, 3] ^= 1
        path = folder / "MNIST" / "raw" / f"{name}{suffix}"
        write_idx(path, other)
        with pytest.raises(UserError, match=path.name):
            load_images(str(folder))
        write_idx(path, images[name])
    load_images(str(folder))


def test_damaged_files_are_named_and_nothing_is_downloaded(small_mnist, monkeypatch):
    folder, images = small_mnist
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)
    raw = folder / "MNIST" / "raw"
    first, second = images
    whole = (raw / f"{first}.gz").read_bytes()
    for damaged in (whole[:-10], whole[:5], b"<html>", whole[:100] + b"x" + whole[101:]):
        (raw / f"{first}.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=first):
            load_images(str(folder))
    (raw / f"{first}.gz").write_bytes(whole)
    (raw / second).write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(UserError, match=second):
        load_images(str(folder))
    (raw / second).unlink()
    (raw / f"{second}.gz").unlink()
    with pytest.raises(UserError, match=f"no .*{second}"):
        load_images(str(folder))


def test_no_network_offers_the_glyphs(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(UserError, match="--data glyphs, which needs no network"):
        load_images("mnist")


@needs_mnist
def test_real_mnist_is_what_its_hashes_say():
    train, test = load_images(REAL_MNIST)  # which may not be writable
    assert train.shape == (train_mnist.IMAGE_SETS["mnist"].n_train, 784)
    assert test.shape == (10_000, 784)
    assert (train.min(), train.max()) == (0, 1)
    assert train.mean().item() == pytest.approx(0.1307, abs=1e-4)  # the well-known mean of MNIST


# --- settings and sweeps


def test_lists_sweep_their_product_once_each():
    line = [
        "--arch",
        "relu",
        "topk",
        "--k",
        "8",
        "16",
        "--l2",
        "0",
        "1e-5",
        "--seed",
        "0",
        "1",
        "1",
    ]
    names = {folder.name for folder in parse(line)[1]}
    assert len(names) == 2 * 2 * 1 + 2 * 2 * 2  # relu has no k
    assert "topk_k16_l2-1e-05_seed1" in names
    assert "relu_l2-0_seed0" in names
    (both,) = parse(["--tied-init", "--unit-norm", "--epochs", "2"])[1]
    assert both.name == "relu_l2-0_tied-init_unit-norm_2-epochs_seed0"
    assert len(parse(["--tied-init", "off", "on", "--clip", "0", "1"])[1]) == 4


def test_the_defaults_are_the_study():
    hp = settings()
    assert (hp.arch, hp.d_in, hp.d_sae, hp.sparsity, hp.lr) == ("relu", 784, 1568, 0.1, 1e-3)
    assert (hp.batch_size, hp.steps) == (512, 100 * 118)
    assert (hp.warmup, hp.decay, hp.clip, hp.reduction, hp.dtype) == (0, 0, 0, "mean", "float32")
    assert (hp.l1, hp.l2, hp.dead_after) == (0, 0, 300_000)
    assert (hp.tied_init, hp.unit_norm, hp.biases) == (False, False, False)
    tied = settings("--tied-init", "--unit-norm")
    assert (tied.tied_init, tied.unit_norm, tied.biases) == (True, True, True)
    glyphs = settings("--data", "glyphs")
    assert (glyphs.d_sae, glyphs.batch_size, glyphs.steps) == (512, 128, 20 * 157)


def test_the_folder_that_images_came_from_is_recorded():
    assert settings().data == "mnist"
    assert settings("--data", "somewhere/else").data == "somewhere/else"
    same = settings("--data", "somewhere/else")
    same.data = "mnist"
    assert same == settings()


def test_seed_and_data_seed_act_apart():
    images = draw_glyphs(1000)
    first, orders = {}, {}
    for seed, data_seed in ((0, 0), (1, 0), (0, 1)):
        hp = settings(*TINY, "--seed", seed, "--data-seed", data_seed)
        batches = Rows(images, scale=1.0).batches(hp, 0, {})
        orders[seed, data_seed] = torch.stack([next(batches) for _ in range(4)])
        first[seed, data_seed] = Trainer(hp).sae.W_dec.detach()
    assert torch.equal(orders[0, 0], orders[1, 0])
    assert not torch.equal(orders[0, 0], orders[0, 1])
    assert torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first[0, 0], first[1, 0])


def test_a_longer_run_of_relu_starts_as_the_shorter_one():
    """Its rate is constant; so figures after 20 epochs are those of a longer run on its way."""
    source = Rows(draw_glyphs(1000), scale=1.0)
    saes = []
    for epochs in (1, 3):
        hp = settings(*TINY, "--epochs", epochs, "--l2", "1e-5")
        trainer, batches = Trainer(hp), source.batches(hp, 0, {})
        for _ in range(12):
            trainer.train_step(next(batches))
        saes.append(trainer.sae)
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)


# --- the whole command


def test_the_command_trains_measures_draws_and_compares(few_glyphs, tmp_path, capsys):
    line = ["--arch", *ARCHS, "--seed", 0, 1, "--k", 4, "--l2", "1e-5"]
    runs = command(tmp_path, *line)
    printed = capsys.readouterr().out
    assert len(runs) == 2 * len(ARCHS)
    _, test_images = load_images("glyphs")
    for run in runs:
        sae = SAE.load(run)
        quality, _ = evaluate.quality(sae, [test_images])
        written = json.loads((run / "quality.json").read_text())
        assert written["inputs"] == 500
        assert written["fve"] == pytest.approx(quality["fve"], abs=1e-5)
        assert sae.metadata["hook_name"] == "pixels"
        covariance = np.load(run / "covariance.npy")
        assert np.allclose(covariance, np.cov(test_images.T.numpy()), atol=1e-5)
        assert (run / "features.png").stat().st_size > 1000
        assert f"{run}: of 64 features {written['alive']} are alive" in printed
    assert len(json.loads((tmp_path / "consistency.json").read_text())["groups"]) == len(ARCHS)
    assert (tmp_path / "pairs.png").stat().st_size > 1000

    times = {path: path.stat().st_mtime_ns for run in runs for path in run.iterdir()}
    assert command(tmp_path, *line) == runs
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nothing is done again"
    assert "to do" not in capsys.readouterr().out


def test_a_command_that_stopped_before_the_pictures_has_saved_its_sae(
    few_glyphs, tmp_path, monkeypatch
):
    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(train_mnist, "plot_features", fail)
        with pytest.raises(ZeroDivisionError):
            command(tmp_path, "--seed", 0, 1)
    runs = sorted(tmp_path.iterdir())
    before = [weights(run) for run in runs]
    assert not any((run / "quality.json").exists() for run in runs)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        assert command(tmp_path, "--seed", 0, 1) == runs
    assert [weights(run) for run in runs] == before
    for run in runs:
        assert (run / "quality.json").exists()
        assert (run / "features.png").exists()


def test_a_command_that_was_interrupted_ends_with_the_same_weights(
    few_glyphs, tmp_path, monkeypatch, capsys
):
    save_checkpoint = sae.save_checkpoint

    def save_and_stop(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    line = [
        *TINY,
        "--epochs",
        "8",
        "--l2",
        "1e-5",
        "--tied-init",
        "--out",
        str(tmp_path / "stopped"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sae, "CHECKPOINT_SECONDS", 0.05)
        patch.setattr(sae, "save_checkpoint", save_and_stop)
        with pytest.raises(SystemExit):
            sae.run_command(lambda: train_mnist.main(line))
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.glob("stopped/*/checkpoint.pt"))
    (stopped,) = command(tmp_path / "stopped", *line)
    (whole,) = command(tmp_path / "whole", *line[:-2])
    assert weights(stopped) == weights(whole)
    assert (stopped / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert not (stopped / "checkpoint.pt").exists()


def test_a_backend_of_notebooks_in_the_environment_breaks_nothing(tmp_path):
    code = "import train_mnist as t; t.draw_glyphs(2); import evaluate; evaluate.new_figure(1)"
    environment = {**os.environ, "MPLBACKEND": "module://no_such_backend"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_of_another_run_is_left_alone(few_glyphs, tmp_path):
    (run,) = command(tmp_path)
    content = json.loads((run / "hparams.json").read_text())
    content["hparams"]["clip"] = 5.0
    (run / "hparams.json").write_text(json.dumps(content))
    before = weights(run)
    with pytest.raises(UserError, match=r"--clip 5\.0 .*give another --out"):
        command(tmp_path)
    assert weights(run) == before


def test_the_others_of_a_sweep_are_measured_and_compared_where_an_sae_diverges(
    few_glyphs, tmp_path, monkeypatch, capsys
):
    drawn = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: drawn.append(path.name))
    with pytest.raises(UserError, match=r"l2-1e\+38\S+_seed0: the loss is not finite.*_seed1: "):
        command(tmp_path, "--l2", 0, "1e38", "--seed", 0, 1)
    assert "shared of alive" in capsys.readouterr().out
    assert "pairs.png" in drawn
    measured = sorted(path.parent.name for path in tmp_path.glob("*/quality.json"))
    assert [name.split("_")[1] for name in measured] == ["l2-0", "l2-0"]


def test_saes_that_all_diverge_are_named_though_none_is_left_to_be_compared(few_glyphs, tmp_path):
    with pytest.raises(UserError, match="the loss is not finite"):
        command(tmp_path, "--l2", "1e38", "--seed", 0, 1)
    assert not list(tmp_path.glob("*/sae_weights.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--l1", "-3"], "--l1"),
        (["--device", "abacus"], "--device abacus"),
        (["--data", "nowhere"], "--data nowhere"),
        (["--epochs", "0"], "--epochs"),
    ],
)
def test_a_command_line_that_cannot_work_names_the_flag_and_writes_nothing(
    arguments, message, tmp_path, refusal
):
    line = [*TINY, "--out", tmp_path / "out", *arguments]
    assert message in refusal(train_mnist.main, line)
    assert not (tmp_path / "out").exists()


@needs_mnist
def test_real_mnist_is_learnt_in_one_epoch(tmp_path):
    line = ["--data", REAL_MNIST, "--epochs", 1, "--d-sae", 256, "--batch-size", 512]
    (run,) = command(tmp_path, *line, "--tied-init", "--l2", "1e-5")
    result = json.loads((run / "quality.json").read_text())
    assert result["inputs"] == 10_000
    assert result["fve"] > 0.75
    assert SAE.load(run).metadata["model_name"] == REAL_MNIST


# --- pictures


def sae_of(rows):
    """An SAE with these decoder rows [n, 784]."""
    sae = SAE(784, len(rows), "relu")
    with torch.no_grad():
        sae.encoder.copy_(rows)
        sae.W_dec.copy_(rows)
    return sae


def group_of(*saes, label="relu, l2 1e-05"):
    return SimpleNamespace(runs=[SimpleNamespace(sae=sae) for sae in saes], label=label)


@pytest.mark.parametrize("n", [3, 8, 11, 40])
def test_partners_stand_below_their_features_whatever_their_number(n, monkeypatch):
    rows = torch.randn(n, 784, generator=torch.Generator().manual_seed(0))
    other = -rows.flip(0)
    drawn = []
    monkeypatch.setattr(train_mnist, "draw_tiles", lambda *arguments: drawn.append(arguments))
    train_mnist.plot_pairs([group_of(sae_of(rows), sae_of(other))])
    ((_, tiles, _, _),) = drawn
    assert len(tiles) == min(8, n)
    for tile in tiles:
        above, below = tile.images
        assert torch.equal(above, -below)
        assert tile.title == "-1.00"
    train_mnist.plot_pairs([group_of(sae_of(rows), sae_of(other))] * 3)


def test_pairs_go_from_the_most_alike_to_the_least():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 784, generator=generator)
    noise = torch.randn(60, 784, generator=generator) * torch.linspace(0, 3, 60)[:, None]
    pairs = train_mnist.example_pairs(sae_of(rows), sae_of(rows + noise), 8)
    cosines = [abs(pair.cosine) for pair in pairs]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] == pytest.approx(1)
    assert cosines[-1] < 0.4
    for pair in pairs:
        expected = torch.cosine_similarity(pair.a, pair.b, dim=0).item()
        assert pair.cosine == pytest.approx(expected)


def test_a_configuration_without_alive_features_is_named_in_the_picture_of_pairs():
    rows = torch.randn(5, 784, generator=torch.Generator().manual_seed(0))
    dead, alive = sae_of(torch.zeros(5, 784)), sae_of(rows)
    groups = [group_of(alive, alive, label="l2 0"), group_of(dead, dead, label="l2 1")]
    left, right = train_mnist.plot_pairs(groups).axes
    assert left.get_title() == "l2 0"
    assert right.get_title() == "l2 1\nno pair of alive features"
    assert not right.axison, "no empty frame"


def test_the_strongest_features_come_first(monkeypatch):
    drawn = []
    monkeypatch.setattr(train_mnist, "draw_tiles", lambda *arguments: drawn.append(arguments))
    rows = torch.eye(784)[:5] * torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    train_mnist.plot_features(sae_of(rows), torch.tensor([9.0, 1, 2, 0, 1]))
    ((_, tiles, _, _),) = drawn
    assert [tile.title for tile in tiles] == ["9.00", "6.00", "5.00", "2.00", "0.00"]
    assert torch.equal(tiles[1].images[0], rows[2])


def test_a_tile_shows_each_pixel_where_it_is_on_a_scale_of_its_own():
    image = torch.zeros(28, 28)
    image[0, 0], image[27, 0], image[0, 27] = 5.0, -2.5, 1.0
    flat = image.flatten()
    tiles = [train_mnist.Tile([flat, 3 * flat], "first"), train_mnist.Tile([flat], "second")]
    axis = evaluate.new_figure(2).subplots()
    train_mnist.draw_tiles(axis, tiles, 1, "")
    (shown,) = axis.get_images()
    canvas = np.array(shown.get_array())
    found = {(row, column): canvas[row, column] for row, column in np.argwhere(canvas)}
    expected = {}
    for top in (10, 40, 81):
        expected[top, 2] = 1.0
        expected[top + 27, 2] = -0.5
        expected[top, 29] = 0.2
    assert found == pytest.approx(expected)
    assert [text.get_text() for text in axis.texts] == ["first", "second"]
