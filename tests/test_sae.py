"""sae.py: rules, losses and training against slow or independent versions; runs; files.

Architectures and penalties come from the tables of sae.py, so that a fork which adds one is tested
like the others. What only one of them does is tested under its name.
"""

import copy
import itertools
import json
import math
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

import sae as sae_module
from sae import (
    ARCHS,
    PENALTIES,
    SAE,
    Hparams,
    Parser,
    Rows,
    Trainer,
    UserError,
    annealed_k,
    applies,
    auxiliary_loss,
    batchtopk,
    decoder_only,
    dense_pass,
    encoder_only,
    fast_pass,
    finished_sae,
    flag,
    geometric_median,
    group_sizes,
    initialise,
    is_complete,
    keep_largest,
    largest,
    learning_rate,
    make_folder,
    pick_device,
    read_hparams,
    replacing,
    resume,
    save_checkpoint,
    save_run,
    spell,
    sweep,
    topk,
    total_loss,
    train,
    train_sae,
    use_bfloat16,
    weight_penalty,
    weighted_sums,
    write_hparams,
)

SPARSE = [name for name, arch in ARCHS.items() if arch.chosen_from]
OURS = [
    "relu",
    "topk",
    "batchtopk",
    "matryoshka",
    "jumprelu",
]  # whose formulas are written out here
SMALL = {
    "d_in": 12,
    "d_sae": 64,
    "k": 5,
    "batch_size": 16,
    "steps": 40,
    "lr": 1e-2,
    "warmup": 3,
    "sparsity": 0.1,
    "l0_weight": 0.01,
    "dtype": "float32",
}


def small(arch="topk", **others):
    """Settings of an SAE that is trained in a moment."""
    return Hparams(**{**SMALL, "arch": arch, **others})


def data(n=16, d_in=12, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def trained(hp, steps=None):
    """A trainer after its steps, or fewer of them, on a batch of its own for each step."""
    trainer = Trainer(hp)
    for step in range(steps or hp.steps):
        trainer.train_step(data(hp.batch_size, hp.d_in, seed=step))
    return trainer


def double_sae(hp):
    """An SAE in float64, in train mode, with all its parameters away from zero."""
    model = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k).double().train()
    initialise(model, hp)
    with torch.no_grad():
        model.b_enc.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        model.b_dec.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
        for tensor in ARCHS[hp.arch].tensors:
            values = getattr(model, tensor.name)
            values.uniform_(0, 0.5, generator=torch.Generator().manual_seed(3))
    return model


def assert_same_bits(sae, other):
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def assert_same_weights(folder, other):
    assert_same_bits(SAE.load(folder), SAE.load(other))


# --------------------------------------------------------------------------------------------------
# Rules


def test_topk_keeps_the_k_largest_positive_entries_of_each_row():
    pre_acts = data(20, 30) - 0.8  # few are positive, so that some rows have fewer than 6
    acts = topk(None, pre_acts, 6)
    for row, result in zip(pre_acts.tolist(), acts.tolist()):
        kept = sorted(range(30), key=lambda i: -row[i])[:6]
        assert result == [row[i] if i in kept and row[i] > 0 else 0 for i in range(30)]


def test_batchtopk_keeps_the_k_times_b_largest_of_the_batch():
    pre_acts = data(20, 30)
    acts = batchtopk(None, pre_acts, 2)
    limit = sorted(pre_acts.flatten().tolist())[-40]
    expected = [[value if value >= limit else 0 for value in row] for row in pre_acts.tolist()]
    assert acts.tolist() == expected
    assert len(set((acts > 0).sum(1).tolist())) > 1, "rows differ in how many latents they use"


def test_jumprelu_keeps_what_is_positive_and_strictly_above_the_threshold():
    model = SAE(2, 5, "jumprelu")
    model.threshold.data = torch.tensor([-2.0, -2.0, 0.5, 0.5, 3.0])
    acts = sae_module.jumprelu(model, torch.tensor([[-1.0, 1.5, 0.5, 0.75, 2.0]]), 0)
    assert acts.tolist() == [[0, 1.5, 0, 0.75, 0]]


@pytest.mark.parametrize("arch", ARCHS)
def test_in_eval_mode_an_input_is_encoded_the_same_with_and_without_its_batch(arch):
    model = double_sae(small(arch)).eval()
    x = data(8).double()
    assert torch.allclose(model.encode(x)[:1], model.encode(x[:1]))
    assert (model.encode(x) > 0).any()


@pytest.mark.parametrize("arch", [name for name in SPARSE if ARCHS[name].chosen_from == "batch"])
def test_in_train_mode_those_that_choose_from_the_batch_depend_on_it(arch):
    model = double_sae(small(arch))
    x = data(8).double()
    assert not torch.allclose(model.encode(x)[:1], model.encode(x[:1]))
    assert (model.encode(x) > 0).sum() == 8 * model.k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k"), [(64, 2), (64, 1), (4096, 5), (4096, 128), (4097, 5), (100, 100)]
)
def test_the_folded_search_finds_what_a_full_one_finds(n, k, dtype):
    for seed in range(5):
        x = (data(7, n, seed) * 10).to(dtype)  # in bfloat16 many are equal
        if seed == 4:
            x = x.round().clamp(min=0)
        indices = largest(x, k)
        assert indices.shape == (7, k)
        assert all(len(set(row)) == k for row in indices.tolist()), "no entry twice"
        found = x.gather(-1, indices).sort(-1).values
        assert torch.equal(found, x.sort(-1).values[:, n - k :])


def test_the_gradient_of_the_jump_is_that_of_a_ramp_as_wide_as_the_bandwidth():
    """Equation 12 of arXiv:2407.14435: -1 / bandwidth for each input within half a bandwidth."""
    width = sae_module.BANDWIDTH
    threshold = torch.tensor([0.5, 0.5], requires_grad=True)
    pre_acts = torch.tensor([[0.5 + 0.4 * width, 0.5 + 0.6 * width], [0.5 - 0.4 * width, 0.5]])
    pre_acts.requires_grad_()
    above = sae_module.Above.apply(pre_acts, threshold)
    assert above.tolist() == [[1, 1], [0, 0]]
    above.backward(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    assert threshold.grad.tolist() == pytest.approx([-101 / width, -1000 / width])
    assert pre_acts.grad is None


# --------------------------------------------------------------------------------------------------
# The loss: the formulas written out, the dense pass and the fast one


def written_out(model, hp, x, dead):
    """The training loss by the formulas, slowly, with nothing of sae.py.

    The sums of JumpReLU's straight-through estimator are those of a function whose value is the
    jump and whose derivative is that of the ramp.
    """

    def error(difference):
        squares = difference.square()
        return squares.sum(1).mean() if hp.reduction == "sum" else squares.mean()

    pre_acts = (x - model.b_dec) @ model.W_enc + model.b_enc
    positive = pre_acts.clamp(min=0)
    active = None
    if hp.arch == "relu":
        acts = active = positive
        weight = hp.sparsity
    elif hp.arch == "topk":
        acts = torch.where(pre_acts >= pre_acts.sort(dim=1).values[:, -hp.k, None], positive, 0)
    elif hp.arch in ("batchtopk", "matryoshka"):
        limit = pre_acts.flatten().sort().values[-hp.k * len(x)]
        acts = torch.where(pre_acts >= limit, positive, 0)
    else:
        near = (pre_acts - model.threshold).abs() < sae_module.BANDWIDTH / 2
        ramp = -model.threshold * near / sae_module.BANDWIDTH
        active = (pre_acts > model.threshold) + ramp - ramp.detach()
        acts = positive * active
        weight = hp.l0_weight

    ends = [2, 6, 14, 30, 64] if hp.arch == "matryoshka" else [64]
    prefixes = [acts[:, :n] @ model.W_dec[:n] + model.b_dec for n in ends]
    loss = sum(error(prefix - x) for prefix in prefixes) / len(ends)
    for W in (model.W_enc, model.W_dec):
        loss = loss + hp.l1 * W.abs().sum() + hp.l2 * W.square().sum()
    if active is not None:
        loss = loss + weight * (active.sum(1).mean() if hp.reduction == "sum" else active.mean())
    if dead is None:
        return loss

    residual = (x - acts @ model.W_dec - model.b_dec).detach()
    chosen = torch.zeros_like(pre_acts)
    for row in range(len(x)):  # the d_in / 2 strongest of the dead latents
        by_strength = sorted(dead.nonzero().flatten().tolist(), key=lambda i: -pre_acts[row, i])
        chosen[row, by_strength[:6]] = 1
    revived = (positive * chosen) @ model.W_dec
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return loss + hp.aux * (revived - residual).square().sum(1).mean() / variance


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("arch", OURS)
def test_loss_and_every_gradient_equal_the_formula_written_out(arch, reduction, dense):
    hp = small(arch, l1=0.01, l2=0.02, reduction=reduction)
    x = data().double()
    model = double_sae(hp)
    dead = None
    if applies("aux", arch):
        dead = torch.rand(hp.d_sae, generator=torch.Generator().manual_seed(3)) < 0.3
    loss = total_loss(model, hp, x, hp.k, dead, dense).total
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = written_out(model, hp, x, dead)
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-12)
    for name, parameter in model.named_parameters():
        assert gradients[name].any(), name
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-12), name


