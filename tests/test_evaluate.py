"""evaluate.py: measures against their formulas written out, matching against brute force and
planted truth, runs, labels, tables and pictures."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import (
    alive_by_weight,
    choose_features,
    compare_seeds,
    consistency,
    decoder_orthogonality,
    encoder_decoder_cosine,
    find_runs,
    label_runs,
    load_groups,
    match_pair,
    quality,
    read_features,
    recurring_features,
    sharedness,
    table,
)
from sae import PENALTIES, SAE, Hparams, UserError, spell, write_json

# --------------------------------------------------------------------------------------------------
# SAEs with random weights


def random_sae(d_in=8, d_sae=6, seed=0, arch="relu"):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, arch, 2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    return sae.eval()


def permuted(sae, order, noise=0.0, flip=False, seed=1):
    """A copy whose feature order[i] is feature i of the SAE, up to noise and, with `flip`, sign."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(sae.d_sae)
    if flip:
        signs[torch.rand(sae.d_sae, generator=generator) < 0.5] = -1
    copy = SAE(sae.d_in, sae.d_sae, sae.arch, sae.k).eval()
    with torch.no_grad():
        for i in range(sae.d_sae):
            noises = noise * torch.randn(2, sae.d_in, generator=generator)
            copy.W_dec[order[i]] = signs[i] * sae.W_dec[i] + noises[0]
            copy.W_enc[:, order[i]] = signs[i] * sae.W_enc[:, i] + noises[1]
    return copy


def kill(sae, features):
    with torch.no_grad():
        sae.W_enc[:, features] = 0
        sae.W_dec[features] = 0
    return sae


