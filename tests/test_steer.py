"""steer.py: generation against a slow loop without cache, measures by hand, statistics against known values."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import autointerp, tiny_model
from scipy import stats

import evaluate
import steer
from sae import SAE, UserError
from train_pythia import residual_stream, spliced

FAMILIES = ["gpt_neox", "gpt2", "llama"]
PROMPT = [5, 17, 40]
SAID = {"explanation": "", "score": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "BACKOFF", 0.001)
    monkeypatch.setattr(steer, "RESAMPLES", 1000)


def lively(family="gpt_neox"):
    """A tiny model whose predictions are not all alike."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 100
    return model


def some_sae(d_sae=64):
    sae = SAE(16, d_sae, "topk", 4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.W_dec.copy_(sae.W_enc.T + 0.1 * torch.randn(d_sae, 16, generator=generator))
        sae.b_enc.normal_(generator=generator)
    return sae.eval()


def vectors(n=6, size=3.0):
    return size * torch.randn(n, 16, generator=torch.Generator().manual_seed(1))


def uniform(n=6, steps=8):
    return torch.rand(n, steps, generator=torch.Generator().manual_seed(2))


# --- generation


@pytest.mark.parametrize("steer_prompt", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_one_text_at_a_time_without_a_cache(family, temperature, steer_prompt):
    model = lively(family)
    texts = steer.generate(model, 2, PROMPT, vectors(), uniform(), temperature, 0.9, steer_prompt)
    plain = steer.generate(model, 2, PROMPT, 0 * vectors(), uniform(), temperature, 0.9, steer_prompt)
    assert not torch.equal(texts, plain), "steering should matter here, or the test shows nothing"
    for row, (vector, draws) in enumerate(zip(vectors(), uniform())):
        tokens = list(PROMPT)
        for draw in draws:

            def add(resid, vector=vector):
                steered = torch.arange(resid.shape[1]) >= (0 if steer_prompt else len(PROMPT))
                return resid + steered[None, :, None] * vector

            with spliced(model, 2, add), torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1]
            tokens.append(steer.sample(logits, draw[None], temperature, 0.9).item())
        assert texts[row].tolist() == tokens[len(PROMPT) :]


def test_generation_in_half_precision_stays_there():
    model, sae = lively().bfloat16(), some_sae()
    texts = steer.generate(model, 2, PROMPT, vectors(), uniform())
    assert texts.shape == (6, 8)
    acts, perplexity = steer.read_back(model, 2, sae, PROMPT, texts, torch.arange(6))
    assert acts.isfinite().all()
    assert perplexity.isfinite().all()
    assert steer.promoted_tokens(model, vectors(), 3).shape == (6, 3)


def test_the_order_of_the_texts_has_nothing_to_do_with_their_draws():
    rows = [
        {"feature": f, "prompt": "a", "original": "", "steered": "", "control": "", "explanation": "x"}
        for f in range(400)
    ]
    first = [
        'text A: "asteered"' in prompt
        for _, field, prompt, _ in steer.rating_questions([row | {"steered": "steered"} for row in rows], args())
        if field == "ratings"
    ]
    draws = np.stack([steer.draws(0, f, 0, 4) for f in range(400)])
    assert all(abs(np.corrcoef(first, column)[0, 1]) < 0.2 for column in draws.T)


def test_what_comes_after_the_end_of_text_does_not_count():
    texts = torch.tensor([[1, 2, 9, 3], [9, 1, 1, 1], [1, 2, 3, 4]])
    assert steer.before_end(texts, 9).tolist() == [[True, True, False, False], [True] + [False] * 3, [True] * 4]
    assert steer.before_end(texts, None).all()


def test_strength_zero_changes_nothing_at_all():
    texts = [steer.generate(lively(), 2, PROMPT, v, uniform(steps=20)) for v in (0 * vectors(), -0.0 * vectors())]
    assert torch.equal(*texts)


def test_draws_of_a_text_do_not_depend_on_its_company():
    assert (steer.draws(0, 7, 1, 5) == steer.draws(0, 7, 1, 5)).all()
    others = [steer.draws(*key, 5) for key in ((1, 7, 1), (0, 8, 1), (0, 7, 2))]
    assert not any((steer.draws(0, 7, 1, 5) == other).any() for other in others)


def test_sampling_follows_the_tempered_distribution_within_top_p():
    logits, n = torch.tensor([[2.0, 0.0, 1.0, -3.0, 1.5]]), 40_000
    tokens = steer.sample(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, 0.7, 0.9)
    p = (logits[0] / 0.7).softmax(0)
    kept, total = [], 0.0
    for i in p.argsort(descending=True).tolist():  # the likeliest that together reach top_p
        kept.append(i)
        total += p[i].item()
        if total >= 0.9:
            break
    expected = torch.tensor([p[i].item() / total if i in kept else 0.0 for i in range(5)])
    assert len(kept) < 5
    assert torch.allclose(tokens.bincount(minlength=5) / n, expected, atol=1e-3)
    assert steer.sample(logits, torch.tensor([0.99]), 0, 0.9).item() == 0
    for extreme in (0.0, 1 - 2**-24):
        assert steer.sample(logits, torch.tensor([extreme]), 0.7, 0.9).item() in kept
    assert steer.sample(logits, torch.tensor([0.999]), 0.7, 1e-6).item() == 0


def test_strength_modes():
    sae, features = some_sae(), torch.tensor([3, 9, 30])
    unit = sae.W_dec[features] / sae.W_dec[features].norm(dim=1, keepdim=True)
    assert torch.allclose(steer.steering_vectors(sae, features, "fixed", 5, 7.0), 5 * unit)
    assert torch.allclose(steer.steering_vectors(sae, features, "rms", 0.5, 8.0), 4 * unit)
    added, x = steer.steering_vectors(sae, features, "preact", 2.5, 7.0), torch.randn(1, 16)
    rise = sae.pre_acts(x + added)[range(3), features] - sae.pre_acts(x)[0, features]
    assert torch.allclose(rise, torch.full((3,), 2.5), atol=1e-4)
    with torch.no_grad():
        sae.W_enc[:, 9] = -sae.W_dec[9]
    assert steer.steering_vectors(sae, features, "preact", 2.5, 7.0).isfinite().all(1).tolist() == [True, False, True]


# --- measures


def test_reading_back_equals_a_text_at_a_time():
    model, sae, features = lively(), some_sae(), torch.tensor([3, 9, 30, 3, 0, 1])
    texts = steer.generate(model, 2, PROMPT, vectors(), uniform(steps=12))
    eos = texts[0, 5].item()  # the first text ends early
    acts, perplexity = steer.read_back(model, 2, sae, PROMPT, texts, features, eos)
    ends = set()
    for row, text in enumerate(texts.tolist()):
        text = text[: max(1, text.index(eos))] if eos in text else text
        ends.add(len(text))
        tokens = torch.tensor([PROMPT + text])
        with torch.no_grad():
            logp = model(input_ids=tokens).logits[0].log_softmax(1)
            mine = sae.encode(residual_stream(model, tokens, 2)[0])[:, features[row]]
        losses = [-logp[2 + i, token].item() for i, token in enumerate(text)]
        assert perplexity[row].item() == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
        assert acts[row].item() == pytest.approx(mine[3:].mean().item(), abs=1e-5)
    assert len(ends) > 1
    assert (acts > 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_promoted_tokens_go_through_final_norm_and_unembedding(family):
    model, directions = lively(family), vectors(3)
    got = steer.promoted_tokens(model, directions, 4)
    centred = directions if family == "llama" else directions - directions.mean(1, keepdim=True)
    normed = centred / centred.square().mean(1, keepdim=True).sqrt()
    logits = normed @ model.get_output_embeddings().weight.T
    assert got.tolist() == logits.topk(4).indices.tolist()


# --- ratings


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("4", 4),
        ("4.", 4),
        ("**5**", 5),
        ("Text B is about food.\n1\n", 1),
        ("B has 7 of them.\n1", 1),
        ("3/5", None),
        ("Rating: 2", None),
        ("5\n\nText B mentions 1 animal.", None),
        ("Text B mentions 3 dogs", None),
        ("-1", None),
        ("0", None),
        ("6", None),
        ("12", None),
        ("4.5", None),
        ("4 or 5", None),
        ("B", None),
        ("", None),
    ],
)
def test_ratings_are_read_in_the_form_asked_for_and_not_guessed(text, rating):
    assert steer.parse_rating(text) == rating


