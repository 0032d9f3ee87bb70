"""The figures of claims 3 and 4 on a real model, made again from the answers that are kept."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import steer

PAGES = Path(__file__).parents[1] / ".readme"
KEPT = json.loads(gzip.decompress((PAGES / "judge" / "smollm2_block9.json.gz").read_bytes()))
ROWS = {"none": "never", "l2": "all the time", "late": "in the last fifth alone"}


def texts_of(setting):
    """The texts that were rated, with the explanation and the score of their feature."""
    kept = KEPT[setting]
    explained = {row["feature"]: row for row in kept["autointerp"]}
    texts = []
    for row in kept["texts"]:
        feature = explained[row["feature"]]
        about = {"explanation": feature["explanation"], "autointerp_score": feature["score"]}
        texts.append(steer.Text(**row, **about))
    return texts


def section_of_claim_3():
    """What results.md says of the judge's ratings."""
    page = (PAGES / "results.md").read_text()
    return page[page.index("by a blind judge") : page.index("## Claim 4")]


def row_of_claim_3(setting):
    """The numbers in the row of the judge's table on results.md."""
    lines = section_of_claim_3().splitlines()
    line = next(line for line in lines if line.startswith(f"| {ROWS[setting]} |"))
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


@pytest.mark.parametrize("setting", ROWS)
def test_the_table_of_claim_3_is_what_the_answers_say(setting):
    [entry] = steer.summarise(texts_of(setting))
    found = [entry["success_by_feature"]["features"]]
    for name in ("steered", "control", "difference", "ratio"):
        figure = entry["success_by_feature"][name]
        found += [figure["value"], *figure["interval"]]
    found += [entry["success_of_all"]["rate"], entry["perplexity"]]
    digits = [0, *[2] * 9, *[1] * 3, 3, 1]
    shown = row_of_claim_3(setting)
    assert len(shown) == len(found)
    for value, number, places in zip(found, shown, digits):
        assert abs(value - number) <= 0.51 * 10**-places


@pytest.mark.parametrize(("setting", "places"), [("l2", (3, 3, 2)), ("late", (5, 4, 2))])
def test_the_p_values_of_claim_3_are_what_the_answers_say(setting, places):
    found = steer.compare(texts_of("none"), texts_of(setting), steer.success)
    section = section_of_claim_3()
    assert f"of all 150, p = {found['of_all']['permutation_p']:.2f}" in section
    values = [found["chi_squared"]["p"], found["permutation_p"]]
    values.append(found["over_control"]["permutation_p"])
    shown = re.findall(r"0\.\d+", section)
    for p, digits in zip(values, places):
        assert f"{p:.{digits}f}" in shown


def test_the_ratios_of_success_with_and_without_the_penalty_are_those_on_the_page():
    found = steer.compare(texts_of("none"), texts_of("l2"), steer.success)
    for ratio in (found["ratio"], found["of_all"]["ratio"]):
        low, high = ratio["interval"]
        assert f"{ratio['value']:.1f} ({low:.1f} to {high:.1f})" in section_of_claim_3()


def test_scores_do_not_predict_success():
    page = (PAGES / "results.md").read_text()
    for setting in ROWS:
        steered = [text for text in texts_of(setting) if text.kind == "steered"]
        r = steer.correlation(steered, steer.success)["by_text"]["r"]
        assert r < 0
        assert f"{r:.2f}" in page[page.index("## Claim 4") :]


def excerpts_of(rows):
    """Of each feature, in how many excerpts of its test it is active, and how many there are."""
    return [row["active_excerpts"] for row in rows]


def test_the_mean_scores_and_the_agreement_are_those_on_the_page():
    page = (PAGES / "results.md").read_text()
    for setting, shown in (("none", "0.85"), ("l2", "0.75"), ("late", "0.79")):
        rows = [row for row in KEPT[setting]["autointerp"] if row["score"] is not None]
        scores = [row["score"] for row in rows]
        assert f"{np.mean(scores):.2f}" == shown and f"{shown} ({len(rows)}" in page
        guessed = [1 - active / shown_excerpts for active, shown_excerpts in excerpts_of(rows)]
        assert f"{np.mean(guessed):.2f}" in page, "what the answer None scores"
    alpha = steer.krippendorff_alpha(KEPT["two_readers"])
    assert f"Krippendorff's alpha is {alpha:.2f}" in page