def order_of(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def cosine(a, b):
    return abs(a @ b / (a.norm() * b.norm())).item()


def write_run(folder, sae, seed, **settings):
    """A run folder as training leaves it."""
    own = {"arch": sae.arch, "d_in": sae.d_in, "d_sae": sae.d_sae, "seed": seed}
    hp = Hparams(**{**own, **settings})
    sae.save(folder, {"seed": seed})
    write_json(folder / "hparams.json", {"hparams": asdict(hp), "complete": True})
    return folder


# --------------------------------------------------------------------------------------------------
# Quality of one SAE


def test_quality_equals_its_definitions_whatever_the_batches():
    sae, x = random_sae(), torch.randn(50, 8) + 1
    result, mean_acts = quality(sae, x.split(7))
    acts = sae.encode(x).detach()
    error = (acts @ sae.W_dec + sae.b_dec - x).detach().double()
    variance = (x - x.mean(0)).double().square().sum()
    assert result["inputs"] == 50
    assert result["recon"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert result["fve"] == pytest.approx(1 - (error.square().sum() / variance).item(), rel=1e-5)
    assert result["l0"] == pytest.approx((acts > 0).sum().item() / 50)
    assert result["dead_by_use"] == (acts.amax(0) <= 0).sum()
    assert torch.allclose(mean_acts.float(), acts.mean(0), atol=1e-5)
    in_one_batch, _ = quality(sae, [x])
    assert in_one_batch["recon"] == pytest.approx(result["recon"], rel=1e-5)


def test_features_without_weights_and_features_without_use_are_counted_apart():
    sae = kill(random_sae(d_sae=20), [3, 4])
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.fill_(1)
        sae.b_enc[10:15] = -1e6
        sae.b_enc[3:5] = -1
    result, _ = quality(sae, [torch.randn(500, 8)])
    assert (result["alive"], result["dead_by_weight"]) == (18, 2)
    assert result["dead_by_use"] == 7


def test_a_feature_is_dead_when_either_of_its_norms_is_below_a_hundredth_of_a_strong_one():
    sae = random_sae(d_sae=5)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc[:, 1] = 0
        sae.W_dec[2] *= 0.9e-2
        sae.W_dec[3] *= 1.1e-2
    assert alive_by_weight(sae).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("d_sae", [3, 50, 150, 1000])
def test_one_huge_row_makes_no_other_feature_dead(d_sae):
    sae = random_sae(d_sae=d_sae)
    with torch.no_grad():
        sae.W_dec[0] *= 1e6
    assert alive_by_weight(sae).all()


@pytest.mark.parametrize("left", [0.0, 1e-5])
def test_dead_features_stay_dead_where_nine_in_ten_are(left):
    sae = random_sae(d_sae=1000)
    with torch.no_grad():
        sae.encoder[100:] *= left
        sae.W_dec[100:] *= left
    assert alive_by_weight(sae).nonzero().flatten().tolist() == list(range(100))


def test_an_sae_of_which_only_two_features_are_left_has_two():
    sae = kill(random_sae(d_sae=1000), range(2, 1000))
    assert alive_by_weight(sae).sum() == 2


def test_orthogonality_equals_all_pairs_written_out():
    sae = kill(random_sae(d_in=10, d_sae=60), [7])
    pairs = []
    for i, j in itertools.combinations(set(range(60)) - {7}, 2):
        pairs.append(cosine(sae.W_dec[i], sae.W_dec[j]))
    result = decoder_orthogonality(sae, block=16)
    assert result["mean"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert result["max"] == pytest.approx(max(pairs), rel=1e-5)
    quantiles = np.quantile(pairs, [0.5, 0.9, 0.99])
    assert [result["median"], result["p90"], result["p99"]] == pytest.approx(quantiles, rel=1e-4)


def test_percentiles_of_a_sample_of_features_are_near_those_of_all():
    sae = random_sae(d_in=32, d_sae=1200)
    exact, sampled = decoder_orthogonality(sae), decoder_orthogonality(sae, sample=600)
    assert sampled["mean"] == exact["mean"]
    assert sampled["max"] == exact["max"]
    for name in ("median", "p90", "p99"):
        assert sampled[name] == pytest.approx(exact[name], rel=0.02)


def test_a_feature_s_own_encoder_and_decoder_are_compared_with_their_sign():
    sae = random_sae(d_sae=3)
    with torch.no_grad():
        sae.encoder.copy_(sae.W_dec)
        sae.encoder[0] *= -2
    result = encoder_decoder_cosine(sae)
    assert result["mean"] == pytest.approx((-1 + 1 + 1) / 3, abs=1e-6)
    assert result["median"] == pytest.approx(1, abs=1e-6)


def test_an_sae_without_living_features_has_no_geometry():
    assert encoder_decoder_cosine(SAE(4, 8)) is None
    assert decoder_orthogonality(SAE(4, 8)) is None


# --------------------------------------------------------------------------------------------------
# Two SAEs


def by_brute_force(rows_a, rows_b):
    """The matrix of |cosine| by loops, and the best of all permutations, as a list."""
    n = len(rows_a)
    cos = np.array([[cosine(a, b) for b in rows_b] for a in rows_a])
    permutations = itertools.permutations(range(n))
    return cos, max(permutations, key=lambda p: sum(cos[i, p[i]] for i in range(n)))


@pytest.mark.parametrize("seed", range(8))
def test_matching_equals_the_best_of_all_permutations(seed):
    a = random_sae(seed=seed)
    b = permuted(a, order_of(6, seed), noise=0.6, flip=True)
    figures, partner, shared_dec, shared_enc = match_pair(a, b, threshold=0.7)
    cos_dec, by_decoder = by_brute_force(a.W_dec, b.W_dec)
    cos_enc, by_encoder = by_brute_force(a.W_enc.T, b.W_enc.T)
    n_shared = 0
    for i in range(6):
        j = by_decoder[i]
        if by_encoder[i] == j and cos_dec[i, j] > 0.7 and cos_enc[i, j] > 0.7:
            n_shared += 1
            assert partner[i] == j
            assert shared_dec[i] == pytest.approx(cos_dec[i, j], rel=1e-5)
            assert shared_enc[i] == pytest.approx(cos_enc[i, j], rel=1e-5)
        else:
            assert (partner[i], shared_dec[i], shared_enc[i]) == (-1, 0, 0)
    expected = {
        "shared": n_shared / 6,
        "mcc": np.mean([cos_dec[i, by_decoder[i]] for i in range(6)]),
    }
    for side, cos in (("dec", cos_dec), ("enc", cos_enc)):
        best = [*cos.max(axis=0), *cos.max(axis=1)]
        expected[f"mean_max_cos_{side}"] = np.mean(best)
        expected[f"paired_{side}"] = np.mean([value > 0.7 for value in best])
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name
        assert figures[f"{name}_alive"] == pytest.approx(value, rel=1e-5), name


HARD_PAIR = os.environ.get("SAE_HARD_PAIR")


@pytest.mark.skipif(not HARD_PAIR, reason="SAE_HARD_PAIR names no file with two SAEs to match")
def test_two_saes_on_which_sparse_matchings_hang_are_matched():
    arrays = np.load(HARD_PAIR)
    saes = []
    for number in "01":
        sae = SAE(784, 1568, "relu").eval()
        with torch.no_grad():
            sae.W_enc.copy_(torch.from_numpy(arrays[f"enc{number}"]).float())
            sae.W_dec.copy_(torch.from_numpy(arrays[f"dec{number}"]).float())
        saes.append(sae)
    match = match_pair(*saes)
    assert (match.partner >= 0).sum() == 4
    assert match.figures["mean_max_cos_dec"] == pytest.approx(0.385, abs=1e-3)
    assert match.figures["mean_max_cos_enc"] == pytest.approx(0.226, abs=1e-3)


def test_a_planted_permutation_with_flips_and_noise_is_recovered_exactly():
    a, order = random_sae(d_in=64, d_sae=200), order_of(200)
    match = match_pair(a, permuted(a, order, noise=0.2, flip=True))
    assert match.partner.tolist() == order
    assert match.figures["shared"] == match.figures["shared_alive"] == 1
    assert 0.9 < match.figures["mcc"] < 1


def test_decoders_that_agree_are_not_shared_while_encoders_disagree():
    a = random_sae(d_in=64, d_sae=50)
    b = permuted(a, order_of(50))
    with torch.no_grad():
        b.W_enc.normal_(generator=torch.Generator().manual_seed(9))
    match = match_pair(a, b)
    assert match.figures["paired_dec"] == 1
    assert match.figures["mcc"] == pytest.approx(1)
    assert match.figures["shared"] == 0
    assert (match.partner == -1).all()


def test_dead_features_match_nothing_and_shares_are_given_over_all_and_over_alive():
    a, order = random_sae(d_in=64, d_sae=40), order_of(40)
    b = permuted(a, order)
    kill(a, range(10))  # 30 are left
    kill(b, order[5:20])  # 25 are left, and 20 are alive in both
    figures, partner, _, _ = match_pair(a, b)
    assert (partner >= 0).nonzero()[0].tolist() == list(range(20, 40))
    assert figures["shared"] == 20 / 40
    assert figures["shared_alive"] == pytest.approx((20 / 30 + 20 / 25) / 2)
    cos = np.zeros((40, 40))  # of dead features 0
    for i in range(10, 40):
        for j in set(range(40)) - set(order[5:20]):
            cos[i, j] = cosine(a.W_dec[i], b.W_dec[j])
    best_a, best_b = cos.max(axis=1).sum(), cos.max(axis=0).sum()
    assert figures["mean_max_cos_dec"] == pytest.approx((best_a + best_b) / 80)
    assert figures["mean_max_cos_dec_alive"] == pytest.approx((best_a / 30 + best_b / 25) / 2)
    matched = figures["mcc"] * 40  # the sum of 25 cosines, of which 20 are 1
    assert 20 < matched < 25
    assert figures["mcc_alive"] == pytest.approx((matched / 30 + matched / 25) / 2)


def test_two_saes_without_living_features_share_nothing():
    figures, partner, _, _ = match_pair(SAE(4, 8), SAE(4, 8))
    assert set(figures.values()) == {0}
    assert (partner == -1).all()


def test_matching_does_not_depend_on_which_sae_comes_first():
    a, b = random_sae(d_sae=30), permuted(random_sae(d_sae=30), order_of(30), noise=0.4)
    kill(b, [1, 2])
    there, back = match_pair(a, b), match_pair(b, a)
    assert there.figures == pytest.approx(back.figures)
    assert (there.partner >= 0).any()
    for i, j in enumerate(there.partner):
        assert j < 0 or back.partner[j] == i


def test_saes_of_different_shapes_cannot_be_matched():
    with pytest.raises(UserError, match="d_in 8, d_sae 6 and d_in 8, d_sae 7"):
        match_pair(random_sae(), random_sae(d_sae=7))


# --------------------------------------------------------------------------------------------------
# Encoders compared by what they do to data


def test_under_the_data_metric_cosines_are_correlations_of_pre_activations(tmp_path):
    x = torch.randn(400, 8) @ torch.randn(8, 8) + 5
    x[:, 3] = 2  # a pixel that never changes
    a, b = random_sae(seed=1), random_sae(seed=2)
    evaluate.save_covariance(evaluate.covariance(x), tmp_path)
    metric = evaluate.data_metric(tmp_path, 8)
    responses_a, responses_b = a.pre_acts(x).detach(), b.pre_acts(x).detach()
    for i, j in itertools.product(range(6), range(6)):
        columns = torch.stack([responses_a[:, i], responses_b[:, j]])
        found = torch.cosine_similarity(metric @ a.W_enc[:, i], metric @ b.W_enc[:, j], dim=0)
        assert found.item() == pytest.approx(columns.corrcoef()[0, 1].item(), abs=1e-4)


def test_encoders_that_differ_where_there_is_no_data_are_shared_on_data_alone(tmp_path):
    x, a = torch.randn(400, 8), random_sae()
    x[:, 5:] = 0
    b = permuted(a, order_of(6))
    with torch.no_grad():
        b.W_enc[5:] += 10 * torch.randn(3, 6)
    for seed, sae in enumerate((a, b)):
        write_run(tmp_path / f"r_seed{seed}", sae, seed)
        evaluate.save_covariance(evaluate.covariance(x), tmp_path / f"r_seed{seed}")
    (by_weight,) = compare_seeds(find_runs([tmp_path]))
    (on_data,) = compare_seeds(find_runs([tmp_path]), on_data=True)
    assert (by_weight.figures.on_data, on_data.figures.on_data) == (False, True)
    assert by_weight.figures.pairs[0]["shared"] < 0.5
    assert on_data.figures.pairs[0]["shared"] == 1
    for name in ("mean_max_cos_dec", "mcc"):
        assert by_weight.figures.pairs[0][name] == on_data.figures.pairs[0][name]


@pytest.mark.parametrize("content", [None, b"no array", "another width"])
def test_on_data_without_a_covariance_says_which_command_writes_it(content, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"r_seed{seed}", random_sae(seed=seed), seed)
    if content == "another width":
        evaluate.save_covariance(evaluate.covariance(torch.randn(50, 7)), tmp_path / "r_seed0")
    elif content is not None:
        (tmp_path / "r_seed0" / "covariance.npy").write_bytes(content)
    with pytest.raises(
        UserError, match=r"r_seed0/covariance\.npy .*evaluate\.py quality writes it"
    ):
        evaluate.main(["seeds", str(tmp_path), "--on-data"])


# --------------------------------------------------------------------------------------------------
# Many


def three_seeds():
    """SAEs of three seeds, and the number of each base feature in each: 0-9 are of all three, 10-14
    of the first two, and the rest each seed's own."""
    base = random_sae(d_in=64, d_sae=30)
    orders = [order_of(30, seed) for seed in range(3)]
    saes = []
    for number, order in enumerate(orders):
        sae = permuted(base, order, noise=0.1, seed=number)
        own = order[15:] if number < 2 else order[10:]
        fresh = random_sae(d_in=64, d_sae=30, seed=50 + number)
        with torch.no_grad():
            sae.W_dec[own] = fresh.W_dec[own]
            sae.W_enc[:, own] = fresh.W_enc[:, own]
        saes.append(sae)
    return saes, orders


def test_features_of_all_seeds_are_always_shared_whatever_the_order_of_rows():
    saes, _ = three_seeds()
    figures = consistency(saes, [0, 1, 2])
    assert figures.always_shared == pytest.approx(10 / 30)
    assert figures.sometimes_shared == pytest.approx((5 + 5 + 0) / 90)
    assert figures.never_shared == pytest.approx(1 - 10 / 30 - 10 / 90)
    assert figures.always_shared_alive == pytest.approx(10 / 30)
    assert [pair["seeds"] for pair in figures.pairs] == [[0, 1], [0, 2], [1, 2]]


def test_shares_of_alive_features_are_over_each_seed_s_own():
    saes, orders = three_seeds()
    kill(saes[0], orders[0][20:])  # 10 of its own 15
    figures = consistency(saes, [0, 1, 2])
    assert figures.always_shared_alive == pytest.approx((10 / 20 + 10 / 30 + 10 / 30) / 3)
    assert figures.sometimes_shared_alive == pytest.approx((5 / 20 + 5 / 30 + 0) / 3)
    assert figures.never_shared_alive == pytest.approx((5 / 20 + 15 / 30 + 20 / 30) / 3)


def test_which_features_recur_is_told_by_their_numbers_in_each_run_most_alike_first():
    saes, orders = three_seeds()
    figures = consistency(saes, [0, 1, 2])
    by_all = [entry["features"] for entry in figures.shared_by_all]
    by_two = [entry["features"] for entry in figures.shared_by_two]
    assert sorted(by_all) == sorted([order[i] for order in orders] for i in range(10))
    assert sorted(by_two) == sorted([orders[0][i], orders[1][i], None] for i in range(10, 15))
    for entries in (figures.shared_by_all, figures.shared_by_two):
        alike = [entry["cos_dec"] + entry["cos_enc"] for entry in entries]
        assert alike == sorted(alike, reverse=True)
    i, j, k = by_all[0]
    rows = [saes[0].W_dec[i], saes[1].W_dec[j], saes[2].W_dec[k]]
    columns = [saes[0].W_enc[:, i], saes[1].W_enc[:, j], saes[2].W_enc[:, k]]
    for name, vectors in (("cos_dec", rows), ("cos_enc", columns)):
        expected = np.mean([cosine(a, b) for a, b in itertools.combinations(vectors, 2)])
        assert figures.shared_by_all[0][name] == pytest.approx(expected, rel=1e-5)


def test_three_pairs_that_do_not_close_a_cycle_are_not_always_shared():
    # Feature 0 of seed 0 is feature 1 of seed 1 and feature 2 of seed 2, but those two have other
    # partners: 1 of seed 1 goes with 3 of seed 2. Row 0 of seed 1 is shared with seed 2, too, so
    # that counting rows of each pair's first SAE would call feature 0 always shared.
    partner = {
        (0, 1): np.array([1, -1, -1, -1]),
        (0, 2): np.array([2, -1, -1, -1]),
        (1, 2): np.array([0, 3, -1, -1]),
    }
    assert all(of_first[0] >= 0 for of_first in partner.values())
    classes = sharedness(partner, 3)
    assert classes.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]]


def random_partners(n_seeds, n=12):
    """One-to-one partners of most features for every two seeds, mostly the same number."""
    rng = np.random.default_rng(n_seeds)
    partner = {}
    for pair in itertools.combinations(range(n_seeds), 2):
        partner[pair] = np.full(n, -1)
        kept = rng.permutation(n)[: n - 2]
        partner[pair][kept] = kept
        partner[pair][kept[:2]] = kept[1::-1]  # two of them the wrong way round
    return partner


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_sharedness_equals_a_search_over_all_choices_of_a_feature_from_each_seed(n_seeds):
    partner = random_partners(n_seeds)
    expected = np.zeros((n_seeds, 12), dtype=int)
    for (a, b), of_a in partner.items():
        for i in range(12):
            if of_a[i] >= 0:
                expected[a, i] = expected[b, of_a[i]] = 1
    for choice in itertools.product(range(12), repeat=n_seeds):
        if all(partner[a, b][choice[a]] == choice[b] for a, b in partner):
            for seed in range(n_seeds):
                expected[seed, choice[seed]] = 2
    assert (expected == 2).any()
    assert sharedness(partner, n_seeds).tolist() == expected.tolist()


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_a_shared_feature_is_in_one_list_and_in_no_circle_twice(n_seeds):
    partner = random_partners(n_seeds)
    classes = sharedness(partner, n_seeds)
    matches = {}
    for pair, of_a in partner.items():
        matches[pair] = evaluate.Match({}, of_a, (of_a >= 0) * 0.9, (of_a >= 0) * 0.8)
    by_all, by_two = recurring_features(matches, n_seeds)
    for seed in range(n_seeds):
        of_all = [entry["features"][seed] for entry in by_all]
        assert sorted(of_all) == np.flatnonzero(classes[seed] == 2).tolist()
        of_two = {entry["features"][seed] for entry in by_two} - {None}
        assert of_two == set(np.flatnonzero(classes[seed] == 1).tolist())


# --------------------------------------------------------------------------------------------------
# Finding and grouping runs


def test_runs_are_found_at_any_depth_each_once_and_plain_files_are_passed_over(tmp_path):
    folders = []
    for name in ("a_seed0", "grid/b_seed0", "grid/deeper/c_seed0"):
        folders.append(write_run(tmp_path / "runs" / name, random_sae(), 0))
    (tmp_path / "runs" / "shares.png").write_bytes(b"")
    (tmp_path / "runs" / "unfinished").mkdir()
    assert find_runs([tmp_path / "runs"]) == folders
    (tmp_path / "link").symlink_to(folders[0])
    again = [folders[0], tmp_path / "link", folders[0] / ".." / "a_seed0", tmp_path / "runs"]
    assert find_runs(again) == folders
    with pytest.raises(UserError, match=r"shares\.png: no run folder"):
        find_runs([tmp_path / "runs" / "shares.png"])


def test_runs_are_grouped_by_configuration_and_labelled_by_what_differs(tmp_path):
    base = random_sae(d_in=32, d_sae=20)
    for l2, noise in ((1e-5, 0.05), (0.0, 0.5)):
        for seed in (2, 0, 1):
            sae = permuted(base, order_of(20, seed), noise=noise, seed=seed)
            write_run(tmp_path / f"relu_l2-{l2:g}_seed{seed}", sae, seed, l2=l2)
    groups = compare_seeds(find_runs([tmp_path]))
    assert [group.label for group in groups] == ["l2 0", "l2 1e-05"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 2]] * 2
    assert groups[1].figures.always_shared == 1
    assert not {"seed", "data_seed"} & set(groups[0].config)