def test_swapping_the_texts_turns_the_rating_back():
    row = {"prompt": "I", "original": " am", "steered": " eat", "explanation": "food"}
    for swap, answer in ((False, "5"), (True, "1")):
        prompt, parse = steer.rating_question(row, "steered", swap)
        texts = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if line.startswith("text ")]
        assert texts == (["I eat", "I am"] if swap else ["I am", "I eat"])
        assert parse(answer) == 5
        assert parse("3") == 3
        assert parse("nonsense") is None


def planted_rows(n=60, prompts=("a", "b", "c"), seed=0):
    """Rows whose steered text holds the word of its explanation, more often the higher the score."""
    generator, rows = np.random.default_rng(seed), []
    for feature in range(n):
        score = round(generator.uniform(0.3, 1.0), 3)
        for prompt in prompts:
            said = generator.random() < score
            row = {"feature": feature, "prompt": prompt, "strength": 5.0, "explanation": f"word{feature}"}
            row |= {"autointerp_score": score, "original": " nothing", "control": " noise", "ratings": {}}
            row |= {"steered": f" word{feature}" if said else " no", "ratings_control": {}, "said": float(said)}
            rows.append(row)
    return rows


def word_judge(prompt):
    """Rates by whether the word of the explanation is in one text and not in the other."""
    word = re.search(r"word\d+", prompt).group()
    a, b = (re.search(rf'text {name}: "(.*)"', prompt).group(1) for name in "AB")
    return str(3 + 2 * (word in b.split()) - 2 * (word in a.split()))


