"""Steer a language model with the features of SAEs, and measure what comes of it.

    python steer.py RUN --strength 5 10 20                                   what needs no judge
    python steer.py RUN RUN --mode rms --strength 0.6 1                      two settings compared
    python steer.py RUN RUN --judge NAME --base-url http://localhost:8000/v1        and rated

RUN is the folder of an SAE of a language model, such as runs/pythia/topk_k40_l2-0.0001_seed0.

For every feature and neutral prompt the language model writes three kinds of text, from the same
random draws: the original, without interference; the steered text, for which the feature's decoder
direction is added to the residual stream; and the control, for which a random direction of the same
length is added, since noise changes a text, too, and some texts will happen to suit the feature.

Three measures need no judge. Echo: does the unsteered model, reading the text, see more of the
feature per token than in the original? Perplexity: what did steering cost? Promoted: how many of
the ten tokens that the direction raises most are in the text? A judge, some other language model,
is shown the feature's explanation (see evaluate.py autointerp), the original and the text, and
rates from 1 to 5 whether the text is more related to the explanation; 4 or 5 is a success.

A run folder gets steering.json; the folder --out gets the comparison of the runs, and pictures.
Read on in this order: generate, read back, one run, rate, compare; then "Machinery".
"""

import hashlib
import inspect
import itertools
import json
import os
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
    use_bfloat16,
    write_json,
)
from train_pythia import (
    Run,
    Stream,
    check_model,
    cut_contexts,
    decode_parts,
    end_tokens,
    final_norm,
    load_model,
    open_run,
    read_run,
    spliced,
)

PROMPTS = ("I think that", "It is", "This is what")  # neutral beginnings, the same for all features
STRENGTH = {"fixed": 5.0, "rms": 0.6, "preact": 5.0}  # by mode, as in the study
RMS_TOKENS = 8192  # on which the norm of the residual stream is measured, in contexts of 128
RMS_CONTEXT = 128
SUCCESS = 4  # the mean rating from which a text counts as more related to the explanation
RESAMPLES = 10_000  # of permutation tests and of bootstrap intervals


@dataclass
class Settings:
    """All that decides the texts of a feature; by default as in the study."""

    strength: list = field(default_factory=lambda: [STRENGTH["fixed"]])  # see steering_vectors
    mode: str = "fixed"  # what strength measures: "fixed", "rms" or "preact"
    prompts: list = field(default_factory=lambda: list(PROMPTS))
    new_tokens: int = 30
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.9
    steer_prompt: bool = False  # whether the prompt's positions are steered as well
    seed: int = 0  # of the features chosen, the draws, the random directions, the order shown


class Setup(NamedTuple):
    """A language model, and an SAE of its residual stream after block `layer`."""

    model: torch.nn.Module
    tokenizer: object
    layer: int
    sae: SAE
    rms: float | None = None  # root mean square norm of the residual stream, for mode "rms"


@dataclass
class Text:
    """One text and what was measured of it: a row of steering.json."""

    feature: int
    prompt: str
    kind: str  # "original", "steered" or "control"
    strength: float  # 0 for an original
    text: str  # what was written after the prompt, up to an end of text
    act: float  # mean of the feature over the text's tokens, as the unsteered model reads it
    perplexity: float  # of the text, for the unsteered model
    promoted: float  # share of the ten tokens the direction raises most that the text contains
    echo: float | None = None  # act minus that of the original; None for an original
    ratings: dict = field(default_factory=dict)  # {judge: 1 to 5, or None for no usable answer}
    explanation: str | None = None  # of the feature, as in autointerp.json
    autointerp_score: float | None = None  # of the explanation, as in autointerp.json
    asked: bool = False  # whether autointerp.json has a row for the feature, explained or not


# --------------------------------------------------------------------------------------------------
# Generate


def random_generator(*key):
    """A generator that depends on the key alone, such as (seed, feature, "control").

    So what is drawn for a feature does not depend on which others are steered with it. A feature of
    another run that has the same number gets the same draws and the same random direction.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def encoder_gain(sae, features):
    """What a step of length 1 along its decoder row adds to each feature's pre-activation: [n]."""
    return (F.normalize(sae.W_dec[features]) * sae.W_enc.T[features]).sum(1)


@torch.no_grad()
def steering_vectors(sae, features, mode, strength, rms=None):
    """What is added to the residual stream for each feature, along its decoder row: [n, d_in].

    strength is, by mode, the length of the vector (fixed); its length in units of `rms`, the root
    mean square norm of the residual stream (rms); or what it adds to the feature's own
    pre-activation (preact), where the feature's encoder_gain must be positive. Where that is small,
    the vector is long.
    """
    direction = F.normalize(sae.W_dec[features])
    if mode == "fixed":
        return strength * direction
    if mode == "rms":
        return strength * rms * direction
    return strength / encoder_gain(sae, features)[:, None] * direction


def control_vectors(features, seed, like):
    """Random directions, each drawn from the seed and its feature, as long as those of `like`."""
    rows = []
    for feature in features:
        rows.append(random_generator(seed, feature, "control").standard_normal(like.shape[1]))
    directions = F.normalize(torch.from_numpy(np.stack(rows)).to(like))
    return directions * like.norm(dim=1, keepdim=True)


def sample(logits, uniform, temperature, top_p):
    """Next tokens [n] from logits [n, vocabulary], of the likeliest that together reach top_p.

    Inverts the distribution function at uniform [n], so equal logits and equal draws give the same
    token.
    """
    if temperature == 0:
        return logits.argmax(1)
    probability, tokens = (logits.float() / temperature).softmax(1).sort(1, descending=True)
    likelier = probability.cumsum(1) - probability  # the probability of all before this one
    probability = torch.where(likelier < top_p, probability, 0)
    cumulative = probability.cumsum(1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1, keepdim=True)
    n_kept = (likelier < top_p).sum(1, keepdim=True)
    chosen = torch.minimum(chosen, n_kept - 1)  # where rounding leads past the last that is kept
    return tokens.gather(1, chosen)[:, 0]


def add_vectors(vectors, resid):
    """The residual stream with vectors added, in its own precision."""
    return (resid + vectors).to(resid.dtype)


