"""Measure trained SAEs: reconstruction, dead latents, geometry, and which features recur across seeds.

    python evaluate.py seeds runs/mnist                         every run in the folder, grouped by configuration
    python evaluate.py seeds a_seed0 a_seed1 --json shared.json   these two; table, JSON and two pictures
    python evaluate.py quality runs/pythia                      what SAEs do to the language model they came from

A run is a folder that train_mnist.py or train_pythia.py wrote, or anyone's in the format of SAELens or of
dictionary_learning. A reading order: `quality`, then `match_pair` (two SAEs), then `sharedness` (many).

Dead features: a latent whose encoder column or decoder row has (all but) vanished has no direction, and matches
nothing. So every share is given twice: over all d_sae features, and over those alive, each SAE over its own.
"""

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from sae import (
    SAE,
    Parser,
    UsageError,
    check_writable,
    make_folder,
    pick_device,
    read_hparams,
    replacing,
    run_command,
    write_json,
)

# A norm below this share of the largest counts as zero. Under an L2 penalty the weights of a latent that never
# fires fall towards zero exponentially, and those that died last are still on their way: on MNIST, latents below
# this limit carried less than a millionth of the reconstruction.
DEAD_NORM = 1e-2


# ---------------------------------------------------------------------------------------------------
# Quality of one SAE


@torch.no_grad()
def alive_by_weight(sae):
    """[d_sae] bool: latents whose encoder column and decoder row both have a norm, see DEAD_NORM."""
    norms = torch.stack([sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1)])
    return (norms > DEAD_NORM * norms.amax(1, keepdim=True)).all(0)


@torch.no_grad()
def quality(sae, batches):
    """What an SAE in eval mode does to held-out data: a dict for quality.json; mean acts and firing rates [d_sae].

    `batches` is an iterable of x [B, d_in]. recon: squared error per input and dimension. fve: fraction of
    variance explained. l0: latents on per input. Alive and dead by weight: see DEAD_NORM; by use: never on here.
    """
    inputs, error = 0, 0.0
    total, total_square = torch.zeros(2, sae.d_in, dtype=torch.float64)
    act_sum, fired = torch.zeros(2, sae.d_sae, dtype=torch.float64)
    for x in batches:
        acts = sae.encode(x)
        error += (sae.decode(acts) - x).square().sum().item()
        total += x.sum(0).cpu()
        total_square += x.square().sum(0).cpu()
        act_sum += acts.sum(0).cpu()
        fired += (acts > 0).sum(0).cpu()
        inputs += len(x)
    variance = (total_square - total.square() / inputs).sum().item()
    alive = alive_by_weight(sae).sum().item()
    result = {
        "inputs": inputs,
        "recon": error / inputs / sae.d_in,
        "fve": 1 - error / variance if variance > 0 else None,
        "l0": fired.sum().item() / inputs,
        "alive": alive,
        "dead_by_weight": sae.d_sae - alive,
        "dead_by_use": (fired == 0).sum().item(),
    }
    return result | geometry(sae), act_sum / inputs, fired / inputs


@torch.no_grad()
def geometry(sae):
    """Cosine of a feature's own encoder and decoder; off-diagonal |cosine| of decoder rows. Alive features only."""
    alive = alive_by_weight(sae)
    decoder, encoder = unit_rows(sae.W_dec[alive]), unit_rows(sae.W_enc.T[alive])
    own = (decoder * encoder).sum(1)
    result = {"enc_dec_cos": {"mean": own.mean().item(), "median": own.median().item()} if len(own) else None}
    if len(decoder) < 2:
        return result | {"orthogonality": None}
    # All pairs as a histogram of 10,000 bins, block by block: at d_sae = 16,384 there are 134 million of them.
    counts, largest = torch.zeros(10_000, dtype=torch.float64), 0.0
    for start in range(0, len(decoder), 1024):
        cos = (decoder[start : start + 1024] @ decoder[start:].T).abs().clamp(max=1)
        upper = cos[torch.ones_like(cos, dtype=torch.bool).triu(1)].cpu()
        if len(upper):
            counts += torch.histc(upper, 10_000, 0, 1).double()
            largest = max(largest, upper.max().item())
    middles = (np.arange(10_000) + 0.5) / 10_000
    share = (counts.cumsum(0) / counts.sum()).numpy()
    quantile = {name: middles[np.searchsorted(share, q)] for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}
    mean = float((counts.numpy() * middles).sum() / counts.sum())
    return result | {"orthogonality": {"mean": mean, **{k: float(v) for k, v in quantile.items()}, "max": largest}}