@pytest.mark.parametrize("arch", ARCHS)
def test_the_fast_pass_returns_what_the_dense_one_does(arch):
    hp = small(arch)
    model, x = double_sae(hp), data().double()
    dead = torch.arange(64) % 3 == 0
    fast, dense = fast_pass(model, x, hp.k, dead), dense_pass(model, x, hp.k, dead)
    assert torch.allclose(fast.pre_acts, dense.pre_acts)
    assert torch.equal(fast.fired, dense.fired.to(fast.fired.dtype))
    assert torch.allclose(fast.revived, dense.revived)
    assert torch.allclose(
        fast.acts[fast.acts > 0].sort().values, dense.acts[dense.acts > 0].sort().values
    )
    assert len(fast.prefixes) == len(dense.prefixes) == len(group_sizes(arch, 64))
    for ours, theirs in zip(fast.prefixes, dense.prefixes):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(dense.prefixes[-1], model.decode(dense.acts))
    assert fast_pass(model, x, hp.k).revived is None


@pytest.mark.parametrize("arch", ARCHS)
def test_the_fast_loss_has_the_gradients_of_the_dense_one(arch):
    hp = small(arch, l1=0.01, l2=0.02)
    model, x = double_sae(hp), data().double()
    dead = torch.arange(64) % 3 == 0 if applies("aux", arch) else None
    found = []
    for dense in (False, True):
        model.zero_grad()
        total_loss(model, hp, x, hp.k, dead, dense).total.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for fast, dense in zip(*found):
        assert torch.allclose(fast, dense, atol=1e-12)


@pytest.mark.parametrize("arch", SPARSE)
def test_fast_and_dense_training_stay_together_for_100_steps(arch, monkeypatch):
    monkeypatch.setattr(sae_module, "LOG_EVERY", 5)
    monkeypatch.setattr(sae_module, "LOOK_FOR_DEAD_EVERY", 10)
    hp = small(arch, steps=100, l2=1e-3, lr=1e-3, dead_after=160)
    fast = trained(hp)
    monkeypatch.setattr(sae_module, "fast_pass", dense_pass)
    dense = trained(hp)
    for ours, theirs in zip(fast.metrics, dense.metrics):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_fast_gradients_in_bfloat16_are_the_dense_ones_within_rounding(arch):
    hp = small(arch, d_sae=256, l0_weight=0.0)
    model = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k).train()
    initialise(model, hp)
    found = []
    for dense in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = total_loss(model, hp, data(64), hp.k, dense=dense)
        model.zero_grad()
        loss.total.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([loss.total.detach(), loss.forward.fired.float(), *gradients])
    for fast, dense in zip(*found):
        assert (fast - dense).norm() <= 0.02 * dense.norm()