@torch.no_grad()
def generate(model, layer, prompt, vectors, uniform, settings):
    """Continue `prompt`, a list of token ids, along each of vectors [n, d_in]: ids [n, steps].

    A row's vector is added to the residual stream after block `layer` at every position behind the
    prompt (with steer_prompt at all positions). So the first token that is written is not steered,
    and is that of the original. uniform [n, steps] are the random draws.
    """
    # transformers 5.24 calls the cache "cache"; older versions call it past_key_values.
    takes_cache = "cache" in inspect.signature(model.forward).parameters
    cache_name = "cache" if takes_cache else "past_key_values"
    tokens = torch.tensor(prompt, device=vectors.device).expand(len(vectors), -1)
    first_steered = 0 if settings.steer_prompt else len(prompt)
    cache, n_cached = None, 0
    for step in range(uniform.shape[1]):
        # Only what is not in the cache is read: first the prompt, then one token at a time. Some
        # recurrent models return nothing under that name. They read the whole text at every step,
        # and are not asked for a cache again.
        positions = torch.arange(n_cached, tokens.shape[1], device=tokens.device)
        is_steered = positions >= first_steered
        added = vectors[:, None] * is_steered[:, None]  # [n, positions read, d_in]
        cached = {} if cache is None else {cache_name: cache}
        use_cache = step == 0 or cache is not None
        with spliced(model, layer, partial(add_vectors, added)):
            out = model(input_ids=tokens[:, n_cached:], use_cache=use_cache, **cached)
        cache = out.get(cache_name)
        n_cached = 0 if cache is None else tokens.shape[1]
        next_tokens = sample(
            out.logits[:, -1], uniform[:, step], settings.temperature, settings.top_p
        )
        tokens = torch.cat([tokens, next_tokens[:, None]], 1)
    return tokens[:, len(prompt) :]


# --------------------------------------------------------------------------------------------------
# Read back: measures that need no judge


def before_end(tokens, ends):
    """Which of tokens [n, steps] come before the first of `ends`, which end a text: bool."""
    is_end = torch.isin(tokens, torch.tensor(sorted(ends), dtype=torch.long, device=tokens.device))
    return is_end.cumsum(1) == 0


@torch.no_grad()
def read_back(setup, prompt, tokens, features, ends):
    """Have the unsteered model read texts, tokens [n, steps], after the prompt.

    Returns the mean activation of each text's own feature, [n], and the text's perplexity, [n],
    over the tokens before the one that ends it. A text that ends at once is measured on that token.
    """
    seen = []

    def look(resid):
        seen.append(resid)
        return resid

    beginning = torch.tensor(prompt, device=tokens.device).expand(len(tokens), -1)
    with spliced(setup.model, setup.layer, look):
        logits = setup.model(input_ids=torch.cat([beginning, tokens], 1), use_cache=False).logits
    # The logits at a position predict the next token: [n, steps, vocabulary].
    log_p = logits[:, len(prompt) - 1 : -1].float().log_softmax(2)
    loss = -log_p.gather(2, tokens[..., None])[..., 0]  # [n, steps]
    x = seen[0][:, len(prompt) :].flatten(0, 1).float()  # [n * steps, d_in]
    own = torch.tensor(features, device=x.device).repeat_interleave(tokens.shape[1])[:, None]
    # One activation of a TopK SAE needs all others of its token, [n * steps, d_sae]: in parts.
    parts = zip(x.split(4096), own.split(4096))
    acts = torch.cat([setup.sae.encode(part).gather(1, feature) for part, feature in parts])
    counted = before_end(tokens, ends)
    counted[:, 0] = True  # so that there is something to average where a text ends at once
    n_counted = counted.sum(1)
    mean_act = (acts.view(tokens.shape) * counted).sum(1) / n_counted
    perplexity = ((loss * counted).sum(1) / n_counted).exp()
    return mean_act, perplexity


@torch.no_grad()
def promoted_tokens(model, directions, k=10):
    """The k tokens [n, k] that directions [n, d_in] raise most, by final norm and unembedding."""
    unembed = model.get_output_embeddings()
    directions = directions.to(unembed.weight.dtype)
    logits = unembed(final_norm(model)(directions))
    # Biases raise the same tokens whatever the direction is: those that they raise for a zero
    # vector, which leaves nothing but them.
    of_biases = unembed(final_norm(model)(torch.zeros_like(directions[:1])))
    return (logits.float() - of_biases.float()).topk(k, dim=1).indices


# --------------------------------------------------------------------------------------------------
# One run: every feature, prompt and strength


def write_texts(setup, settings, features, prompt, kind, strength, vectors, promoted):
    """Write and measure a text for each feature, along vectors [n, d_in]: a list of Text.

    promoted, n lists, are the promoted_tokens of the features' decoder directions.
    """
    model, tokenizer = setup.model, setup.tokenizer
    # No BOS token, since SAEs are trained without one (train_pythia.tokenise).
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    draws = []
    for feature in features:
        generator = random_generator(settings.seed, feature, prompt, "draws")
        draws.append(generator.random(settings.new_tokens, dtype=np.float32))
    uniform = torch.from_numpy(np.stack(draws)).to(vectors.device)
    tokens = generate(model, setup.layer, prompt_ids, vectors, uniform, settings)
    ends = end_tokens(model, tokenizer)
    acts, perplexity = read_back(setup, prompt_ids, tokens, features, ends)
    written = before_end(tokens, ends)
    texts = []
    for i, feature in enumerate(features):
        ids = tokens[i][written[i]].tolist()
        # The text after the prompt, with the space before it.
        _, text = decode_parts(tokenizer, [prompt_ids, ids])
        share = np.mean([token in ids for token in promoted[i]])
        measures = {"act": acts[i].item(), "perplexity": perplexity[i].item()}
        texts.append(Text(feature, prompt, kind, strength, text, promoted=float(share), **measures))
    return texts