def unit_rows(W):
    return W / W.norm(dim=1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def cross_entropy(model, contexts):
    """Mean cross-entropy, in nats, of each next token of contexts, an iterable of [B, context] token ids."""
    total, n = 0.0, 0
    for tokens in contexts:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
        n += tokens[:, 1:].numel()
    return total / n


def language_model_quality(sae, model, layer, contexts, baseline=None):
    """`quality` of an SAE on the residual stream, and what its reconstruction does to the language model.

    contexts is a list of [B, context] token ids. The first position, on which no SAE is trained, stays as it is.
    ce_zeroed is the cross-entropy with zeros in place of the residual stream; loss_recovered is the share of the
    way from there to the model's own that the reconstruction keeps. `baseline` is (ce, ce_zeroed) if known.
    """
    from train_pythia import residual_stream, spliced

    def replaced(by):
        def replace(resid):
            rest = by(resid[:, 1:].flatten(0, 1).float()).to(resid.dtype)
            return torch.cat([resid[:, :1], rest.view_as(resid[:, 1:])], 1)

        with spliced(model, layer, replace):
            return cross_entropy(model, contexts)

    def activations():
        for tokens in contexts:
            yield from residual_stream(model, tokens, layer)[:, 1:].flatten(0, 1).float().split(4096)

    result, _, firing = quality(sae, activations())
    result["ce"], result["ce_zeroed"] = baseline or (cross_entropy(model, contexts), replaced(torch.zeros_like))
    result["ce_reconstructed"] = replaced(lambda x: torch.cat([sae(part) for part in x.split(4096)]))
    lost = result["ce_reconstructed"] - result["ce"]
    result["loss_recovered"] = 1 - lost / (result["ce_zeroed"] - result["ce"])
    return result, firing


def measure_language_model_runs(folders, n_tokens, data, device):
    """quality.json and firing.png for each run of train_pythia.py, on held-out tokens or those of `data`."""
    from train_pythia import load_model, open_tokens, read_tokens

    runs = []
    for folder in folders:
        hp = read_hparams(folder)
        if not hp.get("model"):
            raise UsageError(f"{folder}: not a run of train_pythia.py, so there is no language model to measure with")
        hp["tokens"] = hp["steps"] * hp["batch_size"]
        runs.append((folder, SAE.load(folder).to(device), SimpleNamespace(**hp)))
    rows, baselines, at = [], {}, None
    for folder, sae, hp in tqdm(runs, desc="measuring", unit="SAE"):
        if at != (hp.model, hp.layer, hp.context, hp.data):
            at = (hp.model, hp.layer, hp.context, hp.data)
            model, tokenizer = load_model(hp.model, device)
            vocab_size = model.get_input_embeddings().num_embeddings
            hp.data = data or hp.data
            tokens = read_tokens(hp, tokenizer, vocab_size) if data else open_tokens(hp, tokenizer, vocab_size)[1]
            n_contexts = min(n_tokens, len(tokens)) // hp.context
            if n_contexts < 1:
                raise UsageError(f"--tokens {n_tokens}: fewer than one context of {hp.context}")
            tokens = torch.from_numpy(tokens[: n_contexts * hp.context].astype(np.int64)).view(-1, hp.context)
            contexts = tokens.to(device).split(max(1, 8192 // hp.context))
        result, firing = language_model_quality(sae, model, hp.layer, contexts, baselines.get(at))
        baselines[at] = result["ce"], result["ce_zeroed"]
        write_json(folder / "quality.json", result)
        save_figure(plot_firing(firing, folder.name), folder / "firing.png")
        rows.append((folder.name, result))
    return rows


def quality_table(rows):
    """One line a run."""
    lines = [("run", "fve", "l0", "ce", "reconstructed", "zeroed", "loss recovered", "alive", "dead by use")]
    lines[0] += ("enc-dec cos", "decoder cos (mean)")
    for name, r in rows:
        cells = [name, f"{r['fve']:.4f}", f"{r['l0']:.1f}", f"{r['ce']:.4f}", f"{r['ce_reconstructed']:.4f}"]
        cells += [f"{r['ce_zeroed']:.3f}", f"{r['loss_recovered']:.4f}", str(r["alive"]), str(r["dead_by_use"])]
        own, others = r["enc_dec_cos"], r["orthogonality"]
        cells += [f"{own['mean']:.3f}" if own else "-", f"{others['mean']:.4f}" if others else "-"]
        lines.append(tuple(cells))
    return markdown(lines)


def markdown(lines):
    """A Markdown table, its columns padded; the first line is the head."""
    lines = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------------
# Which features recur across seeds


@torch.no_grad()
def match_pair(a, b, threshold=0.7):
    """Compare the features of two SAEs of one shape by |cosine|, for decoder and encoder.

    Returns a dict of figures, each over all features and over those alive, both directions averaged:
    mean_max_cos (mean of the best match), paired (share whose best match exceeds the threshold), shared (share
    whose one-to-one partner by Hungarian matching is the same for decoder and encoder, both cosines above the
    threshold); the shared partner in b of each feature of a, [d_sae] int, -1 for none; and the best decoder
    matches of the features alive in a, then in b.
    """
    if (a.d_in, a.d_sae) != (b.d_in, b.d_sae):
        shapes = f"d_in {a.d_in}, d_sae {a.d_sae} and d_in {b.d_in}, d_sae {b.d_sae}"
        raise UsageError(f"SAEs of different shapes cannot be matched: {shapes}")
    alive_a, alive_b = (alive_by_weight(sae).nonzero().flatten().numpy() for sae in (a, b))
    counts, figures, matches, best_decoder = (len(alive_a), len(alive_b)), {}, {}, []
    for name, weights in (("dec", lambda sae: sae.W_dec), ("enc", lambda sae: sae.W_enc.T)):
        cos = (unit_rows(weights(a)[alive_a]) @ unit_rows(weights(b)[alive_b]).T).abs().numpy()
        best = [cos.max(axis, initial=0) for axis in (1, 0)]  # of each feature of a, of each feature of b
        best_decoder = best_decoder or best
        sums = [x.sum(dtype=np.float64) for x in best], [(x > threshold).sum() for x in best]
        for figure, totals in zip(("mean_max_cos", "paired"), sums):
            figures[f"{figure}_{name}"], figures[f"{figure}_{name}_alive"] = shares(totals, counts, a.d_sae)
        rows, columns = assign(cos)
        matches[name] = {(i, j) for i, j in zip(rows, columns) if cos[i, j] > threshold}
    partner = np.full(a.d_sae, -1)
    for i, j in matches["dec"] & matches["enc"]:
        partner[alive_a[i]] = alive_b[j]
    both = (partner >= 0).sum()
    figures["shared"], figures["shared_alive"] = shares([both, both], counts, a.d_sae)
    return figures, partner, np.concatenate(best_decoder)


def assign(cos):
    """The one-to-one matching of rows and columns [n, m] with the largest summed cosine: two arrays of indices.

    scipy's Hungarian method, after pairs that need no search are taken out. Such a pair exceeds the sum of the
    second best in its row and the second best in its column: any matching without it gains by exchanging for it
    the pairs of its row and its column (cosines are not negative, so what remains of those cannot lose).
    """
    rows, columns, found = np.arange(cos.shape[0]), np.arange(cos.shape[1]), []
    while min(cos.shape) > 1:
        of_rows, of_columns = (torch.from_numpy(c).topk(2, dim=1) for c in (cos, np.ascontiguousarray(cos.T)))
        best = of_rows.indices[:, 0]
        margin = of_rows.values[:, 0] - of_rows.values[:, 1] - of_columns.values[best, 1]
        sure = ((margin > 0) & (of_columns.indices[best, 0] == torch.arange(len(cos)))).numpy()
        if sure.mean() < 0.01:
            break
        best = best.numpy()[sure]
        found.append((rows[sure], columns[best]))
        rows, columns = rows[~sure], np.delete(columns, best)
        cos = np.delete(cos[~sure], best, axis=1)
    i, j = linear_sum_assignment(cos, maximize=True)
    found.append((rows[i], columns[j]))
    i, j = (np.concatenate(indices) for indices in zip(*found))
    return i[np.argsort(i)], j[np.argsort(i)]


def shares(totals, alive, d_sae):
    """Means of a's and b's totals over all features and over those alive: (total_a / n_a + total_b / n_b) / 2."""
    over_all = sum(totals) / 2 / d_sae
    over_alive = sum(total / max(n, 1) for total, n in zip(totals, alive)) / 2
    return float(over_all), float(over_alive)


def sharedness(partner, n_seeds):
    """How far each feature of each seed recurs: int [n_seeds, d_sae], 2 always, 1 sometimes, 0 never shared.

    `partner[a, b]` is match_pair's partner array, for a < b. Always shared is a closed circle: feature i of
    seed a has a partner in every other seed, and those are each other's partners too. (Counting rows of each
    pair's first SAE instead mixes the indices of two SAEs as soon as there is a pair without seed 0.)
    """
    partner = dict(partner)
    for a, b in itertools.combinations(range(n_seeds), 2):
        inverse = np.full_like(partner[a, b], -1)
        (i,) = np.nonzero(partner[a, b] >= 0)
        inverse[partner[a, b][i]] = i
        partner[b, a] = inverse
    classes = []
    for a in range(n_seeds):
        others = [b for b in range(n_seeds) if b != a]
        found = np.stack([partner[a, b] >= 0 for b in others])
        closed = found.all(0)
        for b, c in itertools.combinations(others, 2):
            closed &= partner[b, c][partner[a, b]] == partner[a, c]  # index -1 is masked by `found`
        classes.append(np.where(closed, 2, np.where(found.any(0), 1, 0)))
    return np.stack(classes)


def consistency(saes, seeds, threshold=0.7, progress=None):
    """All pairs of seeds of one configuration: a dict as in the JSON file, and the pairs' best decoder matches."""
    pairs, partner, best = [], {}, []
    for a, b in itertools.combinations(range(len(saes)), 2):
        figures, partner[a, b], best_ab = match_pair(saes[a], saes[b], threshold)
        pairs.append({"seeds": [seeds[a], seeds[b]]} | figures)
        best.append(best_ab)
        if progress is not None:
            progress.update()
    classes = sharedness(partner, len(saes))
    alive = np.stack([alive_by_weight(sae).numpy() for sae in saes])
    result = {"seeds": list(seeds), "alive": alive.sum(1).tolist(), "d_sae": saes[0].d_sae, "pairs": pairs}
    for value, name in ((2, "always"), (1, "sometimes"), (0, "never")):
        of_alive = [((row == value) & a).sum() / max(a.sum(), 1) for row, a in zip(classes, alive)]
        result[f"{name}_shared"] = float((classes == value).mean())
        result[f"{name}_shared_alive"] = float(np.mean(of_alive))
    return result, best


# ---------------------------------------------------------------------------------------------------
# Finding and grouping runs


def find_runs(paths):
    """The run folders that the paths name: each a run, or a folder of runs. Plain files (pictures) are passed over."""

    def holds_sae(folder):
        return (folder / "cfg.json").exists() or (folder / "ae.pt").exists()

    runs = []
    for path in map(Path, paths):
        inside = [] if holds_sae(path) else sorted(filter(holds_sae, path.glob("*")))
        runs += inside or [path] * (not path.is_file())  # of a folder without an SAE, SAE.load says what is missing
    return list({path.resolve(): path for path in runs}.values())  # a run under two names is one run


def describe(folder):
    """Load the SAE of a run folder: it, its seeds (seed, data_seed), and its configuration without them.

    The configuration is that of hparams.json; in a folder that somebody else wrote, what its metadata say.
    """
    sae = SAE.load(folder)
    if (folder / "hparams.json").exists():
        config = read_hparams(folder)
    else:
        config = {"arch": sae.arch, "k": sae.k, "d_in": sae.d_in, "d_sae": sae.d_sae}
        names = ("l1", "l2", "model_name", "lm_name", "hook_name", "layer", "submodule_name", "seed", "data_seed")
        config |= {name: sae.metadata[name] for name in names if name in sae.metadata}
    seed, data_seed = config.pop("seed", None), config.pop("data_seed", None)
    return sae, (seed if isinstance(seed, int) else None, data_seed), config


def load_groups(folders):
    """Load runs and group those of one configuration: a list of {label, config, seeds, saes, folders}.

    Seeds and data seeds may vary together; where runs share a seed but not a data seed, each data seed is a group.
    A run without a seed of its own takes its place in the order given.
    """
    runs = [(folder, *describe(folder)) for folder in folders]
    times = Counter((seeds[0], json.dumps(config, sort_keys=True)) for _, _, seeds, config in runs)
    grids = {key for (seed, key), n in times.items() if seed is not None and n > 1}
    groups = {}
    for folder, sae, (seed, data_seed), config in runs:
        key = json.dumps(config, sort_keys=True)
        if key in grids:
            config["data_seed"] = data_seed
        label = re.sub(r"_seed-?\d+", "", folder.resolve().name)
        group = {"label": label, "config": config, "seeds": [], "saes": [], "folders": []}
        group = groups.setdefault(key + str(config.get("data_seed")), group)
        group["seeds"].append(seed)
        group["saes"].append(sae)
        group["folders"].append(folder)
    for group in groups.values():
        if None in group["seeds"] or len(set(group["seeds"])) < len(group["seeds"]):
            group["seeds"] = list(range(len(group["seeds"])))
    return list(groups.values())


def compare_seeds(folders, threshold=0.7):
    """Consistency of every configuration among the run folders that has two seeds or more: a list of dicts,
    each with label, config, folders, saes, the figures of `consistency`, and the best matches. Raises UsageError."""
    groups = load_groups(folders)
    alone = [group for group in groups if len(group["saes"]) < 2]
    groups = [group for group in groups if len(group["saes"]) >= 2]
    if not groups:
        found = "; ".join(f"{g['folders'][0]} (d_in {g['saes'][0].d_in}, d_sae {g['saes'][0].d_sae})" for g in alone)
        raise UsageError(f"RUN...: no two SAEs of one configuration and shape, which seeds need; found {found}")
    for group in alone:
        print(f"note: {group['folders'][0]} is left out, one seed of its configuration", file=sys.stderr)
    n_pairs = sum(len(g["saes"]) * (len(g["saes"]) - 1) // 2 for g in groups)
    with tqdm(total=n_pairs, desc="matching seeds", unit="pair") as progress:
        for group in groups:
            figures, best = consistency(group["saes"], group["seeds"], threshold, progress)
            group |= {"figures": figures, "best": best}
    return groups


def consistency_table(groups):
    """The table of the README: one line a configuration, means over its pairs of seeds, `all (alive)`."""
    columns = ("mean_max_cos_dec", "mean_max_cos_enc", "paired_dec", "paired_enc", "shared")
    lines = [("configuration", "seeds", "alive", "max cos dec", "max cos enc", "paired dec", "paired enc")]
    lines[0] += ("shared", "always shared")
    for group in groups:
        figures = group["figures"]
        cells = [group["label"], len(figures["seeds"]), f"{np.mean(figures['alive']):.0f}/{figures['d_sae']}"]
        for name in columns:
            over = [np.mean([pair[name + suffix] for pair in figures["pairs"]]) for suffix in ("", "_alive")]
            cells.append(f"{over[0]:.3f} ({over[1]:.3f})")
        cells.append(f"{figures['always_shared']:.3f} ({figures['always_shared_alive']:.3f})")
        lines.append(tuple(map(str, cells)))
    return markdown(lines)


def write_consistency(groups, path):
    """The JSON file, and the two pictures beside it."""
    path = Path(path)
    make_folder(path.parent)
    write_json(path, {"groups": [{"label": g["label"], "config": g["config"]} | g["figures"] for g in groups]})
    save_figure(plot_shares(groups), path.with_name(path.stem + "_shares.png"))
    save_figure(plot_best_matches(groups), path.with_name(path.stem + "_cosines.png"))


# ---------------------------------------------------------------------------------------------------
# Pictures


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def plot_shares(groups):
    """Consistency by configuration: bars are means over pairs of seeds, dots the pairs themselves."""
    panels = (("mean_max_cos_dec_alive", "mean max cosine\n(decoder, alive)"), ("shared", "shared\n(all features)"))
    panels += (("shared_alive", "shared\n(alive features)"),)
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(groups)))
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (name, title) in zip(axes, panels):
        largest = 0.05
        for row, group in enumerate(groups):
            values = [pair[name] for pair in group["figures"]["pairs"]]
            largest = max(largest, *values)
            axis.barh(row, np.mean(values), color=f"C{row % 10}", alpha=0.5)
            axis.plot(values, [row] * len(values), "o", color="black", markersize=4)
            place = axis.get_yaxis_transform()  # x as a share of the width
            axis.text(1, row, f"{np.mean(values):.3f}", transform=place, ha="right", va="center", fontsize=10)
        axis.set(title=title, xlim=(0, 1.5 * largest))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(groups)), [group["label"].replace("_", "\n", 2) for group in groups], fontsize=9)
    axes[0].invert_yaxis()
    return figure