def test_weighted_sums_and_their_gradients_are_those_of_a_dense_matrix():
    """With sources and targets that occur several times, once and never."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(5, (12,), generator=generator)
    targets = torch.randint(4, (12,), generator=generator)
    sources[sources == 2] = 3
    targets[targets == 1] = 0
    weights = torch.randn(12, generator=generator).double().requires_grad_()
    vectors = torch.randn(5, 3, generator=generator).double().requires_grad_()

    def ours(weights, vectors):
        return weighted_sums(weights, sources, vectors, targets, 6)

    def dense(weights, vectors):
        matrix = torch.zeros(6, 5).double()
        return matrix.index_put((targets, sources), weights, accumulate=True) @ vectors

    assert torch.allclose(ours(weights, vectors), dense(weights, vectors), atol=1e-12)
    upstream = torch.randn(6, 3, generator=generator).double()
    found = torch.autograd.grad(ours(weights, vectors), (weights, vectors), upstream)
    expected = torch.autograd.grad(dense(weights, vectors), (weights, vectors), upstream)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected))
    assert torch.autograd.gradcheck(ours, (weights, vectors))


@pytest.mark.parametrize("dense", [False, True])
def test_the_auxiliary_loss_reaches_no_living_latent(dense):
    hp = small()
    model, x = double_sae(hp), data().double()
    dead = torch.arange(64) < 10
    forward = total_loss(model, hp, x, hp.k, dead, dense).forward
    auxiliary_loss(forward.revived, x, dead).backward()
    assert model.W_dec.grad[:10].any()
    assert not model.W_dec.grad[10:].any()
    assert not model.encoder.grad[10:].any()


def test_the_auxiliary_loss_by_hand():
    """The residual varies by 2 * (1 + 4) / 2 about its mean; what is revived misses it by 1."""
    residual = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    revived = residual + torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert auxiliary_loss(revived, residual, torch.tensor([True, False])) == pytest.approx(1 / 5)
    assert auxiliary_loss(revived, residual, torch.tensor([False, False])) == 0


# --------------------------------------------------------------------------------------------------
# The penalties

# Of W_enc = [1, -2] and W_dec = [3, -4]: the value, and the derivative by each matrix.
BY_HAND = {
    "l1": (1 + 2 + 3 + 4, torch.sign),
    "l2": (1 + 4 + 9 + 16, lambda W: 2 * W),
    "l1_mean": (1.5 + 3.5, lambda W: W.sign() / 2),
    "l2_norm": (math.sqrt(5) + 5, lambda W: W / W.norm()),
}


def penalised_sae():
    model = SAE(1, 2)
    with torch.no_grad():
        model.W_enc.copy_(torch.tensor([[1.0, -2.0]]))
        model.W_dec.copy_(torch.tensor([[3.0], [-4.0]]))
        model.b_enc.fill_(100)
        model.b_dec.fill_(100)
    return model


@pytest.mark.parametrize(
    "weights", [{"l1": 1}, {"l2": 1}, {"l1_mean": 1}, {"l2_norm": 1}, {"l1_mean": 0.5, "l2": 0.1}]
)
def test_a_penalty_and_its_gradient_by_hand(weights):
    model = penalised_sae()
    penalty = weight_penalty(model, small(**weights))
    penalty.backward()
    expected = sum(weight * BY_HAND[name][0] for name, weight in weights.items())
    assert penalty.item() == pytest.approx(expected)
    for W in (model.encoder, model.W_dec):
        gradient = sum(weight * BY_HAND[name][1](W.data) for name, weight in weights.items())
        assert torch.allclose(W.grad, gradient)
    assert model.b_enc.grad is None
    assert model.b_dec.grad is None


def test_no_penalty_is_zero_and_reaches_no_weight():
    penalty = weight_penalty(penalised_sae(), small())
    assert penalty == 0
    assert not penalty.requires_grad


def test_a_penalty_may_concern_one_side_alone():
    for side, own, other in (
        (encoder_only, "encoder", "W_dec"),
        (decoder_only, "W_dec", "encoder"),
    ):
        model = penalised_sae()
        side(torch.norm)(model).backward()
        assert getattr(model, own).grad.any()
        assert getattr(model, other).grad is None


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_a_setting_and_of_zero_weights_has_finite_gradients(name):
    model = SAE(3, 4)
    penalty = weight_penalty(model, small(**{name: 1.0}))
    penalty.backward()
    gradients = [W.grad for W in (model.encoder, model.W_dec) if W.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_late_penalty_leaves_the_steps_before_it_as_they_are_without_one(name):
    hp = small(steps=40, **{name: 1e-2}, penalty_from=0.75)
    late, never = Trainer(hp), Trainer(small(steps=40))
    always = Trainer(replace(hp, penalty_from=0))
    for step in range(31):
        for trainer in (late, never, always):
            trainer.train_step(data(seed=step))
        assert torch.equal(late.sae.W_dec, never.sae.W_dec) == (step < 30)
    assert not torch.equal(late.sae.W_dec, always.sae.W_dec)


# --------------------------------------------------------------------------------------------------
# Initialisation and constraints


def test_tied_initialisation_is_a_unit_decoder_and_its_transpose():
    model = SAE(12, 64)
    initialise(model, small())
    assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert torch.equal(model.W_enc, model.W_dec.T)
    assert not model.b_enc.any()


def test_independent_initialisation_is_kaiming_uniform_with_the_fan_in_of_each_matrix():
    model = SAE(200, 400)
    initialise(model, small(tied_init=False, d_in=200, d_sae=400))
    for W, fan_in in ((model.W_enc, 200), (model.W_dec, 400)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < W.abs().max() <= bound
        assert math.isclose(W.var().item(), bound**2 / 3, rel_tol=0.02)
    both = torch.stack([model.W_enc.flatten(), model.W_dec.T.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02


def test_b_dec_starts_at_the_geometric_median_of_the_first_batch():
    trainer = Trainer(small(lr=1e-30))
    for seed in (0, 1):
        trainer.train_step(data(100, seed=seed))
        assert torch.equal(trainer.sae.b_dec, geometric_median(data(100, seed=0)))


def test_the_geometric_median_minimises_the_sum_of_distances():
    x = torch.cat([data(50, 3), data(5, 3, seed=1) + 100]).double()  # outliers hardly move it
    median = geometric_median(x, steps=1000, tolerance=1e-10)

    def cost(point):
        return (x - point).norm(dim=1).sum()

    assert (median - x[:50].median(0).values).norm() < 1
    for direction in torch.cat([torch.eye(3), -torch.eye(3)]).double():
        assert cost(median + 1e-3 * direction) > cost(median)


@pytest.mark.parametrize("arch", ARCHS)
def test_unit_norm_holds_after_many_steps(arch):
    constrained = trained(small(arch, unit_norm=True, l2=1e-3)).sae.W_dec.norm(dim=1)
    free = trained(small(arch)).sae.W_dec.norm(dim=1)
    assert torch.allclose(constrained, torch.ones(64), atol=1e-6)
    assert not torch.allclose(free, torch.ones(64), atol=1e-3)


def test_biases_off_stay_zero():
    trainer = trained(small("relu", biases=False, tied_init=False))
    assert not trainer.sae.b_enc.any()
    assert not trainer.sae.b_dec.any()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_decoder_that_does_not_learn_trains_the_rest(arch):
    trainer = Trainer(small(arch, unit_norm=True, l2=1e-3))
    trainer.sae.W_dec.requires_grad_(False)
    decoder, encoder = trainer.sae.W_dec.clone(), trainer.sae.encoder.clone()
    for step in range(12):
        trainer.train_step(data(seed=step))
    assert torch.allclose(trainer.sae.W_dec, decoder, atol=1e-6)
    assert not torch.allclose(trainer.sae.encoder, encoder, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# The training step


@pytest.mark.parametrize("arch", ARCHS)
def test_training_lowers_the_error_of_every_architecture(arch):
    hp = small(arch, steps=150, lr=2e-2, reduction="mean")
    x = data(200, seed=77)
    before, after = trained(hp, steps=1).sae, trained(hp).sae
    first, last = ((sae(x) - x).square().mean() for sae in (before, after))
    assert last < 0.5 * x.var() < first


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_training_follows_the_schedules_penalties_and_constraints_written_out(arch, unit_norm):
    weights = {"l1_mean": 0.3, "l2_norm": 0.01}
    hp = small(arch, steps=30, warmup=10, decay=0.4, k_anneal=0.5, clip=0.5, **weights)
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
        pre_acts = (x - model.b_dec) @ model.W_enc + model.b_enc
        acts = pre_acts.relu() if arch == "relu" else keep_largest(pre_acts, k)
        loss = (acts @ model.W_dec + model.b_dec - x).square().sum(1).mean()
        loss = loss + 0.3 * (model.W_enc.abs().mean() + model.W_dec.abs().mean())
        loss = loss + 0.01 * (model.W_enc.norm() + model.W_dec.norm())
        if arch == "relu":
            loss = loss + 0.1 * acts.sum(1).mean()
        loss.backward()
        if unit_norm and arch == "topk":  # the part along the row would only change its norm
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


def test_the_learning_rate_warms_up_holds_and_decays_to_zero():
    hp = small(lr=1.0, steps=100, warmup=10, decay=0.2)
    rates = [learning_rate(hp, step) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0
    assert learning_rate(replace(hp, warmup=0, decay=0.0), 0) == 1


def test_k_falls_linearly_from_d_in_to_its_target():
    hp = small(d_in=50, k=10, steps=1000, k_anneal=0.1)
    assert [annealed_k(hp, step) for step in (0, 50, 100, 999)] == [50, 30, 10, 10]
    assert annealed_k(replace(hp, k_anneal=0.0), 0) == 10
    assert annealed_k(replace(hp, d_in=5), 0) == 10, "never below the target"


def test_the_log_tells_what_happened_in_its_step(monkeypatch):
    monkeypatch.setattr(sae_module, "LOG_EVERY", 1)
    trainer = Trainer(small("relu", l2=0.1, reduction="mean", dead_after=20))
    trainer.sae.b_enc.data[:3] = -1e6
    for step in range(2):
        x, sae = data(seed=step), copy.deepcopy(trainer.sae)
        if step == 0:
            sae.b_dec.data.copy_(geometric_median(x))
        trainer.train_step(x)
        row, acts = trainer.metrics[-1], sae.encode(x)
        error = (sae.decode(acts) - x).square()
        variance = (x - x.mean(0)).square().sum()
        penalty = 0.1 * (sae.W_enc.square().sum() + sae.W_dec.square().sum())
        loss = error.mean() + penalty + 0.1 * acts.mean()
        assert row["step"] == step + 1
        assert row["recon"] == pytest.approx(error.mean().item(), rel=1e-5)
        assert row["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["l0"] == pytest.approx((acts > 0).sum().item() / 16)
        assert row["fve"] == pytest.approx(1 - (error.sum() / variance).item(), abs=1e-5)
        assert row["lr"] == pytest.approx(1e-2 * step / 3)
        assert row["dead"] == (3 if step else 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_how_often_is_logged_changes_no_weight(arch, monkeypatch):
    """Also where the auxiliary loss takes part, which must know whether any latent is dead."""
    hp = small(arch, steps=60, dead_after=64, aux=1.0)
    monkeypatch.setattr(sae_module, "LOOK_FOR_DEAD_EVERY", 20)
    monkeypatch.setattr(sae_module, "LOG_EVERY", 7)
    often = trained(hp)
    monkeypatch.setattr(sae_module, "LOG_EVERY", 1000)
    assert_same_bits(often.sae, trained(hp).sae)
    assert any(row["dead"] for row in often.metrics) or not applies("aux", arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_log_asks_the_device_for_a_value(arch, monkeypatch):
    """On the meta device tensors have no values, and what would wait for one raises an error."""
    hp = small(arch, l2=0.1, unit_norm=arch == "topk", threshold_start=0, dead_after=5)
    trainer = Trainer(hp, "meta")
    trainer.step = 1  # the first one looks at the data, for b_dec
    trainer.device = torch.device("cpu")  # for autocast, which has no meta device, nor has the
    trainer.optimizer = torch.optim.Adam(trainer.optimizer.param_groups[0]["params"])  # fused Adam
    trainer.any_dead = applies("aux", arch)
    for _ in range(2):
        trainer.train_step(data().to("meta"))
    monkeypatch.setattr(sae_module, "LOG_EVERY", 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer.train_step(data().to("meta"))


@pytest.mark.parametrize("l2", [0.0, 1e-6])
def test_a_latent_that_never_fires_vanishes_under_the_penalty_alone(l2):
    hp = small("relu", l2=l2, steps=400, lr=4e-2, warmup=0, decay=0.0)
    trainer = Trainer(hp)
    trainer.sae.b_enc.data[0] = -1e6
    for step in range(hp.steps):
        trainer.train_step(data(seed=step % 20))
    norm = trainer.sae.W_enc[:, 0].norm().item()
    assert norm < 1e-6 if l2 else norm == pytest.approx(1, abs=1e-5)


def test_dead_counters_count_inputs_since_a_latent_fired():
    trainer = Trainer(small("relu", lr=1e-9))
    trainer.sae.b_enc.data[0] = -1e6
    for step in range(3):
        trainer.train_step(data(seed=step))
    assert trainer.inputs_since_fired[0] == 3 * 16
    fires = (trainer.sae.encode(data(seed=2)) > 0).any(0)
    assert not trainer.inputs_since_fired[fires].any()


def test_the_auxiliary_loss_trains_latents_that_never_win(monkeypatch):
    monkeypatch.setattr(sae_module, "LOOK_FOR_DEAD_EVERY", 10)

    def encoder_norms(aux):
        hp = small(aux=aux, dead_after=32, steps=100, k_anneal=0.0, warmup=0)
        trainer = Trainer(hp)
        trainer.sae.encoder.data[:20] *= 0.01  # positive now and then, never among the top k
        for step in range(hp.steps):
            trainer.train_step(data(seed=step))
        return trainer.sae.encoder[:20].norm(dim=1)

    assert (encoder_norms(0.0) < 0.011).all()
    assert (encoder_norms(1 / 32) > 0.05).all()


@pytest.mark.parametrize("arch", [name for name in SPARSE if applies("threshold_beta", name)])
def test_the_threshold_is_the_running_mean_of_the_smallest_kept_activation(arch):
    hp = small(arch, threshold_start=3, lr=1e-9)
    trainer, expected = Trainer(hp), None
    for step in range(10):
        x = data(seed=step)
        kept = batchtopk(trainer.sae, trainer.sae.pre_acts(x), annealed_k(hp, step)).detach()
        smallest = kept[kept > 0].min().item()
        if step == 3:
            expected = smallest
        elif step > 3:
            expected = 0.99 * expected + 0.01 * smallest
        trainer.train_step(x)
    assert torch.allclose(trainer.sae.threshold, torch.full((64,), expected), rtol=1e-5)


def test_a_run_shorter_than_threshold_start_has_a_threshold_nevertheless():
    assert (trained(small("batchtopk", threshold_start=1000)).sae.threshold > 0).all()


def test_a_batch_without_any_positive_activation_leaves_the_threshold_alone():
    trainer = Trainer(small("batchtopk"))
    trainer.sae.threshold.fill_(0.5)
    trainer.step = 30
    trainer.update_threshold(torch.zeros(80))
    assert (trainer.sae.threshold == 0.5).all()


def test_jumprelu_learns_a_threshold_for_each_latent():
    sae = trained(small("jumprelu", steps=200)).sae
    assert len(set(sae.threshold.tolist())) > 32
    heavier = trained(small("jumprelu", steps=200, l0_weight=0.1)).sae
    x = data(200, seed=77)
    assert (heavier.encode(x) > 0).sum() < (sae.encode(x) > 0).sum()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_other_weights(arch):
    first, again, other = (trained(small(arch, seed=seed)).sae for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert not torch.allclose(first.W_dec, other.W_dec, atol=1e-3)


def test_bfloat16_follows_float32_within_its_rounding():
    exact = trained(small("relu", l2=1e-3))
    rounded = trained(small("relu", l2=1e-3, dtype="bfloat16"))
    assert rounded.bfloat16
    assert not exact.bfloat16
    assert rounded.sae.W_enc.dtype == torch.float32
    assert rounded.metrics[-1]["loss"] == pytest.approx(exact.metrics[-1]["loss"], rel=0.02)
    assert not torch.equal(exact.sae.W_enc, rounded.sae.W_enc)


def test_the_dtype_auto_asks_the_hardware(monkeypatch, tmp_path):
    flags = {"avx2 amx_bf16 amx_tile": True, "avx2 avx512_bf16": True, "avx2": False}
    monkeypatch.setattr(sae_module, "CPU_INFO", tmp_path / "cpuinfo")
    assert use_bfloat16("auto", torch.device("cpu")) is False, "where there is no such file"
    for text, expected in flags.items():
        (tmp_path / "cpuinfo").write_text(f"flags: {text}")
        assert use_bfloat16("auto", torch.device("cpu")) is expected


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    trainer = trained(small("relu", steps=1000), steps=10)
    save_checkpoint(trainer, tmp_path, {})
    good = (tmp_path / "checkpoint.pt").read_bytes()
    trainer.sae.W_enc.data[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite at step 10"):
        save_checkpoint(trainer, tmp_path, {})
    with pytest.raises(UserError, match="not finite at step 100"):
        for step in range(100):
            trainer.train_step(data(seed=step))
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


# --------------------------------------------------------------------------------------------------
# Sources and runs


def some_rows(n=100):
    """A source of a few rows whose mean squared norm is not 1."""
    return Rows(3 * data(n), held_out=3 * data(40, seed=1), metadata={"model_name": "some model"})


@pytest.mark.parametrize("scale", [None, 1.0])
def test_rows_serve_every_row_once_an_epoch_divided_by_the_scale(scale):
    x = 3 * data(100)
    source = Rows(x, scale=scale)
    expected_scale = scale or math.sqrt(x.square().sum(1).mean())
    assert source.scale == pytest.approx(expected_scale, rel=1e-6)
    batches = list(itertools.islice(source.batches(small(), 0, {}), 14))
    assert [len(batch) for batch in batches] == 2 * [16, 16, 16, 16, 16, 16, 4]
    epochs = [torch.cat(batches[:7]) * source.scale, torch.cat(batches[7:]) * source.scale]
    for epoch in epochs:
        assert torch.allclose(epoch.sort(dim=0).values, x.sort(dim=0).values, atol=1e-5)
    assert not torch.allclose(*epochs), "in another order"


def test_the_order_of_rows_is_a_function_of_the_data_seed_and_the_epoch_alone():
    def served(n, step=0, **settings):
        batches = some_rows().batches(small(**settings), step, {})
        return torch.cat(list(itertools.islice(batches, n)))

    whole = served(28)
    assert torch.equal(whole, served(28, seed=5, l2=0.1, arch="relu")), "no other setting matters"
    assert torch.equal(whole, served(80, batch_size=5)), "nor the size of a batch"
    assert torch.equal(whole[9 * 16 - 12 :], served(28 - 9, step=9)), "the step says it all"
    assert not torch.equal(whole, served(28, data_seed=1))


@pytest.mark.parametrize(
    "x",
    [
        data().index_fill(0, torch.tensor([3]), math.nan),
        data().index_fill(0, torch.tensor([3]), math.inf),
        torch.zeros(16, 12),
        torch.zeros(0, 12),
        data()[0],
        torch.ones(16, 12, dtype=torch.long),
    ],
    ids=["nan", "infinite", "all zero", "no rows", "one-dimensional", "integers"],
)
def test_rows_that_are_no_matrix_of_finite_numbers_are_refused_at_once(x):
    with pytest.raises(UserError, match="activations must be"):
        Rows(x)


def test_held_out_rows_are_checked_as_those_that_are_trained_on():
    for held_out in (data(d_in=13), torch.full((5, 12), math.nan)):
        with pytest.raises(UserError, match="activations must be"):
            Rows(data(), held_out)


def test_rows_without_any_held_out_train_as_well(tmp_path):
    source = Rows(data())
    assert list(source.held_out()) == []
    train({tmp_path: small()}, source)
    assert is_complete(tmp_path, small())


class Counting:
    """A source as somebody would write one: six names, and a state that it cannot do without.

    `stop` is the number of the batch that never comes. `clock`, if any, moves on with each batch.
    """

    d_in = 12

    def __init__(self, stop=None, clock=None):
        self.stop, self.clock = stop, clock
        self.scale = None  # not there before the first batch is asked for
        self.metadata = {"hook_name": "somewhere"}
        self.position = 0

    def batches(self, hp, step, state):
        self.scale = 2.0
        self.position = state.get("position", 0)
        assert self.position == step
        while self.position != self.stop:
            self.position += 1
            if self.clock:
                self.clock.now += sae_module.CHECKPOINT_SECONDS + 1
            yield data(hp.batch_size, seed=self.position)
        raise KeyboardInterrupt

    def state(self):
        return {"position": self.position}

    def held_out(self):
        yield 2 * data(30, seed=1000)


@pytest.fixture
def clock(monkeypatch):
    """The time that `train` sees, so that there is a checkpoint after each batch of a Counting."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sae_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("arch", ARCHS)
