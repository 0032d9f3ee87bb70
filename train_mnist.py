"""Train SAEs on images of digits and see which features recur across seeds.

    python train_mnist.py --data glyphs --l2 0 1e-5 --seed 0 1 2      no network needed, minutes on two cores
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2                    MNIST, the study's plain setting
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2 --tied-init --unit-norm

Lists sweep: the product of all of them is trained, one run folder each, on the same order of batches. A
finished run is not trained again and an interrupted one goes on, so the same command can always be repeated.
At the end: the table of feature consistency over seeds, and pictures.
"""

import argparse
import hashlib
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

import evaluate
from sae import (
    ARCHS,
    L2_FORMS,
    Hparams,
    Parser,
    RunError,
    Trainer,
    UsageError,
    check_writable,
    first_line,
    fit,
    is_complete,
    pick_device,
    run_command,
    run_name,
    stop_signal,
    write_hparams,
    write_json,
)

N_IMAGES = {"mnist": 60_000, "glyphs": 20_000}
# MNIST as the study has it; glyphs for a first look within minutes
DEFAULTS = {
    "mnist": {"d_sae": 1568, "epochs": 100, "batch_size": 512},
    "glyphs": {"d_sae": 512, "epochs": 20, "batch_size": 128},
}


# ---------------------------------------------------------------------------------------------------
# Images, each split one tensor [n, 784] of pixels in [0, 1]