def test_a_label_names_settings_as_folders_do_and_none_that_follows_from_another():
    plain = {"arch": "relu", "tied_init": False, "biases": False, "steps": 7, "length": "3 epochs"}
    tied = {"arch": "relu", "tied_init": True, "biases": True, "steps": 9, "length": "4 epochs"}
    off, on = spell("tied_init", False, " "), spell("tied_init", True, " ")
    assert label_runs([plain, tied]) == [f"{off}, 3 epochs", f"{on}, 4 epochs"]
    configs = [
        {"arch": "relu", "k": 40, "l2": 0.0},
        {"arch": "relu", "k": 40, "l2": 1e-5},
        {"arch": "topk", "k": 32, "l2": 0.0},  # of which k says no more than the architecture
        {"arch": "topk", "k": 32, "l2": 1e-5},
    ]
    assert label_runs(configs) == ["relu, l2 0", "relu, l2 1e-05", "topk, l2 0", "topk, l2 1e-05"]
    assert label_runs([{"arch": "topk", "k": 32, "l1": 0.0, "l2": 1e-5}]) == ["topk, l2 1e-05"]


def test_a_penalised_configuration_follows_its_baseline_and_numbers_are_in_order(tmp_path):
    for k, l2, seed in itertools.product((2, 3, 10), (1e-4, 0.0), (0, 1)):
        sae = random_sae(d_sae=12, seed=seed, arch="topk")
        write_run(tmp_path / f"topk_k{k}_l2-{l2:g}_seed{seed}", sae, seed, k=k, l2=l2)
    labels = [group.label for group in load_groups(find_runs([tmp_path]))]
    assert labels == [f"k{k}, l2 {l2:g}" for k in (2, 3, 10) for l2 in (0.0, 1e-4)]


