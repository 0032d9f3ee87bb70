"""Train SAEs on images of digits and see which features recur across seeds.

    python train_mnist.py --data glyphs --l2 0 1e-5 --seed 0 1 2      no network needed, minutes on two cores
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2                    MNIST, the study's plain setting
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2 --tied-init --unit-norm

Lists sweep: the product of all of them is trained, one run folder each, on the same order of batches. A
finished run is not trained again and an interrupted one goes on, so the same command can always be repeated.
At the end: the table of feature consistency over seeds, and pictures.
"""

import hashlib
import itertools
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment

import evaluate
from sae import (
    Parser,
    Trainer,
    UserError,
    at_least,
    first_line,
    fit,
    is_complete,
    make_folder,
    pick_device,
    resume,
    run_command,
    save_run,
    sweep,
    write_hparams,
    write_json,
)

# The study's settings for images where they differ from those for Pythia: plain Adam, and glyphs for a first look
IMAGES = {"arch": "relu", "d_sae": 1568, "k": 32, "sparsity": 0.1, "reduction": "mean", "tied_init": False}
IMAGES |= {"lr": 1e-3, "batch_size": 512, "warmup": 0, "decay": 0.0, "clip": 0.0, "dtype": "float32"}
DATA = {  # images to train on, passes over them, settings
    "mnist": (60_000, 100, IMAGES),
    "glyphs": (20_000, 20, IMAGES | {"d_sae": 512, "batch_size": 128}),
}


# ---------------------------------------------------------------------------------------------------
# Images, each split one tensor [n, 784] of pixels in [0, 1]