def plot_best_matches(groups):
    """How well the features of one seed are found in another: the distribution of best decoder cosines."""
    figure = Figure(figsize=(7, 4.5))
    axis = figure.subplots()
    for row, group in enumerate(groups):
        values = np.concatenate(group["best"])
        axis.hist(values, bins=np.linspace(0, 1, 51), density=True, histtype="step", linewidth=2, color=f"C{row % 10}")
        axis.plot([], [], color=f"C{row % 10}", linewidth=2, label=f"{group['label']} ({len(values):,} features)")
    axis.axvline(0.7, color="gray", linestyle=":")
    axis.set(xlabel="|cosine| with the best match in another seed (decoder, alive)", ylabel="density", xlim=(0, 1))
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_firing(firing, name):
    """How often latents fire [d_sae]: a histogram over the logarithm of the rate, and how many never do."""
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    axis.hist(firing[firing > 0].log10().numpy(), bins=np.linspace(-6, 0, 61))
    never = int((firing == 0).sum())
    axis.set(xlabel="log10 of the share of inputs on which a latent fires", ylabel="latents")
    axis.set_title(f"{name}\n{never:,} of {len(firing):,} never fire", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    seeds = commands.add_parser("seeds", help="consistency of features across seeds, grouped by configuration")
    seeds.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    seeds.add_argument("--threshold", type=float, default=0.7, help="cosine from which features are the same")
    seeds.add_argument("--json", metavar="FILE", help="write the figures here, and two pictures beside it")
    measure = commands.add_parser("quality", help="reconstruction and loss recovered, of language-model runs")
    measure.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train_pythia.py, or folders of them")
    measure.add_argument("--tokens", type=int, default=200_000, help="how many of the held-out tokens to read")
    measure.add_argument("--data", metavar="FILE", help="other tokens than the held-out ones")
    measure.add_argument("--json", metavar="FILE", help="write the figures of all runs here")
    measure.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(Path(args.json).parent, "--json")
        if Path(args.json).exists() and not Path(args.json).is_file():
            raise UsageError(f"--json {args.json}: not a file; give a name that ends in .json")
    if args.command == "quality":
        rows = measure_language_model_runs(find_runs(args.runs), args.tokens, args.data, pick_device(args.device))
        print(quality_table(rows))
        if args.json:
            write_json(args.json, {"runs": [{"run": name} | result for name, result in rows]})
        return
    if not 0 < args.threshold < 1:
        raise UsageError(f"--threshold {args.threshold}: a cosine between 0 and 1, such as 0.7")
    groups = compare_seeds(find_runs(args.runs), args.threshold)
    print(consistency_table(groups))
    if args.json:
        write_consistency(groups, args.json)


if __name__ == "__main__":
    run_command(main)