def test_two_runs_of_one_configuration_and_seed_are_an_error_that_names_them(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, random_sae(), 0)
    with pytest.raises(UserError, match=r"/a and .*/b are of one configuration and seed"):
        compare_seeds(find_runs([tmp_path]))


def test_runs_of_one_training_are_one_configuration_however_its_length_is_said(tmp_path):
    for seed, length in ((0, ""), (1, "3 epochs")):
        write_run(tmp_path / f"r_seed{seed}", random_sae(seed=seed), seed, length=length)
    (group,) = compare_seeds(find_runs([tmp_path]))
    assert [run.seed for run in group.runs] == [0, 1]


def test_seeds_may_vary_with_the_data_seed_but_a_grid_of_both_is_split(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "both" / f"r_seed{seed}", random_sae(), seed, data_seed=seed)
    (both,) = load_groups(find_runs([tmp_path / "both"]))
    assert [run.seed for run in both.runs] == [0, 1, 2]
    for data_seed, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):  # a grid that is not full
        name = f"r_data-seed-{data_seed}_seed{seed}"
        write_run(tmp_path / "grid" / name, random_sae(), seed, data_seed=data_seed)
    found = []
    for group in load_groups(find_runs([tmp_path / "grid"])):
        found.append((group.config["data_seed"], [run.seed for run in group.runs]))
    assert found == [(0, [0, 1, 2]), (1, [0, 1])]