def args(**others):
    return SimpleNamespace(**{"seed": 0, "prompts": ["a", "b", "c"], "fixed_order": False, "concurrency": 4} | others)


def test_a_planted_success_rate_and_correlation_are_recovered(chat, tmp_path):
    rows, chat.answer = planted_rows(), word_judge
    judge = evaluate.Judge(chat.url, "wise", tmp_path / "answers.jsonl")
    steer.rate(rows, [judge], args())
    said = [row["said"] for row in rows]
    assert [steer.success_of(row) for row in rows] == said
    assert {steer.success_of(row, "_control") for row in rows} == {0.0}
    found = steer.correlation(rows, steer.success_of)
    expected = stats.pointbiserialr(said, [row["autointerp_score"] for row in rows])
    assert found["r"] == pytest.approx(expected.statistic)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["r"] > 0.2
    first = ["text A: " + json.dumps(row["prompt"] + " nothing") for row in rows]
    shown = [body["messages"][0]["content"] for body in chat.requests]
    unswapped = sum(any(line in prompt for line in first) for prompt in shown)
    assert 0.4 < unswapped / len(shown) < 0.6, "the order of the texts should be random"
    asked = len(chat.requests)
    again = planted_rows()
    steer.rate(again, [evaluate.Judge(chat.url, "wise", tmp_path / "answers.jsonl")], args())
    assert again == rows
    assert len(chat.requests) == asked


def test_the_fixed_order_shows_the_unsteered_text_first(chat, tmp_path):
    rows, chat.answer = planted_rows(5), word_judge
    steer.rate(rows, [evaluate.Judge(chat.url, "wise", tmp_path / "answers.jsonl")], args(fixed_order=True))
    assert all(' nothing"\ntext B' in body["messages"][0]["content"] for body in chat.requests)
    assert [steer.success_of(row) for row in rows] == [row["said"] for row in rows]


def test_features_without_an_explanation_are_not_rated_but_counted(chat, tmp_path):
    rows, chat.answer = planted_rows(10), word_judge
    for row in rows:
        row |= {"echo": 1.0, "echo_control": -1.0, "promoted": 0.5, "promoted_control": 0.0}
        row |= {"perplexity": 9.0, "perplexity_control": 8.0, "perplexity_original": 7.0}
        if row["feature"] < 4:
            row |= {"explanation": None, "autointerp_score": None}
    steer.rate(rows, [evaluate.Judge(chat.url, "wise", tmp_path / "answers.jsonl")], args())
    (entry,) = steer.summarise(rows)
    said = [row["said"] for row in rows if row["feature"] >= 4]
    assert entry["success"]["rate"] == pytest.approx(np.mean(said))
    assert entry["success_of_all"]["rate"] == pytest.approx(sum(said) / 30)
    assert (entry["success"]["n"], entry["success_of_all"]["n"]) == (18, 30)
    assert (entry["texts"], entry["features"], entry["explained"]) == (30, 10, 6)
    assert entry["echoes"]["rate"] == 1
    assert entry["echoes_control"]["rate"] == 0


# --- statistics


