"""Steer a language model with the features of SAEs, and measure what that does.

    python steer.py runs/pythia/topk_k40_l2-0_seed0 runs/pythia/topk_k40_l2-0.0001_seed0 --strength 5 10 20
    python steer.py RUN RUN --base-url https://api.example.com/v1 --judge some-model      rated by a judge as well

For each feature and neutral prompt the model writes three texts from the same random draws: as it is, with the
feature's decoder direction added to the residual stream, and with a random direction of the same size (the control:
what noise achieves). Without a judge that gives echo, perplexity and promoted tokens; a judge rates 1 to 5 whether
the steered text is more related to the feature's explanation (see evaluate.py autointerp), 4 or 5 being success.
Each run folder gets steering.json; --out the comparison of the runs and the figures. A reading order: `generate`,
`read_back`, `steer_run`, `rate`, `compare`.
"""

import inspect
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import evaluate
from sae import (
    SAE,
    Parser,
    UserError,
    at_least,
    make_folder,
    pick_device,
    read_json,
    run_command,
    write_json,
)
from train_pythia import blocks, spliced

PROMPTS = ("I think that", "It is", "This is what")  # neutral beginnings, the same for every feature
SUCCESS = 4  # a rating from which the steered text counts as more related
RESAMPLES = 10_000  # of permutations


# ---------------------------------------------------------------------------------------------------
# Generate


@torch.no_grad()
def steering_vectors(sae, features, mode, strength, rms):
    """What to add to the residual stream for each feature, [n, d_in]: its decoder direction, made as long as

    strength (fixed), strength times `rms`, the root mean square norm of the residual stream (rms), or as raises the
    feature's own pre-activation by strength (preact; not a number where encoder and decoder point apart).
    """
    direction = F.normalize(sae.W_dec[features])
    if mode == "preact":
        gain = (direction * sae.W_enc.T[features]).sum(1, keepdim=True)
        return direction * torch.where(gain > 0, strength / gain, torch.nan)
    return direction * strength * (rms if mode == "rms" else 1.0)


def sample(logits, uniform, temperature, top_p):
    """Next tokens [n] from logits [n, vocabulary] by the inverse of the distribution function at uniform [n].

    Of the likeliest tokens that together reach top_p; the same uniform number and logits give the same token.
    """
    if temperature == 0:
        return logits.argmax(1)
    probability, tokens = (logits.float() / temperature).softmax(1).sort(1, descending=True)
    below = probability.cumsum(1) - probability  # the probability of all likelier tokens
    kept = torch.where(below < top_p, probability, 0).cumsum(1)
    choice = (kept <= uniform[:, None] * kept[:, -1:]).sum(1, keepdim=True).clamp(max=kept.shape[1] - 1)
    return tokens.gather(1, choice)[:, 0]


@torch.no_grad()
def generate(model, layer, prompt, vectors, uniform, temperature=0.7, top_p=0.9, steer_prompt=False):
    """Continue `prompt` (a list of token ids) in n ways: token ids [n, steps], one row for each of vectors [n, d_in].

    While a token is generated, its row's vector is added to the residual stream after block `layer` at the newest
    position; at the prompt's positions only if steer_prompt. uniform [n, steps] are the random draws.
    """
    cached = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # the older name
    written, past = [], None
    tokens = torch.tensor(prompt, device=vectors.device).expand(len(vectors), -1)
    for step in range(uniform.shape[1]):
        added = vectors[:, None] if past is not None or steer_prompt else 0.0
        with spliced(model, layer, lambda resid, added=added: (resid + added).to(resid.dtype)):
            out = model(input_ids=tokens, use_cache=True, **{cached: past})
        past = out[cached]
        tokens = sample(out.logits[:, -1], uniform[:, step], temperature, top_p)[:, None]
        written.append(tokens)
    return torch.cat(written, 1)