def test_any_source_with_the_six_names_trains_and_its_state_is_brought_back(arch, tmp_path, clock):
    hp = small(arch, steps=30, dead_after=64)
    train({tmp_path / "whole": hp}, Counting())
    with pytest.raises(KeyboardInterrupt):
        train({tmp_path / "again": hp}, Counting(stop=17, clock=clock))
    with pytest.raises(UserError, match="unfinished"):
        SAE.load(tmp_path / "again")
    train({tmp_path / "again": hp}, Counting())
    assert_same_weights(tmp_path / "whole", tmp_path / "again")
    assert SAE.load(tmp_path / "again").metadata["hook_name"] == "somewhere"


@pytest.mark.parametrize("arch", ARCHS)
def test_training_in_memory_equals_training_in_a_folder_and_is_for_inputs_as_they_are(
    arch, tmp_path
):
    hp = small(arch)
    train({str(tmp_path / "run"): hp}, some_rows())  # a string will do
    sae = train_sae(hp, some_rows())
    assert_same_bits(sae, SAE.load(tmp_path / "run"))
    assert not sae.training
    assert not sae.W_dec.requires_grad
    source, trainer = some_rows(), Trainer(hp)
    for x in itertools.islice(source.batches(hp, 0, {}), hp.steps):
        trainer.train_step(x)
    trainer.sae.eval()
    x = 3 * data(50, seed=5)
    acts = trainer.sae.encode(x / source.scale) * source.scale
    assert torch.allclose(sae.encode(x), acts, atol=1e-4)
    assert torch.allclose(sae(x), trainer.sae(x / source.scale) * source.scale, atol=1e-4)