@pytest.mark.parametrize("shapes", [[(8, 6)], [(8, 6), (8, 7)], [(8, 6), (9, 6)]])
def test_no_two_saes_of_one_shape_is_an_error_that_names_the_shapes(shapes, tmp_path):
    for number, (d_in, d_sae) in enumerate(shapes):
        random_sae(d_in, d_sae).save(tmp_path / f"run{number}")
    with pytest.raises(UserError, match="no two SAEs of one configuration") as error:
        evaluate.main(["seeds", str(tmp_path)])
    for d_in, d_sae in shapes:
        assert f"d_in {d_in}, d_sae {d_sae}" in str(error.value)


# --------------------------------------------------------------------------------------------------
# Runs of others


def test_folders_of_others_take_their_seed_from_metadata_or_from_the_order_given(tmp_path):
    base = random_sae(d_in=32, d_sae=20)
    for seed in (7, 5):
        permuted(base, order_of(20, seed)).save(tmp_path / f"with{seed}", {"seed": seed})
        permuted(base, order_of(20, seed)).save(tmp_path / f"without{seed}")
    for names, seeds in ((["with7", "with5"], [7, 5]), (["without7", "without5"], [0, 1])):
        (group,) = compare_seeds(find_runs([tmp_path / name for name in names]))
        assert [run.seed for run in group.runs] == seeds
        assert group.figures.always_shared == 1


def test_what_was_measured_on_an_sae_of_others_is_no_part_of_its_configuration(tmp_path):
    for seed in (0, 1):
        measured = {"l0": 30.1 + seed, "num_dead_features": 17 * seed, "wandb_id": f"run{seed}"}
        random_sae(seed=seed).save(tmp_path / f"sae{seed}", {"lr": 3e-4, "seed": seed, **measured})
    (group,) = load_groups(find_runs([tmp_path]))
    assert [run.seed for run in group.runs] == [0, 1]


@pytest.mark.parametrize(
    "detail", [{"lr": 1e-4}, {"training_tokens": 1000}, {"hook_name": "blocks.4.hook_resid_post"}]
)
def test_details_of_training_tell_configurations_of_others_apart(detail, tmp_path):
    common = {"lr": 3e-4, "hook_name": "blocks.3.hook_resid_post"}
    random_sae().save(tmp_path / "sae0", {**common, "seed": 0})
    random_sae().save(tmp_path / "sae1", {**common, "seed": 1, **detail})
    (name,) = detail
    with pytest.raises(UserError, match=f"no two SAEs of one configuration .*differ in: .*{name}"):
        compare_seeds(find_runs([tmp_path]))


def test_a_run_without_a_second_seed_beside_others_is_pointed_out(tmp_path, capsys):
    for name, lr, seed in (("a", 3e-4, 0), ("b", 3e-4, 1), ("c", 1e-4, 2)):
        random_sae(seed=seed).save(tmp_path / name, {"lr": lr, "seed": seed})
    evaluate.main(["seeds", str(tmp_path)])
    note = capsys.readouterr().out.splitlines()[0]
    assert str(tmp_path / "c") in note
    assert "lr" in note


def test_labels_stay_short_beside_runs_that_differ_in_fifty_settings(tmp_path):
    for name, offset in (("ours", None), ("theirs/first", 0), ("theirs/second", 1)):
        for seed in (0, 1):
            folder = tmp_path / name / f"sae_seed{seed}"
            if offset is None:
                write_run(folder, random_sae(), seed)
            else:
                settings = {f"setting_{i}": i + offset for i in range(50)}
                random_sae().save(folder, {**settings, "seed": seed})
    labels = [group.label for group in load_groups(find_runs([tmp_path]))]
    assert len(set(labels)) == 3
    assert max(map(len, labels)) < 80
    assert "theirs/first/sae_seed0" in labels


@pytest.mark.parametrize(
    "metadata", [{"arch": 5}, {"l2": [1]}, {"seed": {}}, {"steps": None}, {"length": 3}]
)
def test_metadata_of_others_may_hold_anything(metadata, tmp_path):
    for name, more in (("a", metadata), ("b", {}), ("c", {})):
        random_sae().save(tmp_path / name, more)
    assert any(len(group.runs) >= 2 for group in compare_seeds(find_runs([tmp_path])))


