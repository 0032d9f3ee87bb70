"""sae.py: activation rules, losses, penalties and the training step against slow or independent versions; files."""

import copy
import itertools
import json
import math
import pickle
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open

import sae as sae_module
from sae import (
    ARCHS,
    PENALTIES,
    SAE,
    Hparams,
    Parser,
    Trainer,
    UserError,
    annealed_k,
    batchtopk,
    fit,
    geometric_median,
    group_sizes,
    initialise,
    is_complete,
    jumprelu,
    learning_rate,
    make_folder,
    replacing,
    resume,
    save_checkpoint,
    save_run,
    sweep,
    topk,
    total_loss,
    use_bfloat16,
    weight_penalty,
    weighted_sums,
    write_hparams,
)

TRAINED = [name for name, arch in ARCHS.items() if arch.train]
SPARSE = [name for name, arch in ARCHS.items() if arch.chosen_from]
SMALL = {"d_in": 12, "d_sae": 64, "k": 5, "batch_size": 16, "steps": 40, "lr": 1e-2, "warmup": 3, "dtype": "float32"}


def small(arch="topk", **others):
    return Hparams(**SMALL | {"arch": arch, "sparsity": 0.1} | others)


def data(n=16, d_in=12, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def double_sae(hp, x):
    """An SAE in float64 with all its parameters away from zero."""
    model = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k).double().train()
    initialise(model, hp)
    with torch.no_grad():
        model.b_enc.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        model.b_dec.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return model


# --- activation rules


def test_topk_keeps_the_k_largest_positive_entries_of_each_row():
    pre_acts = data(20, 30) - 0.8  # few are positive, so that some rows have fewer than k
    acts = topk(pre_acts, 6)
    for row, result in zip(pre_acts.tolist(), acts.tolist()):
        kept = sorted(range(30), key=lambda i: -row[i])[:6]
        assert result == [row[i] if i in kept and row[i] > 0 else 0 for i in range(30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(64, 2), (64, 1), (4096, 5), (4096, 128), (4097, 5), (100, 100)])
def test_largest_finds_what_a_full_search_finds(n, k, dtype):
    for seed in range(5):
        x = (data(7, n, seed) * 10).to(dtype)  # in bfloat16 many are equal
        if seed == 4:
            x = x.round().clamp(min=0)
        indices = sae_module.largest(x, k)
        assert indices.shape == (7, k)
        assert all(len(set(row)) == k for row in indices.tolist()), "no entry twice"
        assert torch.equal(x.gather(-1, indices).sort(-1).values, x.sort(-1).values[:, n - k :])


def test_batchtopk_keeps_the_k_times_b_largest_of_the_batch():
    pre_acts = data(20, 30)
    acts = batchtopk(pre_acts, 2)
    limit = sorted(pre_acts.flatten().tolist())[-40]
    expected = [[v if v >= limit else 0 for v in row] for row in pre_acts.tolist()]
    assert acts.tolist() == expected
    assert len(set((acts > 0).sum(1).tolist())) > 1, "rows should differ in how many latents they use"


def test_jumprelu_keeps_what_is_strictly_above_the_threshold_and_positive():
    pre_acts = torch.tensor([[-1.0, 0.5, 0.6, 2.0]])
    assert jumprelu(pre_acts, torch.tensor([-2.0, 0.5, 0.5, 3.0])).tolist() == [[0, 0, 0.6000000238418579, 0]]


def test_batchtopk_in_eval_mode_treats_each_input_by_itself():
    model = SAE(12, 64, "batchtopk", 5)
    initialise(model, small("batchtopk"))
    model.threshold.fill_(0.4)
    x = data(8)
    model.eval()
    assert torch.allclose(model.encode(x)[:1], model.encode(x[:1]), atol=1e-6)
    model.train()
    assert not torch.allclose(model.encode(x)[:1], model.encode(x[:1]), atol=1e-6)


# --- loss


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("arch", TRAINED)
def test_loss_and_every_gradient_equal_the_formula_written_out(arch, reduction, dense):
    hp = small(arch, l1=0.01, l2=0.02, reduction=reduction)
    x = data().double()
    model = double_sae(hp, x)
    dead = torch.rand(hp.d_sae, generator=torch.Generator().manual_seed(3)) < 0.3
    if "aux" not in ARCHS[arch].settings:
        dead = None
    loss, _ = total_loss(model, hp, x, hp.k, dead, dense)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def error(e):
        return e.square().sum(1).mean() if reduction == "sum" else e.square().mean()

    pre = (x - model.b_dec) @ model.W_enc + model.b_enc
    if arch == "relu":
        acts = pre.clamp(min=0)
    elif arch == "topk":
        acts = torch.where(pre >= pre.sort(dim=1).values[:, -hp.k, None], pre.clamp(min=0), 0)
    elif ARCHS[arch].chosen_from == "batch":
        acts = torch.where(pre >= pre.flatten().sort().values[-hp.k * len(x)], pre.clamp(min=0), 0)
    else:  # a fork's own rule
        acts = model.activate(pre, hp.k)
    ends = [2, 6, 14, 30, 64] if arch == "matryoshka" else [64]
    assert [*itertools.accumulate(group_sizes(arch, 64))] == ends
    expected = sum(error(acts[:, :n] @ model.W_dec[:n] + model.b_dec - x) for n in ends) / len(ends)
    expected = expected + 0.01 * (model.W_enc.abs().sum() + model.W_dec.abs().sum())
    expected = expected + 0.02 * (model.W_enc.square().sum() + model.W_dec.square().sum())
    if "sparsity" in ARCHS[arch].settings:
        active = acts if arch == "relu" else ARCHS[arch].sparsity(model, pre, acts)
        expected = expected + 0.1 * (active.sum(1).mean() if reduction == "sum" else active.mean())
    residual = (x - acts @ model.W_dec - model.b_dec).detach()
    revived = torch.zeros_like(pre)
    for row in range(len(x) if dead is not None else 0):  # the d_in / 2 strongest dead latents of each input
        strongest = sorted(dead.nonzero().flatten().tolist(), key=lambda i: -pre[row, i].item())[:6]
        revived[row, strongest] = 1
    by_dead = (pre.clamp(min=0) * revived) @ model.W_dec
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    if dead is not None:
        expected = expected + (by_dead - residual).square().sum(1).mean() / variance / 32
    expected.backward()

    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-12), name