def load_images(data):
    """Training and test images of `data`: "mnist", "glyphs" or a folder with MNIST in it. Raises UserError."""
    if data == "glyphs":
        return draw_glyphs(DATA["glyphs"][0] + 2_000).split([DATA["glyphs"][0], 2_000])
    from torchvision.datasets import MNIST  # here, because glyphs do without and it takes seconds to import

    root, way_out = Path("data"), "give --data glyphs, which needs no network"
    if data != "mnist":
        root, way_out = Path(data), "give a folder with MNIST's own archives, where you may write"
        check_mnist_folder(root, MNIST.resources)
    try:
        splits = [MNIST(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # there are many ways to be damaged
        raise UserError(f"--data {data}: no MNIST to be had ({first_line(error)}): {way_out}") from None
    if [split.data.shape for split in splits] != [(60_000, 28, 28), (10_000, 28, 28)]:
        raise UserError(f"--data {data}: not MNIST's 70,000 images: {way_out}")
    return [split.data.flatten(1).float() / 255 for split in splits]


def check_mnist_folder(root, resources):
    """torchvision would download into a folder that lacks MNIST; one that the user names must have it, whole."""
    for archive, md5 in resources:
        path = root / "MNIST" / "raw" / archive
        if path.with_suffix("").exists():
            continue
        if not path.exists():
            raise UserError(f"--data {root}: no {path}: give a folder with MNIST/raw in it, or --data glyphs")
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            raise UserError(f"--data {root}: {path} is damaged (its checksum is not MNIST's): fetch it again")


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


def train(hp, images, test_images, folder, device):
    """Train one SAE on images [n, 784], or go on with it; measure it on the test images and write its run folder."""
    trainer = Trainer(hp, device)
    resume(trainer, folder)
    write_hparams(trainer, folder)
    fit({folder: trainer}, batches(images, hp, first=trainer.step))
    result, mean_acts = evaluate.quality(trainer.sae.eval(), test_images.split(1000))
    write_json(folder / "quality.json", result)
    evaluate.save_covariance(evaluate.covariance(test_images), folder)
    evaluate.save_figure(plot_features(trainer.sae, mean_acts), folder / "features.png")
    save_run(trainer, folder, {"model_name": hp.data, "hook_name": "pixels", "context_size": 1, "prepend_bos": False})
    print(
        f"{folder}: fve {result['fve']:.4f}, l0 {result['l0']:.1f}, of {hp.d_sae} features "
        f"{result['alive']} are alive and {hp.d_sae - result['dead_by_use']} are used"
    )


def main(argv=None):
    args, runs = parse(argv)
    device = pick_device(args.device)
    missing = [folder for folder, hp in runs.items() if not is_complete(folder, hp)]
    if missing:
        images, test_images = (split.to(device) for split in load_images(args.data))
        make_folder(args.out)
        print(f"training {len(missing)} of {len(runs)} SAEs on {len(images):,} images, {device}, into {args.out}")
    for folder in missing:
        if not is_complete(folder, runs[folder]):  # by another process, meanwhile
            train(runs[folder], images, test_images, folder, device)
    if len(set(args.seed)) < 2:
        print("one seed: give --seed 0 1 2 for the table of consistency over seeds")
        return
    groups = evaluate.compare_seeds(list(runs))
    print(evaluate.table(groups))
    evaluate.write_consistency(groups, args.out / "consistency.json")
    evaluate.save_figure(plot_pairs(groups), args.out / "pairs.png")


# ---------------------------------------------------------------------------------------------------
# Pictures


def draw_tiles(axis, features, titles, columns, heading):
    """Features [n, 784] as images in rows of `columns`, each on its own scale: red adds ink, blue takes it away."""
    rows, height, width = -(-len(features) // columns), 38, 32
    canvas = np.zeros((max(rows, 1) * height + 2, columns * width))
    for n, (feature, title) in enumerate(zip(features, titles)):
        if title is None:  # an empty place
            continue
        top, left = n // columns * height + 10, n % columns * width + 2
        canvas[top : top + 28, left : left + 28] = feature.view(28, 28) / feature.abs().max().clamp(min=1e-12)
        axis.text(left + 14, top - 2, title, ha="center", fontsize=9)
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), 28, 28, fill=False, linewidth=0.5))
    axis.imshow(canvas, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title(heading, fontsize=11)
    axis.axis("off")


@torch.no_grad()
def plot_features(sae, mean_acts, n=64):
    """The strongest decoder features; strength is mean activation times norm, the feature's share of the ink."""
    W_dec = sae.W_dec.cpu()
    strength = mean_acts * W_dec.norm(dim=1)
    order = strength.argsort(descending=True)[:n]
    figure, heading = Figure(figsize=(7, 9)), "Decoder features, strongest first (mean activation x norm above each)"
    draw_tiles(figure.subplots(), W_dec[order], [f"{strength[i]:.2f}" for i in order], 8, heading)
    return figure


@torch.no_grad()
def plot_pairs(groups, columns=4):
    """For each configuration, side by side: alive features of one seed above their one-to-one partners (Hungarian,
    decoder) in the next, from the best pair to the worst."""
    rows = -(-len(groups) // 2)
    figure = Figure(figsize=(7, 0.6 + 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis in axes[len(groups) :]:
        axis.axis("off")
    for axis, group in zip(axes, groups):
        features_a, features_b = (sae.W_dec[evaluate.alive_by_weight(sae)] for sae in group["saes"][:2])
        cos = (F.normalize(features_a) @ F.normalize(features_b).T).numpy()
        i, j = linear_sum_assignment(np.abs(cos), maximize=True)
        order = np.argsort(-np.abs(cos[i, j]))
        order = order[np.linspace(0, len(order) - 1, min(2 * columns, len(order))).astype(int)]
        features, titles = [], []
        for some in (order[:columns], order[columns:]):
            empty = [None] * (columns - len(some))  # so that partners stand below, whatever the number of pairs
            features += [*features_a[i[some]], *empty, *features_b[j[some]], *empty]
            titles += [*(f"{c:+.2f}" for c in cos[i, j][some]), *empty, *[""] * len(some), *empty]
        draw_tiles(axis, features, titles, columns, textwrap.fill(group["label"], 36))
    figure.suptitle("Features of one seed, each above its partner in another,\nwith their cosine; best pair to worst")
    return figure


# ---------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The arguments, and the SAEs they ask for: {run folder: Hparams}."""
    first = Parser(add_help=False)  # the defaults of all other flags depend on this one
    first.add_argument("--data", default="mnist")
    dataset = "glyphs" if first.parse_known_args(argv)[0].data == "glyphs" else "mnist"
    n_images, epochs, defaults = DATA[dataset]
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="mnist", metavar="mnist|glyphs|DIR", help="what to train on; mnist is downloaded to data/")
    add("--epochs", type=at_least(1), default=epochs, help=f"passes over the images (default {epochs})")
    add("--out", type=Path, default=f"runs/{dataset}", metavar="DIR", help="where run folders go (default runs/DATA)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    # Biases come with tied initialisation: the plain setting has none at all
    computed = ("d_in", "biases", "steps", "length", "data", "model", "layer", "context")
    parser.add_settings(computed, **defaults, dead_after=5 * n_images)
    args = parser.parse_args(argv)

    def complete(given, args):
        steps = args.epochs * -(-n_images // max(1, given["batch_size"]))
        settings = {"d_in": 784, "biases": given["tied_init"], "data": dataset}
        return settings | {"steps": steps, "length": f"{args.epochs} epochs"}

    return args, {args.out / name: hp for name, hp in sweep(parser, args, complete).items()}


if __name__ == "__main__":
    run_command(main)