def test_finishing_a_run_leaves_the_trainer_as_it_was():
    trainer = trained(small("batchtopk"))
    before = copy.deepcopy(trainer.sae.state_dict())
    finished_sae(trainer, 7.0)
    for name, tensor in before.items():
        assert torch.equal(tensor, trainer.sae.state_dict()[name])
    assert trainer.sae.training


def test_runs_trained_together_equal_runs_trained_alone_also_with_other_numbers_of_steps(tmp_path):
    runs = {
        "relu": small("relu", l2=1e-3),
        "topk": small("topk", seed=1, steps=25),
        "batchtopk": small("batchtopk", steps=60, lr=1e-3),
    }
    train({tmp_path / "together" / name: hp for name, hp in runs.items()}, some_rows())
    for name, hp in runs.items():
        train({tmp_path / "alone" / name: hp}, some_rows())
        assert_same_weights(tmp_path / "together" / name, tmp_path / "alone" / name)


def test_an_sae_that_diverges_is_named_and_costs_the_others_nothing(tmp_path, clock):
    good, bad = small(steps=150), small(steps=150, lr=1e30)
    train({tmp_path / "alone": good}, Counting())
    runs = {tmp_path / "bad": bad, tmp_path / "good": good}
    with pytest.raises(UserError, match="bad: the loss is not finite at step 100: lower --lr"):
        train(runs, Counting(clock=clock))
    assert_same_weights(tmp_path / "good", tmp_path / "alone")
    assert not (tmp_path / "bad" / "sae_weights.safetensors").exists()
    with pytest.raises(UserError, match="bad: the loss is not finite"):
        train(runs, Counting(clock=clock))


def test_what_is_finished_is_not_trained_again(tmp_path):
    hp = small()
    train({tmp_path: hp}, some_rows())
    before = (tmp_path / "sae_weights.safetensors").stat().st_mtime_ns
    (tmp_path / "checkpoint.pt").write_text("left by a kill between the last two writes")
    train({tmp_path: hp}, Counting(stop=0))  # of which not even the first batch is asked for
    assert (tmp_path / "sae_weights.safetensors").stat().st_mtime_ns == before
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_run_that_is_ahead_of_the_others_waits_for_them_and_keeps_its_checkpoint(tmp_path, clock):
    hp = small()
    train({tmp_path / "whole": hp}, Counting())
    runs = {tmp_path / "ahead": hp, tmp_path / "behind": replace(hp, seed=1)}
    for folder, steps in zip(runs, (25, 10)):
        with pytest.raises(KeyboardInterrupt):
            train({folder: runs[folder]}, Counting(stop=steps, clock=clock))
    with pytest.raises(KeyboardInterrupt):
        train(runs, Counting(stop=20, clock=clock))

    def step_and_state(folder):
        trainer = Trainer(runs[folder])
        state = resume(trainer, folder)
        return trainer.step, state

    # A batch was served, and its checkpoint written, before the next one failed to come.
    assert step_and_state(tmp_path / "ahead") == (25, {"position": 25})
    assert step_and_state(tmp_path / "behind") == (20, {"position": 20})
    train(runs, Counting())
    assert_same_weights(tmp_path / "ahead", tmp_path / "whole")
    train({tmp_path / "other": replace(hp, seed=1)}, Counting())
    assert_same_weights(tmp_path / "behind", tmp_path / "other")


@pytest.mark.parametrize("arch", ARCHS)
def test_resumed_training_equals_uninterrupted_bit_for_bit_with_all_its_metrics(
    arch, tmp_path, monkeypatch
):
    monkeypatch.setattr(sae_module, "LOOK_FOR_DEAD_EVERY", 20)
    monkeypatch.setattr(sae_module, "LOG_EVERY", 10)
    hp = small(arch, steps=60, dead_after=64, l2=1e-3)
    whole = trained(hp)
    save_checkpoint(trained(hp, steps=33), tmp_path, {"position": torch.tensor(3)})
    resumed = Trainer(hp)
    assert resume(resumed, tmp_path) == {"position": 3}
    for step in range(resumed.step, hp.steps):
        resumed.train_step(data(seed=step))
    assert_same_bits(whole.sae, resumed.sae)
    assert resumed.metrics == whole.metrics
    assert torch.equal(resumed.inputs_since_fired, whole.inputs_since_fired)


# Trains in processes that are killed at random moments, ever later ones, until one of them is done,
# and then in one that nobody kills. A moment is counted in the time of the processor, and train's
# clock ticks once a step, so that this does not depend on what else the machine does. The processes
# are forked, which takes no time, from one that has not yet trained anything.
KILLED = """
import itertools, multiprocessing, random, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
import sae

def train(folder, seconds):
    runs = {f"{folder}/topk": sae.Hparams(arch="topk", steps=100, **common)}
    runs[f"{folder}/jumprelu"] = sae.Hparams(arch="jumprelu", steps=150, **common)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process by a signal; 0 is never
    sae.train(runs, sae.Rows(x), "cpu")

def exit_code(*arguments):
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode

torch.set_num_threads(1)
sae.CHECKPOINT_SECONDS = 0
sae.time.monotonic = itertools.count().__next__
x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
common = dict(d_in=12, d_sae=64, k=5, batch_size=16, warmup=3, lr=1e-2, dtype="float32")
common["dead_after"] = 300
moments = random.Random(0)
kills = 0
while exit_code("killed", moments.uniform(0.1, 0.3 * (kills + 1))) == -signal.SIGPROF:
    kills += 1
print(kills, exit_code("killed", 0), exit_code("whole", 0))
"""


