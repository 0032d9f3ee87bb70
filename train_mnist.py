"""Train SAEs on images of digits, and see which features recur from seed to seed.

    python train_mnist.py --data glyphs --l2 0 1e-5 --seed 0 1 2       no download, minutes on a CPU
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2                     MNIST, the study's setting
    python train_mnist.py --l2 0 1e-5 --seed 0 1 2 --tied-init --unit-norm      its other one

Its other setting differs in three things: the encoder starts as the decoder's transpose, decoder
rows keep norm 1, and there are biases, which `--tied-init` switches on.

Flags that take several values are swept: every combination is an SAE with a run folder of its own,
and all are trained on the same stream of batches. What is finished is not trained again, and what
was interrupted goes on, so a command can always be repeated. At the end it prints a table of how
far features recur, and draws pictures.
"""

import gzip
import hashlib
import importlib.util
import itertools
import math
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import evaluate
from sae import (
    SAE,
    Diverged,
    Parser,
    Rows,
    UserError,
    at_least,
    first_line,
    is_complete,
    make_folder,
    pick_device,
    run_command,
    sweep,
    train,
    write_json,
)

# The study's plain settings for images, where they differ from those for Pythia. There are no
# biases, and encoder and decoder are drawn separately. `--tied-init` switches biases on as well
# (see `complete` in `parse`).
STUDY = {
    "arch": "relu",
    "d_sae": 1568,
    "k": 32,  # of the architectures that have one; the study has ReLU alone here
    "sparsity": 0.1,
    "l0_weight": 0.01,  # of JumpReLU, which the study did not train
    "reduction": "mean",  # over pixels and over latents
    "tied_init": False,
    "lr": 1e-3,
    "batch_size": 512,
    "warmup": 0,
    "decay": 0.0,
    "clip": 0.0,
    "dtype": "float32",
}


class ImageSet(NamedTuple):
    n_train: int  # images to train on
    epochs: int  # passes over them
    settings: dict


IMAGE_SETS = {
    "mnist": ImageSet(60_000, 100, STUDY),
    "glyphs": ImageSet(20_000, 20, {**STUDY, "d_sae": 512, "batch_size": 128}),  # for minutes
}
N_TEST_GLYPHS = 2_000


# --------------------------------------------------------------------------------------------------
# Images: tensors [n, 784] of pixels in [0, 1], with ink 1