@pytest.mark.parametrize("arch", SPARSE)
def test_sparse_and_dense_training_stay_together_for_300_steps(arch, monkeypatch):
    def losses(dense):
        with monkeypatch.context() as patch:
            patch.setattr(sae_module, "total_loss", lambda *args: total_loss(*args, dense=dense))
            patch.setattr(sae_module, "LOG_EVERY", 1)
            trainer = train(small(arch, steps=300, l2=1e-3, lr=1e-3, dead_after=160))
        return torch.tensor([row["loss"] for row in trainer.metrics])

    assert torch.allclose(losses(dense=False), losses(dense=True), rtol=1e-3)


def test_weighted_sums_and_their_gradients_are_those_of_a_dense_matrix():
    """Sources and targets with several entries, with one and with none; numerical derivatives agree too."""
    generator = torch.Generator().manual_seed(0)
    sources, targets = (torch.randint(high, (12,), generator=generator) for high in (5, 4))
    sources[sources == 2], targets[targets == 1] = 3, 0
    weights, vectors = (torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((12,), (5, 3)))

    def dense(weights, vectors):
        return torch.zeros(6, 5).double().index_put((targets, sources), weights, accumulate=True) @ vectors

    def ours(weights, vectors):
        return weighted_sums(weights, sources, vectors, targets, 6)

    assert torch.allclose(ours(weights, vectors), dense(weights, vectors), atol=1e-12)
    upstream = torch.randn(6, 3, generator=generator).double()
    gradients, expected = (
        torch.autograd.grad(f(weights, vectors), (weights, vectors), upstream) for f in (ours, dense)
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, expected))
    assert torch.autograd.gradcheck(ours, (weights, vectors))