def steer_run(setup, features, settings, batch_size=256, progress=None):
    """All texts of features of an SAE, measured but not rated: a list of Text.

    progress, a tqdm bar, advances by one for each feature and prompt.
    """
    sae = setup.sae
    texts = []
    for start in range(0, len(features), batch_size):
        batch = features[start : start + batch_size]
        nothing = torch.zeros_like(sae.W_dec[batch])
        promoted = promoted_tokens(setup.model, sae.W_dec[batch]).tolist()
        for prompt in settings.prompts:
            originals = write_texts(
                setup, settings, batch, prompt, "original", 0.0, nothing, promoted
            )
            texts += originals
            for strength in settings.strength:
                steered = steering_vectors(sae, batch, settings.mode, strength, setup.rms)
                control = control_vectors(batch, settings.seed, like=steered)
                for kind, vectors in (("steered", steered), ("control", control)):
                    some = write_texts(
                        setup, settings, batch, prompt, kind, strength, vectors, promoted
                    )
                    for text, original in zip(some, originals):
                        text.echo = text.act - original.act
                    texts += some
            if progress is not None:
                progress.update(len(batch))
    return texts


# --------------------------------------------------------------------------------------------------
# Rate: a judge compares each steered or control text with its original

RATE = """\
A feature inside a language model is active on some tokens and silent on all others. This is a
description of when it is active:
{explanation}

Below are two texts, A and B, which begin with the same words. Which of them is more closely related
to the description? Rate this from 1 to 5:

1: text A, clearly
2: text A, slightly
3: both equally, or neither
4: text B, slightly
5: text B, clearly

Go by what the texts say and how they say it, not by how well they are written.

{fence}

BEGIN DATA
text A: {a}
text B: {b}
END DATA

Reply with a single line that begins with "ANSWER:", followed by one number from 1 to 5. Write
nothing else."""


def parse_rating(reply):
    """The rating in a judge's reply, 1 to 5; None where the answer is anything else."""
    answer = (evaluate.answer_line(reply) or "").strip(" \t*_`\"'<>()[].")
    return int(answer) if answer in ("1", "2", "3", "4", "5") else None


def parse_swapped_rating(reply):
    """The same where the original was text B: turned round, so that 5 is for the other text."""
    rating = parse_rating(reply)
    return None if rating is None else 6 - rating


def rating_question(text, original, swap):
    """The prompt about a text and its original, which is text A unless swapped; and its parser."""
    quote = partial(json.dumps, ensure_ascii=False)
    a, b = quote(original.prompt + original.text), quote(text.prompt + text.text)
    if swap:
        a, b = b, a
    prompt = RATE.format(explanation=quote(text.explanation), fence=evaluate.FENCE, a=a, b=b)
    return prompt, parse_swapped_rating if swap else parse_rating


def rate(texts, judges, seed, fixed_order=False, concurrency=16):
    """Have every judge rate all steered and control texts whose feature has an explanation.

    Which of the two texts comes first depends on the seed and on which text it is, and not on what
    else is rated. So the same command, or one for more features, asks the same questions, whose
    answers a Judge remembers.
    """
    originals = {(text.feature, text.prompt): text for text in texts if text.kind == "original"}
    rated = [text for text in texts if text.kind != "original" and text.explanation]
    questions = []
    for text in rated:
        key = (seed, text.feature, text.prompt, text.kind, text.strength, "order")
        swap = not fixed_order and random_generator(*key).random() < 0.5
        questions.append(rating_question(text, originals[text.feature, text.prompt], swap))
    for judge in judges:
        answers = evaluate.ask_all(judge, questions, f"rating by {judge.model}", concurrency)
        for text, answer in zip(rated, answers):
            text.ratings[judge.model] = answer.value


# --------------------------------------------------------------------------------------------------
# Compare. An outcome is a function of a text: 1.0, 0.0, or None where nobody rated it. The names of
# these functions are in the keys of steering.json and in the head of the table.


def success(text):
    """Whether the judges find the text more related to the explanation than its original."""
    ratings = [rating for rating in text.ratings.values() if rating is not None]
    return float(np.mean(ratings) >= SUCCESS) if ratings else None


def success_of_all(text):
    """Success, where a feature that could not be explained counts as a failure.

    None for a feature that nobody was asked to explain, and for a text with an explanation but
    without a usable rating.
    """
    if text.explanation:
        return success(text)
    return 0.0 if text.asked else None


def echoes(text):
    """Does the model, reading the text, see more of the feature per token than in the original?"""
    return float(text.echo > 0)


def outcomes(texts, kind, outcome):
    """The outcomes of the texts of one kind, without the Nones."""
    values = [outcome(text) for text in texts if text.kind == kind]
    return [value for value in values if value is not None]


def rate_with_interval(values):
    """The mean of outcomes, with its 95% Wilson interval, and how many they are."""
    if not values:
        return {"rate": None, "interval": None, "n": 0}
    found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"rate": float(np.mean(values)), "interval": [found.low, found.high], "n": len(values)}


def by_feature(texts, kind, outcome):
    """{feature: mean outcome of its texts of one kind}.

    The texts of a feature depend on each other, so features are what is tested and resampled. They
    count as independent. A p or an interval is about other features of the same SAE, under the same
    prompts, and not about other seeds.
    """
    values = {}
    for text in texts:
        if text.kind == kind and outcome(text) is not None:
            values.setdefault(text.feature, []).append(outcome(text))
    return {feature: float(np.mean(some)) for feature, some in values.items()}


def beside_control(texts, outcome):
    """The mean outcome of each feature's steered texts and of its controls: [features, 2]."""
    steered, control = (by_feature(texts, kind, outcome) for kind in ("steered", "control"))
    pairs = [(steered[feature], control[feature]) for feature in steered if feature in control]
    return np.array(pairs).reshape(-1, 2)


def resampled_means(values, generator):
    """Means of bootstrap samples of values [features, ...]: [RESAMPLES, ...]."""
    means = []
    for _ in range(RESAMPLES):
        means.append(values[generator.integers(len(values), size=len(values))].mean(0))
    return np.array(means)


def with_interval(value, resampled):
    """A figure, and the middle 95% of its resampled values, of those that are defined.

    None stands for what is infinite or undefined, which a JSON file cannot hold.
    """
    resampled = np.sort(resampled[~np.isnan(resampled)])
    low, high = np.nan, np.nan
    if len(resampled):
        tail = int(0.025 * len(resampled))
        low, high = resampled[tail], resampled[-1 - tail]
    value, low, high = (float(n) if np.isfinite(n) else None for n in (value, low, high))
    return {"value": value, "interval": [low, high]}