def dictionary_learning(folder, seed, **settings):
    """A folder as dictionary_learning's trainSAE leaves it."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "encoder.weight": torch.randn(6, 8, generator=generator),
        "encoder.bias": torch.zeros(6),
        "decoder.weight": torch.randn(8, 6, generator=generator),
        "bias": torch.zeros(8),
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "lr": 1e-3, "seed": seed, **settings}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})


def test_saes_of_dictionary_learning_are_grouped_by_all_but_their_seed(tmp_path):
    for number, (penalty, seed) in enumerate(itertools.product((0.1, 0.2), (0, 1))):
        dictionary_learning(tmp_path / f"trainer_{number}", seed, l1_penalty=penalty)
    found = [(g.label, [run.seed for run in g.runs]) for g in compare_seeds(find_runs([tmp_path]))]
    assert found == [("l1-penalty 0.1", [0, 1]), ("l1-penalty 0.2", [0, 1])]


# --------------------------------------------------------------------------------------------------
# The table, the JSON file, the features in it


def cells(printed):
    """The first table in what was printed: a dict for each line."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row)) for row in rows]


def recurring_runs(folder, seeds=(0, 1, 2), **settings):
    """Runs of one configuration in which every feature recurs. {seed: order of its features}"""
    base = random_sae(d_in=32, d_sae=20)
    for seed in seeds:
        sae = permuted(base, order_of(20, seed), noise=0.05, seed=seed)
        write_run(folder / f"r_seed{seed}", sae, seed, **settings)
    return {seed: order_of(20, seed) for seed in seeds}


def test_a_column_that_nobody_measured_is_left_out(tmp_path):
    recurring_runs(tmp_path, seeds=(0, 1))
    (row,) = cells(table(load_groups(find_runs([tmp_path]))))
    assert row == {"configuration": "relu", "seeds": "2", "alive": "20/20"}
    (row,) = cells(table(compare_seeds(find_runs([tmp_path]))))
    assert [*row][3:] == ["mcc", "shared", "shared of alive"]


def test_always_shared_is_shown_for_three_seeds_or_more(tmp_path):
    recurring_runs(tmp_path)
    (row,) = cells(table(compare_seeds(find_runs([tmp_path]))))
    assert row["always shared"] == "1.000"


def test_what_is_no_number_in_quality_json_was_not_measured(tmp_path):
    recurring_runs(tmp_path, seeds=(0, 1))
    for seed, content in ((0, {"fve": "x", "l0": 3.0}), (1, {"fve": [1], "l0": None})):
        write_json(tmp_path / f"r_seed{seed}" / "quality.json", content)
    (row,) = cells(table(compare_seeds(find_runs([tmp_path]))))
    assert "fve" not in row
    assert row["l0"] == "3.0"


def test_the_table_joins_quality_and_consistency(run_folder, capsys):
    runs = [str(folder) for folder in run_folder]
    evaluate.main(["quality", *runs, "--tokens", "600", "--device", "cpu"])
    capsys.readouterr()
    evaluate.main(["seeds", *runs])
    results = [json.loads((folder / "quality.json").read_text()) for folder in run_folder]
    (row,) = cells(capsys.readouterr().out)
    for name, head, digits in (("fve", "fve", 3), ("loss_recovered", "loss recovered", 4)):
        mean = (results[0][name] + results[1][name]) / 2
        assert float(row[head]) == pytest.approx(mean, abs=0.6 * 10**-digits)
    figures = match_pair(*map(SAE.load, run_folder)).figures
    assert row["mcc"] == f"{figures['mcc']:.3f}"
    assert row["shared"] == f"{figures['shared']:.3f}"
    evaluate.main(["seeds", *runs, "--on-data"])  # for which what quality wrote is enough
    assert "correlation of their pre-activations" in capsys.readouterr().out


