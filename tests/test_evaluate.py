"""evaluate.py: quality against direct formulas; matching against brute force and planted truth; grouping and errors."""

import itertools
import json
import os

import numpy as np
import pytest
import torch

import evaluate
from evaluate import alive_by_weight, compare_seeds, consistency, find_runs, geometry, match_pair, quality, sharedness
from sae import PENALTIES, SAE, Hparams, Trainer, UserError, write_hparams


def random_sae(d_in=8, d_sae=6, seed=0, arch="relu"):
    generator = torch.Generator().manual_seed(seed)
    model = SAE(d_in, d_sae, arch, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.eval()


def permuted(model, order, noise=0.0, flip=False, seed=1):
    """A copy whose feature order[i] is the model's feature i, up to sign and noise."""
    other = SAE(model.d_in, model.d_sae, model.arch, model.k).eval()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(model.d_sae, generator=generator) < 0.5, -1.0, 1.0) if flip else 1.0
    with torch.no_grad():
        other.W_dec[order] = (model.W_dec.T * signs).T + noise * torch.randn(model.W_dec.shape, generator=generator)
        other.W_enc[:, order] = model.W_enc * signs + noise * torch.randn(model.W_enc.shape, generator=generator)
    return other


def kill(model, features):
    with torch.no_grad():
        model.W_enc[:, features] = 0
        model.W_dec[features] = 0
    return model