def test_a_run_that_was_killed_again_and_again_has_the_weights_of_one_that_was_not(tmp_path):
    command = [sys.executable, "-c", KILLED, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    kills, again, whole = map(int, done.stdout.split("\n")[-2].split())
    assert kills >= 2
    assert again == whole == 0
    for arch in ("topk", "jumprelu"):
        folders = [tmp_path / name / arch for name in ("killed", "whole")]
        assert_same_weights(*folders)
        killed, whole = [(folder / "metrics.jsonl").read_text() for folder in folders]
        assert killed == whole
        killed, whole = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert killed == whole, "no checkpoint and no half of a file is left"


@pytest.mark.parametrize(("warmup", "noted"), [(10, False), (11, True)])
def test_a_warm_up_of_more_than_a_fifth_of_the_steps_is_told(warmup, noted, capsys):
    train_sae(small(steps=50, warmup=warmup), some_rows())
    assert ("--warmup" in capsys.readouterr().out) == noted


def test_what_the_runs_of_one_stream_must_agree_on_is_checked():
    for runs, name in (
        ([small(), small(batch_size=17)], "--batch-size"),
        ([small(), small(data_seed=1)], "--data-seed"),
        ([small(d_in=13)], "--d-in 13"),
    ):
        with pytest.raises(UserError, match=name):
            train({str(i): hp for i, hp in enumerate(runs)}, some_rows())


# --------------------------------------------------------------------------------------------------
# Run folders


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_folder_is_what_the_plan_says_and_does_what_the_trained_sae_does(arch, tmp_path):
    hp = small(arch, seed=3)
    tmp_path.joinpath("metrics.jsonl.28761.tmp").write_text("half a file, as a kill leaves it")
    train({tmp_path: hp}, some_rows())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json",
        "hparams.json",
        "metrics.jsonl",
        "sae_weights.safetensors",
    ]
    assert is_complete(tmp_path, hp)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40
    assert set(rows[-1]) == {"step", "loss", "recon", "l0", "fve", "penalty", "dead", "lr"}

    loaded = SAE.load(tmp_path)
    arch = finished_sae(Trainer(hp), 1.0).arch  # a fork may save its own as one that it equals
    assert loaded.arch == arch
    assert loaded.metadata["seed"] == 3
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    expected = {
        "architecture": ARCHS[arch].saelens,
        "d_in": 12,
        "d_sae": 64,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if ARCHS[arch].saelens == "topk":
        expected["k"] = 5
        expected["rescale_acts_by_decoder_norm"] = False
    assert cfg == expected
    assert metadata["sae_lens_version"] == "6.0.0"
    assert metadata["sae_lens_training_version"] is None, "else SAELens names its own"
    assert metadata["model_from_pretrained_kwargs"] == {}
    assert metadata["model_name"] == "some model"
    assert {*PENALTIES, "seed", "data_seed"} <= set(metadata)
    assert ("k" in metadata) == applies("k", arch)

    shapes = {"W_enc": [12, 64], "b_enc": [64], "W_dec": [64, 12], "b_dec": [12]}
    for tensor in ARCHS[arch].tensors:
        shapes[tensor.saelens_name] = [64]
    with safe_open(tmp_path / "sae_weights.safetensors", "pt") as file:
        names = list(file.keys())
        assert {name: file.get_slice(name).get_shape() for name in names} == shapes
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}


def test_an_architecture_whose_own_tensor_is_not_written_is_refused_and_its_checkpoint_kept(
    tmp_path, monkeypatch
):
    """As a fork would do it: a parameter made in __init__ that is not in the table."""

    def gated(sae, pre_acts, k):
        return pre_acts.relu() * sae.gate

    def initialise_with_gate(self, *arguments):
        original(self, *arguments)
        self.gate = torch.nn.Parameter(torch.ones(self.d_sae))

    original = SAE.__init__
    monkeypatch.setattr(SAE, "__init__", initialise_with_gate)
    arch = replace(ARCHS["relu"], train_rule=gated, eval_rule=gated)
    monkeypatch.setitem(ARCHS, "relu", arch)
    hp = small("relu")
    trainer = trained(hp)
    assert not torch.equal(trainer.sae.gate, torch.ones(64))
    save_checkpoint(trainer, tmp_path, {})
    with pytest.raises(UserError):
        save_run(trainer, tmp_path, some_rows(), data())
    assert (tmp_path / "checkpoint.pt").exists()
    assert not is_complete(tmp_path, hp)


def test_an_architecture_that_scales_the_wrong_tensors_is_refused(tmp_path, monkeypatch):
    (threshold,) = ARCHS["jumprelu"].tensors
    wrong = threshold._replace(scales_with_x=False)
    monkeypatch.setitem(ARCHS, "jumprelu", replace(ARCHS["jumprelu"], tensors=(wrong,)))
    trainer = Trainer(small("jumprelu"))
    trainer.sae.threshold.data.fill_(0.5)
    save_checkpoint(trainer, tmp_path, {})
    source = Rows(100 * data())
    with pytest.raises(UserError, match="checkpoint is kept"):
        save_run(trainer, tmp_path, source, 100 * data() / source.scale)
    assert (tmp_path / "checkpoint.pt").exists()


def test_what_is_read_back_must_do_what_the_trained_sae_does(tmp_path, monkeypatch):
    def save_other_numbers(tensors, path):
        save_file({**tensors, "W_enc": tensors["W_enc"].flip(0)}, path)

    trainer = trained(small())
    save_checkpoint(trainer, tmp_path, {})
    monkeypatch.setattr(sae_module, "save_file", save_other_numbers)
    with pytest.raises(UserError, match="checkpoint is kept"):
        save_run(trainer, tmp_path, some_rows(), data())
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_run_whose_weights_are_gone_is_not_complete(tmp_path):
    train({tmp_path: small()}, some_rows())
    assert is_complete(tmp_path, small())
    (tmp_path / "sae_weights.safetensors").unlink()
    assert not is_complete(tmp_path, small())


def test_a_folder_of_other_settings_is_not_taken_for_this_run(tmp_path):
    write_hparams(Trainer(small(lr=0.5)), tmp_path, complete=True)
    with pytest.raises(UserError, match=r"--lr 0\.5 instead of 0\.01"):
        is_complete(tmp_path, small())


def rewrite_settings(folder, change):
    """Apply `change` to the content of hparams.json in a folder."""
    path = folder / "hparams.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_fork_with_a_new_setting_keeps_its_finished_runs(tmp_path):
    train({tmp_path: small()}, some_rows())
    rewrite_settings(tmp_path, lambda content: content["hparams"].pop("aux"))
    assert is_complete(tmp_path, small())
    with pytest.raises(UserError, match="--aux"):
        is_complete(tmp_path, small(aux=0.5))


@pytest.mark.parametrize("listed", [True, False], ids=["now", "files of before"])
@pytest.mark.parametrize(("value", "at_rest"), [(0, True), (0.5, False)])
def test_a_run_of_a_fork_is_read_only_where_the_new_setting_was_at_rest(
    value, at_rest, listed, tmp_path
):
    write_hparams(Trainer(small()), tmp_path, complete=True)

    def as_a_fork_writes_it(content):
        content["hparams"]["orthogonality"] = value
        if not listed:
            del content["not_default"]
        elif not at_rest:
            content["not_default"].append("orthogonality")

    rewrite_settings(tmp_path, as_a_fork_writes_it)
    if at_rest:
        assert set(read_hparams(tmp_path)) == {one.name for one in fields(Hparams)}
    else:
        with pytest.raises(UserError, match="orthogonality"):
            read_hparams(tmp_path)


def test_a_setting_that_is_not_zero_at_rest_may_be_unknown_too(tmp_path):
    write_hparams(Trainer(small()), tmp_path)
    rewrite_settings(tmp_path, lambda content: content["hparams"].update(side="both"))
    assert read_hparams(tmp_path)["k"] == 5


@pytest.mark.parametrize(
    "text",
    ["[1]", "[" * 100_000, '{"hparams": {"l2": "1"}}', '{"hparams": {"seed": [1]}}', '{"a": 1}'],
)
def test_settings_that_cannot_be_read_name_their_file(text, tmp_path):
    (tmp_path / "hparams.json").write_text(text)
    with pytest.raises(UserError, match=r"hparams\.json"):
        is_complete(tmp_path, small())


@pytest.mark.parametrize("change", ["metrics", "moments", "more", "less", "shape"])
def test_a_checkpoint_that_does_not_fit_the_code_is_refused_and_kept(change, tmp_path):
    save_checkpoint(trained(small(), steps=3), tmp_path, {})
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if change == "metrics":
        state["metrics"] = [3]
    elif change == "moments":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    elif change == "more":
        state["sae"]["gate"] = torch.zeros(3)
    elif change == "less":
        del state["sae"]["b_enc"]
    else:
        state["sae"]["b_enc"] = torch.zeros(3)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt does not fit this code") as error:
        resume(Trainer(small()), tmp_path)
    assert "delete" not in str(error.value)
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("cut", [0, 100, -200])
def test_a_damaged_checkpoint_names_itself(cut, tmp_path):
    save_checkpoint(trained(small(), steps=2), tmp_path, {})
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        resume(Trainer(small()), tmp_path)


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
        with pytest.raises(UserError, match="nothing can be written in"):
            make_folder(folder)