def test_rates_have_wilson_intervals_by_hand_and_leave_out_what_was_not_rated():
    for successes, n in ((0, 10), (3, 10), (10, 10), (57, 900)):
        found, z = steer.rate_with_interval([1.0] * successes + [0.0] * (n - successes) + [None]), stats.norm.ppf(0.975)
        rate = successes / n
        middle, half = rate + z * z / 2 / n, z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
        expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert found["interval"] == pytest.approx(expected, abs=1e-9)
        assert (found["rate"], found["n"]) == (rate, n)
    assert steer.rate_with_interval([None]) == {"rate": None, "interval": None, "n": 0}


def rated(outcomes, first=0, score=None, control=None):
    """Rows of {feature: outcomes}, and of what random directions do."""
    rows = []
    for feature, values in enumerate(outcomes, first):
        for i, value in enumerate(values):
            row = {"feature": feature, "ratings": {"j": 5 if value else 1}, "ratings_control": {}}
            if control is not None:
                row["ratings_control"] = {"j": 5 if control[feature - first][i] else 1}
            rows.append(row | {"autointerp_score": None if score is None else score[feature - first]})
    return rows


def test_the_figures_that_the_study_printed_come_out():
    """6.3% of 900 texts against 13.0% of 555: p = 2.3e-5; r = 0.060 against 0.144: Fisher's z = 1.6, p = 0.12."""
    flat = [[i < 57] for i in range(900)], [[i < 72] for i in range(555)]
    result = steer.compare(rated(flat[0]), rated(flat[1]), steer.success_of)
    assert result["chi_squared"]["p"] == pytest.approx(2.3e-5, rel=0.01)
    assert result["n"] == [900, 555]
    error = (1 / 897 + 1 / 552) ** 0.5
    found = steer.z_test(np.arctanh(0.144) - np.arctanh(0.060), error)
    assert found["z"] == pytest.approx(1.6, abs=0.05)
    assert found["p"] == pytest.approx(0.12, abs=0.005)


def test_texts_of_a_feature_do_not_count_as_independent():
    generator = np.random.default_rng(5)
    a = [[bool(generator.random() < 0.3)] * 9 for _ in range(30)]  # every text of a feature ends alike
    b = [[bool(generator.random() < 0.5)] * 9 for _ in range(30)]
    result = steer.compare(rated(a), rated(b), steer.success_of)
    assert result["chi_squared"]["p"] < 0.01 < result["permutation_p"]


def test_a_setting_whose_random_directions_succeed_as_often_has_no_advantage():
    generator = np.random.default_rng(6)
    texts = [generator.random((2, 150, 3)) < rate for rate in (0.1, 0.4)]  # steered and control alike
    a, b = (rated(steered, control=control) for steered, control in texts)
    result = steer.compare(a, b, steer.success_of)
    assert result["permutation_p"] < 0.005
    assert result["over_control"]["permutation_p"] > 0.05
    assert result["over_control"]["differences"] == pytest.approx([0, 0], abs=0.05)
    better = rated(generator.random((150, 3)) < 0.6, control=texts[1][1])
    assert steer.compare(a, better, steer.success_of)["over_control"]["permutation_p"] < 0.005
    assert "over_control" not in steer.compare(rated([[1]]), rated([[0]]), steer.success_of)


def test_the_permutation_test_is_fair_without_a_difference_and_finds_one():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        a, b = ({f: generator.binomial(3, 0.4) / 3 for f in range(20)} for _ in range(2))
        found.append(steer.permutation_test(a, b))
    assert 0.35 < np.mean(found) < 0.75
    assert np.mean(np.array(found) < 0.1) < 0.25
    a, b = ({f: generator.binomial(3, p) / 3 for f in range(40)} for p in (0.2, 0.8))
    assert steer.permutation_test(a, b) < 0.01
    assert steer.permutation_test({0: 1.0}, {1: 1.0}) == 1


def test_correlations_and_slopes_of_two_settings_are_told_apart():
    generator = np.random.default_rng(1)
    score = generator.uniform(0, 1, 300)
    flat = rated([list(generator.random(3) < 0.5) for _ in score], score=score.tolist())
    steep = rated([list(generator.random(3) < s) for s in score], score=score.tolist())
    result = steer.compare(flat, steep, steer.success_of)
    for differ in ("differ", "differ_by_feature"):
        assert result[differ]["correlations"]["p"] < 0.01
        assert result[differ]["slopes"]["p"] < 0.01
    outcomes = [steer.success_of(row) for row in steep]
    line, second = stats.linregress(np.repeat(score, 3), outcomes), result["correlations"][1]
    assert second["slope"] == pytest.approx(line.slope)
    assert second["interval"][0] < second["r"] < second["interval"][1]
    assert second["spearman"] == pytest.approx(stats.spearmanr(np.repeat(score, 3), outcomes)[0])
    means = np.array(outcomes).reshape(300, 3).mean(1)
    assert second["by_feature"]["r"] == pytest.approx(stats.pearsonr(score, means)[0])
    assert second["by_feature"]["n"] == 300
    assert steer.compare(steep, steep, steer.success_of)["differ"]["correlations"]["p"] == 1