def rates_by_feature(texts, outcome):
    """What steering achieves beside random directions; None where nothing has an outcome.

    Means over `features`, each {"value", "interval"}: steered; control, of random directions;
    their difference; their ratio, null where no control succeeds. The 95% intervals are those of a
    bootstrap over features. They have no width where all features have the same mean: see the
    Wilson interval of success or echoes instead. Resamples in which a ratio is 0/0 are left out.
    """
    pairs = beside_control(texts, outcome)
    if len(pairs) == 0:
        return None
    steered, control = pairs.mean(0)
    some_steered, some_control = resampled_means(pairs, np.random.default_rng(0)).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = with_interval(steered / control, some_steered / some_control)
    return {
        "features": len(pairs),
        "steered": with_interval(steered, some_steered),
        "control": with_interval(control, some_control),
        "difference": with_interval(steered - control, some_steered - some_control),
        "ratio": ratio,
    }


def mean_difference(a, b, axis=-1):
    """What permutation_test tests."""
    return a.mean(axis) - b.mean(axis)


def permutation_test(a, b):
    """Two-sided p of the difference of the means of a and b, which hold a value for each feature.

    Under the hypothesis that it is chance which values are a's and which are b's. The smallest p
    that it can give is 2 / (RESAMPLES + 1). None where a or b has fewer than two values.
    """
    if min(len(a), len(b)) < 2:
        return None
    if np.ptp(np.concatenate([a, b])) == 0:
        return 1.0  # nothing differs
    options = {"n_resamples": RESAMPLES, "batch": 1000, "random_state": np.random.default_rng(0)}
    found = stats.permutation_test((a, b), mean_difference, vectorized=True, **options)
    return float(found.pvalue)


def compare_by_feature(a, b, outcome):
    """Do the steered texts of two SAEs differ in the mean outcome of their features?

    rates, features: the mean of each SAE, and over how many features; ratio: that of b by that of
    a, {"value", "interval"}, with a bootstrap interval for which features of both are resampled,
    independently; permutation_p: see permutation_test.
    """
    means_a = np.array(list(by_feature(a, "steered", outcome).values()))
    means_b = np.array(list(by_feature(b, "steered", outcome).values()))
    rate_a, rate_b = means_a.mean(), means_b.mean()
    generator = np.random.default_rng(0)
    some_a, some_b = resampled_means(means_a, generator), resampled_means(means_b, generator)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = with_interval(rate_b / rate_a, some_b / some_a)
    return {
        "rates": [float(rate_a), float(rate_b)],
        "features": [len(means_a), len(means_b)],
        "ratio": ratio,
        "permutation_p": permutation_test(means_a, means_b),
    }