def test_a_device_that_is_not_there_is_an_error():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device nonsense"):
        pick_device("nonsense")


# --------------------------------------------------------------------------------------------------
# Formats of others, each against its formula


def random_tensors(*more):
    """Weights in SAELens' names, with `more` tensors [64] of the names given."""
    tensors = {
        "W_enc": data(12, 64),
        "b_enc": data(1, 64)[0],
        "W_dec": data(64, 12, seed=5),
        "b_dec": data(1, 12)[0],
    }
    for number, name in enumerate(more):
        tensors[name] = data(1, 64, seed=10 + number)[0]
    return tensors


def saelens_folder(folder, cfg, tensors):
    """Write a folder in SAELens' format, as somebody else would, and load it."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "sae_weights.safetensors")
    whole = {"d_in": 12, "d_sae": 64, "dtype": "float32", **cfg}
    (folder / "cfg.json").write_text(json.dumps(whole))
    return SAE.load(folder)


def dictionary_folder(folder, kind, state, **trainer):
    """The same in dictionary_learning's format."""
    torch.save(state, folder / "ae.pt")
    config = {"trainer": {"dict_class": kind, **trainer}}
    (folder / "config.json").write_text(json.dumps(config))
    return SAE.load(folder)


def pre_acts_of(t, x):
    return (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]


def assert_encodes_and_decodes(sae, x, acts, x_hat):
    assert torch.allclose(sae.encode(x), acts, atol=1e-5)
    assert torch.allclose(sae(x), x_hat, atol=1e-4)
    assert (acts > 0).any()


def test_an_encoder_that_does_not_centre_its_input_is_folded(tmp_path):
    t, x = random_tensors(), data(9)
    cfg = {"architecture": "standard", "apply_b_dec_to_input": False}
    acts = (x @ t["W_enc"] + t["b_enc"]).relu()
    sae = saelens_folder(tmp_path, cfg, t)
    assert_encodes_and_decodes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_activations_rescaled_by_the_norms_of_the_decoder_are_folded(tmp_path):
    t, x = random_tensors(), data(9)
    norm = t["W_dec"].norm(dim=1)
    acts = keep_largest(pre_acts_of(t, x) * norm, 7)
    cfg = {"architecture": "topk", "k": 7, "rescale_acts_by_decoder_norm": True}
    sae = saelens_folder(tmp_path, cfg, t)
    assert_encodes_and_decodes(sae, x, acts, (acts / norm) @ t["W_dec"] + t["b_dec"])


def test_a_jumprelu_of_saelens_has_a_threshold_for_each_latent(tmp_path):
    t, x = random_tensors("threshold"), data(9)
    pre_acts = pre_acts_of(t, x)
    acts = torch.where(pre_acts > t["threshold"], pre_acts.relu(), 0)
    sae = saelens_folder(tmp_path, {"architecture": "jumprelu"}, t)
    assert sae.arch == "jumprelu"
    assert_encodes_and_decodes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def gated_acts(x, b_dec, W_enc, r_mag, b_gate, b_mag):
    """Equations 3 and 7 of arXiv:2404.16014: a gate that decides, and a magnitude of its own."""
    projected = (x - b_dec) @ W_enc
    magnitude = (projected * r_mag.exp() + b_mag).relu()
    return magnitude * (projected + b_gate > 0)


def test_a_gated_sae_of_saelens_is_the_jumprelu_that_it_equals(tmp_path):
    t, x = random_tensors("r_mag", "b_gate", "b_mag"), data(9)
    del t["b_enc"]
    acts = gated_acts(x, t["b_dec"], t["W_enc"], t["r_mag"], t["b_gate"], t["b_mag"])
    sae = saelens_folder(tmp_path, {"architecture": "gated"}, t)
    assert_encodes_and_decodes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_a_gated_sae_of_dictionary_learning_is_the_jumprelu_that_it_equals(tmp_path):
    t, x = random_tensors("r_mag", "gate_bias", "mag_bias"), data(9)
    state = {
        "decoder_bias": t["b_dec"],
        "encoder.weight": t["W_enc"].T,
        "decoder.weight": t["W_dec"].T,
        "r_mag": t["r_mag"],
        "gate_bias": t["gate_bias"],
        "mag_bias": t["mag_bias"],
    }
    acts = gated_acts(x, t["b_dec"], t["W_enc"], t["r_mag"], t["gate_bias"], t["mag_bias"])
    sae = dictionary_folder(tmp_path, "GatedAutoEncoder", state)
    assert_encodes_and_decodes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_a_sparsify_sae_is_a_topk(tmp_path):
    t, x = random_tensors(), data(9)
    tensors = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    save_file(tensors, tmp_path / "sae.safetensors")
    cfg = {"activation": "topk", "d_in": 12, "num_latents": 64, "k": 7, "transcode": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    acts = keep_largest(pre_acts_of(t, x), 7)
    assert_encodes_and_decodes(SAE.load(tmp_path), x, acts, acts @ t["W_dec"] + t["b_dec"])
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "transcode": True}))
    with pytest.raises(UserError, match="transcoder"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}},
    ],
)
def test_a_topk_sae_as_saelens_wrote_it_before_version_6_is_read(cfg, tmp_path):
    t, x = random_tensors(), data(9)
    acts = keep_largest(pre_acts_of(t, x), 7)
    assert torch.allclose(saelens_folder(tmp_path, cfg, t).encode(x), acts, atol=1e-5)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_a_fine_tuned_sae_of_saelens_5_scales_its_activations_in_decoding(name, tmp_path):
    t, x = random_tensors(), data(9)
    t[name] = data(1, 64, seed=8)[0].abs()
    acts = pre_acts_of(t, x).relu()
    sae = saelens_folder(tmp_path, {"finetuning_scaling_factor": True}, t)
    assert sae.arch == "relu", "no architecture means standard"
    assert_encodes_and_decodes(sae, x, acts, (acts * t[name]) @ t["W_dec"] + t["b_dec"])


def test_scaling_factors_in_a_file_that_does_not_speak_of_them_are_refused(tmp_path):
    with pytest.raises(UserError, match="scaling_factor"):
        saelens_folder(tmp_path, {"architecture": "standard"}, random_tensors("scaling_factor"))


def test_a_files_own_fields_come_before_its_metadata(tmp_path):
    cfg = {"architecture": "topk", "k": 7, "d_in": 12}
    cfg["metadata"] = {"architecture": "standard", "k": 3, "d_in": 99, "model_name": "a model"}
    sae = saelens_folder(tmp_path, cfg, random_tensors())
    assert (sae.arch, sae.k) == ("topk", 7)
    assert sae.metadata["architecture"] == "topk"
    assert sae.metadata["k"] == 7
    assert sae.metadata["d_in"] == 12
    assert sae.metadata["model_name"] == "a model"


DICTIONARIES = ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"]


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_the_linear_layers_of_dictionary_learning_are_read(kind, tmp_path):
    t, x = random_tensors(), data(9)
    biases = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}
    state = {
        "encoder.weight": t["W_enc"].T,
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T,
        biases.get(kind, "b_dec"): t["b_dec"],
    }
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        state["k"], state["threshold"] = torch.tensor(7), torch.tensor(0.8)
    sae = dictionary_folder(tmp_path, kind, state, seed=4)
    pre_acts, W_dec = pre_acts_of(t, x), t["W_dec"]
    if kind == "AutoEncoderNew":
        pre_acts = x @ t["W_enc"] + t["b_enc"]
    acts = pre_acts.relu()
    if kind == "AutoEncoder":  # its loader moves the decoder's norms to the encoder
        norm = W_dec.norm(dim=1)
        acts, W_dec = acts * norm, W_dec / norm[:, None]
    elif kind == "AutoEncoderTopK":
        acts = keep_largest(pre_acts, 7)
    elif kind == "BatchTopKSAE":
        acts = torch.where(pre_acts > 0.8, pre_acts, 0)
    assert_encodes_and_decodes(sae, x, acts, acts @ W_dec + t["b_dec"])
    assert sae.metadata["seed"] == 4