def load_images(data):
    """Training and test images of `data`: "mnist", "glyphs" or a folder with MNIST in it. Raises UsageError."""
    if data == "glyphs":
        images = draw_glyphs(N_IMAGES["glyphs"] + 2_000)
        return images[: N_IMAGES["glyphs"]], images[N_IMAGES["glyphs"] :]
    from torchvision.datasets import MNIST  # here, because glyphs do without and it takes seconds to import

    root = Path("data") if data == "mnist" else Path(data)
    if data != "mnist":
        check_mnist_folder(root, MNIST.resources)
    try:
        splits = [MNIST(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        way_out = "give --data glyphs, which needs no network"
        if data != "mnist":
            way_out = "give a folder where you may write, without the damaged files"
        raise UsageError(f"--data {data}: no MNIST to be had ({first_line(error)}): {way_out}") from None
    return [split.data.flatten(1).float() / 255 for split in splits]


def check_mnist_folder(root, resources):
    """torchvision would download into a folder that lacks MNIST; one that the user names must have it, whole."""
    raw = root / "MNIST" / "raw"
    for archive, md5 in resources:
        path = raw / archive
        if path.with_suffix("").exists():
            continue
        if not path.exists():
            raise UsageError(f"--data {root}: no {path}: give a folder with MNIST/raw in it, or --data glyphs")
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            raise UsageError(f"--data {root}: {path} is damaged (its checksum is not MNIST's): fetch it again")


def draw_glyphs(n, seed=0):
    """n images of the digits, [n, 784], from the fonts that ship with matplotlib under random affine warps."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [f"DejaVu{family}{style}" for family in ("Sans", "SansMono", "Serif") for style in ("", "-Bold")]
    names += ["DejaVuSans-Oblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic"]
    names += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmtt10"]
    masters = []  # each digit of each font once, large, centred by its ink
    for name, digit in itertools.product(names, "0123456789"):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 36)
        left, top, right, bottom = font.getbbox(digit)
        image = Image.new("L", (56, 56))
        ImageDraw.Draw(image).text((28 - (left + right) / 2, 28 - (top + bottom) / 2), digit, fill=255, font=font)
        masters.append(np.asarray(image, dtype=np.float32) / 255)
    masters = torch.from_numpy(np.stack(masters))[:, None]
    generator = torch.Generator().manual_seed(seed)

    def between(low, high):
        return torch.rand(n, generator=generator) * (high - low) + low

    which = torch.randint(len(masters), (n,), generator=generator)
    angle, shear, scale = between(-0.25, 0.25), between(-0.25, 0.25), between(0.65, 0.9)
    stretch = between(0.85, 1.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos * stretch, shear - sin, between(-0.08, 0.08), sin * stretch, cos, between(-0.08, 0.08)]
    affine = torch.stack(rows, 1).view(n, 2, 3)
    # Blurred to the resolution of the result, so that sampling at half of it leaves no jagged edges
    masters, images = F.avg_pool2d(masters, 3, stride=1, padding=1), []
    for part in torch.arange(n).split(1000):
        grid = F.affine_grid(affine[part], (len(part), 1, 28, 28), align_corners=False)
        images.append(F.grid_sample(masters[which[part]], grid, align_corners=False))
    return torch.cat(images).flatten(1).clamp(0, 1)


def batches(images, hp, first=0):
    """Endless batches [B, 784] from number `first` on, all images once per epoch (its last batch is smaller).

    The order is a function of data_seed and epoch alone: every SAE sees the same, and there is no state to keep.
    """
    per_epoch = -(-len(images) // hp.batch_size)
    for epoch in itertools.count(first // per_epoch):
        generator = torch.Generator().manual_seed(hp.data_seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for index in range(first % per_epoch, per_epoch):
            yield images[order[index * hp.batch_size : (index + 1) * hp.batch_size]]
        first = 0


# ---------------------------------------------------------------------------------------------------
# Training


def hparams(args, arch, k, l1, l2, seed):
    """The study's settings for images, with what the command line changes of them."""
    n_images = N_IMAGES[args.dataset]
    return Hparams(
        arch=arch,
        d_in=784,
        d_sae=args.d_sae,
        k=k if arch != "relu" else Hparams.k,
        sparsity=args.sparsity if arch == "relu" else 0.0,
        l1=l1,
        l2=l2,
        l1_form="mean",
        l2_form=args.l2_form,
        reduction="mean",
        tied_init=args.tied_init,
        biases=args.tied_init,  # the plain setting has none at all
        unit_norm=args.unit_norm,
        lr=args.lr,  # of plain Adam: no warm-up, no decay, no clipping
        warmup=0,
        decay=0.0,
        clip=0.0,
        batch_size=args.batch_size,
        steps=args.epochs * -(-n_images // args.batch_size),
        dead_after=5 * n_images,
        seed=seed,
        data_seed=args.data_seed,
        data=args.dataset,
        dtype=args.dtype,
    )


def sweep(args):
    """The SAEs of the command line, the product of its lists: {name of the run: hyperparameters}."""
    runs, usual = {}, parse(["--data", args.dataset])
    for arch, k, l1, l2, seed in itertools.product(args.arch, args.k, args.l1, args.l2, args.seed):
        hp = hparams(args, arch, k, l1, l2, seed)
        defaults = hparams(usual, arch, 32, 0.0, 0.0, 0)
        defaults.biases = hp.biases  # follows from tied_init, so a name need not say both
        name = run_name(hp, defaults)
        if runs.setdefault(name, hp) != hp:
            raise UsageError(f"--l1, --l2: two of the values are the same to 6 digits, both would be {name}")
    return runs


def train(hp, images, folder, device, stop):
    """Train one SAE on images [n, 784], on the device, or go on with it. Returns its Trainer."""
    trainer = Trainer(hp, next(batches(images, hp)), device)
    trainer.resume(folder)
    write_hparams(folder, hp, complete=False, bfloat16=trainer.bfloat16)
    fit({folder: trainer}, batches(images, hp, first=trainer.step), stop)
    return trainer


def finish(trainer, folder, test_images):
    """Measure a trained SAE on the test images, draw its features, and write its run folder."""
    hp = trainer.hp
    metadata = {name: getattr(hp, name) for name in ("l1", "l2", "l1_form", "l2_form", "seed", "data_seed")}
    metadata |= {"model_name": hp.data, "hook_name": "pixels", "context_size": 1, "prepend_bos": False}
    sae = trainer.sae.eval()
    result, mean_acts, _ = evaluate.quality(sae, test_images.split(1000))
    write_json(folder / "quality.json", result)
    evaluate.save_covariance(evaluate.covariance(test_images), folder)
    evaluate.save_figure(plot_features(sae, mean_acts), folder / "features.png")
    trainer.finish(folder, metadata)
    print(
        f"{folder}: fve {result['fve']:.4f}, l0 {result['l0']:.1f}, of {hp.d_sae} features "
        f"{result['alive']} are alive and {hp.d_sae - result['dead_by_use']} are used"
    )


# ---------------------------------------------------------------------------------------------------
# Pictures


def draw_tiles(features, titles, columns, heading):
    """Features [n, 784] as images in rows of `columns`, each on its own scale: red adds ink, blue takes it away."""
    rows, height, width = -(-len(features) // columns), 38, 32
    canvas = np.zeros((max(rows, 1) * height + 2, columns * width))
    figure = Figure(figsize=(7, 0.6 + 7 * canvas.shape[0] / canvas.shape[1]))
    axis = figure.subplots()
    for n, (feature, title) in enumerate(zip(features, titles)):
        top, left = n // columns * height + 10, n % columns * width + 2
        canvas[top : top + 28, left : left + 28] = feature.view(28, 28) / feature.abs().max().clamp(min=1e-12)
        axis.text(left + 14, top - 2, title, ha="center", fontsize=9)
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), 28, 28, fill=False, linewidth=0.5))
    axis.imshow(canvas, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title(heading, fontsize=11)
    axis.axis("off")
    return figure


@torch.no_grad()
def plot_features(sae, mean_acts, n=64):
    """The strongest decoder features; strength is mean activation times norm, the feature's share of the ink."""
    W_dec = sae.W_dec.cpu()
    strength = mean_acts * W_dec.norm(dim=1)
    order = strength.argsort(descending=True)[:n]
    titles = [f"{strength[i]:.2f}" for i in order]
    return draw_tiles(W_dec[order], titles, 8, "Decoder features, strongest first (mean activation x norm above each)")


@torch.no_grad()
def plot_pairs(a, b, name, columns=8):
    """Alive features of one SAE above their one-to-one partners (Hungarian, decoder) in another, best to worst."""
    features_a, features_b = (sae.W_dec[evaluate.alive_by_weight(sae)] for sae in (a, b))
    cos = evaluate.unit_rows(features_a) @ evaluate.unit_rows(features_b).T
    rows, partners = evaluate.assign(cos.abs())
    cos = cos.numpy()
    order = np.argsort(-np.abs(cos[rows, partners]))
    order = order[np.linspace(0, len(order) - 1, min(2 * columns, len(order))).astype(int)]
    features, titles = [], []
    for start in range(0, len(order), columns):
        i, j = rows[order[start : start + columns]], partners[order[start : start + columns]]
        features += [*features_a[i], *features_b[j]]
        titles += [f"{c:+.2f}" for c in cos[i, j]] + [""] * len(j)
    heading = f"{name}: features of one seed, each above its partner\nin another, with their cosine; best pair to worst"
    return draw_tiles(features, titles, columns, heading)


# ---------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="mnist", metavar="mnist|glyphs|DIR", help="what to train on; mnist is downloaded to data/")
    add("--arch", nargs="+", default=["relu"], metavar="ARCH", help=f"any of {', '.join(ARCHS)}")
    add("--l1", nargs="+", type=float, default=[0.0], help="weight of the L1 penalty; the study's is 1e-3")
    add("--l2", nargs="+", type=float, default=[0.0], help="weight of the L2 penalty; the study's is 1e-5")
    add("--l2-form", default="squares", help=f"of the L2 penalty, one of {', '.join(L2_FORMS)}")
    add("--seed", nargs="+", type=int, default=[0], help="initialisation")
    add("--data-seed", type=int, default=0, help="order of the images")
    add("--tied-init", action="store_true", help="encoder starts as decoder's transpose; adds biases")
    add("--unit-norm", action="store_true", help="decoder rows are kept at norm 1")
    add("--sparsity", type=float, default=0.1, help="weight of the mean activation, relu only (default 0.1)")
    add("--k", nargs="+", type=int, default=[32], help="active latents, all but relu")
    add("--d-sae", type=int, default=None, help="number of latents (default 1568; glyphs 512)")
    add("--epochs", type=int, default=None, help="passes over the images (default 100; glyphs 20)")
    add("--batch-size", type=int, default=None, help="images per step (default 512; glyphs 128)")
    add("--lr", type=float, default=1e-3)
    add("--dtype", default="float32", help="of matrix products: float32, bfloat16, or auto: the faster one here")
    add("--out", default=None, metavar="DIR", help="where run folders go (default runs/mnist or runs/glyphs)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    args.dataset = "glyphs" if args.data == "glyphs" else "mnist"
    for name, usual in (DEFAULTS[args.dataset] | {"out": f"runs/{args.dataset}"}).items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    if args.epochs < 1 or args.batch_size < 1:
        raise UsageError(f"--epochs {args.epochs} --batch-size {args.batch_size}: give numbers above 0")
    args.out = Path(args.out)
    return args


def main(argv=None):
    args = parse(argv)
    runs = {args.out / name: hp for name, hp in sweep(args).items()}
    device = pick_device(args.device)
    check_writable(args.out, "--out")
    missing = [folder for folder, hp in runs.items() if not is_complete(folder, hp)]
    if missing:
        images, test_images = (split.to(device) for split in load_images(args.data))
        print(f"training {len(missing)} of {len(runs)} SAEs on {len(images):,} images, {device}, into {args.out}")
        with stop_signal() as stop:
            for folder in missing:
                if is_complete(folder, runs[folder]):  # by another process, meanwhile
                    continue
                trainer = train(runs[folder], images, folder, device, stop)
                finish(trainer, folder, test_images)
                if stop.is_set():
                    raise RunError(f"interrupted after {folder}: the same command goes on from there")
    if len(set(args.seed)) < 2:
        print("one seed: give --seed 0 1 2 for the table of consistency over seeds")
        return
    groups = evaluate.compare_seeds(list(runs))
    print(evaluate.consistency_table(groups))
    evaluate.write_consistency(groups, args.out / "consistency.json")
    for group in groups:
        evaluate.save_figure(plot_pairs(*group["saes"][:2], group["label"]), args.out / f"pairs_{group['label']}.png")


if __name__ == "__main__":
    run_command(main)