def test_features_count_and_not_texts():
    generator = np.random.default_rng(2)
    score = generator.uniform(0, 1, 40)
    outcomes = [[bool(generator.random() < 0.5)] for _ in score]
    once = steer.correlation(rated(outcomes, score=score.tolist()), steer.success_of)
    many = steer.correlation(rated([o * 25 for o in outcomes], score=score.tolist()), steer.success_of)
    assert many["p"] < once["p"], "texts over texts, as the study has it"
    for name, value in once["by_feature"].items():
        assert many["by_feature"][name] == pytest.approx(value)
    assert (many["n"], many["by_feature"]["n"]) == (1000, 40)


def test_a_comparison_without_spread_is_none_and_no_crash():
    assert steer.correlation(rated([[True], [True], [True]], score=[0.1, 0.2, 0.3]), steer.success_of) is None
    assert steer.correlation([], steer.success_of) is None
    assert steer.compare([], rated([[True]]), steer.success_of) is None
    assert steer.compare(rated([[True]]), rated([[True]]), steer.success_of)["chi_squared"] is None


def test_krippendorffs_alpha_by_known_values():
    table = ["12332141" + "2" + "   ", "12332241" + "25" + " 3", " 3332342" + "251 ", "12332441" + "251 "]
    units = [[int(row[i]) for row in table if row[i] != " "] for i in range(12)]
    assert steer.krippendorff_alpha(units) == pytest.approx(0.849, abs=0.001)
    assert steer.krippendorff_alpha([[1, 1], [4, 4]]) == 1
    assert steer.krippendorff_alpha([[3]]) is None
    assert steer.krippendorff_alpha([[3, 3], [3, 3]]) is None


# --- the command


def run(folders, out, *more):
    flags = ["--n", 6, "--new-tokens", 5, "--batch-size", 4, "--out", out, "--device", "cpu", *more]
    steer.main([*map(str, folders), *map(str, flags)])


def test_the_command_without_a_judge(run_folder, tmp_path, capsys):
    run(run_folder, tmp_path / "report", "--strength", 0, 4)
    shown = capsys.readouterr().out
    assert "no --judge" in shown
    assert "has no explanations" in shown
    result = json.loads((run_folder[0] / "steering.json").read_text())
    assert len(result["rows"]) == 6 * 3 * 2
    row = result["rows"][0]
    assert {"feature", "prompt", "strength", "original", "steered", "echo", "perplexity", "ratings"} <= set(row)
    for row in result["rows"]:
        if row["strength"] == 0:
            assert row["steered"] == row["original"] == row["control"]
            assert row["echo"] == 0
            assert row["perplexity"] == row["perplexity_original"]
    assert [entry["strength"] for entry in result["summary"]] == [0, 4]
    comparison = json.loads((tmp_path / "report" / "comparison.json").read_text())["comparisons"]
    assert [entry["strength"] for entry in comparison] == [0, 4]
    assert (tmp_path / "report" / "rates.png").stat().st_size > 1000
    first = json.dumps(result)
    run(run_folder[:1], tmp_path / "report", "--strength", 0, 4)
    assert json.dumps(json.loads((run_folder[0] / "steering.json").read_text())) == first, "alone or together, the same"


def test_equal_settings_are_told_apart_and_nothing_counts_twice(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder[0], tmp_path / "again")
    folders = (run_folder[0], tmp_path / "again")
    run(folders, tmp_path / "report", "--strength", 4, 4, "--features", 3, 5, 3)
    assert len(json.loads((run_folder[0] / "steering.json").read_text())["rows"]) == 2 * 3
    runs = json.loads((tmp_path / "report" / "comparison.json").read_text())["runs"]
    assert list(runs) == [str(folder) for folder in folders]