def test_the_k_of_dictionary_learning_may_be_in_its_config_alone(tmp_path):
    t, x = random_tensors(), data(9)
    state = {
        "encoder.weight": t["W_enc"].T,
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T,
        "b_dec": t["b_dec"],
    }
    sae = dictionary_folder(tmp_path, "AutoEncoderTopK", state, k=7)
    assert sae.k == 7
    assert torch.allclose(sae.encode(x), keep_largest(pre_acts_of(t, x), 7), atol=1e-5)


def test_a_matryoshka_of_dictionary_learning_may_have_an_unset_threshold(tmp_path):
    t, x = random_tensors(), data(9)
    numbers = {"k": torch.tensor(7), "threshold": torch.tensor(-1.0)}
    state = {**t, **numbers, "group_sizes": torch.tensor([32, 32])}
    sae = dictionary_folder(tmp_path, "MatryoshkaBatchTopKSAE", state)
    assert torch.allclose(sae.encode(x), pre_acts_of(t, x).relu(), atol=1e-5)


def test_a_jumprelu_of_dictionary_learning_does_not_centre_its_input(tmp_path):
    t, x = random_tensors("threshold"), data(9)
    pre_acts = x @ t["W_enc"] + t["b_enc"]
    acts = torch.where(pre_acts > t["threshold"], pre_acts.relu(), 0)
    sae = dictionary_folder(tmp_path, "JumpReluAutoEncoder", t)
    assert_encodes_and_decodes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("k", [None, 0, 65, -1, "many"])
def test_a_topk_sae_needs_a_k_that_fits(k, tmp_path):
    with pytest.raises(UserError):
        saelens_folder(tmp_path, {"architecture": "topk", "k": k}, random_tensors())


@pytest.mark.parametrize("damage", ["empty", "no weights", "cut", "bad json", "unknown", "missing"])
def test_a_folder_without_a_whole_sae_names_itself(damage, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    tensors = random_tensors()
    if damage == "missing":
        del tensors["W_dec"]
    with pytest.raises(UserError, match="run"):
        if damage == "empty":
            SAE.load(folder)
        cfg = {"architecture": "transcoder" if damage == "unknown" else "standard"}
        saelens_folder(folder, cfg, tensors)
        weights = folder / "sae_weights.safetensors"
        if damage == "no weights":
            weights.unlink()
        elif damage == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            (folder / "cfg.json").write_text('{"architecture": ')
        SAE.load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_rather_than_counted_as_dead(value, tmp_path):
    tensors = random_tensors()
    tensors["W_dec"][3] = value
    with pytest.raises(UserError, match="not finite"):
        saelens_folder(tmp_path, {"architecture": "standard"}, tensors)


class Bomb:
    """What a pickle may hold: a call of any function."""

    def __reduce__(self):
        return (open, ("bomb_went_off", "w"))


def test_no_code_in_a_file_is_ever_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(trained(small(), steps=3), tmp_path, {})
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    trainer = Trainer(small())
    torch.save({**state, "stream": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="damaged"):
        resume(trainer, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(UserError, match="damaged"):
        resume(trainer, tmp_path)
    with pytest.raises(UserError, match="not a whole SAE"):
        dictionary_folder(tmp_path, "AutoEncoder", {"bias": Bomb()})
    assert not (tmp_path / "bomb_went_off").exists()


# --------------------------------------------------------------------------------------------------
# Settings and command lines


@pytest.mark.parametrize(
    "wrong",
    [
        {"arch": "nonsense"},
        {"l2": -1e-5},
        {"l1": math.nan},
        {"l1_mean": math.inf},
        {"k": 65},
        {"k": 0},
        {"lr": 0.0},
        {"arch": "matryoshka", "d_sae": 20},
        {"reduction": "max"},
        {"decay": 1.5},
        {"seed": 2**64},
        {"dead_after": 10**400},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_names_its_flag(wrong):
    with pytest.raises(UserError, match=flag([*wrong][-1])):
        small(**wrong)


def test_a_setting_that_does_not_concern_the_architecture_makes_no_other_run():
    assert small("relu", k=7) == small("relu", k=9)
    assert small("topk", sparsity=0.1) == small("topk", sparsity=0.2)
    assert small("topk", k=7) != small("topk", k=9)
    for name, arch in ARCHS.items():
        assert all(applies(setting, name) for setting in (*arch.settings, "l2", "seed"))


def swept(*line):
    """{name: Hparams} of the command line of a script."""

    def complete(settings, args):
        return {"d_in": 12, "steps": args.epochs, "length": f"{args.epochs} epochs"}

    parser = Parser()
    parser.add_settings(("d_in", "steps", "length"), d_sae=64, k=5)
    parser.add_argument("--epochs", type=int, default=5)
    return sweep(parser, parser.parse_args(line), complete)


def test_the_name_of_a_run_tells_architecture_k_l2_seed_and_what_differs():
    assert [*swept("--l2", "1e-4")] == ["topk_k5_l2-0.0001_seed0"]
    line = "--arch relu --l1 1e-3 --unit-norm --tied-init off --seed 2 --epochs 9"
    (name,) = swept(*line.split())
    assert name == "relu_l2-0_l1-0.001_tied-init-off_unit-norm_9-epochs_seed2"


def test_any_two_settings_have_two_names():
    changes = [
        [],
        ["--lr", "1e-3"],
        ["--k", "8"],
        ["--l2", "1e-5"],
        ["--l2", "1.23456789e-5"],
        ["--l2", "1.23456788e-5"],
        ["--seed", "1"],
        ["--data-seed", "1"],
        ["--tied-init", "off"],
        ["--epochs", "9"],
        ["--batch-size", "64"],
        ["--layer", "2"],
        ["--warmup", "1"],
        ["--warmup", "0"],
    ]
    names = {name for change in changes for name in swept(*change)}
    assert len(names) == len(changes)


def test_folders_and_labels_name_a_setting_alike():
    assert spell("l2", 1e-5) == "l2-1e-05"
    assert spell("l2", 1e-5, joint=" ") == "l2 1e-05"
    assert spell("k", 32) == "k32"
    assert spell("arch", "topk") == "topk"
    assert spell("tied_init", True) == "tied-init"
    assert spell("tied_init", False) == "tied-init-off"


def test_a_sweep_is_the_product_of_its_lists_without_what_an_architecture_does_not_use():
    line = "--arch relu topk --k 8 16 --sparsity 0.1 0.2 --unit-norm off on"
    runs = swept(*line.split())
    assert len(runs) == 8
    assert [hp.k for hp in runs.values() if hp.arch == "topk"] == [8, 8, 16, 16]
    assert {hp.sparsity for hp in runs.values() if hp.arch == "relu"} == {0.1, 0.2}
    assert {hp.unit_norm for hp in runs.values()} == {False, True}
    assert all(hp.d_in == 12 and hp.steps == 5 for hp in runs.values())


@pytest.mark.parametrize("one", fields(Hparams), ids=lambda one: one.name)
def test_every_setting_is_a_flag_with_help_that_takes_a_list_unless_it_decides_the_stream(one):
    parser = Parser()
    parser.add_settings(())
    text, value = "1", one.type(1)
    if one.type is bool:
        text, value = "off", False
    elif one.metadata["choices"]:
        text = value = one.metadata["choices"][-1]
    if one.metadata["stream"]:
        assert getattr(parser.parse_args([flag(one.name), text]), one.name) == value
    else:
        assert getattr(parser.parse_args([flag(one.name), text, text]), one.name) == [value, value]
    page = " ".join(parser.format_help().split())
    assert one.metadata["help"] in page
    assert flag(one.name) in page
    assert all(choice in page for choice in one.metadata["choices"])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--l2 -1", "--l2"),
        ("--l2 x", "--l2"),
        ("--l2", "--l2"),
        ("--arch nonsense", "--arch"),
        ("--k 100", "--k"),
        ("--unit-norm maybe", "--unit-norm"),
        ("--l 1", "--l"),
        ("--batch-size 1 2", "2"),
    ],
)
def test_a_command_line_that_cannot_work_ends_in_one_line_with_status_2(line, named, capsys):
    with pytest.raises(SystemExit) as stop:
        swept(*line.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("--k 3: too few"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (KeyboardInterrupt(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_ends_in_one_line_on_standard_error(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        sae_module.run_command(main)
    assert stop.value.code == status
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_fault_of_ours_is_not_hidden():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        sae_module.run_command(main)