def order_of(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- quality


def test_quality_equals_its_definitions_whatever_the_batches():
    model, x = random_sae(), torch.randn(50, 8) + 1
    result, mean_acts = quality(model, x.split(7))
    acts = model.encode(x).detach()
    error = (acts @ model.W_dec + model.b_dec - x).detach().double()
    assert result["recon"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    total = (x - x.mean(0)).double().square().sum()
    assert result["fve"] == pytest.approx(1 - (error.square().sum() / total).item(), rel=1e-5)
    assert result["l0"] == pytest.approx((acts > 0).sum().item() / 50)
    assert result["dead_by_use"] == (acts.amax(0) <= 0).sum()
    assert result["inputs"] == 50
    assert torch.allclose(mean_acts.float(), acts.mean(0), atol=1e-5)
    assert quality(model, [x])[0]["recon"] == pytest.approx(result["recon"], rel=1e-5)


def test_quality_tells_dead_by_weight_from_dead_by_use():
    model = kill(random_sae(d_sae=20), [3, 4])
    with torch.no_grad():
        model.b_dec.zero_()
        model.b_enc.fill_(1)
        model.b_enc[10:15] = -1e6
        model.b_enc[3:5] = -1
    result, _ = quality(model, [torch.randn(500, 8)])
    assert (result["alive"], result["dead_by_weight"]) == (18, 2)
    assert result["dead_by_use"] == 7


def test_a_latent_is_dead_when_either_of_its_norms_is_zero():
    model = random_sae(d_sae=5)
    with torch.no_grad():
        model.W_enc[:, 1] = 0
        model.W_dec *= 1 / model.W_dec.norm(dim=1, keepdim=True)
        model.W_dec[2] *= 0.9e-2  # all but gone
        model.W_dec[3] *= 1.1e-2  # weak, but alive
    assert alive_by_weight(model).tolist() == [True, False, False, True, True]


def test_geometry_equals_all_pairs_written_out():
    model = kill(random_sae(d_in=10, d_sae=1100), [7])  # more than one block of the histogram
    rows = torch.cat([model.W_dec[:7], model.W_dec[8:]]).detach()
    rows = rows / rows.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    cos = (rows @ rows.T)[i, j].abs().numpy()
    found = geometry(model)["orthogonality"]
    expected = {"mean": cos.mean(), "median": np.median(cos), "max": cos.max()}
    expected |= {"p90": np.quantile(cos, 0.9), "p99": np.quantile(cos, 0.99)}
    assert found == pytest.approx(expected, abs=2e-4)
    columns = torch.cat([model.W_enc[:, :7], model.W_enc[:, 8:]], 1).T.detach()
    own = torch.cosine_similarity(rows, columns)
    assert geometry(model)["enc_dec_cos"]["mean"] == pytest.approx(own.mean().item(), abs=1e-5)


def test_geometry_of_an_sae_without_living_features_is_none():
    assert geometry(SAE(4, 8)) == {"enc_dec_cos": None, "orthogonality": None}


# --- matching two SAEs


@pytest.mark.parametrize("seed", range(8))
def test_matching_equals_brute_force_over_all_permutations(seed):
    a, b = random_sae(seed=seed), permuted(random_sae(seed=seed), order_of(6, seed), noise=0.6, flip=True)
    figures, partner = match_pair(a, b, threshold=0.7)

    def best_permutation(rows_a, rows_b):
        cos = torch.cosine_similarity(rows_a[:, None], rows_b[None], dim=2).abs().detach().numpy()
        best = max(itertools.permutations(range(6)), key=lambda p: sum(cos[i, p[i]] for i in range(6)))
        return cos, best

    cos_dec, by_decoder = best_permutation(a.W_dec, b.W_dec)
    cos_enc, by_encoder = best_permutation(a.W_enc.T, b.W_enc.T)
    expected = np.full(6, -1)
    for i, j in enumerate(by_decoder):
        if by_encoder[i] == j and cos_dec[i, j] > 0.7 and cos_enc[i, j] > 0.7:
            expected[i] = j
    assert partner.tolist() == expected.tolist()
    assert figures["shared"] == pytest.approx((expected >= 0).mean())
    assert figures["mean_max_cos_dec"] == pytest.approx((cos_dec.max(0).mean() + cos_dec.max(1).mean()) / 2, rel=1e-5)
    assert figures["mean_max_cos_enc"] == pytest.approx((cos_enc.max(0).mean() + cos_enc.max(1).mean()) / 2, rel=1e-5)
    paired = ((cos_enc.max(0) > 0.7).mean() + (cos_enc.max(1) > 0.7).mean()) / 2
    assert figures["paired_enc"] == pytest.approx(paired)


HARD_PAIR = os.environ.get("SAE_HARD_PAIR")


@pytest.mark.skipif(not HARD_PAIR, reason="SAE_HARD_PAIR names no file with two SAEs that are hard to match")
def test_two_saes_on_which_sparse_matchings_hang_are_matched():
    arrays = np.load(HARD_PAIR)
    saes = []
    for number in "01":
        saes.append(SAE(784, 1568, "relu").eval())
        with torch.no_grad():
            saes[-1].W_enc.copy_(torch.from_numpy(arrays[f"enc{number}"]).float())
            saes[-1].W_dec.copy_(torch.from_numpy(arrays[f"dec{number}"]).float())
    figures, partner = match_pair(*saes)
    assert (partner >= 0).sum() == 4
    assert figures["mean_max_cos_dec"] == pytest.approx(0.385, abs=1e-3)
    assert figures["mean_max_cos_enc"] == pytest.approx(0.226, abs=1e-3)


def test_a_planted_permutation_with_flips_and_noise_is_recovered_exactly():
    a, order = random_sae(d_in=64, d_sae=200), order_of(200)
    figures, partner = match_pair(a, permuted(a, order, noise=0.2, flip=True))
    assert partner.tolist() == order.tolist()
    assert figures["shared"] == figures["shared_alive"] == 1


def test_decoders_that_agree_are_not_shared_while_encoders_disagree():
    a = random_sae(d_in=64, d_sae=50)
    b = permuted(a, order_of(50))
    with torch.no_grad():
        b.W_enc.normal_(generator=torch.Generator().manual_seed(9))
    figures, partner = match_pair(a, b)
    assert figures["paired_dec"] == 1
    assert figures["shared"] == 0
    assert (partner == -1).all()


def test_dead_features_match_nothing_and_shares_are_given_over_all_and_over_alive():
    a, order = random_sae(d_in=64, d_sae=40), order_of(40)
    b = permuted(a, order)
    kill(a, range(10))  # 30 alive
    kill(b, order[5:20])  # 25 alive; 20 features are alive in both
    figures, partner = match_pair(a, b)
    assert (partner >= 0).nonzero()[0].tolist() == list(range(20, 40))
    assert figures["shared"] == 20 / 40
    assert figures["shared_alive"] == pytest.approx((20 / 30 + 20 / 25) / 2)
    rows = [torch.nn.functional.normalize(sae.W_dec[evaluate.alive_by_weight(sae)]).detach() for sae in (a, b)]
    cos = (rows[0] @ rows[1].T).abs()
    assert cos.shape == (30, 25)
    assert figures["mean_max_cos_dec"] == pytest.approx((cos.amax(1).sum() + cos.amax(0).sum()).item() / 80)
    assert figures["mean_max_cos_dec_alive"] == pytest.approx((cos.amax(1).mean() + cos.amax(0).mean()).item() / 2)


def test_two_saes_without_living_features_share_nothing():
    figures, partner = match_pair(SAE(4, 8), SAE(4, 8))
    assert set(figures.values()) == {0}
    assert (partner == -1).all()


def test_matching_does_not_depend_on_which_sae_comes_first():
    a, b = random_sae(d_sae=30), permuted(random_sae(d_sae=30), order_of(30), noise=0.4)
    kill(b, [1, 2])
    there, partner = match_pair(a, b)
    back, partner_back = match_pair(b, a)
    assert there == pytest.approx(back)
    for i, j in enumerate(partner):
        assert j < 0 or partner_back[j] == i


def test_saes_of_different_shapes_cannot_be_matched():
    with pytest.raises(UserError, match="d_in 8, d_sae 6 and d_in 8, d_sae 7"):
        match_pair(random_sae(), random_sae(d_sae=7))


# --- matching many


def test_cycles_of_three_seeds_are_always_shared_whatever_the_order_of_rows():
    base = random_sae(d_in=64, d_sae=30)
    orders = [order_of(30, seed) for seed in range(3)]
    saes = [permuted(base, order) for order in orders]
    with torch.no_grad():  # features 0-9 are of all three; 10-14 of the first two; the rest each its own
        for number, (model, order) in enumerate(zip(saes, orders)):
            own = order[15:] if number < 2 else order[10:]
            fresh = random_sae(d_in=64, d_sae=30, seed=50 + number)
            model.W_dec[own] = fresh.W_dec[own]
            model.W_enc[:, own] = fresh.W_enc[:, own]
    result = consistency(saes, [0, 1, 2])
    assert result["always_shared"] == pytest.approx(10 / 30)
    assert result["sometimes_shared"] == pytest.approx((5 + 5 + 0) / 90)
    assert result["never_shared"] == pytest.approx(1 - 10 / 30 - 10 / 90)
    assert result["always_shared_alive"] == pytest.approx(10 / 30)


def test_three_pairs_that_do_not_close_a_cycle_are_not_always_shared():
    # Feature 0 of seed 0 is feature 1 of seed 1 and feature 2 of seed 2, but those two have other partners: 1 of
    # seed 1 goes with 3 of seed 2. Row 0 of seed 1 is shared with seed 2 too, so counting by row number in each
    # pair's first SAE (0 in pair 0-1, 0 in pair 0-2, 0 in pair 1-2) would call feature 0 always shared.
    partner = {(0, 1): np.array([1, -1, -1, -1]), (0, 2): np.array([2, -1, -1, -1]), (1, 2): np.array([0, 3, -1, -1])}
    by_row_number = sum(all(partner[pair][row] >= 0 for pair in partner) for row in range(4))
    assert by_row_number == 1
    classes = sharedness(partner, 3)
    assert not (classes == 2).any()
    assert classes.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_every_seed_counts_as_many_always_shared_features(n_seeds):
    rng = np.random.default_rng(n_seeds)
    partner = {}
    for pair in itertools.combinations(range(n_seeds), 2):
        partner[pair] = np.full(12, -1)
        kept = rng.permutation(12)[:10]
        partner[pair][kept] = kept  # mostly the identity: many cycles close
        partner[pair][kept[:2]] = kept[1::-1]
    classes = sharedness(partner, n_seeds)
    counts = (classes == 2).sum(1)
    assert len(set(counts)) == 1
    expected = 0
    for members in itertools.product(range(12), repeat=n_seeds):  # every choice of one feature from each seed
        expected += all(partner[a, b][members[a]] == members[b] for a, b in partner)
    assert counts[0] == expected > 0


# --- run folders, table, files


def write_run(folder, model, seed, **settings):
    hp = Hparams(**{"arch": "relu", "d_in": model.d_in, "d_sae": model.d_sae, "seed": seed} | settings)
    model.save(folder, {"seed": seed})
    write_hparams(Trainer(hp), folder, complete=True)
    return folder


def test_runs_are_grouped_by_configuration_and_labelled_by_what_differs(tmp_path):
    base = random_sae(d_in=32, d_sae=20)
    for l2, noise in ((1e-5, 0.05), (0.0, 0.5)):
        for seed in (2, 0, 1):
            model = permuted(base, order_of(20, seed), noise=noise, seed=seed)
            write_run(tmp_path / f"relu_l2-{l2:g}_seed{seed}", model, seed, l2=l2)
    groups = compare_seeds(find_runs([tmp_path]))
    assert [group["label"] for group in groups] == ["no penalty", "l2 1e-5"]
    assert [group["name"] for group in groups] == ["relu_l2-0", "relu_l2-1e-05"]
    assert [group["figures"]["seeds"] for group in groups] == [[0, 1, 2]] * 2
    assert groups[1]["figures"]["always_shared"] == 1
    table = evaluate.table(groups)
    assert len(set(map(len, table.splitlines()))) == 1, "columns line up"
    assert "1.000 (1.000)" in table


def test_labels_are_words_and_a_penalised_configuration_follows_its_baseline(tmp_path):
    plain, tied = {"tied_init": False, "biases": False}, {"unit_norm": True}
    for setting in (plain, tied):
        for more in ({"l2": 1e-5}, {}, {"l1_mean": 1e-3}, {"l2": 1e-5, "steps": 9, "length": "20 epochs"}):
            hp = setting | {"steps": 7, "length": "3 epochs"} | more
            for seed in (0, 1):
                name = "_".join(f"{key}-{value}" for key, value in hp.items()) + f"_seed{seed}"
                write_run(tmp_path / name, random_sae(seed=seed), seed, **hp)
    labels = [group["label"] for group in compare_seeds(find_runs([tmp_path]))]
    assert labels == [
        "plain, l2 1e-5, 20 epochs",
        *(f"plain, {penalty}, 3 epochs" for penalty in ("no penalty", "l1 mean 0.001", "l2 1e-5")),
        "tied, unit norm, l2 1e-5, 20 epochs",
        *(f"tied, unit norm, {penalty}, 3 epochs" for penalty in ("no penalty", "l1 mean 0.001", "l2 1e-5")),
    ]


def test_two_runs_of_one_configuration_and_seed_are_an_error_that_names_them(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, random_sae(), 0)
    with pytest.raises(UserError, match=r"/a and .*/b are of one configuration and seed"):
        compare_seeds(find_runs([tmp_path]))


def test_a_run_from_before_there_was_a_setting_has_its_default(tmp_path):
    folders = [write_run(tmp_path / f"r_seed{s}", random_sae(d_in=8, d_sae=6), s) for s in (0, 1)]
    found = json.loads((folders[0] / "hparams.json").read_text())
    del found["hparams"]["aux"], found["hparams"]["length"]
    (folders[0] / "hparams.json").write_text(json.dumps(found))
    (group,) = compare_seeds(folders)
    assert group["figures"]["seeds"] == [0, 1]


def test_paths_without_a_run_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt: no run folder"):
        find_runs([tmp_path / "a.txt"])


def test_the_command_writes_the_json_of_the_design_and_two_pictures(tmp_path, capsys):
    base = random_sae(d_in=32, d_sae=20)
    folders = [write_run(tmp_path / f"r_seed{s}", permuted(base, order_of(20, s)), s) for s in (0, 1, 2)]
    (tmp_path / "picture.png").write_bytes(b"")
    out = tmp_path / "results" / "shared.json"
    evaluate.write_json(folders[0] / "quality.json", {"fve": 0.9})  # so that there is a front to draw
    evaluate.main(["seeds", *map(str, folders), str(tmp_path / "picture.png"), "--json", str(out)])
    (group,) = json.loads(out.read_text())["groups"]
    assert group["config"]["d_sae"] == 20
    assert "seed" not in group["config"]
    assert group["alive"] == [20] * 3
    assert [pair["seeds"] for pair in group["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    keys = {"seeds", "mean_max_cos_dec", "mean_max_cos_enc", "paired_dec", "paired_enc", "shared", "shared_alive"}
    assert keys <= set(group["pairs"][0])
    shares = [group[name] for name in ("always_shared", "sometimes_shared", "never_shared", "always_shared_alive")]
    assert shares == [1, 0, 0, 1]
    assert {p.name for p in out.parent.iterdir()} == {"shared.json", "shared_shares.png", "shared_front.png"}
    assert "| relu, no penalty | 3     | 20/20 | 0.900 |" in capsys.readouterr().out


def test_any_name_of_a_folder_can_be_drawn(tmp_path):
    folders = [write_run(tmp_path / f"a$\\frac$_seed{s}", random_sae(d_in=8, d_sae=6), s) for s in (0, 1)]
    evaluate.main(["seeds", *map(str, folders), "--json", str(tmp_path / "all.json")])
    assert (tmp_path / "all_shares.png").exists()


def test_folders_of_others_take_their_seed_from_metadata_or_from_the_order_given(tmp_path):
    base = random_sae(d_in=32, d_sae=20)
    for seed, metadata in ((7, {"seed": 7}), (5, {"seed": 5})):
        permuted(base, order_of(20, seed)).save(tmp_path / f"with{seed}", metadata)
        permuted(base, order_of(20, seed)).save(tmp_path / f"without{seed}")
    for names, seeds in ((["with7", "with5"], [7, 5]), (["without7", "without5"], [0, 1]), (["with7"] * 2, None)):
        folders = find_runs([tmp_path / name for name in names])
        if seeds is None:
            assert len(folders) == 1, "the same folder twice is one run"
            continue
        (group,) = compare_seeds(folders)
        assert group["figures"]["seeds"] == seeds
        assert group["figures"]["always_shared"] == 1


def test_seeds_may_vary_with_the_data_seed_but_a_grid_of_both_is_split(tmp_path):
    for seed, data_seed in ((0, 0), (1, 1), (2, 2)):
        write_run(tmp_path / "both" / f"r_data-seed-{data_seed}_seed{seed}", random_sae(), seed, data_seed=data_seed)
    for seed, data_seed in itertools.product((0, 1), (0, 1)):
        write_run(tmp_path / "grid" / f"r_data-seed-{data_seed}_seed{seed}", random_sae(), seed, data_seed=data_seed)
    (both,) = compare_seeds(find_runs([tmp_path / "both"]))
    assert both["figures"]["seeds"] == [0, 1, 2]
    grid = compare_seeds(find_runs([tmp_path / "grid"]))
    assert [(group["config"]["data_seed"], group["figures"]["seeds"]) for group in grid] == [(0, [0, 1]), (1, [0, 1])]


def test_a_grid_that_is_not_full_loses_no_seed(tmp_path):
    for data_seed, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        write_run(tmp_path / f"r_data-seed-{data_seed}_seed{seed}", random_sae(), seed, data_seed=data_seed)
    assert [group["figures"]["seeds"] for group in compare_seeds(find_runs([tmp_path]))] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("quality", [{"fve": "x"}, {"orthogonality": 5}, {"fve": [1]}, {}])
def test_what_is_no_figure_in_quality_json_is_not_measured(quality, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"r_seed{seed}", random_sae(), seed)
        (tmp_path / f"r_seed{seed}" / "quality.json").write_text(json.dumps(quality))
    assert "fve" not in evaluate.table(compare_seeds(find_runs([tmp_path])))


def test_a_run_under_two_names_is_one_run(tmp_path):
    run = write_run(tmp_path / "r_seed0", random_sae(), 0)
    (tmp_path / "link").symlink_to(run)
    assert len(find_runs([run, tmp_path / "link", run / ".." / "r_seed0"])) == 1


def test_folders_of_others_on_different_layers_are_not_taken_for_seeds(tmp_path):
    for layer in (3, 4):
        random_sae().save(tmp_path / f"layer{layer}", {"hook_name": f"blocks.{layer}.hook_resid_post"})
    with pytest.raises(UserError, match="no two SAEs of one configuration"):
        compare_seeds(find_runs([tmp_path]))


@pytest.mark.parametrize("shapes", [[(8, 6)], [(8, 6), (8, 7)], [(8, 6), (9, 6)]])
def test_no_two_saes_of_one_shape_is_an_error_that_names_the_shapes(shapes, tmp_path):
    for number, (d_in, d_sae) in enumerate(shapes):
        random_sae(d_in, d_sae).save(tmp_path / f"run{number}")
    with pytest.raises(UserError, match="no two SAEs of one configuration") as error:
        evaluate.main(["seeds", str(tmp_path)])
    for d_in, d_sae in shapes:
        assert f"d_in {d_in}, d_sae {d_sae}" in str(error.value)


def dictionary_learning(folder, seed, **settings):
    """A folder as dictionary_learning's trainSAE leaves it."""
    generator = torch.Generator().manual_seed(seed)
    state = {"encoder.weight": torch.randn(6, 8, generator=generator), "encoder.bias": torch.zeros(6)}
    state |= {"decoder.weight": torch.randn(8, 6, generator=generator), "bias": torch.zeros(8)}
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    config = {"dict_class": "AutoEncoder", "trainer_class": "StandardTrainer", "lr": 1e-3, "seed": seed} | settings
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}))


def test_saes_of_others_are_one_configuration_only_if_all_but_the_seed_agrees(tmp_path):
    for number, (l1_penalty, seed) in enumerate(itertools.product((0.1, 0.2), (0, 1))):
        dictionary_learning(tmp_path / f"trainer_{number}", seed, l1_penalty=l1_penalty)
    groups = compare_seeds(find_runs([tmp_path]))
    assert [(group["label"], group["seeds"]) for group in groups] == [
        ("l1 penalty 0.1", [0, 1]),
        ("l1 penalty 0.2", [0, 1]),
    ]
    dictionary_learning(tmp_path / "trainer_4", 1, l1_penalty=0.2)
    with pytest.raises(UserError, match=r"trainer_3 and .*trainer_4 are of one configuration and seed"):
        compare_seeds(find_runs([tmp_path]))


@pytest.mark.parametrize("details", [{"lr": 1e-4}, {"training_tokens": 1000}])
def test_training_details_of_saelens_tell_configurations_apart(details, tmp_path):
    for seed, more in ((0, {}), (1, details)):
        random_sae().save(tmp_path / f"sae{seed}", {"lr": 3e-4, "seed": seed} | more)
    with pytest.raises(UserError, match=f"no two SAEs of one configuration .*differ in: {next(iter(details))}"):
        compare_seeds(find_runs([tmp_path]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds", "nowhere"], "nowhere: no SAE here"),
        (["seeds", "nowhere", "--threshold", "2"], "argument --threshold: 2: give 0 to 1"),
        (["seeds", "nowhere", "--json", "."], "argument --json: .: not a file"),
        (["seeds"], "RUN"),
        (["seed", "x"], "invalid choice: 'seed'"),
        (["quality", "nowhere", "--tokens", "0"], "--tokens: 0: give 1 or more"),
    ],
)
def test_a_command_line_that_cannot_work_says_why(arguments, message, refusal):
    assert message in refusal(evaluate.main, arguments)


# --- language models


def tiny_lm():
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        p *= 10  # far from uniform predictions
    return model


def identity_sae(d_in, keep=1.0):
    """Features i and d_in + i are the two signs of dimension i, so it reconstructs `keep` times its input."""
    model = SAE(d_in, 2 * d_in, "relu").eval().requires_grad_(False)
    model.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)], 1))
    model.W_dec.copy_(keep * model.W_enc.T)
    return model