def draws(seed, feature, prompt_number, steps):
    """The random draws of one feature and prompt: they do not depend on what else is generated with it."""
    return np.random.default_rng([seed, feature, prompt_number]).random(steps, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------
# Read back: measures that need no judge


@torch.no_grad()
def read_back(model, layer, sae, prompt, texts, features, eos=None):
    """How the unsteered model reads texts [n, steps] after the prompt: for each its feature's mean activation, and
    its perplexity, each over the tokens before the first end of text."""
    found = []

    def keep(resid):
        found.append(resid)
        return resid

    beginning = torch.tensor(prompt, device=texts.device).expand(len(texts), -1)
    with spliced(model, layer, keep):
        logits = model(input_ids=torch.cat([beginning, texts], 1), use_cache=False).logits
    loss = F.cross_entropy(logits[:, len(prompt) - 1 : -1].float().transpose(1, 2), texts, reduction="none")
    x, own = found[0][:, len(prompt) :].flatten(0, 1).float(), features.repeat_interleave(texts.shape[1])[:, None]
    # All d_sae activations exist for a few thousand tokens at a time only
    acts = torch.cat([sae.encode(a).gather(1, feature) for a, feature in zip(x.split(4096), own.split(4096))])
    acts = acts.view(texts.shape)
    counted = before_end(texts, eos).float()
    n = counted.sum(1)
    return (acts * counted).sum(1) / n, ((loss * counted).sum(1) / n).exp()


def before_end(texts, eos):
    """Which tokens of texts [n, steps] come before the first end of text; of a text that ends at once, that end."""
    counted = (texts == (-1 if eos is None else eos)).cumsum(1) == 0
    counted[:, 0] = True
    return counted


def final_norm(model):
    """The normalisation before the unembedding: the last one outside the blocks, whatever the family calls it."""
    inside = {*blocks(model).modules()}
    return [m for m in model.base_model.modules() if "norm" in type(m).__name__.lower() and m not in inside][-1]


@torch.no_grad()
def promoted_tokens(model, directions, k):
    """The k tokens that each direction [n, d_in] raises most, through the final norm and unembedding: [n, k]."""
    unembed = model.get_output_embeddings()
    return unembed(final_norm(model)(directions.to(unembed.weight.dtype))).topk(k, dim=1).indices


# ---------------------------------------------------------------------------------------------------
# One run: every feature, prompt and strength


def steer_run(sae, model, tokenizer, layer, features, args, rms, progress):
    """All texts and measures of an SAE: the rows of steering.json, without ratings."""
    device, eos, rows = next(model.parameters()).device, tokenizer.eos_token_id, []
    generator = torch.Generator().manual_seed(args.seed)
    noise = F.normalize(torch.randn(len(features), sae.d_in, generator=generator)).to(device)
    for start in range(0, len(features), args.batch_size):
        some = torch.tensor(features[start : start + args.batch_size], device=device)
        random, promoted = noise[start : start + len(some)], promoted_tokens(model, sae.W_dec[some], 10)
        for number, prompt in enumerate(args.prompts):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            uniform = np.stack([draws(args.seed, feature, number, args.new_tokens) for feature in some.tolist()])
            uniform = torch.from_numpy(uniform).to(device)

            def write(vectors, ids=ids, uniform=uniform, some=some, promoted=promoted):
                """What is written along vectors [n, d_in], and its measures: for each text a dict."""
                texts = generate(model, layer, ids, vectors, uniform, args.temperature, args.top_p, args.steer_prompt)
                acts, perplexity = read_back(model, layer, sae, ids, texts, some, eos)
                counted = before_end(texts, eos)
                said = torch.where(counted, texts, -1)[:, None]
                share = (promoted[..., None] == said).any(2).float().mean(1)
                strings = [tokenizer.decode(text[kept]) for text, kept in zip(texts, counted)]
                names = ("text", "act", "perplexity", "promoted")
                columns = (strings, acts.tolist(), perplexity.tolist(), share.tolist())
                return [dict(zip(names, values)) for values in zip(*columns)]

            originals = write(torch.zeros_like(random))
            for strength in args.strength:
                vectors = steering_vectors(sae, some, args.mode, strength, rms)
                works = vectors.isfinite().all(1)  # else the encoder of the feature does not see its decoder
                vectors = torch.where(works[:, None], vectors, 0.0)
                controls = write(random * vectors.norm(dim=1, keepdim=True))
                texts = zip(some.tolist(), originals, write(vectors), controls)
                for feature, original, steered, control in itertools.compress(texts, works.tolist()):
                    row = {"feature": feature, "prompt": prompt, "strength": strength}
                    row |= {"original": original["text"], "perplexity_original": original["perplexity"]}
                    for name, text, kind in (("steered", steered, ""), ("control", control, "_control")):
                        row |= {name: text["text"], "echo" + kind: text["act"] - original["act"], "ratings" + kind: {}}
                        row |= {"perplexity" + kind: text["perplexity"], "promoted" + kind: text["promoted"]}
                    rows.append(row)
                progress.update(len(some))
    return rows


def choose(sae, folder, args):
    """The features to steer and {feature: (explanation, score)}: those of autointerp.json, else random alive ones."""
    path, scores = Path(folder) / "autointerp.json", {}
    if path.exists():
        found = read_json(path)
        if found.get("sae") != evaluate.fingerprint(folder):
            raise UserError(f"{path}: is of another SAE than the one in its folder: repeat evaluate.py autointerp")
        try:
            scores = {int(row["feature"]): (row["explanation"], row["score"]) for row in found["features"]}
            if not {*scores} <= {*range(sae.d_sae)}:
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{path}: not as evaluate.py autointerp writes it, so repeat that") from None
    among = evaluate.alive_by_weight(sae)
    if scores:
        among = torch.tensor([feature in scores for feature in range(sae.d_sae)])
    return evaluate.choose_features(args, folder, among), scores


# ---------------------------------------------------------------------------------------------------
# Rate: the judge

RATE = """\
A language model was steered towards something, which somebody describes so: {explanation}
Here are two texts. Which is more related to the description? Reply with one number and nothing else:
1 if text A clearly is, 2 if text A rather is, 3 if neither or both are, 4 if text B rather is, 5 if text B clearly is.

{fence}
BEGIN DATA
text A: {a}
text B: {b}
END DATA"""


def parse_rating(text):
    """A rating from 1 to 5, alone on the last line; else None."""
    line = evaluate.last_line(text).rstrip(".")
    return int(line) if line in ("1", "2", "3", "4", "5") else None


def rating_question(row, name, swap):
    """The prompt that compares a row's `name` text with the original, which is text A unless swapped; and a parser
    that turns the answer back, so that 5 always means the steered text."""
    texts = [json.dumps(row["prompt"] + row[key], ensure_ascii=False) for key in ("original", name)]
    a, b = reversed(texts) if swap else texts
    explanation = json.dumps(row["explanation"], ensure_ascii=False)
    prompt = RATE.format(explanation=explanation, fence=evaluate.FENCE, a=a, b=b)

    def parse(text):
        rating = parse_rating(text)
        return 6 - rating if swap and rating else rating

    return prompt, parse


def rating_questions(rows, args):
    """For the rows whose feature has an explanation: (row, the field its rating goes to, prompt, parser).

    The order of the texts is drawn from the row alone, so that repeating the command asks the same questions.
    """
    for row in rows:
        for name, field in (("steered", "ratings"), ("control", "ratings_control")):
            if row["explanation"]:
                # The last number keeps these draws apart from those of the text itself
                place = [args.seed, row["feature"], args.prompts.index(row["prompt"]), 2 + (name == "control")]
                swap = not args.fixed_order and np.random.default_rng(place).random() < 0.5
                yield row, field, *rating_question(row, name, swap)


def rate(rows, judges, args):
    """Have every judge rate every steered and control text of explained features; None where no answer made sense."""
    questions = list(rating_questions(rows, args))
    for judge in judges:
        asked = [question[2:] for question in questions]
        answers = evaluate.ask_all(judge, asked, f"rating by {judge.model}", args.concurrency)
        for (row, field, *_), (rating, _) in zip(questions, answers):
            row[field][judge.model] = rating


# ---------------------------------------------------------------------------------------------------
# Compare


def success_of(row, kind=""):
    """Whether the judges' mean rating is a success, of the control with `kind` "_control": 1.0 or 0.0; None unrated."""
    ratings = [rating for rating in row["ratings" + kind].values() if rating is not None]
    return float(np.mean(ratings) >= SUCCESS) if ratings else None


def echoes(row, kind=""):
    """Whether the model, reading the text, sees more of the feature than in its own: 1.0 or 0.0; `kind` as above."""
    return float(row["echo" + kind] > 0)


def rate_with_interval(values):
    """A rate of 1.0 and 0.0 values, without the Nones, with its 95% Wilson interval: {"rate", "interval", "n"}."""
    values = [value for value in values if value is not None]
    if not values:
        return {"rate": None, "interval": None, "n": 0}
    found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"rate": float(np.mean(values)), "interval": [found.low, found.high], "n": len(values)}