def test_the_json_file_names_the_features_that_recur_and_commands_take_them_from_it(tmp_path):
    orders = recurring_runs(tmp_path / "runs")
    out = tmp_path / "results" / "all.json"
    write_json(tmp_path / "runs" / "r_seed0" / "quality.json", {"fve": 0.9})
    evaluate.main(["seeds", str(tmp_path / "runs"), "--json", str(out)])
    assert {path.name for path in out.parent.iterdir()} == {
        "all.json",
        "all_shares.png",
        "all_front.png",
    }
    (group,) = json.loads(out.read_text())["groups"]
    assert group["config"]["d_sae"] == 20
    assert group["seeds"] == [0, 1, 2]
    assert group["alive"] == [20] * 3
    assert group["quality"] == [{"fve": 0.9}, None, None]
    assert [pair["seeds"] for pair in group["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert (group["always_shared"], group["always_shared_alive"]) == (1, 1)
    read = []
    for seed in range(3):
        read.append(read_features([str(out)], tmp_path / "runs" / f"r_seed{seed}"))
    for numbers in zip(*read):  # of one feature in each run
        assert len({orders[seed].index(number) for seed, number in enumerate(numbers)}) == 1
    assert len(read[0]) == 20


def test_features_that_two_seeds_share_are_taken_where_none_is_shared_by_all(tmp_path):
    base = random_sae(d_in=32, d_sae=20)
    for seed, sae in enumerate((base, permuted(base, order_of(20)), random_sae(32, 20, seed=9))):
        write_run(tmp_path / f"r_seed{seed}", sae, seed)
    out = tmp_path / "all.json"
    evaluate.main(["seeds", str(tmp_path), "--json", str(out)])
    assert sorted(read_features([str(out)], tmp_path / "r_seed1")) == list(range(20))
    with pytest.raises(UserError, match=r"no feature of .*r_seed2 recurs"):
        read_features([str(out)], tmp_path / "r_seed2")


def test_a_run_that_was_trained_again_is_no_longer_in_the_json_file(tmp_path):
    recurring_runs(tmp_path)
    out = tmp_path / "all.json"
    evaluate.main(["seeds", str(tmp_path), "--json", str(out)])
    write_run(tmp_path / "r_seed1", random_sae(d_in=32, d_sae=20, seed=5), 1)
    with pytest.raises(UserError, match=r"--features .*all\.json: .*r_seed1.* is not in it"):
        read_features([str(out)], tmp_path / "r_seed1")
    write_json(out, {"groups": [{"runs": 3}]})
    with pytest.raises(UserError, match=r"--features .*all\.json: not as"):
        read_features([str(out)], tmp_path / "r_seed1")


def test_features_are_those_named_or_else_drawn_from_the_alive_the_same_every_time(tmp_path):
    alive = torch.tensor([True, False] * 10)
    assert read_features(["3", "5"], tmp_path) == [3, 5]
    assert read_features(None, tmp_path) == []
    assert choose_features([5, 3, 5], 10, alive, 0, tmp_path) == [5, 3]
    assert choose_features([5, 3, 4], 2, alive, 0, tmp_path) == [5, 3]
    drawn = choose_features([], 4, alive, 0, tmp_path)
    assert drawn == sorted(set(drawn)) == choose_features([], 4, alive, 0, tmp_path)
    assert len(drawn) == 4
    assert all(alive[feature] for feature in drawn)
    assert drawn != choose_features([], 4, alive, 1, tmp_path)
    assert choose_features([], 100, alive, 0, tmp_path) == list(range(0, 20, 2))


def test_features_that_cannot_be_chosen_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"--features 20: .* 0 to 19"):
        choose_features([3, 20], 10, torch.ones(20).bool(), 0, tmp_path)
    with pytest.raises(UserError, match="none of its features is alive"):
        choose_features([], 10, torch.zeros(20).bool(), 0, tmp_path)
    with pytest.raises(UserError, match="--features x: give numbers"):
        read_features(["x"], tmp_path)


# --------------------------------------------------------------------------------------------------
# Pictures


def configurations(n, penalty="l2"):
    """Groups as compare_seeds returns them, with made-up figures: n settings, each without and with
    a penalty, of which the last without one has the best fve and the last with it shares most."""
    groups = []
    for number, weight in itertools.product(range(n), (0.0, 1e-5)):
        config = {"arch": "relu", "k": number, penalty: weight}
        shared = 0.01 * number + 1e4 * weight
        fve = 0.8 + 0.01 * number - 1e4 * weight
        pairs = [{"shared": shared + d, "shared_alive": shared, "mcc": 0.4} for d in (0, 0.01)]
        figures = evaluate.Consistency(False, pairs, 0, 0, 0, 0, 0, 0, [], [])
        runs = []
        for seed in range(2):
            run = evaluate.TrainedSAE(Path(), SAE(4, 8), config, seed, 0, {"fve": fve}, 300)
            runs.append(run)
        groups.append(evaluate.Group(config, runs, f"k{number}, {penalty} {weight:g}", figures))
    return groups


def width_when_saved(figure, path):
    evaluate.save_figure(figure, path)
    with Image.open(path) as image:
        return image.width


@pytest.mark.parametrize("n", [1, 3, 9])
def test_text_of_every_picture_can_be_read_at_400_pixels(n, tmp_path):
    groups = configurations(n)
    figures = [
        evaluate.plot_shares(groups),
        evaluate.plot_front(groups),
        evaluate.plot_penalty(groups, "l2"),
    ]
    for number, figure in enumerate(figures):
        width = width_when_saved(figure, tmp_path / f"{number}.png")
        for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")):
            pixels = text.get_fontsize() / 72 * 150 * 400 / width
            assert pixels > 7 or not text.get_text()


def test_with_many_configurations_the_front_names_those_that_no_other_surpasses():
    few, many = configurations(3), configurations(9)
    assert {text.get_text() for text in evaluate.plot_front(few).axes[0].texts} == {
        group.label for group in few
    }
    named = {text.get_text() for text in evaluate.plot_front(many).axes[0].texts}
    assert named == {"k8, l2 0", "k8, l2 1e-05"}


def test_with_many_configurations_the_lines_of_a_penalty_are_told_by_their_mean():
    few = evaluate.plot_penalty(configurations(3), "l2")
    assert [text.get_text() for text in few.legends[0].texts] == ["k0", "k1", "k2"]
    many = evaluate.plot_penalty(configurations(12), "l2")
    assert [text.get_text() for text in many.legends[0].texts] == [
        "each of 12 settings",
        "their mean",
    ]
    mean = [line for line in many.axes[0].lines if line.get_label() == "mean"]
    (line,) = mean
    assert line.get_ydata() == pytest.approx([0.8 + 0.055, 0.8 + 0.055 - 0.1])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_picture_is_drawn_of_whichever_penalty_varies(penalty, tmp_path, capsys):
    for weight, seed in ((0.0, 0), (0.0, 1), (1e-3, 0), (1e-3, 1), (1e-2, 0)):
        name = f"r_{weight:g}_seed{seed}"
        write_run(tmp_path / name, random_sae(seed=seed), seed, **{penalty: weight})
    evaluate.main(["seeds", str(tmp_path), "--json", str(tmp_path / "all.json")])
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"all_shares.png", f"all_{penalty}.png"}
    rows = cells(capsys.readouterr().out)
    assert [row["seeds"] for row in rows] == ["2", "2", "1"]
    assert rows[2]["shared"] == "-", "one seed is in the table, and compared with none"


def test_any_name_of_a_folder_can_be_drawn(tmp_path):
    groups = configurations(2)
    for group in groups:
        group.label = f"a$\\frac$ {group.label}"
    evaluate.save_figure(evaluate.plot_shares(groups), tmp_path / "shares.png")


def test_a_notebook_s_backend_in_the_environment_stops_no_picture(tmp_path):
    program = "import evaluate, sys\n"
    program += "evaluate.save_figure(evaluate.new_figure(2), sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "empty.png")]
    backend = {"MPLBACKEND": "module://a_backend.of_a_notebook"}
    root = Path(evaluate.__file__).parent
    subprocess.run(command, env={**os.environ, **backend}, cwd=root, check=True)
    assert (tmp_path / "empty.png").exists()


# --------------------------------------------------------------------------------------------------
# Language models, and rows of activations


def tiny_lm():
    """A language model far from uniform predictions: three blocks, d_model 16, 50 tokens."""
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 10
    return model


def stream_of(tokens, model=None):
    from train_pythia import Stream

    return Stream(model or tiny_lm(), 1, tokens)


def some_tokens(n_tokens=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, n_tokens, (6, 20), generator=generator)