MNIST_FILES = {  # training and test images, unpacked, and the SHA-256 of each
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
IDX_HEADER = 16  # bytes before the pixels


def load_images(data):
    """Training and test images of "mnist", "glyphs" or a folder with MNIST. Raises UserError."""
    if data == "glyphs":
        n_train = IMAGE_SETS["glyphs"].n_train
        return draw_glyphs(n_train + N_TEST_GLYPHS).split([n_train, N_TEST_GLYPHS])
    root = Path("data" if data == "mnist" else data)
    paths = [root / "MNIST" / "raw" / name for name in MNIST_FILES]  # where torchvision puts them
    if data == "mnist" and not all(path.exists() for path in paths):
        download_mnist(root)
    return [read_mnist(path, data) for path in paths]


def download_mnist(folder):
    """Download MNIST into a folder. Raises UserError."""
    from torchvision.datasets import MNIST  # here, since it takes seconds and is seldom needed

    try:
        MNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        way_out = "give --data glyphs, which needs no network"
        reason = f"MNIST cannot be downloaded into {folder} ({first_line(error)})"
        raise UserError(f"--data mnist: {reason}: {way_out}") from None


def read_mnist(path, data):
    """The images in one of MNIST_FILES, or in its archive beside it. Raises UserError."""
    fetch_again = "delete it, and fetch MNIST again"  # nothing is downloaded over what is there
    packed = not path.exists()
    found = path.with_name(f"{path.name}.gz") if packed else path
    try:
        content = found.read_bytes()
        if packed:
            content = gzip.decompress(content)
    except FileNotFoundError:
        way_out = "give a folder with MNIST/raw in it, or --data glyphs"
        raise UserError(f"--data {data}: no {found}: {way_out}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = f"{found} is damaged ({first_line(error)})"
        raise UserError(f"--data {data}: {reason}: {fetch_again}") from None
    # Other images in MNIST's format would otherwise pass for MNIST in every table.
    if hashlib.sha256(content).hexdigest() != MNIST_FILES[path.name]:
        reason = f"{found} does not hold MNIST's images"
        raise UserError(f"--data {data}: {reason}: {fetch_again}")
    pixels = torch.frombuffer(bytearray(content[IDX_HEADER:]), dtype=torch.uint8)
    return pixels.view(-1, 28 * 28).float() / 255


def draw_glyphs(n, seed=0):
    """n images of digits [n, 784], in the fonts that come with matplotlib, warped at random."""
    masters = draw_masters()
    generator = torch.Generator().manual_seed(seed)

    def between(low, high):
        return torch.rand(n, generator=generator) * (high - low) + low

    which = torch.randint(len(masters), (n,), generator=generator)
    angle, shear, scale = between(-0.25, 0.25), between(-0.25, 0.25), between(0.65, 0.9)
    stretch = between(0.85, 1.15)
    # From a pixel's place (x, y) in the image, each from -1 to 1, to the place in the master that
    # it shows: the factors of x and of y, and a shift. So a scale below 1 enlarges.
    cos, sin = angle.cos() * scale, angle.sin() * scale
    x_row = [cos * stretch, shear - sin, between(-0.08, 0.08)]
    y_row = [sin * stretch, cos, between(-0.08, 0.08)]
    affine = torch.stack([*x_row, *y_row], 1).view(n, 2, 3)
    images = []
    for part in torch.arange(n).split(1000):
        grid = F.affine_grid(affine[part], (len(part), 1, 28, 28), align_corners=False)
        images.append(F.grid_sample(masters[which[part]], grid, align_corners=False))
    return torch.cat(images).flatten(1).clamp(0, 1)


def draw_masters():
    """Every digit in every font, large and centred: [fonts * 10, 1, 56, 56]."""
    # The fonts are found without importing matplotlib, which fails where MPLBACKEND names a
    # notebook's backend that this Python lacks.
    matplotlib = importlib.util.find_spec("matplotlib").submodule_search_locations[0]
    folder = Path(matplotlib) / "mpl-data" / "fonts" / "ttf"
    fonts = []
    for family in ("Sans", "SansMono", "Serif"):
        fonts += [f"DejaVu{family}", f"DejaVu{family}-Bold"]
    fonts += ["DejaVuSans-Oblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic"]
    fonts += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"]
    fonts += ["cmr10", "cmb10", "cmss10", "cmtt10"]
    masters = []
    for name, digit in itertools.product(fonts, "0123456789"):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 36)
        left, top, right, bottom = font.getbbox(digit)
        corner = (28 - (left + right) / 2, 28 - (top + bottom) / 2)  # so that the ink is centred
        image = Image.new("L", (56, 56))
        ImageDraw.Draw(image).text(corner, digit, fill=255, font=font)
        masters.append(np.asarray(image, dtype=np.float32) / 255)
    masters = torch.from_numpy(np.stack(masters))[:, None]
    # Blurred, since the images have half this resolution and would have jagged edges.
    return F.avg_pool2d(masters, 3, stride=1, padding=1)


# --------------------------------------------------------------------------------------------------
# Training, and then the measures of every SAE


def is_finished(folder, hp):
    """Whether a run is trained and measured. Raises UserError where the folder holds another."""
    return is_complete(folder, hp) and (folder / "quality.json").exists()


def measure(folder, test_images, moments):
    """Measure the SAE in a run folder on test images [n, 784] with the covariance `moments`."""
    sae = SAE.load(folder).to(test_images.device)
    quality, mean_acts = evaluate.quality(sae, test_images.split(1000))
    evaluate.save_covariance(moments, folder)
    evaluate.save_figure(plot_features(sae.cpu(), mean_acts), folder / "features.png")
    write_json(folder / "quality.json", quality)  # last, since it says that all this is done
    used = sae.d_sae - quality["dead_by_use"]
    print(f"{folder}: of {sae.d_sae} features {quality['alive']} are alive and {used} are used")


def main(argv=None):
    args, runs = parse(argv)
    device = pick_device(args.device)
    unfinished = {folder: hp for folder, hp in runs.items() if not is_finished(folder, hp)}
    diverged = None
    if unfinished:
        images, test_images = (split.to(device) for split in load_images(args.data))
        make_folder(args.out)
        to_do = f"{len(unfinished)} of {len(runs)} SAEs to do"
        print(f"{to_do} on {len(images):,} images, {device}, in {args.out}")
        metadata = {
            "model_name": args.data,
            "hook_name": "pixels",
            "context_size": 1,
            "prepend_bos": False,
        }
        try:
            train(unfinished, Rows(images, test_images, scale=1.0, metadata=metadata), device)
        except Diverged as error:  # the others are finished, so they are measured and compared
            diverged = error
        moments = evaluate.covariance(test_images)
        for folder, hp in unfinished.items():
            if is_complete(folder, hp):
                measure(folder, test_images, moments)
    finished = [folder for folder, hp in runs.items() if is_finished(folder, hp)]
    if len(set(args.seed)) < 2:
        print("one seed: give --seed 0 1 2 for a table of how far features recur")
    elif finished:
        try:
            compare(finished, args.out)
        except UserError:
            if diverged is None:  # else there may be no two seeds left of any configuration
                raise
    if diverged is not None:
        raise diverged


def compare(folders, out):
    """Print the table of how far features recur, and write figures and pictures into `out`."""
    groups = evaluate.compare_seeds(folders)
    print(evaluate.table(groups))
    evaluate.write_consistency(groups, out / "consistency.json")
    evaluate.save_figure(plot_pairs(groups), out / "pairs.png")


# --------------------------------------------------------------------------------------------------
# Pictures


class Tile(NamedTuple):
    images: list  # of one image [784], or of several that belong together, one below the other
    title: str


def draw_tiles(axis, tiles, columns, heading):
    """Tiles in rows of `columns`; each image on its own scale: red adds ink, blue takes it away."""
    width = 32
    height = 11 + 30 * len(tiles[0].images)
    canvas = np.zeros((math.ceil(len(tiles) / columns) * height + 1, columns * width))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        top, left = row * height + 10, column * width + 2
        axis.text(left + 14, top - 2, tile.title, ha="center", fontsize=9)
        for image in tile.images:
            scaled = image.view(28, 28) / image.abs().max().clamp(min=1e-12)
            canvas[top : top + 28, left : left + 28] = scaled
            x, y = np.array([0, 28, 28, 0, 0]), np.array([0, 0, 28, 28, 0])
            axis.plot(left - 0.5 + x, top - 0.5 + y, "k", linewidth=0.5)  # a frame
            top += 30
    axis.imshow(canvas, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title(heading, fontsize=10)
    axis.axis("off")


@torch.no_grad()
def plot_features(sae, mean_acts, n=49):
    """A picture of the decoder rows of the n strongest features, by mean activation times norm."""
    strength = mean_acts * sae.W_dec.norm(dim=1)
    strongest = strength.argsort(descending=True)[:n]
    tiles = [Tile([sae.W_dec[i]], f"{strength[i]:.2f}") for i in strongest]
    figure = evaluate.new_figure(6)
    heading = "Decoder rows of the strongest features\n(above each: mean activation times norm)"
    draw_tiles(figure.subplots(), tiles, 7, heading)
    return figure


class Pair(NamedTuple):
    """Two decoder rows [784] that are partners."""

    a: torch.Tensor
    b: torch.Tensor
    cosine: float


@torch.no_grad()
def example_pairs(a, b, n):
    """n pairs of decoder rows of two SAEs, matched one to one, from the most alike to the least."""
    rows_a, rows_b = (sae.W_dec[evaluate.alive_by_weight(sae)] for sae in (a, b))
    pairs = []
    for i, j in enumerate(evaluate.match(rows_a, rows_b).partner):
        if j >= 0:
            cosine = F.cosine_similarity(rows_a[i], rows_b[j], dim=0).item()
            pairs.append(Pair(rows_a[i], rows_b[j], cosine))
    pairs.sort(key=lambda pair: -abs(pair.cosine))
    evenly = np.linspace(0, len(pairs) - 1, min(n, len(pairs))).astype(int)
    return [pairs[i] for i in evenly]


def plot_pairs(groups):
    """For each configuration some decoder rows of one seed, each above its partner in another."""
    groups = [group for group in groups if len(group.runs) > 1]
    n_lines = math.ceil(len(groups) / 2)
    figure = evaluate.new_figure(0.6 + 3.2 * n_lines)
    axes = figure.subplots(n_lines, 2, squeeze=False).flatten()
    for axis in axes[len(groups) :]:
        axis.axis("off")
    for axis, group in zip(axes, groups):
        pairs = example_pairs(group.runs[0].sae, group.runs[1].sae, 8)
        tiles = [Tile([pair.a, pair.b], f"{pair.cosine:+.2f}") for pair in pairs]
        heading = textwrap.fill(group.label, 30)
        if tiles:
            draw_tiles(axis, tiles, 4, heading)
        else:  # a penalty that is too strong leaves none
            axis.set_title(f"{heading}\nno pair of alive features", fontsize=10)
            axis.axis("off")
    figure.suptitle(
        "Decoder rows alone: features of one seed, each above its\n"
        "partner in another, with their cosine; best pair to worst",
        fontsize=10,
    )
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The arguments, and the SAEs that they ask for: {run folder: Hparams}."""
    # The defaults of all other flags depend on --data, so it is read first.
    first = Parser(add_help=False)
    first.add_argument("--data", default="mnist")
    name = "glyphs" if first.parse_known_args(argv)[0].data == "glyphs" else "mnist"
    n_train, epochs, settings = IMAGE_SETS[name]

    parser = Parser(description=__doc__)
    add = parser.add_argument
    data = (
        "images: drawn digits (glyphs); MNIST, downloaded to data/ (mnist, the default); or MNIST "
        "in a folder that has it in MNIST/raw, packed or not"
    )
    add("--data", default="mnist", metavar="mnist|glyphs|DIR", help=data)
    add("--epochs", type=at_least(1), default=epochs, help=f"passes over them (default {epochs})")
    out = f"where run folders go (default runs/{name})"
    add("--out", type=Path, default=f"runs/{name}", metavar="DIR", help=out)
    add("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, ...")
    # No flags of these: `complete` computes them, or they are of language models alone.
    no_flags = ("d_in", "biases", "steps", "length", "data", "data_hash")
    no_flags += ("model", "layer", "context")
    parser.add_settings(no_flags, **settings, dead_after=5 * n_train)  # five passes without firing
    args = parser.parse_args(argv)

    def complete(chosen, args):
        """The settings that follow from others.

        `sweep` calls it for each SAE, and for the one that has all flags at their defaults. Nothing
        has checked the settings yet, so batch_size may be 0.
        """
        return {
            "d_in": 28 * 28,
            "biases": chosen["tied_init"],
            "data": args.data,
            "steps": args.epochs * math.ceil(n_train / max(1, chosen["batch_size"])),
            "length": f"{args.epochs} epochs",
        }

    return args, {args.out / run: hp for run, hp in sweep(parser, args, complete).items()}


if __name__ == "__main__":
    run_command(main)