def over_control(outcome):
    """The outcome of a text minus that of the random direction's text: what is due to the feature."""

    def excess(row):
        steered, control = outcome(row), outcome(row, "_control")
        return None if steered is None or control is None else steered - control

    return excess


def by_feature(rows, outcome):
    """{feature: mean outcome of its texts}: those are not independent, but features are."""
    found = {}
    for row in rows:
        if outcome(row) is not None:
            found.setdefault(row["feature"], []).append(outcome(row))
    return {feature: float(np.mean(values)) for feature, values in found.items()}


def permutation_test(a, b):
    """p of the difference of two settings' means over features, each {feature: value}, when features change places."""

    def difference(a, b, axis=-1):
        return a.mean(axis) - b.mean(axis)

    values = [np.array([*means.values()]) for means in (a, b)]
    if min(map(len, values)) < 2 or np.ptp(np.concatenate(values)) == 0:
        return 1.0  # nothing to tell
    found = stats.permutation_test(
        values, difference, n_resamples=RESAMPLES, batch=1000, vectorized=True, random_state=np.random.default_rng(0)
    )
    return float(found.pvalue)


def line_through(x, y):
    """{n, r, p, interval (95%), slope, slope_error} of y over x; None where there is no spread."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    line = stats.linregress(x, y)
    found = {"r": line.rvalue, "p": line.pvalue, "slope": line.slope, "slope_error": line.stderr}
    interval = stats.pearsonr(x, y).confidence_interval(0.95)
    return {"n": len(x), "interval": [*map(float, interval)]} | {name: float(v) for name, v in found.items()}


def correlation(rows, outcome):
    """How auto-interp scores go with an outcome: point-biserial r over texts, as the study has it, with Spearman's; and
    by_feature, over features with the means of their texts, which are independent. None where there is no spread."""
    rows = [row for row in rows if row["autointerp_score"] is not None and outcome(row) is not None]
    scores, values = [row["autointerp_score"] for row in rows], [outcome(row) for row in rows]
    found = line_through(scores, values)
    if found is None:
        return None
    spearman, means = stats.spearmanr(scores, values), by_feature(rows, outcome)
    score_of = {row["feature"]: row["autointerp_score"] for row in rows}
    found |= {"spearman": float(spearman.statistic), "spearman_p": float(spearman.pvalue)}
    return found | {"by_feature": line_through([score_of[feature] for feature in means], [*means.values()])}


def z_test(difference, error):
    """{"z", "p"} of a difference with a standard error; None where there is no error to compare it with."""
    if not (np.isfinite(difference) and np.isfinite(error) and error > 0):
        return None
    z = difference / error
    return {"z": float(z), "p": float(2 * stats.norm.sf(abs(z)))}


def lines_differ(first, second):
    """Whether two of line_through have other correlations (Fisher's z) and other slopes: each {"z", "p"}."""
    if not (first and second) or max(abs(first["r"]), abs(second["r"])) >= 1:
        return None
    apart = np.arctanh(second["r"]) - np.arctanh(first["r"])
    steeper, errors = second["slope"] - first["slope"], (first["slope_error"], second["slope_error"])
    correlations = z_test(apart, sum(1 / (line["n"] - 3) for line in (first, second)) ** 0.5)
    return {"correlations": correlations, "slopes": z_test(steeper, np.hypot(*errors))}


def compare(a, b, outcome):
    """Two settings' rows at one strength: do their rates, and their correlations with auto-interp scores, differ?

    chi_squared is over texts (Yates' correction, as the study has it), permutation over features. over_control: the
    same of what each setting achieves beyond random directions, since those may differ between settings too.
    """
    values = [[outcome(row) for row in rows if outcome(row) is not None] for rows in (a, b)]
    if not all(values):
        return None
    counts = np.array([[sum(v), len(v) - sum(v)] for v in values])
    result = {"rates": [float(np.mean(v)) for v in values], "n": [len(v) for v in values], "chi_squared": None}
    if counts.sum(0).all():
        chi = stats.chi2_contingency(counts)
        result["chi_squared"] = {"statistic": float(chi.statistic), "p": float(chi.pvalue)}
    result["permutation_p"] = permutation_test(by_feature(a, outcome), by_feature(b, outcome))
    excess = [by_feature(rows, over_control(outcome)) for rows in (a, b)]
    if all(excess):
        means = [float(np.mean([*found.values()])) for found in excess]
        result["over_control"] = {"differences": means, "permutation_p": permutation_test(*excess)}
    first, second = result["correlations"] = [correlation(rows, outcome) for rows in (a, b)]
    if first and second:
        result["differ"] = lines_differ(first, second)
        result["differ_by_feature"] = lines_differ(first["by_feature"], second["by_feature"])
    return result


def krippendorff_alpha(units):
    """Agreement of any number of judges, interval scale: `units` is a list of the ratings that each text has.

    1 - (observed disagreement) / (that of ratings paired at random); texts with one rating say nothing.
    """
    units = [np.asarray(unit, dtype=float) for unit in units if len(unit) > 1]
    if not units:
        return None
    every = np.concatenate(units)
    n = len(every)

    def pairs(values):  # sum of squared differences over ordered pairs
        return 2 * (len(values) * (values**2).sum() - values.sum() ** 2)

    observed = sum(pairs(unit) / (len(unit) - 1) for unit in units) / n
    expected = pairs(every) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 0 else None


def agreement(rows):
    """Krippendorff's alpha of all ratings, where there are several judges."""
    rated = [row[field] for row in rows for field in ("ratings", "ratings_control")]
    units = [[rating for rating in ratings.values() if rating is not None] for ratings in rated]
    return {"krippendorff_alpha": krippendorff_alpha(units)} if any(len(ratings) > 1 for ratings in rated) else {}


def summarise(rows):
    """The summary of steering.json, one entry a strength."""
    result = []
    for strength in dict.fromkeys(row["strength"] for row in rows):
        some = [row for row in rows if row["strength"] == strength]
        entry = {"strength": strength, "texts": len(some), "features": len({row["feature"] for row in some})}
        entry["explained"] = len({row["feature"] for row in some if row["explanation"]})
        for name in ("echo", "echo_control", "promoted", "promoted_control"):
            entry[name] = float(np.mean([row[name] for row in some]))
        for name in ("perplexity", "perplexity_control", "perplexity_original"):
            entry[name] = float(np.median([row[name] for row in some]))
        for name, outcome in (("echoes", echoes), ("success", success_of)):
            for kind in ("", "_control"):
                entry[name + kind] = rate_with_interval([outcome(row, kind) for row in some])
        # A feature that nobody could explain leaves the sample; counted as a failure, it stays
        counted = [success_of(row) if row["explanation"] else 0.0 for row in some]
        entry["success_of_all"] = rate_with_interval(counted if entry["success"]["n"] else [])
        outcome = success_of if entry["success"]["n"] else echoes
        entry["autointerp_correlation"] = correlation(some, outcome)
        result.append(entry | {"agreement": agreement(some)})
    return result


# ---------------------------------------------------------------------------------------------------
# Tables and figures


def table(runs):
    """One line for each run and strength."""
    lines = [("run", "strength", "features", "success", "control", "echoes", "control", "echo", "promoted", "control")]
    lines[0] += ("perplexity", "control", "unsteered")
    for label, _, summary in runs:
        for e in summary:
            cells = [label, f"{e['strength']:g}", str(e["features"])]
            for name in ("success", "success_control", "echoes", "echoes_control"):
                rate, interval = e[name]["rate"], e[name]["interval"]
                cells.append("-" if rate is None else "{:.3f} [{:.3f}, {:.3f}]".format(rate, *interval))
            cells += [f"{e['echo']:.3g}", f"{e['promoted']:.3f}", f"{e['promoted_control']:.3f}"]
            cells += [f"{e[name]:.0f}" for name in ("perplexity", "perplexity_control", "perplexity_original")]
            lines.append(tuple(cells))
    return evaluate.markdown(lines)


def plot_rates(runs, judged):
    """Success (or, unjudged, echo) rates with 95% intervals, steered and control, for each run over strengths; and
    against perplexity, what steering costs."""
    name = "success" if judged else "echoes"
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, (label, _, summary) in enumerate(runs):
        summary = [entry for entry in summary if entry[name]["rate"] is not None]
        x = np.arange(len(summary)) + 0.06 * colour
        for kind, style in (("", "o-"), ("_control", "o:")):
            rates = np.array([entry[name + kind]["rate"] for entry in summary])
            ends = np.array([entry[name + kind]["interval"] for entry in summary]).reshape(-1, 2).T
            shown = f"{label}{kind.replace('_', ', ')}"
            left.errorbar(x, rates, np.abs(ends - rates), fmt=style, color=f"C{colour}", label=shown, capsize=2)
            costs = [entry["perplexity" + kind] / entry["perplexity_original"] for entry in summary]
            right.plot(costs, rates, style, color=f"C{colour}")
        left.set_xticks(range(len(summary)), [f"{entry['strength']:g}" for entry in summary])
    title = "success rate" if judged else "share of texts that echo the feature"
    left.set(xlabel="strength", ylabel=title, ylim=(0, None))
    right.set(xlabel="perplexity, times that of unsteered text", xscale="log")
    ticks = [2**n for n in range(-2, 12) if right.get_xlim()[0] <= 2**n <= right.get_xlim()[1]]
    right.set_xticks(ticks, map(str, ticks))
    right.minorticks_off()
    evaluate.plain(left, right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def plot_scores(runs, judged):
    """Histogram of auto-interp scores by feature; and the outcome by score bin, at the first strength."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.array([0.0, 0.6, 0.7, 0.8, 0.9, 1.0 + 1e-9])
    outcome = success_of if judged else echoes
    for colour, (label, rows, summary) in enumerate(run for run in runs if run[2]):
        scored = [row for row in rows if row["autointerp_score"] is not None]
        rows = [row for row in scored if row["strength"] == summary[0]["strength"]]
        scores = {row["feature"]: row["autointerp_score"] for row in rows}
        bins = (np.arange(16) - 0.5) / 14
        left.hist(list(scores.values()), bins=bins, histtype="step", color=f"C{colour}", label=label)
        place = np.digitize([row["autointerp_score"] for row in rows], edges) - 1
        for number in range(len(edges) - 1):
            found = rate_with_interval([outcome(row) for row, at in zip(rows, place) if at == number])
            if found["n"]:
                error = np.abs(np.array(found["interval"]) - found["rate"])[:, None]
                right.errorbar(number + 0.1 * colour, found["rate"], error, fmt="o", color=f"C{colour}", capsize=2)
    left.set(xlabel="auto-interp score", ylabel="features")
    right.set(xlabel="auto-interp score", ylabel="success rate" if judged else "echo rate", ylim=(0, None))
    right.set_xticks(range(5), ["<0.6", "0.6", "0.7", "0.8", "0.9-1"])
    evaluate.plain(left, right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", fontsize=8, frameon=False)
    return figure


def report(runs, out):
    """The table, the comparison of every two runs at every strength they share, and the figures."""
    print(table(runs))
    comparisons = []
    for (name_a, a, first), (name_b, b, second) in itertools.combinations(runs, 2):
        outcome = success_of if any(e["success"]["n"] for e in (*first, *second)) else echoes
        for strength in [e["strength"] for e in first if e["strength"] in [e["strength"] for e in second]]:
            here = [[row for row in rows if row["strength"] == strength] for rows in (a, b)]
            about = {"runs": [name_a, name_b], "strength": strength, "outcome": outcome.__name__}
            result = compare(*here, outcome)
            comparisons.append(about | (result or {}))
            if result and result["chi_squared"]:
                rates, p = result["rates"], result["chi_squared"]["p"]
                said = f"{name_a} and {name_b}, strength {strength:g}: "
                said += f"{rates[0]:.3f} against {rates[1]:.3f}, chi-squared p = {p:.2g}, "
                said += f"by feature p = {result['permutation_p']:.2g}"
                if "over_control" in result:
                    more = result["over_control"]["differences"]
                    said += f"; over random directions {more[0]:.3f} against {more[1]:.3f}, "
                    said += f"by feature p = {result['over_control']['permutation_p']:.2g}"
                print(said)
    write_json(out / "comparison.json", {"comparisons": comparisons, "runs": {label: s for label, _, s in runs}})
    judged = any(entry["success"]["n"] for _, _, summary in runs for entry in summary)
    evaluate.save_figure(plot_rates(runs, judged), out / "rates.png")
    if any(row["autointerp_score"] is not None for _, rows, _ in runs for row in rows):
        evaluate.save_figure(plot_scores(runs, judged), out / "scores.png")


# ---------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of train_pythia.py, the settings to compare")
    add("--strength", nargs="+", type=float, default=[5.0])
    modes = "of strength: a length, times the residual stream's norm, or a rise of the feature's own pre-activation"
    add("--mode", default="fixed", choices=("fixed", "rms", "preact"), help=modes)
    add("--n", type=at_least(1), default=300, help="features, those of autointerp.json or random alive ones")
    add("--features", type=int, nargs="+", help="these features instead")
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--new-tokens", type=at_least(1), default=30)
    add("--temperature", type=at_least(0, float), default=0.7, help="0 for the likeliest token always")
    add("--top-p", type=at_least(1e-9, float, 1), default=0.9)
    add("--steer-prompt", action="store_true", help="steer at the prompt's positions too")
    add("--seed", type=at_least(0), default=0, help="of random draws, features and control directions")
    evaluate.add_judge_flags(add, several="+")
    add("--fixed-order", action="store_true", help="show the unsteered text first always, as the study did")
    add("--batch-size", type=at_least(1), default=256, help="texts generated together")
    add("--out", default="steering", metavar="DIR", help="where the comparison and figures go")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    args.strength, args.prompts = (list(dict.fromkeys(values)) for values in (args.strength, args.prompts))
    if not np.isfinite(args.strength).all():
        parser.error("--strength: give finite numbers")
    if not all(args.prompts):
        parser.error("--prompts: an empty one; give some text to go on from")
    if len(args.base_url) not in (1, len(args.judge)):
        parser.error(f"--base-url: {len(args.base_url)} addresses for {len(args.judge)} judges; give one, or as many")
    if len(args.api_key_env) != len(args.base_url):
        parser.error(f"--api-key-env: give one variable for each of the {len(args.base_url)} of --base-url")
    if len(set(args.judge)) < len(args.judge) or "" in args.judge:
        parser.error(f"--judge {' '.join(args.judge)}: the same name twice, or none at all")
    return args


def main(argv=None):
    args = parse(argv)
    device, found = pick_device(args.device), []
    for folder in evaluate.find_runs(args.runs):
        sae = SAE.load(folder)
        found.append((folder, evaluate.read_run(folder), sae, *choose(sae, folder, args)))
    out = make_folder(args.out)
    if not args.judge:
        print("no --judge: measures that need none; give --judge and --base-url to have texts rated")
    at, runs = None, []
    for folder, hp, sae, features, scores in found:
        if at != evaluate.source(hp):
            model, tokenizer, tokens = evaluate.language_model_and_tokens(hp, device)
            at = evaluate.source(hp)
            check_length(model, tokenizer, args)
        contexts = evaluate.cut_contexts(tokens, 8192, min(128, hp.context), device)
        stream = evaluate.Stream(model, hp.layer, contexts)
        rms = torch.cat([x.square().sum(1) for x in stream]).mean().sqrt().item()  # norm of the residual stream
        total = len(features) * len(args.prompts) * len(args.strength)
        with tqdm(total=total, desc=f"steering {folder.name}", unit="text") as progress:
            rows = steer_run(sae.to(device), model, tokenizer, hp.layer, features, args, rms, progress)
        for row in rows:
            row["explanation"], row["autointerp_score"] = scores.get(row["feature"], (None, None))
        if lost := len(features) - len({row["feature"] for row in rows}):
            print(f"note: {lost} features of {folder} are left out: their encoder does not see their decoder")
        if not any(row["explanation"] for row in rows):
            print(f"note: {folder} has no explanations (evaluate.py autointerp), so nothing can be rated")
        rate(rows, open_judges(args, folder / "answers.jsonl"), args)
        names = ("mode", "strength", "prompts", "new_tokens", "temperature", "top_p", "steer_prompt", "seed", "judge")
        settings = {name: getattr(args, name) for name in (*names, "judge_options", "fixed_order")} | {"rms": rms}
        summary = summarise(rows)
        write_json(folder / "steering.json", {"settings": settings, "rows": rows, "summary": summary})
        group = {"config": vars(hp), "length": hp.length, "folders": [folder], "name": folder.name}
        runs.append((group, rows, summary))
    evaluate.add_labels([group for group, *_ in runs])
    report([(group["label"], *results) for group, *results in runs], out)


def check_length(model, tokenizer, args):
    """Raise UserError where a prompt and its text are more than the model can read."""
    prompts = (len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in args.prompts)
    longest, limit = max(prompts) + args.new_tokens, getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise UserError(f"--new-tokens {args.new_tokens}: with its prompt {longest}, but the model reads {limit}")


def open_judges(args, cache):
    """A Judge for each of --judge, at its own --base-url or the one they share."""
    options = (args.judge_options, args.concurrency)
    named = zip(args.judge, itertools.cycle(zip(args.base_url, args.api_key_env)))
    return [evaluate.Judge(url, name, cache, os.environ.get(key, ""), *options) for name, (url, key) in named]


if __name__ == "__main__":
    run_command(main)