def identity_sae(keep=1.0):
    """It gives `keep` times its input: features i and 16 + i are the two signs of dimension i."""
    sae = SAE(16, 32, "relu").eval().requires_grad_(False)
    sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 1))
    sae.W_dec.copy_(keep * sae.W_enc.T)
    return sae


def test_a_perfect_sae_recovers_all_loss_and_an_empty_one_none():
    stream = stream_of(some_tokens().split(4))
    perfect = evaluate.language_model_quality(identity_sae(), stream)
    assert perfect["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert perfect["ce_reconstructed"] == pytest.approx(perfect["ce"], abs=1e-5)
    assert perfect["fve"] == pytest.approx(1, abs=1e-5)
    assert perfect["l0"] == pytest.approx(16, abs=0.1)
    assert (perfect["inputs"], perfect["outliers"]) == (6 * 19, 0)
    assert abs(perfect["ce_zeroed"] - perfect["ce"]) > 1e-3
    empty = evaluate.language_model_quality(identity_sae(keep=0.0), stream)
    assert empty["loss_recovered"] == pytest.approx(0, abs=1e-5)
    assert empty["ce_reconstructed"] == pytest.approx(empty["ce_zeroed"])


def test_loss_recovered_is_the_share_of_the_way_from_zeros_to_the_model_itself():
    from train_pythia import cross_entropy, spliced

    model, tokens = tiny_lm(), some_tokens()
    result = evaluate.language_model_quality(identity_sae(keep=0.5), stream_of([tokens], model))

    def times(factor):
        """The cross-entropy with all positions but the first times a factor."""

        def replace(resid):
            resid = resid.clone()
            resid[:, 1:] *= factor
            return resid

        with spliced(model, 1, replace):
            return cross_entropy(model, [tokens])

    assert result["ce"] == pytest.approx(times(1), rel=1e-6)
    assert result["ce_zeroed"] == pytest.approx(times(0), rel=1e-5)
    assert result["ce_reconstructed"] == pytest.approx(times(0.5), rel=1e-5)
    expected = (times(0) - times(0.5)) / (times(0) - times(1))
    assert result["loss_recovered"] == pytest.approx(expected, rel=1e-4)


def test_outliers_are_left_out_and_counted():
    tokens, model = some_tokens(49), tiny_lm()
    tokens[1, 5] = tokens[4, 7] = 49
    model.gpt_neox.embed_in.weight[49] *= 1000
    result = evaluate.language_model_quality(identity_sae(), stream_of(tokens.split(3), model))
    assert (result["inputs"], result["outliers"]) == (6 * 19 - 2, 2)


def test_saes_of_one_model_and_text_are_measured_as_each_by_itself(run_folder):
    runs = [str(folder) for folder in run_folder]
    flags = ["--tokens", "600", "--device", "cpu"]
    evaluate.main(["quality", *runs, *flags])
    together = [json.loads((folder / "quality.json").read_text()) for folder in run_folder]
    evaluate.main(["quality", runs[1], *flags])
    assert json.loads((run_folder[1] / "quality.json").read_text()) == together[1]
    assert together[0] != together[1]


def test_an_sae_of_others_is_measured_by_the_model_and_hook_that_its_file_names(
    run_folder, model_folder, tmp_path
):
    sae = SAE.load(run_folder[0])
    origin = {"model_name": str(model_folder), "hook_name": "blocks.2.hook_resid_post"}
    sae.save(tmp_path / "theirs", {**origin, "context_size": 16})
    flags = ["--tokens", "600", "--device", "cpu", "--data", str(tmp_path / "tokens.bin")]
    results = []
    for folder in (run_folder[0], tmp_path / "theirs"):
        evaluate.main(["quality", str(folder), *flags])
        results.append(json.loads((folder / "quality.json").read_text()))
    for name in ("inputs", "fve", "l0", "ce", "ce_reconstructed"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-3)


def test_a_run_on_rows_of_activations_is_measured_on_their_last_tenth(tmp_path, capsys):
    x = torch.randn(300, 8) + 1
    np.save(tmp_path / "acts.npy", x.numpy())
    folder = write_run(tmp_path / "r_seed0", random_sae(), 0, data=str(tmp_path / "acts.npy"))
    evaluate.main(["quality", str(folder), "--device", "cpu", "--json", str(tmp_path / "all.json")])
    result = json.loads((folder / "quality.json").read_text())
    expected, _ = quality(random_sae(), [x[270:]])
    assert result["inputs"] == 30
    assert result["fve"] == pytest.approx(expected["fve"], rel=1e-5)
    assert np.load(folder / "covariance.npy") == pytest.approx(np.cov(x[270:].T), abs=1e-4)
    names = {"run": "r_seed0", "folder": str(folder)}
    assert json.loads((tmp_path / "all.json").read_text())["runs"] == [names | result]
    (row,) = cells(capsys.readouterr().out)
    assert row["fve"] == f"{result['fve']:.3f}"


def test_rows_of_another_width_than_the_sae_takes_are_an_error(tmp_path):
    np.save(tmp_path / "acts.npy", np.ones((50, 9), dtype=np.float32))
    folder = write_run(tmp_path / "r_seed0", random_sae(), 0)
    with pytest.raises(UserError, match=r"rows of width 9, but .* takes 8"):
        evaluate.main(["quality", str(folder), "--data", str(tmp_path / "acts.npy")])


def test_quality_of_a_run_that_is_of_no_language_model_is_an_error(tmp_path):
    write_run(tmp_path / "r", random_sae(), 0)
    random_sae().save(tmp_path / "theirs")
    for name in ("r", "theirs"):
        with pytest.raises(UserError, match=f"{name}: not a run of train_pythia"):
            evaluate.main(["quality", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds", "nowhere"], "nowhere: no SAE here"),
        (["seeds", "nowhere", "--threshold", "2"], "--threshold: 2"),
        (["seeds", "nowhere", "--json", "."], "--json: .: a folder"),
        (["seed", "x"], "invalid choice: 'seed'"),
        (["quality", "nowhere", "--tokens", "0"], "--tokens: 0"),
    ],
)
def test_a_command_line_that_cannot_work_says_which_flag_or_folder(arguments, message, refusal):
    assert message in refusal(evaluate.main, arguments)