def test_cross_entropy_is_the_mean_over_all_next_tokens():
    model, tokens = tiny_lm(), torch.randint(0, 50, (6, 20))
    logits = model(tokens).logits
    by_hand = [-logits[b, t].log_softmax(0)[tokens[b, t + 1]].item() for b in range(6) for t in range(19)]
    assert evaluate.cross_entropy(model, tokens.split(4)) == pytest.approx(np.mean(by_hand), rel=1e-5)


def stream(tokens, layer=1):
    return evaluate.Stream(tiny_lm(), layer, tokens)


def test_a_perfect_sae_recovers_all_loss_and_an_empty_one_none():
    tokens = torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(0)).split(4)
    perfect = evaluate.language_model_quality(identity_sae(16), stream(tokens))
    assert perfect["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert perfect["ce_reconstructed"] == pytest.approx(perfect["ce"], abs=1e-5)
    assert perfect["fve"] == pytest.approx(1, abs=1e-5)
    assert perfect["l0"] == pytest.approx(16, abs=0.1)
    assert (perfect["inputs"], perfect["outliers"]) == (6 * 19, 0)
    assert abs(perfect["ce_zeroed"] - perfect["ce"]) > 1e-3
    empty = evaluate.language_model_quality(identity_sae(16, keep=0.0), stream(tokens))
    assert empty["loss_recovered"] == pytest.approx(0, abs=1e-5)
    assert empty["ce_reconstructed"] == pytest.approx(empty["ce_zeroed"])


def test_splicing_replaces_every_position_but_the_first():
    from train_pythia import spliced

    model, tokens = tiny_lm(), torch.randint(0, 50, (2, 10))
    half = evaluate.language_model_quality(identity_sae(16, keep=0.5), stream([tokens]))

    def halve(resid):
        resid = resid.clone()
        resid[:, 1:] *= 0.5
        return resid

    with spliced(model, 1, halve):
        assert half["ce_reconstructed"] == pytest.approx(evaluate.cross_entropy(model, [tokens]), rel=1e-5)
    assert evaluate.cross_entropy(model, [tokens]) == pytest.approx(half["ce"], rel=1e-6), "the hook is gone"


def test_outliers_are_left_out_counted_and_not_replaced():
    """As in training, where they are dropped: norms above 10 times the median of the first batch."""
    tokens, model = torch.randint(0, 49, (6, 20)), tiny_lm()
    tokens[1, 5] = tokens[4, 7] = 49
    model.gpt_neox.embed_in.weight[49] *= 1000
    outliers = evaluate.Stream(model, 1, tokens.split(3))
    kept = torch.cat([*outliers])
    assert len(kept) == 6 * 19 - 2
    assert kept.norm(dim=1).max() < outliers.limit
    result = evaluate.language_model_quality(identity_sae(16, keep=0.0), outliers)
    assert (result["inputs"], result["outliers"]) == (6 * 19 - 2, 2)
    seen = []
    outliers.cross_entropy(lambda x: seen.append(x) or torch.zeros_like(x))
    assert torch.allclose(torch.cat(seen), kept)


def test_quality_of_a_run_that_is_not_of_a_language_model_is_an_error(tmp_path):
    write_run(tmp_path / "r", random_sae(), 0)
    random_sae().save(tmp_path / "somebody's")
    for name in ("r", "somebody's"):
        with pytest.raises(UserError, match=r"not a run of train_pythia\.py") as error:
            evaluate.main(["quality", str(tmp_path / name)])
        assert "delete" not in str(error.value)
        assert "move" not in str(error.value)


# --- encoders compared by what they do to data


def test_the_data_metric_makes_cosines_correlations_of_pre_activations(tmp_path):
    x = torch.randn(400, 8) @ torch.randn(8, 8) + 5
    x[:, 3] = 2  # a pixel that never changes
    a, b = random_sae(seed=1), random_sae(seed=2)
    evaluate.save_covariance(evaluate.covariance(x), tmp_path)
    metric = evaluate.data_metric(tmp_path, 8)
    cos = torch.cosine_similarity((metric @ a.W_enc).T[:, None], (metric @ b.W_enc).T[None], dim=2)
    seen = torch.cat([a.pre_acts(x), b.pre_acts(x)], 1).T.corrcoef()[:6, 6:]
    assert torch.allclose(cos, seen, atol=1e-4)


def test_encoders_that_differ_where_there_is_no_data_are_shared_on_data_alone(tmp_path):
    x, a = torch.randn(400, 8), random_sae()
    x[:, 5:] = 0
    b = permuted(a, order_of(6))
    with torch.no_grad():
        b.W_enc[5:] += 10 * torch.randn(3, 6)
    for seed, sae in enumerate((a, b)):
        write_run(tmp_path / f"r_seed{seed}", sae, seed)
        evaluate.save_covariance(evaluate.covariance(x), tmp_path / f"r_seed{seed}")
    (by_weight,), (on_data,) = (compare_seeds(find_runs([tmp_path]), on_data=value) for value in (False, True))
    assert by_weight["figures"]["pairs"][0]["shared"] < 0.5
    assert on_data["figures"]["pairs"][0]["shared"] == 1
    assert [group["figures"]["on_data"] for group in (by_weight, on_data)] == [False, True]
    for name in ("alive", "mean_max_cos_dec"):
        values = [{**g["figures"], **g["figures"]["pairs"][0]}[name] for g in (by_weight, on_data)]
        assert values[0] == values[1]


@pytest.mark.parametrize(
    "metadata", [{"arch": 5}, {"l2": [1]}, {"seed": {}}, {"steps": None}, {"tied_init": [1]}, {"length": 3}]
)
def test_metadata_of_others_may_hold_anything(metadata, tmp_path):
    for name, more in (("a", metadata), ("b", {}), ("c", {})):
        random_sae().save(tmp_path / name, more)
    assert any(len(group["seeds"]) >= 2 for group in compare_seeds(find_runs([tmp_path])))


@pytest.mark.parametrize("content", [None, b"", b"no array", "another width"])
def test_on_data_without_a_covariance_says_where_it_comes_from(content, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"r_seed{seed}", random_sae(seed=seed), seed)
    if content == "another width":
        evaluate.save_covariance(evaluate.covariance(torch.randn(50, 7)), tmp_path / "r_seed0")
    elif content is not None:
        (tmp_path / "r_seed0" / "covariance.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"r_seed0/covariance\.npy cannot be read .*evaluate\.py quality writes it"):
        evaluate.main(["seeds", str(tmp_path), "--on-data"])


# --- the table of runs


def test_the_table_joins_quality_and_consistency(run_folder, tmp_path, capsys):
    evaluate.main(["quality", str(run_folder[0]), str(run_folder[1]), "--tokens", "600", "--device", "cpu"])
    capsys.readouterr()
    evaluate.main(["seeds", str(run_folder[0].parent), "--json", str(tmp_path / "out" / "all.json")])
    results = [json.loads((folder / "quality.json").read_text()) for folder in run_folder]
    head, _, line = capsys.readouterr().out.splitlines()[:3]
    cells = dict(zip(*([cell.strip() for cell in row.strip("|").split("|")] for row in (head, line))))
    assert cells["seeds"] == "2"
    for name, column, digits in (("fve", "fve", 3), ("loss_recovered", "loss recovered", 4), ("l0", "l0", 1)):
        mean = sum(result[name] for result in results) / 2
        assert float(cells[column]) == pytest.approx(mean, abs=0.6 * 10**-digits)
    figures, _ = match_pair(*map(SAE.load, run_folder))
    assert cells["shared"] == "{shared:.3f} ({shared_alive:.3f})".format(**figures)
    evaluate.main(["seeds", str(run_folder[0].parent), "--on-data"])  # what quality wrote is enough
    assert "correlations of their pre-activations" in capsys.readouterr().out


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_curves_are_over_whichever_penalty_varies(penalty, tmp_path, capsys):
    for weight, seed in ((0.0, 0), (0.0, 1), (1e-3, 0), (1e-3, 1), (1e-2, 0)):
        write_run(tmp_path / f"r_{weight:g}_seed{seed}", random_sae(seed=seed), seed, **{penalty: weight})
    evaluate.main(["seeds", str(tmp_path), "--json", str(tmp_path / "all.json")])
    assert {path.name for path in tmp_path.glob("*.png")} == {f"all_{name}.png" for name in ("shares", penalty)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith(f"| {penalty.replace('_', ' ')} 0.01")
    assert lines[4].count(" - ") == 6, "one seed is in the table, and compared with none"