def line_through(x, y):
    """Correlation and regression of y over x, two lists.

    n; r, its p and 95% interval; the slope and its standard error. None where either does not vary,
    and for fewer than four points, which leave r no interval.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    line = stats.linregress(x, y)
    low, high = stats.pearsonr(x, y).confidence_interval(0.95)
    return {
        "n": len(x),
        "r": float(line.rvalue),
        "p": float(line.pvalue),
        "interval": [float(low), float(high)],
        "slope": float(line.slope),
        "slope_error": float(line.stderr),
    }


def correlation(texts, outcome):
    """Do auto-interp scores predict the outcome of steered texts? None where either is constant.

    by_text     line_through over texts, where r is the study's point-biserial correlation
    spearman    r and p of ranks, over texts
    by_feature  line_through over features, with the mean outcome of each
    """
    texts = [text for text in texts if text.kind == "steered" and outcome(text) is not None]
    texts = [text for text in texts if text.autointerp_score is not None]
    scores, values = [text.autointerp_score for text in texts], [outcome(text) for text in texts]
    by_text = line_through(scores, values)
    if by_text is None:
        return None
    ranks = stats.spearmanr(scores, values)
    score_of = {text.feature: text.autointerp_score for text in texts}
    means = by_feature(texts, "steered", outcome)
    return {
        "by_text": by_text,
        "spearman": {"r": float(ranks.statistic), "p": float(ranks.pvalue)},
        "by_feature": line_through([score_of[feature] for feature in means], list(means.values())),
    }


def z_test(difference, error):
    """{"z", "p"} of a difference with a standard error; None where there is no such error."""
    if not (np.isfinite(difference) and np.isfinite(error) and error > 0):
        return None
    z = difference / error
    return {"z": float(z), "p": float(2 * stats.norm.sf(abs(z)))}


def lines_differ(first, second):
    """Do two of line_through differ in their correlations (Fisher's z), and in their slopes?"""
    if first is None or second is None or max(abs(first["r"]), abs(second["r"])) >= 1:
        return None
    z_difference = np.arctanh(second["r"]) - np.arctanh(first["r"])
    z_error = np.sqrt(1 / (first["n"] - 3) + 1 / (second["n"] - 3))
    slope_error = np.hypot(first["slope_error"], second["slope_error"])
    return {
        "correlations": z_test(z_difference, z_error),
        "slopes": z_test(second["slope"] - first["slope"], slope_error),
    }


def chi_squared(a, b):
    """The study's test of two lists of outcomes, as if independent, with Yates' correction."""
    counts = np.array([[sum(values), len(values) - sum(values)] for values in (a, b)])
    if not counts.sum(0).all():
        return None  # all succeed, or none
    found = stats.chi2_contingency(counts)
    return {"statistic": float(found.statistic), "p": float(found.pvalue)}


def compare(a, b, outcome):
    """Do two SAEs differ? a and b are the texts of each at one strength. None without outcomes.

    Whether two settings differ, other seeds included, is more than it can say: see by_feature.

    rates, n               of the steered texts of both
    chi_squared            of these texts, as in the study, which takes them for independent
    features, ratio, permutation_p
                           of the means of features: see compare_by_feature
    of_all                 for success, the same and "rates" where features without an explanation
                           count as failures; else None
    over_control           the means of each feature's steered rate minus its control's, and their
                           permutation_p, since random directions, too, may succeed more often in
                           one SAE than in the other
    correlations           of auto-interp scores with the outcome, in both
    differ, differ_by_feature
                           whether these correlations differ, over texts and over features
    """
    values_a, values_b = (outcomes(texts, "steered", outcome) for texts in (a, b))
    if not values_a or not values_b:
        return None
    found = compare_by_feature(a, b, outcome)
    pairs_a, pairs_b = beside_control(a, outcome), beside_control(b, outcome)
    over_control = None
    if len(pairs_a) and len(pairs_b):
        excess_a, excess_b = pairs_a[:, 0] - pairs_a[:, 1], pairs_b[:, 0] - pairs_b[:, 1]
        over_control = {
            "differences": [excess_a.mean(), excess_b.mean()],
            "permutation_p": permutation_test(excess_a, excess_b),
        }
    first, second = correlation(a, outcome), correlation(b, outcome)
    differ, differ_by_feature = None, None
    if first and second:
        differ = lines_differ(first["by_text"], second["by_text"])
        differ_by_feature = lines_differ(first["by_feature"], second["by_feature"])
    return {
        "rates": [float(np.mean(values_a)), float(np.mean(values_b))],
        "n": [len(values_a), len(values_b)],
        "chi_squared": chi_squared(values_a, values_b),
        "features": found["features"],
        "ratio": found["ratio"],
        "permutation_p": found["permutation_p"],
        "of_all": compare_by_feature(a, b, success_of_all) if outcome is success else None,
        "over_control": over_control,
        "correlations": [first, second],
        "differ": differ,
        "differ_by_feature": differ_by_feature,
    }


def squared_differences(values):
    """The sum of the squared differences over all ordered pairs of values."""
    return 2 * (len(values) * (values**2).sum() - values.sum() ** 2)


def krippendorff_alpha(units):
    """Agreement of judges on an interval scale (Krippendorff 2011).

    `units` is a list of the ratings that each text has. Alpha is 1 - (observed disagreement) /
    (that of ratings paired at random). A text with one rating says nothing. None where no text has
    two, or where all ratings are equal.
    """
    units = [np.array(unit, dtype=float) for unit in units if len(unit) > 1]
    if not units:
        return None
    ratings = np.concatenate(units)
    n = len(ratings)
    observed = sum(squared_differences(unit) / (len(unit) - 1) for unit in units) / n
    expected = squared_differences(ratings) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 0 else None


def summarise(texts):
    """The summary of steering.json: for each strength a dict.

    texts, features         how many steered texts, and of how many features
    explained               how many of these features have an explanation
    success, echoes         rates of steered texts, with Wilson intervals as if texts were
                            independent
    success_of_all          the same, where features without an explanation count as failures
    echo, promoted          means over steered texts
    perplexity              the median over steered texts
    ..._control             the same of texts along random directions
    perplexity_original     the median over texts that were not steered
    ..._by_feature          of features: see rates_by_feature
    autointerp_correlation  of scores with success, or with echoes where nothing was rated
    krippendorff_alpha      the agreement of several judges
    """
    original_perplexity = [text.perplexity for text in texts if text.kind == "original"]
    entries = []
    for strength in dict.fromkeys(text.strength for text in texts if text.kind != "original"):
        some = [text for text in texts if text.kind != "original" and text.strength == strength]
        steered = [text for text in some if text.kind == "steered"]
        control = [text for text in some if text.kind == "control"]
        rated = outcomes(some, "steered", success)
        of_all = outcomes(some, "steered", success_of_all) if rated else []
        ratings = []  # of each text
        for text in some:
            ratings.append([rating for rating in text.ratings.values() if rating is not None])
        entry = {
            "strength": strength,
            "texts": len(steered),
            "features": len({text.feature for text in steered}),
            "explained": len({text.feature for text in steered if text.explanation}),
            "success": rate_with_interval(rated),
            "success_control": rate_with_interval(outcomes(some, "control", success)),
            "success_of_all": rate_with_interval(of_all),
            "success_by_feature": rates_by_feature(some, success),
            "success_of_all_by_feature": rates_by_feature(some, success_of_all) if rated else None,
            "echoes": rate_with_interval(outcomes(some, "steered", echoes)),
            "echoes_control": rate_with_interval(outcomes(some, "control", echoes)),
            "echoes_by_feature": rates_by_feature(some, echoes),
            "echo": float(np.mean([text.echo for text in steered])),
            "echo_control": float(np.mean([text.echo for text in control])),
            "promoted": float(np.mean([text.promoted for text in steered])),
            "promoted_control": float(np.mean([text.promoted for text in control])),
            "perplexity": float(np.median([text.perplexity for text in steered])),
            "perplexity_control": float(np.median([text.perplexity for text in control])),
            "perplexity_original": float(np.median(original_perplexity)),
            "autointerp_correlation": correlation(steered, success if rated else echoes),
            "krippendorff_alpha": krippendorff_alpha(ratings),
        }
        entries.append(entry)
    return entries


# ==================================================================================================
# Machinery
# ==================================================================================================
#
# Tables and pictures


class Result(NamedTuple):
    """A run in the report."""

    label: str
    texts: list  # of Text
    summary: list  # of `summarise`


def cell(figure):
    """A figure of rates_by_feature with its interval, such as "0.13 [0.10, 0.16]"."""
    value, low, high = (
        "-" if number is None else f"{number:.2f}"
        for number in (figure["value"], *figure["interval"])
    )
    return f"{value} [{low}, {high}]"


def table(results, outcome):
    """One line for each run and strength: rates over features, beside random directions."""
    head = ["run", "strength", "features", outcome.__name__, "random", "difference", "ratio"]
    head += ["promoted", "random", "perplexity", "random", "original"]
    lines = [head]
    for result in results:
        for entry in result.summary:
            rates = entry[f"{outcome.__name__}_by_feature"]
            cells = [result.label, f"{entry['strength']:g}"]
            if rates is None:
                cells += ["-", "-", "-", "-", "-"]
            else:
                cells.append(str(rates["features"]))
                for name in ("steered", "control", "difference", "ratio"):
                    cells.append(cell(rates[name]))
            for name in ("promoted", "promoted_control"):
                cells.append(f"{entry[name]:.3f}")
            for name in ("perplexity", "perplexity_control", "perplexity_original"):
                cells.append(f"{entry[name]:.0f}")
            lines.append(cells)
    return evaluate.markdown(lines)


OUTCOME_TITLES = {success: "success rate", echoes: "share of texts that echo the feature"}


def plot_rates(results, outcome):
    """Rates over strengths, and over the cost in perplexity, beside random directions."""
    figure = evaluate.new_figure(4)
    left, right = figure.subplots(1, 2, sharey=True)
    strengths = sorted({entry["strength"] for result in results for entry in result.summary})
    for number, result in enumerate(results):
        left.plot([], [], color=f"C{number}", label=result.label)
        for kind, cost, style in (
            ("steered", "perplexity", "o-"),
            ("control", "perplexity_control", "o:"),
        ):
            x, rates, below, above, costs = [], [], [], [], []
            for entry in result.summary:
                found = entry[f"{outcome.__name__}_by_feature"]
                if found is None:
                    continue
                rate, (low, high) = found[kind]["value"], found[kind]["interval"]
                x.append(strengths.index(entry["strength"]) + 0.06 * number)  # side by side
                rates.append(rate)
                below.append(rate - low)
                above.append(high - rate)
                costs.append(entry[cost] / entry["perplexity_original"])
            left.errorbar(x, rates, [below, above], fmt=style, color=f"C{number}", capsize=2)
            right.plot(costs, rates, style, color=f"C{number}")
    left.plot([], [], "k-", label="along the feature")
    left.plot([], [], "k:", label="along a random direction")
    left.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    left.set(xlabel="strength", ylabel=OUTCOME_TITLES[outcome], ylim=(0, None))
    right.set(xlabel="perplexity, times the original's", xscale="log")
    low, high = right.get_xlim()
    low, high = min(low, 0.9), max(high, 2.2)  # so that at least 1 and 2 are marked
    right.set_xlim(low, high)
    ticks = [2.0**n for n in range(-3, 16) if low <= 2.0**n <= high]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    evaluate.plain(left, right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10, frameon=False)
    return figure


SCORE_BINS = {"<0.6": 0.0, "0.6": 0.6, "0.7": 0.7, "0.8": 0.8, "0.9-1": 0.9}  # the study's


def plot_scores(results, outcome):
    """Auto-interp scores of features; and the outcome by score, at each run's first strength.

    Bars are 95% Wilson intervals over texts, as if these were independent, and so somewhat too
    short. A bootstrap over features would say nothing of a bin that holds two or three of them.
    """
    figure = evaluate.new_figure(4)
    left, right = figure.subplots(1, 2)
    for number, result in enumerate(results):
        strength = result.summary[0]["strength"]
        texts = [
            text
            for text in result.texts
            if text.kind == "steered"
            and text.strength == strength
            and text.autointerp_score is not None
        ]
        scores = {text.feature: text.autointerp_score for text in texts}
        fourteenths = (np.arange(16) - 0.5) / 14  # by the default protocol a score is a share of 14
        style = {"histtype": "step", "color": f"C{number}", "label": result.label}
        left.hist(list(scores.values()), fourteenths, **style)
        lower_ends = list(SCORE_BINS.values())[1:]
        bins = np.searchsorted(lower_ends, [text.autointerp_score for text in texts], "right")
        for place in range(len(SCORE_BINS)):
            here = [text for text, of_text in zip(texts, bins) if of_text == place]
            found = rate_with_interval(outcomes(here, "steered", outcome))
            if found["n"]:
                rate, (low, high) = found["rate"], found["interval"]
                error = [[rate - low], [high - rate]]
                x = place + 0.1 * number  # side by side
                right.errorbar(x, rate, error, fmt="o", color=f"C{number}", capsize=2)
    left.set(xlabel="auto-interp score", ylabel="features")
    right.set(xlabel="auto-interp score", ylabel=OUTCOME_TITLES[outcome], ylim=(0, None))
    right.set_xticks(range(len(SCORE_BINS)), SCORE_BINS)
    evaluate.plain(left, right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", fontsize=10, frameon=False)
    return figure


def sentence(comparison):
    """What `compare` found, a line for each pair of figures."""
    over_texts, over_control = comparison["chi_squared"], comparison["over_control"]
    of_all = comparison["of_all"]
    lines = [rates_in_words("features with an explanation" if of_all else "features", comparison)]
    if over_texts:
        lines[0] += f", over texts (chi-squared) p = {over_texts['p']:.2g}"
    if over_control:
        a, b = over_control["differences"]
        p = p_in_words(over_control["permutation_p"])
        lines.append(f"beyond random directions: {a:.3f} against {b:.3f}{p}")
    if of_all:
        lines.append(rates_in_words("all features, unexplained ones as failures", of_all))
    return "\n".join(lines)


def rates_in_words(what, found):
    """The rates, their ratio and p that compare or compare_by_feature found, in words."""
    a, b = found["rates"]
    n_a, n_b = found["features"]
    ratio, p = cell(found["ratio"]), p_in_words(found["permutation_p"])
    return f"{what} ({n_a} and {n_b}): {a:.3f} against {b:.3f}, ratio {ratio}{p}"


def p_in_words(p):
    """The p of a permutation test in words; nothing where there was no test."""
    return "" if p is None else f", over features p = {p:.2g}"


def report(results, out):
    """Print the table, and compare every two runs at every strength that they share.

    The folder `out` gets pictures and comparison.json: {"comparisons": of `compare`, "runs":
    {label: summary}}.
    """
    judged = any(entry["success"]["n"] for result in results for entry in result.summary)
    outcome = success if judged else echoes
    print(table(results, outcome))
    comparisons = []
    for a, b in itertools.combinations(results, 2):
        shared = {entry["strength"] for entry in b.summary}
        for strength in [entry["strength"] for entry in a.summary if entry["strength"] in shared]:
            texts_a = [text for text in a.texts if text.strength == strength]
            texts_b = [text for text in b.texts if text.strength == strength]
            comparison = compare(texts_a, texts_b, outcome)
            if comparison is None:
                continue
            head = {"runs": [a.label, b.label], "strength": strength, "outcome": outcome.__name__}
            comparisons.append({**head, **comparison})
            print(f"\n{a.label} and {b.label}, strength {strength:g}, {outcome.__name__}:")
            print(sentence(comparison))
    summaries = {result.label: result.summary for result in results}
    write_json(out / "comparison.json", {"comparisons": comparisons, "runs": summaries})
    evaluate.save_figure(plot_rates(results, outcome), out / "rates.png")
    if any(text.autointerp_score is not None for result in results for text in result.texts):
        evaluate.save_figure(plot_scores(results, outcome), out / "scores.png")


# --------------------------------------------------------------------------------------------------
# Run folders and language models


def read_explanations(folder, d_sae):
    """The rows of a run's autointerp.json by feature, {} where there is none. Raises UserError."""
    path = Path(folder) / "autointerp.json"
    if not path.exists():
        return {}
    found = read_json(path)
    if found.get("sae") != evaluate.fingerprint(folder):
        raise UserError(f"{path} is of another SAE than the folder: repeat evaluate.py autointerp")
    try:
        rows = {int(row["feature"]): row for row in found["features"]}
        whole = all({"explanation", "score"} <= set(row) for row in rows.values())
    except (LookupError, TypeError, ValueError):
        whole = False
    if not whole or not set(rows) <= set(range(d_sae)):
        raise UserError(f"{path} is not as evaluate.py autointerp writes it: repeat that")
    return rows


class Job(NamedTuple):
    """A run to be steered."""

    run: Run
    sae: SAE
    explanations: dict  # {feature: row of autointerp.json}
    features: list


def prepare(folder, args):
    """Read a run folder and choose its features, before any work is done. Raises UserError.

    They are the first --n of --features; without these, --n at random of those in autointerp.json
    where there is one, else of those alive.
    """
    run, sae = read_run(folder), SAE.load(folder)
    width = check_model(run)
    if sae.d_in != width:
        raise UserError(f"{folder}: an SAE of width {sae.d_in}, but {run.model} has {width}")
    explanations = read_explanations(folder, sae.d_sae)
    among = evaluate.alive_by_weight(sae)
    if explanations:
        among = torch.tensor([feature in explanations for feature in range(sae.d_sae)])
    chosen = evaluate.read_features(args.features, folder) if args.features else None
    features = evaluate.choose_features(chosen, args.n, among, args.seed, folder)
    if args.mode == "preact":
        gains = encoder_gain(sae, features).tolist()
        positive = {feature: gain for feature, gain in zip(features, gains) if gain > 0}
        if not positive:
            reason = "none of its features is raised by its own decoder direction"
            raise UserError(f"--mode preact: {folder}: {reason}")
        if len(positive) < len(features):
            left_out = f"{len(features) - len(positive)} of {len(features)} features of {folder}"
            print(f"note: {left_out} are left out: their own decoder direction does not raise them")
        features = list(positive)
        longest = max(map(abs, args.strength)) / min(positive.values())
        print(f"--mode preact: the longest vector for {folder} has length {longest:.3g}")
    return Job(run, sae, explanations, features)


def load_setup(job, args, device):
    """The language model of a run and, for mode "rms", the norm of its residual stream.

    The norm is measured where SAEs are trained: without first positions and outliers. Raises
    UserError.
    """
    run = job.run
    # On a CPU texts are written in float32 whatever dtype the run had.
    if args.mode != "rms":
        model, tokenizer = load_model(run.model, device, use_bfloat16(run.dtype, device))
        return Setup(model, tokenizer, run.layer, job.sae.to(device))
    model, tokenizer, tokens = open_run(run, device, data=args.data)
    length = min(RMS_CONTEXT, run.context)
    if len(tokens) < length:
        reason = f"{len(tokens)} tokens are fewer than one context of {length}"
        raise UserError(f"--data: {reason}: give a longer text to measure the norm on")
    contexts = cut_contexts(tokens, RMS_TOKENS, length, device)  # a list of [B, length]
    squares = [x.square().sum(1) for x in Stream(model, run.layer, contexts)]
    rms = torch.cat(squares).mean().sqrt().item()
    return Setup(model, tokenizer, run.layer, job.sae.to(device), rms)


def check_lengths(setup, settings):
    """Raise UserError where a prompt has no tokens, or with its text more than the model reads."""
    config = setup.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for prompt in settings.prompts:
        n_prompt = len(setup.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if n_prompt == 0:
            raise UserError(f"--prompts {prompt!r}: give some text to go on from")
        if limit and n_prompt + settings.new_tokens > limit:
            reason = f"with the prompt's {n_prompt} these are more than the {limit} tokens that the"
            raise UserError(f"--new-tokens {settings.new_tokens}: {reason} model reads: give less")


def are_the_same(settings, found):
    """Whether the "settings" of a steering.json are these. Older files do not name the dtype."""
    return {"dtype": settings["dtype"], **found} == settings


def read_earlier(path, settings):
    """The steering.json of an earlier command with the same settings; where none is, an empty one.

    So a command that was interrupted, or is repeated for more features, does not write again what
    is there.
    """
    if path.exists():
        found = read_json(path)
        if are_the_same(settings, found.get("settings", {})):
            return found
    return {"settings": settings, "judging": None, "rows": []}


def enter_explanations(texts, explanations):
    """Enter what autointerp.json, {feature: row}, says of the features of texts.

    A rating is about an explanation: where that is another one now, the text's ratings go. Texts of
    a feature that is no longer in the file keep the explanation by which they were rated.
    """
    n_changed = 0
    for text in texts:
        row = explanations.get(text.feature)
        if row is None:
            continue
        if text.ratings and text.explanation != row["explanation"]:
            text.ratings = {}
            n_changed += 1
        text.explanation, text.autointerp_score = row["explanation"], row["score"]
        text.asked = True
    if n_changed:
        print(f"note: {n_changed} texts have another explanation now: their ratings are dropped")


def write_steering(path, content):
    """Write steering.json. One of other settings that stands in its place is renamed first."""
    if path.exists() and not are_the_same(content["settings"], read_json(path).get("settings", {})):
        number = 1
        while path.with_name(f"steering_{number}.json").exists():
            number += 1
        kept = path.rename(path.with_name(f"steering_{number}.json"))
        tqdm.write(f"note: {path} was of other settings: it is kept as {kept.name}")
    write_json(path, content)


def open_judges(args, cache):
    """A Judge for each of --judge, at its own --base-url or at the one they share."""
    judges = []
    for number, name in enumerate(args.judge):
        place = number % len(args.base_url)  # one address may serve them all
        url = args.base_url[place]
        key = os.environ.get(args.api_key_env[place], "")
        judges.append(evaluate.Judge(url, name, cache, key, args.judge_options, args.concurrency))
    return judges


def steer_and_rate(job, label, settings, args, device):
    """Write, measure and rate the texts of a run: its Result, and steering.json. Raises UserError.

    steering.json: {"settings": what decides the texts, "judging": how judges were last asked,
    "summary": of `summarise`, "rows": of Text}.
    """
    folder = job.run.folder
    path = folder / "steering.json"
    setup = load_setup(job, args, device)
    check_lengths(setup, settings)
    made_with = {
        **asdict(settings),
        "rms": setup.rms,
        "model": job.run.model,
        "dtype": str(setup.model.dtype),
        "sae": evaluate.fingerprint(folder),
    }
    earlier = read_earlier(path, made_with)
    texts = [Text(**row) for row in earlier["rows"] if row["feature"] in job.features]
    enter_explanations(texts, job.explanations)
    content = {"settings": made_with, "judging": earlier["judging"]}

    there = {text.feature for text in texts}
    missing = [feature for feature in job.features if feature not in there]
    total = len(missing) * len(settings.prompts)
    with tqdm(total=total, desc=f"steering {folder.name}", unit="prompt") as progress:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            written = steer_run(setup, batch, settings, args.batch_size, progress)
            enter_explanations(written, job.explanations)
            texts = sorted(texts + written, key=lambda text: text.feature)
            # Should the command be interrupted from here on, or a judge fail, this is not lost.
            write_steering(path, {**content, "rows": [asdict(text) for text in texts]})

    judges = open_judges(args, folder / "answers.jsonl")
    if judges:
        content["judging"] = {"options": args.judge_options, "fixed_order": args.fixed_order}
        for text in texts:  # what these judges have answered before is in answers.jsonl
            text.ratings = {}
        rate(texts, judges, settings.seed, args.fixed_order, args.concurrency)
    content["summary"] = summarise(texts)
    write_steering(path, {**content, "rows": [asdict(text) for text in texts]})
    return Result(label, texts, content["summary"])


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    study = Settings()
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of SAEs of language models, or of such folders",
    )
    text = "of steering (default 5, with --mode rms 0.6)"
    add("--strength", nargs="+", type=float, help=text)
    add(
        "--mode",
        choices=("fixed", "rms", "preact"),
        default=study.mode,
        help="what strength is: the length of the vector added (fixed, the default); its length in "
        "units of the residual stream's root mean square norm (rms); or what it adds to the "
        "feature's own pre-activation (preact)",
    )
    text = "how many features: the first of --features, else at random among those of "
    text += "autointerp.json or, without one, those alive (default 300)"
    add("--n", type=at_least(1), default=300, help=text)
    text = "which features: numbers, or a JSON file of evaluate.py seeds"
    add("--features", nargs="+", help=text)
    add("--prompts", nargs="+", default=study.prompts, help="beginnings, to be continued")
    text = "tokens of a text (default 30)"
    add("--new-tokens", type=at_least(1), default=study.new_tokens, help=text)
    text = "of sampling (default 0.7); 0: always the likeliest token"
    add("--temperature", type=at_least(0, float), default=study.temperature, help=text)
    text = "sample among the likeliest tokens that together have this probability (default 0.9)"
    add("--top-p", type=at_least(1e-9, float, 1), default=study.top_p, help=text)
    add("--steer-prompt", action="store_true", help="steer at the prompt's positions, too")
    text = "of the features, the draws, the random directions, the order shown (default 0)"
    add("--seed", type=at_least(0), default=study.seed, help=text)
    text = "text to measure the residual stream's norm on (--mode rms), if not the run's own"
    add("--data", metavar="FILE", help=text)
    evaluate.add_judge_flags(add, several="+")
    add("--fixed-order", action="store_true", help="always show judges the original first")
    text = "features steered together, whose texts are then kept (default 256)"
    add("--batch-size", type=at_least(1), default=256, help=text)
    add("--out", default="steering", metavar="DIR", help="for the comparison (default steering)")
    add("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    args.strength = list(dict.fromkeys(args.strength or [STRENGTH[args.mode]]))
    args.prompts = list(dict.fromkeys(args.prompts))
    if args.data and args.mode != "rms":
        parser.error("--data: only --mode rms reads it")
    if not np.isfinite(args.strength).all():
        parser.error("--strength: give finite numbers")
    if len(args.base_url) not in (1, len(args.judge)):
        parser.error("--base-url: give one address for all of --judge, or one for each")
    if len(args.api_key_env) != len(args.base_url):
        unset = "one that is not set means no key"
        parser.error(f"--api-key-env: give a variable for each --base-url; {unset}")
    if len(set(args.judge)) < len(args.judge):
        parser.error("--judge: the same name twice")
    return args


def main(argv=None):
    args = parse(argv)
    settings = Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})
    device = pick_device(args.device)
    jobs = [prepare(folder, args) for folder in evaluate.find_runs(args.runs)]
    out = make_folder(args.out)
    if not args.judge:
        print("no --judge: this measures what needs none, and ratings of before stay")
    elif not all(job.explanations for job in jobs):
        print("note: only runs with explanations (evaluate.py autointerp) can be rated")
    configs = [evaluate.read_config(job.run.folder, job.sae) for job in jobs]
    labels = evaluate.label_runs(configs, [job.run.folder for job in jobs])
    results = []
    for job, label in zip(jobs, labels):
        results.append(steer_and_rate(job, label, settings, args, device))
    report(results, out)


if __name__ == "__main__":
    run_command(main)