def test_features_are_drawn_from_those_explained(run_folder, chat, tmp_path):
    chat.answer = lambda prompt: "1" if "Somebody" in prompt else "words"
    autointerp(run_folder[0], chat, "--n", 40)
    explained = {row["feature"] for row in json.loads((run_folder[0] / "autointerp.json").read_text())["features"]}
    run(run_folder[:1], tmp_path / "report", "--n", 10)
    steered = {row["feature"] for row in json.loads((run_folder[0] / "steering.json").read_text())["rows"]}
    assert len(steered) == 10
    assert steered <= explained
    assert steered != set(sorted(explained)[:10])


def test_features_that_cannot_be_raised_are_left_out_aloud(run_folder, tmp_path, capsys):
    sae = SAE.load(run_folder[0])
    with torch.no_grad():
        sae.W_enc[:, 3] = -sae.W_dec[3]
    sae.save(run_folder[0])
    run(run_folder[:1], tmp_path / "report", "--mode", "preact", "--features", 3, 5)
    rows = json.loads((run_folder[0] / "steering.json").read_text())["rows"]
    assert {row["feature"] for row in rows} == {5}
    assert "note: 1 features of" in capsys.readouterr().out


def test_the_command_with_two_judges(run_folder, chat, tmp_path, capsys):
    chat.answer = lambda prompt: "1" if "Somebody" in prompt else "some words" if "steered" not in prompt else "5"
    for folder in run_folder:
        autointerp(folder, chat, "--n", 6, "--min-activations", 0)
    flags = ("--judge", "one", "two", "--base-url", chat.url)
    run(run_folder, tmp_path / "report", *flags)
    assert (tmp_path / "report" / "scores.png").exists()
    result = json.loads((run_folder[0] / "steering.json").read_text())
    rated_rows = [row for row in result["rows"] if row["explanation"]]
    assert rated_rows
    assert all(set(row["ratings"]) == {"one", "two"} for row in rated_rows)
    assert result["summary"][0]["agreement"]["krippendorff_alpha"] == 1
    asked = len(chat.requests)
    run(run_folder, tmp_path / "report", *flags)
    assert len(chat.requests) == asked


def test_an_sae_without_an_alive_feature_is_refused(run_folder, tmp_path):
    sae = SAE.load(run_folder[0])
    with torch.no_grad():
        sae.W_dec.zero_()
    sae.save(run_folder[0])
    with pytest.raises(UserError, match="none of its features is alive"):
        run(run_folder[:1], tmp_path / "report")


def test_explanations_of_another_sae_are_refused(run_folder, chat, tmp_path):
    autointerp(run_folder[0], chat)
    (run_folder[1] / "autointerp.json").write_text((run_folder[0] / "autointerp.json").read_text())
    with pytest.raises(UserError, match=r"is of another SAE .* repeat evaluate\.py autointerp"):
        run(run_folder[1:], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("features", [5, [5], [{"feature": "a", **SAID}], [{"feature": 64, **SAID}], [{}]])
def test_an_autointerp_file_that_is_not_whole_is_named(features, run_folder, tmp_path):
    found = {"sae": evaluate.fingerprint(run_folder[0]), "features": features}
    (run_folder[0] / "autointerp.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"autointerp\.json: not as evaluate\.py autointerp writes it"):
        run(run_folder[:1], tmp_path / "report")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", ""], "--prompts"),
        (["--mode", "loud"], "argument --mode: invalid choice: 'loud'"),
        (["--features", 64], "--features 64"),
        (["--strength", "nan"], "--strength"),
        (["--base-url", "http://a", "http://b", "--judge", "one"], "2 addresses for 1 judges"),
        (["--new-tokens", 0], "--new-tokens: 0: give 1 or more"),
        (["--top-p", 2], "--top-p: 2: give 1e-09 to 1"),
        (["--judge-options", "x"], "--judge-options"),
        (["--temperature", "nan"], "--temperature: nan"),
        (["--judge", "a", "a"], "the same name twice"),
        (["--judge", ""], "or none at all"),
        (["--new-tokens", 70], "but the model reads 64"),
        (["--judge", "a", "b", "--base-url", "http://a", "http://b"], "--api-key-env"),
    ],
)
def test_a_command_line_that_cannot_work_says_why(flags, message, run_folder, tmp_path, refusal):
    assert message in refusal(steer.main, [*run_folder, "--out", tmp_path / "report", "--device", "cpu", *flags])
    assert not (run_folder[0] / "steering.json").exists()