@pytest.mark.parametrize("arch", SPARSE)
def test_sparse_gradients_in_bfloat16_are_the_dense_ones_within_rounding(arch):
    hp = small(arch, d_sae=256)
    model, gradients = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k).train(), []
    initialise(model, hp)
    for dense in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = total_loss(model, hp, data(64), hp.k, dense=dense)
        model.zero_grad()
        loss.backward()
        gradients.append((loss.detach(), parts["fired"].float(), *(p.grad for p in model.parameters())))
    for sparse, dense in zip(*gradients):
        assert (sparse - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("dense", [False, True])
def test_auxiliary_loss_reaches_no_living_latent(dense):
    hp = small(aux=1.0)
    x = data().double()
    model = double_sae(hp, x)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[:10] = True
    _, parts = total_loss(model, hp, x, hp.k, dead, dense)
    sae_module.auxiliary_loss(parts["revived"], x, dead).backward()
    assert model.W_dec.grad[:10].abs().sum() > 0
    assert model.W_dec.grad[10:].abs().sum() == 0
    assert model.encoder.grad[10:].abs().sum() == 0


@pytest.mark.parametrize(
    ("weights", "value"),
    [
        ({"l2": 1}, 1 + 4 + 9 + 16),
        ({"l2_norm": 1}, math.sqrt(5) + 5),
        ({"l1": 1}, 1 + 2 + 3 + 4),
        ({"l1_mean": 1}, 1.5 + 3.5),
        ({"l1_mean": 0.5, "l2": 0.1}, 0.5 * 5 + 0.1 * 30),
        ({}, 0),
    ],
)
def test_weight_penalty_by_hand(weights, value):
    model = SAE(1, 2)
    with torch.no_grad():
        model.W_enc.copy_(torch.tensor([[1.0, -2.0]]))
        model.W_dec.copy_(torch.tensor([[3.0], [-4.0]]))
        model.b_enc.fill_(100)
        model.b_dec.fill_(100)
    penalty = weight_penalty(model, small(**weights))
    assert math.isclose(penalty.item(), value, rel_tol=1e-6)
    if not penalty.requires_grad:
        return
    penalty.backward()
    by_hand = {"l1": lambda W: W.sign(), "l2": lambda W: 2 * W, "l1_mean": lambda W: W.sign() / 2}
    by_hand["l2_norm"] = lambda W: W / W.norm()
    for W in (model.encoder, model.W_dec):
        expected = sum(weight * by_hand[name](W) for name, weight in weights.items())
        assert torch.allclose(W.grad, expected.detach())
    assert model.b_enc.grad is None
    assert model.b_dec.grad is None


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_of_zero_weights_has_no_gradient_of_nan_and_is_of_no_size(name):
    model = SAE(3, 4)
    penalty = weight_penalty(model, small(**{name: 1.0}))
    penalty.backward()
    assert penalty == 0
    assert model.encoder.grad.isfinite().all()
    assert model.W_dec.grad.isfinite().all()


# --- initialisation and constraints


def test_tied_initialisation_is_a_unit_decoder_and_its_transpose():
    model = SAE(12, 64)
    initialise(model, small())
    assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert torch.equal(model.W_enc, model.W_dec.T)
    assert (model.b_enc == 0).all()


def test_b_dec_starts_at_the_geometric_median_of_the_first_batch():
    trainer = Trainer(small(lr=1e-30))
    trainer.train_step(data(100))
    assert torch.equal(trainer.sae.b_dec, geometric_median(data(100)))
    trainer.train_step(data(100, seed=1))
    assert torch.equal(trainer.sae.b_dec, geometric_median(data(100)))


def test_independent_initialisation_is_kaiming_uniform_with_each_matrix_own_fan_in():
    hp = small(tied_init=False, biases=False, d_in=200, d_sae=400)
    model = SAE(200, 400)
    initialise(model, hp)
    for W, fan_in in ((model.W_enc, 200), (model.W_dec, 400)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < W.abs().max() <= bound
        assert math.isclose(W.var().item(), bound**2 / 3, rel_tol=0.02)
    assert abs(torch.corrcoef(torch.stack([model.W_enc.flatten(), model.W_dec.T.flatten()]))[0, 1]) < 0.02
    assert (model.b_dec == 0).all()


def test_geometric_median_minimises_the_sum_of_distances():
    x = torch.cat([data(50, 3), data(5, 3, seed=1) + 100]).double()  # outliers hardly move it
    median = geometric_median(x, steps=1000, tolerance=1e-10)

    def cost(point):
        return (x - point).norm(dim=1).sum()

    assert (median - x[:50].median(0).values).norm() < 1
    for direction in torch.cat([torch.eye(3), -torch.eye(3)]).double():
        assert cost(median + 1e-3 * direction) > cost(median)


@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_unit_norm_holds_after_many_steps(arch):
    trainer = train(small(arch, unit_norm=True, l2=1e-3))
    assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert not torch.allclose(train(small(arch)).sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-3)


@pytest.mark.parametrize("arch", TRAINED)
def test_a_decoder_that_does_not_learn_trains_the_rest(arch):
    trainer = Trainer(small(arch, unit_norm=True, l2=1e-3))
    trainer.sae.W_dec.requires_grad_(False)
    trainer.optimizer = torch.optim.Adam([p for p in trainer.sae.parameters() if p.requires_grad])
    decoder, encoder = trainer.sae.W_dec.clone(), trainer.sae.encoder.clone()
    for step in range(12):
        trainer.train_step(data(seed=step))
    assert torch.allclose(trainer.sae.W_dec, decoder, atol=1e-6)
    assert not torch.allclose(trainer.sae.encoder, encoder, atol=1e-3)


def test_biases_off_stay_zero():
    trainer = train(small("relu", biases=False, tied_init=False))
    assert (trainer.sae.b_enc == 0).all()
    assert (trainer.sae.b_dec == 0).all()


# --- training


def train(hp, seed=0, steps=None):
    trainer = Trainer(hp)
    for step in range(steps or hp.steps):
        trainer.train_step(data(hp.batch_size, hp.d_in, seed=seed * 1000 + step))
    return trainer


@pytest.mark.parametrize("arch", TRAINED)
def test_training_lowers_the_error_of_every_architecture(arch):
    hp = small(arch, steps=300, reduction="mean")
    before = train(hp, steps=1)
    x = data(200, seed=77)
    errors = [(t.sae(x) - x).square().mean().item() for t in (before, train(hp))]
    assert errors[1] < 0.5 * x.var() < errors[0]


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_training_follows_the_schedules_forms_and_constraints_written_out(arch, unit_norm):
    hp = small(arch, steps=30, warmup=10, decay=0.4, k_anneal=0.5, clip=0.5, l1_mean=0.3, l2_norm=0.01)
    hp = replace(hp, unit_norm=unit_norm)
    trainer = Trainer(hp)
    model = SAE(12, 64, arch, 5)
    model.load_state_dict(trainer.sae.state_dict())
    model.b_dec.data.copy_(geometric_median(data(seed=0)))
    adam = torch.optim.Adam(model.parameters(), lr=hp.lr)
    for step in range(30):
        x = data(seed=step)
        trainer.train_step(x)
        adam.param_groups[0]["lr"] = hp.lr * min(step / 10, 1, (30 - step) / 12)
        adam.zero_grad()
        k = int(12 - (12 - 5) * min(1, step / 15))
        pre = (x - model.b_dec) @ model.W_enc + model.b_enc
        acts = pre.relu() if arch == "relu" else topk(pre, k)
        loss = (acts @ model.W_dec + model.b_dec - x).square().sum(1).mean()
        loss = loss + 0.3 * (model.W_enc.abs().mean() + model.W_dec.abs().mean())
        loss = loss + 0.01 * (model.W_enc.norm() + model.W_dec.norm())
        loss = loss + (0.1 * acts.sum(1).mean() if arch == "relu" else 0)
        loss.backward()
        if unit_norm and arch == "topk":
            for row, gradient in zip(model.W_dec.detach(), model.W_dec.grad):
                gradient -= (gradient @ row) * row
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        adam.step()
        if unit_norm:
            model.W_dec.data /= model.W_dec.norm(dim=1, keepdim=True)
    for name, p in model.named_parameters():
        assert torch.allclose(p, trainer.sae.get_parameter(name), atol=2e-5), name


def test_the_log_tells_what_happened_in_its_step(monkeypatch):
    monkeypatch.setattr(sae_module, "LOG_EVERY", 1)
    hp = small("relu", l2=0.1, reduction="mean", dead_after=20)
    trainer = Trainer(hp)
    with torch.no_grad():
        trainer.sae.b_enc[:3] = -1e6
    for step in range(2):
        x, sae = data(seed=step), copy.deepcopy(trainer.sae)
        if step == 0:
            sae.b_dec.data.copy_(geometric_median(x))
        trainer.train_step(x)
        row, acts = trainer.metrics[-1], sae.encode(x)
        error = (sae.decode(acts) - x).square()
        penalty = 0.1 * (sae.W_enc.square().sum() + sae.W_dec.square().sum())
        assert row["step"] == step + 1
        assert row["recon"] == pytest.approx(error.mean().item(), rel=1e-5)
        assert row["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
        assert row["loss"] == pytest.approx((error.mean() + penalty + 0.1 * acts.mean()).item(), rel=1e-5)
        assert row["l0"] == pytest.approx((acts > 0).sum().item() / 16)
        assert row["fve"] == pytest.approx(1 - (error.sum() / (x - x.mean(0)).square().sum()).item(), abs=1e-5)
        assert row["lr"] == pytest.approx(1e-2 * step / 3)
        assert row["dead"] == (3 if step else 0)


@pytest.mark.parametrize("arch", TRAINED)
def test_only_the_log_asks_the_device_for_a_value(arch, monkeypatch):
    """On the meta device, where tensors have no values, whatever would wait for one raises an error."""
    trainer = Trainer(small(arch, l2=0.1, unit_norm=arch == "topk", threshold_start=0, dead_after=5), "meta")
    trainer.step = 1  # the first one looks at the data, for b_dec
    trainer.device = torch.device("cpu")  # for autocast, which does not know meta
    trainer.optimizer = torch.optim.Adam(trainer.optimizer.param_groups[0]["params"])  # nor does fused Adam
    trainer.metrics.append({"dead": 1})  # so that the auxiliary loss takes part
    for _ in range(2):
        trainer.train_step(data().to("meta"))
    monkeypatch.setattr(sae_module, "LOG_EVERY", 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer.train_step(data().to("meta"))


@pytest.mark.parametrize("l2", [0.0, 1e-6])
def test_a_latent_that_never_fires_vanishes_under_the_penalty_alone(l2):
    hp = small("relu", l2=l2, steps=2000, warmup=0, decay=0.0)
    trainer = Trainer(hp)
    with torch.no_grad():
        trainer.sae.b_enc[0] = -1e6
    for step in range(hp.steps):
        trainer.train_step(data(seed=step % 20))
    norm = trainer.sae.W_enc[:, 0].norm().item()
    assert norm < 1e-6 if l2 else norm == pytest.approx(1, abs=1e-5)


def test_saes_fitted_together_equal_saes_fitted_alone(tmp_path):
    def stream(first=0):
        return (data(seed=step) for step in itertools.count(first))

    def trainers():
        runs = (small("relu", l2=1e-3), small("topk", seed=1), small("batchtopk", steps=30))
        return {tmp_path / hp.arch: Trainer(hp) for hp in runs}

    together, alone = trainers(), trainers()
    fit(together, stream())
    for folder, trainer in alone.items():
        fit({folder: trainer}, stream())
        assert trainer.step == trainer.hp.steps
        assert torch.equal(trainer.sae.W_enc, together[folder].sae.W_enc)


def test_a_trainer_ahead_of_the_stream_waits_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    hp = small()
    whole, ahead, behind = (train(hp, steps=steps) for steps in (40, 25, 10))
    save_checkpoint(ahead, tmp_path / "ahead", {"position": 25})
    monkeypatch.setattr(sae_module, "CHECKPOINT_SECONDS", 0)

    def stream():
        for step in range(10, 20):
            yield data(seed=step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit({tmp_path / "ahead": ahead, tmp_path / "behind": behind}, stream(), lambda: {"position": 20})
    found = []
    for name in ("ahead", "behind"):
        trainer = Trainer(hp)
        found.append((resume(trainer, tmp_path / name), trainer.step))
    assert found[0] == ({"position": 25}, 25)
    assert 10 < found[1][1] <= 20, "as far as the last checkpoint"
    rest = (data(seed=step) for step in itertools.count(20))
    fit({tmp_path / "ahead": ahead, tmp_path / "behind": behind}, rest)
    for trainer in (ahead, behind):
        assert torch.equal(trainer.sae.W_dec, whole.sae.W_dec)


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    hp = replace(small(), lr=1.0, steps=100, warmup=10, decay=0.2)
    rates = [learning_rate(hp, step) for step in range(101)]
    assert rates[0] == 0
    assert math.isclose(rates[5], 0.5)
    assert rates[10:81] == [1.0] * 71
    assert math.isclose(rates[90], 0.5)
    assert rates[100] == 0
    assert learning_rate(replace(hp, warmup=0, decay=0.0), 0) == 1


def test_k_falls_linearly_from_d_in_to_its_target():
    hp = replace(small(), d_in=50, k=10, steps=1000, k_anneal=0.1)
    assert [annealed_k(hp, step) for step in (0, 50, 100, 999)] == [50, 30, 10, 10]
    assert annealed_k(replace(hp, k_anneal=0.0), 0) == 10
    assert annealed_k(replace(hp, d_in=5), 0) == 10, "never below the target"


def test_dead_counters_count_inputs_since_a_latent_fired():
    trainer = Trainer(small("relu", lr=1e-9))
    with torch.no_grad():
        trainer.sae.b_enc[0] = -1e6
    for step in range(3):
        trainer.train_step(data(seed=step))
    assert trainer.inputs_since_fired[0] == 3 * 16
    fires = (trainer.sae.encode(data(seed=2)) > 0).any(0)
    assert (trainer.inputs_since_fired[fires] == 0).all()


def test_auxiliary_loss_trains_latents_that_never_win(monkeypatch):
    monkeypatch.setattr(sae_module, "LOG_EVERY", 10)  # which latents are dead is asked at log steps

    def encoder_norms(aux):
        hp = small(aux=aux, dead_after=32, steps=100, k_anneal=0.0, warmup=0)
        trainer = Trainer(hp)
        with torch.no_grad():
            trainer.sae.W_enc[:, :20] *= 0.01  # positive now and then, never among the top k
        for step in range(hp.steps):
            trainer.train_step(data(seed=step))
        return trainer.sae.W_enc[:, :20].norm(dim=0)

    assert (encoder_norms(0.0) < 0.011).all()
    assert (encoder_norms(1 / 32) > 0.05).all()


def test_threshold_is_the_running_mean_of_the_smallest_kept_activation():
    hp = small("batchtopk", threshold_start=3, lr=1e-9)
    trainer, expected = Trainer(hp), None
    for step in range(10):
        x = data(seed=step)
        kept = batchtopk(trainer.sae.pre_acts(x), annealed_k(hp, step)).detach()
        smallest = kept[kept > 0].min().item()
        if step >= 3:
            expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
        trainer.train_step(x)
    assert torch.allclose(trainer.sae.threshold, torch.full((64,), expected), rtol=1e-5)


def test_batchtopk_without_any_positive_activation_leaves_the_threshold_alone():
    trainer = Trainer(small("batchtopk"))
    trainer.sae.threshold.fill_(0.5)
    trainer.step = 30
    trainer.update_threshold(torch.zeros(4, 64))
    assert (trainer.sae.threshold == 0.5).all()


@pytest.mark.parametrize("arch", TRAINED)
def test_same_seed_same_bits_other_seed_other_weights(arch):
    weights = [train(small(arch, seed=seed)).sae.W_dec for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


@pytest.mark.parametrize("arch", TRAINED)
def test_resumed_training_equals_uninterrupted_bit_for_bit(arch, tmp_path):
    hp = small(arch, steps=250, dead_after=64, l2=1e-3)
    whole = train(hp)
    half = train(hp, steps=133)
    save_checkpoint(half, tmp_path)
    resumed = Trainer(hp)
    resume(resumed, tmp_path)
    for step in range(resumed.step, hp.steps):
        resumed.train_step(data(seed=step))
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert resumed.metrics == whole.metrics
    assert torch.equal(resumed.inputs_since_fired, whole.inputs_since_fired)


def test_bfloat16_follows_float32_within_its_rounding():
    exact = train(small("relu", l2=1e-3))
    rounded = train(small("relu", l2=1e-3, dtype="bfloat16"))
    assert rounded.bfloat16
    assert not exact.bfloat16
    assert rounded.sae.W_enc.dtype == torch.float32
    assert math.isclose(exact.metrics[-1]["loss"], rounded.metrics[-1]["loss"], rel_tol=0.02)
    assert not torch.equal(exact.sae.W_enc, rounded.sae.W_enc)


def test_auto_dtype_asks_the_hardware(monkeypatch, tmp_path):
    for flags, expected in (("avx2 amx_bf16 amx_tile", True), ("avx512_bf16", True), ("avx2", False)):
        (tmp_path / "cpuinfo").write_text(f"flags: {flags}")
        monkeypatch.setattr(sae_module, "CPU", tmp_path / "cpuinfo")
        assert use_bfloat16("auto", torch.device("cpu")) is expected
    monkeypatch.setattr(sae_module, "CPU", tmp_path / "no such file")
    assert use_bfloat16("auto", torch.device("cpu")) is False


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    trainer = train(small("relu", steps=1000), steps=10)
    save_checkpoint(trainer, tmp_path)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        trainer.sae.W_enc[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite at step 10: lower"):
        save_checkpoint(trainer, tmp_path)
    with pytest.raises(UserError, match="not finite at step 100"):
        for step in range(100):
            trainer.train_step(data(seed=step))
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


# --- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arch": "gated"}, "--arch gated: choose from relu, topk"),
        ({"l2": -1e-5}, "--l2 -1e-05"),
        ({"l1": math.nan}, "--l1 nan"),
        ({"k": 65}, "--k 65: give a number from 1 to --d-sae, which is 64"),
        ({"k": 0}, "--k 0"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"d_sae": 0, "k": 0}, "--d-sae 0"),
        ({"arch": "matryoshka", "d_sae": 20}, "--d-sae 20"),
        ({"l1_mean": math.inf}, "--l1-mean inf"),
        ({"reduction": "max"}, "--reduction max: choose from sum, mean"),
        ({"dtype": "float8"}, "--dtype float8"),
        ({"decay": 1.5}, "--decay 1.5"),
        ({"seed": 2**64}, "--seed 18446744073709551616: give a number from 0 to"),
        ({"dead_after": 10**400}, "--dead-after 1000"),
    ],
)
def test_settings_that_cannot_work_name_their_flag(wrong, message):
    with pytest.raises(UserError) as error:
        Hparams(**SMALL | wrong)
    assert message in str(error.value)


def swept(*line):
    """{name: Hparams} of a command line."""
    parser = Parser()
    parser.add_settings(("d_in", "steps", "length"))
    parser.add_argument("--epochs", type=int, default=5)
    complete = lambda given, args: {"d_in": 12, "steps": args.epochs, "length": f"{args.epochs} epochs"}
    return sweep(parser, parser.parse_args([*line, *([] if "--d-sae" in line else ["--d-sae", "64"])]), complete)


def test_run_names_tell_settings_apart():
    line = ["--d-sae", "16384"]
    assert [*swept(*line, "--l2", "1e-4")] == ["topk_k40_l2-0.0001_seed0"]
    (name,) = swept(*line, "--arch", "relu", "--l1", "1e-3", "--unit-norm", "--seed", "2", "--epochs", "9")
    assert name == "relu_l2-0_l1-0.001_unit-norm_9-epochs_seed2"
    changes = [[], ["--lr", "1e-3"], ["--k", "80"], ["--l2", "1e-5"], ["--seed", "1"], ["--data-seed", "1"]]
    changes += [["--tied-init", "off"], ["--epochs", "9"], ["--batch-size", "64"], ["--layer", "2"], ["--warmup", "1"]]
    changes += [["--warmup", "0"], ["--l2", "1.23456789e-5"], ["--l2", "1.23456788e-5"]]
    names = {name for change in changes for name in swept(*line, *change)}
    assert len(names) == len(changes)


def test_every_setting_of_one_sae_sweeps_and_is_named_by_its_flag():
    parser = Parser()
    parser.add_settings(())
    for known in fields(Hparams):
        value = {bool: "off", str: (known.metadata["choices"]() or ["words"])[-1]}.get(known.type, "1")
        several = [value] if known.metadata["stream"] else [value, value]
        args = parser.parse_args([sae_module.flag(known.name), *several])
        found = getattr(args, known.name)
        assert found == known.type(value == "on" if known.type is bool else value) or len(found) == 2
        assert known.metadata["help"] in " ".join(parser.format_help().split())


def test_what_an_architecture_does_not_use_makes_no_second_run_of_it():
    runs = swept("--arch", "relu", "topk", "--k", "8", "16", "--sparsity", "0.1", "0.2")
    assert sorted(runs) == [
        "relu_l2-0_d-sae-64_sparsity-0.1_seed0",
        "relu_l2-0_d-sae-64_sparsity-0.2_seed0",
        "topk_k16_l2-0_d-sae-64_seed0",
        "topk_k8_l2-0_d-sae-64_seed0",
    ]
    assert small("relu", k=7) == small("relu", k=9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--l2", "-1"], "--l2 -1.0: give a number from 0 to"),
        (["--l2", "x"], "argument --l2: invalid float value: 'x'"),
        (["--arch", "gated"], "--arch gated: choose from relu, topk, batchtopk, matryoshka"),
        (["--k", "100"], "--k 100: give a number from 1 to --d-sae, which is 64"),
        (["--unit-norm", "maybe"], "argument --unit-norm: invalid on_or_off value: 'maybe'"),
        (["--l", "1"], "unrecognized arguments: --l 1"),
        (["--batch-size", "1", "2"], "unrecognized arguments: 2"),
        (["--l2"], "argument --l2: expected at least one argument"),
    ],
)
def test_argparse_refuses_what_cannot_work_in_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        swept(*line)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# --- files


@pytest.mark.parametrize("arch", TRAINED)
def test_save_and_load_round_trip(arch, tmp_path):
    trainer = train(small(arch, seed=3))
    (tmp_path / "checkpoint.pt.123.tmp").write_text("half a checkpoint, as a kill leaves it")
    save_run(trainer, tmp_path, {"model_name": "EleutherAI/pythia-70m-deduped"})
    loaded, x = SAE.load(tmp_path), data(30)
    trainer.sae.eval()
    assert torch.equal(loaded.encode(x), trainer.sae.encode(x))
    assert torch.equal(loaded(x), trainer.sae(x))
    assert (loaded.arch, loaded.k) == (arch, trainer.hp.k)
    assert loaded.metadata["seed"] == 3
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    expected = {"d_in": 12, "d_sae": 64, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    expected |= {"normalize_activations": "none", "reshape_activations": "none"}
    expected |= {"architecture": ARCHS[arch].saelens}
    expected |= {"k": 5, "rescale_acts_by_decoder_norm": False} if ARCHS[arch].saelens == "topk" else {}
    metadata = cfg.pop("metadata")
    assert cfg == expected
    assert metadata["sae_lens_version"] == "6.0.0"
    assert metadata["model_from_pretrained_kwargs"] == {}
    assert metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert {*PENALTIES, "seed", "data_seed"} <= set(metadata)
    shapes = {"W_enc": [12, 64], "b_enc": [64], "W_dec": [64, 12], "b_dec": [12]}
    shapes |= {"threshold": [64]} if ARCHS[arch].saelens == "jumprelu" else {}
    with safe_open(tmp_path / "sae_weights.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == shapes  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    assert is_complete(tmp_path, trainer.hp)
    assert not list(tmp_path.glob("*.tmp"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40
    assert set(rows[-1]) == {"step", "loss", "recon", "l0", "fve", "penalty", "dead", "lr"}


def foreign(tmp_path, cfg, tensors):
    """A folder in SAELens' format that somebody else wrote."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 12, "d_sae": 64, "dtype": "float32"} | cfg))
    return SAE.load(tmp_path)


def random_tensors():
    return {"W_enc": data(12, 64), "b_enc": data(1, 64)[0], "W_dec": data(64, 12, seed=5), "b_dec": data(1, 12)[0]}


def test_load_folds_an_encoder_that_does_not_centre_its_input(tmp_path):
    t, x = random_tensors(), data(9)
    loaded = foreign(tmp_path, {"architecture": "standard", "apply_b_dec_to_input": False}, t)
    assert torch.allclose(loaded.encode(x), (x @ t["W_enc"] + t["b_enc"]).relu(), atol=1e-5)


def test_load_folds_activations_rescaled_by_decoder_norm(tmp_path):
    t, x = random_tensors(), data(9)
    cfg = {"architecture": "topk", "k": 7, "rescale_acts_by_decoder_norm": True}
    loaded, norm = foreign(tmp_path, cfg, t), t["W_dec"].norm(dim=1)
    acts = topk(((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm, 7)
    assert torch.allclose(loaded.encode(x), acts, atol=1e-5)
    assert torch.allclose(loaded(x), (acts / norm) @ t["W_dec"] + t["b_dec"], atol=1e-4)


def test_load_takes_a_jumprelu_with_a_threshold_of_its_own_per_latent(tmp_path):
    t, x = random_tensors() | {"threshold": data(1, 64, seed=9)[0].abs()}, data(9)
    loaded = foreign(tmp_path, {"architecture": "jumprelu"}, t)
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    assert loaded.arch == "jumprelu"
    assert torch.allclose(loaded.encode(x), torch.where(pre > t["threshold"], pre, 0), atol=1e-5)


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}},
    ],
)
def test_load_takes_topk_as_saelens_wrote_it_before_version_6(cfg, tmp_path):
    t, x = random_tensors(), data(9)
    loaded = foreign(tmp_path, cfg, t)
    assert torch.allclose(loaded.encode(x), topk((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 7), atol=1e-5)


@pytest.mark.parametrize("k", [None, 0, 65, -1, "many"])
def test_a_topk_sae_needs_a_k_that_fits(k, tmp_path):
    with pytest.raises(UserError):
        foreign(tmp_path, {"architecture": "topk", "k": k}, random_tensors())


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"])
def test_load_reads_the_linear_layers_of_dictionary_learning(kind, tmp_path):
    t, x = random_tensors(), data(9)
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
    state = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    state |= {bias: t["b_dec"], "k": torch.tensor(7), "threshold": torch.tensor(0.8)}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "seed": 4}}))
    loaded = SAE.load(tmp_path)
    centred = x if kind == "AutoEncoderNew" else x - t["b_dec"]
    pre = (centred @ t["W_enc"] + t["b_enc"]).relu()
    if kind == "AutoEncoder":  # its loader moves the decoder's norms to the encoder
        norm = t["W_dec"].norm(dim=1)
        pre, t["W_dec"] = pre * norm, t["W_dec"] / norm[:, None]
    acts = {"AutoEncoderTopK": topk(pre, 7), "BatchTopKSAE": torch.where(pre > 0.8, pre, 0)}.get(kind, pre)
    assert torch.allclose(loaded.encode(x), acts, atol=1e-5)
    assert torch.allclose(loaded(x), acts @ t["W_dec"] + t["b_dec"], atol=1e-4)
    assert loaded.metadata["seed"] == 4


def test_load_reads_matryoshka_of_dictionary_learning_with_an_unset_threshold(tmp_path):
    t, x = random_tensors(), data(9)
    state = t | {"k": torch.tensor(7), "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([32, 32])}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "MatryoshkaBatchTopKSAE"}}))
    acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert torch.allclose(SAE.load(tmp_path).encode(x), acts, atol=1e-5)


class Bomb:
    def __reduce__(self):
        return (open, ("bomb_went_off", "w"))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(train(small(), steps=3), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for write in (lambda f: torch.save(state | {"stream": Bomb()}, f), lambda f: f.write_bytes(pickle.dumps(Bomb()))):
        write(tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match="is damaged"):
            resume(Trainer(small()), tmp_path)
    assert not (tmp_path / "bomb_went_off").exists()


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    for write in (lambda f: torch.save({"bias": Bomb()}, f), lambda f: f.write_bytes(pickle.dumps(Bomb()))):
        write(tmp_path / "ae.pt")
        with pytest.raises(UserError, match=r"not a whole SAE .UnpicklingError"):
            SAE.load(tmp_path)
    assert not (tmp_path / "bomb_went_off").exists()


@pytest.mark.parametrize("damage", ["empty", "no_weights", "cut", "bad_json", "gated", "missing_tensor"])
def test_a_folder_without_a_whole_sae_says_what_is_wrong(damage, tmp_path):
    folder = tmp_path / "run"
    if damage == "empty":
        folder.mkdir()
    else:
        train(small(), steps=1).sae.save(folder)
        weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
        if damage == "no_weights":
            weights.unlink()
        elif damage == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif damage == "bad_json":
            cfg.write_text('{"architecture": ')
        elif damage == "gated":
            cfg.write_text('{"architecture": "gated"}')
        else:
            foreign_tensors = random_tensors()
            del foreign_tensors["W_dec"]
            with pytest.raises(UserError, match="W_dec"):
                foreign(folder, {"architecture": "standard"}, foreign_tensors)
            return
    with pytest.raises(UserError, match="run"):
        SAE.load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_that_are_not_finite_are_refused_rather_than_counted_as_dead(value, tmp_path):
    tensors = random_tensors()
    tensors["W_dec"][3] = value
    with pytest.raises(UserError, match="not finite"):
        foreign(tmp_path, {"architecture": "standard"}, tensors)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "null",
        "3",
        "[" * 100_000,
        '{"hparams": {"l2": "1"}}',
        '{"hparams": {"seed": [1]}}',
        '{"hparams": null}',
        '{"hparams": [1]}',
    ],
)
def test_settings_that_are_no_object_are_an_error(text, tmp_path):
    (tmp_path / "hparams.json").write_text(text)
    with pytest.raises(UserError, match=r"hparams\.json"):
        is_complete(tmp_path, small())


def test_a_run_whose_weights_are_gone_is_not_complete(tmp_path):
    save_run(train(small()), tmp_path, {})
    assert is_complete(tmp_path, small())
    (tmp_path / "sae_weights.safetensors").unlink()
    assert not is_complete(tmp_path, small())


@pytest.mark.parametrize(
    "change", ["metrics", "no metrics", "moments", "a parameter more", "a parameter less", "another shape"]
)
def test_a_checkpoint_that_does_not_fit_the_code_says_what_differs(change, tmp_path):
    save_checkpoint(train(small(), steps=3), tmp_path)
    state, said = torch.load(tmp_path / "checkpoint.pt", weights_only=True), ""
    if change == "metrics":
        state["metrics"] = [3]
    elif change == "no metrics":
        del state["metrics"]
        said = "metrics"
    elif change == "moments":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
        said = "moments of other shapes"
    elif change == "a parameter more":
        state["sae"]["gate"] = torch.zeros(3)
        said = 'Unexpected key\\(s\\) in state_dict: "gate"'
    elif change == "a parameter less":
        del state["sae"]["b_enc"]
        said = 'Missing key\\(s\\) in state_dict: "b_enc"'
    else:
        state["sae"]["b_enc"] = torch.zeros(3)
        said = "size mismatch for b_enc"
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"does not fit this code .*{said}.*give another --out") as error:
        resume(Trainer(small()), tmp_path)
    assert "delete" not in str(error.value)


def test_an_unfinished_run_folder_says_so(tmp_path):
    save_checkpoint(train(small(), steps=2), tmp_path)
    with pytest.raises(UserError, match="unfinished"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -200])
def test_a_damaged_checkpoint_names_itself_and_the_way_out(cut, tmp_path):
    save_checkpoint(train(small(), steps=2), tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged .* move it away to start over"):
        resume(Trainer(small()), tmp_path)


def test_a_folder_of_other_settings_is_not_taken_for_this_run(tmp_path):
    write_hparams(Trainer(small(lr=0.5)), tmp_path, complete=True)
    with pytest.raises(UserError, match=r"--lr 0\.5 instead of 0\.01: give another --out"):
        is_complete(tmp_path, small())


def test_runs_of_the_time_when_penalties_had_forms_are_still_complete(tmp_path):
    save_run(train(small(l1_mean=1e-3, l2=1e-4)), tmp_path, {})
    found = json.loads((tmp_path / "hparams.json").read_text())
    settings = found["hparams"]
    settings |= {"l1": settings.pop("l1_mean"), "l1_form": "mean", "l2_form": "squares"}
    del settings["l2_norm"], settings["length"]
    (tmp_path / "hparams.json").write_text(json.dumps(found))
    assert is_complete(tmp_path, small(l1_mean=1e-3, l2=1e-4))
    assert set(sae_module.read_hparams(tmp_path)) == {known.name for known in fields(Hparams)}


def test_a_fork_with_a_new_setting_keeps_its_finished_runs(tmp_path):
    save_run(train(small()), tmp_path, {})
    found = json.loads((tmp_path / "hparams.json").read_text())
    del found["hparams"]["aux"]  # as written before there was such a setting
    (tmp_path / "hparams.json").write_text(json.dumps(found))
    assert is_complete(tmp_path, small())
    with pytest.raises(UserError, match="--aux"):
        is_complete(tmp_path, small(aux=0.5))


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left on device"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_where_nothing_can_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UserError, match=r"nothing can be written in .*: give another folder"):
            make_folder(folder)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_a_fine_tuned_sae_of_saelens_5_scales_its_activations_in_decoding(name, tmp_path):
    t, x = random_tensors(), data(9)
    factor = data(1, 64, seed=8)[0].abs()
    loaded = foreign(tmp_path, {"finetuning_scaling_factor": True}, t | {name: factor})
    acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert loaded.arch == "relu", "no architecture means standard"
    assert torch.allclose(loaded.encode(x), acts, atol=1e-5)
    assert torch.allclose(loaded(x), (acts * factor) @ t["W_dec"] + t["b_dec"], atol=1e-4)
