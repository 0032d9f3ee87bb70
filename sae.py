"""Sparse autoencoders (SAEs) with weight regularization: every architecture, penalty and training step.

After "Stable and Steerable Sparse Autoencoders with Weight Regularization" (arXiv:2603.04198). An SAE
explains an activation x by a few of many features. Train two from different seeds and they find
different features, unless an L1 or L2 penalty on the weights makes the same ones recur. This file is
the whole method; read it from top to bottom. train_mnist.py and train_pythia.py feed it data.

    hp = Hparams(arch="topk", d_in=512, d_sae=16_384, k=40, l2=1e-4, steps=24_000)
    trainer = Trainer(hp, first_batch, device="cuda")
    for x in batches:                       # x [B, d_in]
        trainer.train_step(x)
    trainer.sae.save("runs/mine")           # opens in SAELens; SAE.load("runs/mine") reads it back

Notation, as in the paper: d_in the width of the input, d_sae the number of latents (features), B the batch.

    pre_acts = (x - b_dec) @ W_enc + b_enc     [B, d_sae]    W_enc [d_in, d_sae], b_enc [d_sae]
    acts     = activation(pre_acts)            [B, d_sae]    few are not zero
    x_hat    = acts @ W_dec + b_dec            [B, d_in]     W_dec [d_sae, d_in], b_dec [d_in]

Feature i is the encoder column W_enc[:, i] and the decoder row W_dec[i].
"""

import argparse
import ctypes
import json
import math
import os
import pickle
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

ARCHS = ("relu", "topk", "batchtopk", "matryoshka")
CHECKPOINT_SECONDS = 30  # at most so much work is lost to a kill; Ctrl-C and SIGTERM lose nothing
LOG_EVERY = 100  # steps between two lines of metrics.jsonl; the only steps that wait for the device


# What reading a damaged file of weights or a checkpoint may raise
DAMAGE = (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError)
DAMAGE += (RuntimeError, struct.error, pickle.UnpicklingError, SafetensorError)


class UsageError(Exception):
    """The command line, or a file it names, cannot work: exit status 2, nothing written."""


class RunError(Exception):
    """A run broke (loss not finite, disk full, interrupted): exit status 1, finished work is intact."""


# ---------------------------------------------------------------------------------------------------
# Hyperparameters. The defaults are the study's for Pythia-70M; train_mnist.py sets those for images.


@dataclass
class Hparams:
    """Everything that decides how one SAE turns out. Raises UsageError where the values cannot work."""

    arch: str = "topk"  # one of ARCHS
    d_in: int = 512
    d_sae: int = 16_384
    k: int = 40  # active latents per input; for batchtopk and matryoshka the mean over a batch; unused by relu
    sparsity: float = 0.0  # weight of the sum or mean (see reduction) of acts, relu only: TopK needs none
    l1: float = 0.0  # weight of the L1 penalty on the weights
    l2: float = 0.0  # weight of the L2 penalty on the weights
    l1_form: str = "sum"  # one of L1_FORMS
    l2_form: str = "squares"  # one of L2_FORMS
    tied_init: bool = True  # encoder starts as the decoder's transpose; else each is drawn by itself
    unit_norm: bool = False  # decoder rows are kept at norm 1
    biases: bool = True  # train b_enc and b_dec; else both stay 0
    reduction: str = "sum"  # of errors over d_in and of acts over d_sae: "sum" (Pythia) or "mean" (MNIST)
    aux: float = 1 / 32  # weight of the auxiliary loss, TopK family only
    dead_after: int = 10_000_000  # a latent that has not fired for so many inputs counts as dead
    lr: float = 5e-5  # Adam, betas (0.9, 0.999)
    batch_size: int = 2048
    steps: int = 24_414  # 50M tokens
    warmup: int = 1000  # steps of linear warm-up from 0
    decay: float = 0.2  # the last share of the steps, over which lr falls linearly to 0
    clip: float = 1.0  # largest norm of the whole gradient; 0 for no clipping
    k_anneal: float = 0.01  # the first share of the steps, over which k falls linearly from d_in to k
    threshold_start: int = 1000  # first step of the running mean that becomes the inference threshold
    threshold_beta: float = 0.99  # of that mean; the study's 0.999 lags far behind weights that a penalty shrinks
    seed: int = 0  # initialisation
    data_seed: int = 0  # order of the data
    data: str = ""  # what was trained on
    model: str = ""  # the language model, and what of it was read
    layer: int = 0
    context: int = 0  # tokens
    dtype: str = "auto"  # matrix products: float32, bfloat16 (autocast), or bfloat16 where the hardware has it

    def __post_init__(self):
        choices = {"arch": ARCHS, "l1_form": L1_FORMS, "l2_form": L2_FORMS, "reduction": ("sum", "mean")}
        choices["dtype"] = ("auto", "float32", "bfloat16")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: choose from {', '.join(allowed)}")
        for name in ("d_in", "d_sae", "batch_size", "steps", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        for name in ("sparsity", "l1", "l2", "aux", "clip", "warmup", "dead_after", "data_seed", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} {getattr(self, name)}: give 0 or a number above it")
        for name in ("decay", "k_anneal", "threshold_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: a share, from 0 to 1")
        for name, limit in (("seed", 2**63), ("data_seed", 2**40), ("d_sae", 2**31), ("steps", 2**40)):
            if getattr(self, name) >= limit:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: give a number below {limit}")
        if self.arch != "relu" and not 1 <= self.k <= self.d_sae:
            raise UsageError(f"--k {self.k}: give a number from 1 to --d-sae, which is {self.d_sae}")
        if self.arch == "matryoshka" and self.d_sae < 32:
            raise UsageError(f"--d-sae {self.d_sae}: matryoshka's smallest group is 1/32 of it, so give at least 32")


def flag(name):
    """The command-line flag of a hyperparameter: d_sae -> --d-sae."""
    return "--" + name.replace("_", "-")


def run_name(hp, defaults):
    """Name a run folder by what differs: `topk_k40_l2-0.0001_seed0`.

    Architecture, k, l2 and seed always show; any other setting where it is not what `defaults` says.
    """
    parts = [hp.arch] + ([f"k{hp.k}"] if hp.arch != "relu" else []) + [f"l2-{hp.l2:g}"]
    for field in fields(hp):
        value = getattr(hp, field.name)
        if field.name in ("arch", "k", "l2", "seed", "d_in") or value == getattr(defaults, field.name):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").split("/")[-1]
        parts.append(field.name.replace("_", "-") + ("" if value is True else f"-{text}"))
    return "_".join([*parts, f"seed{hp.seed}"])


# ---------------------------------------------------------------------------------------------------
# Activation rules: what makes an architecture. Each maps pre_acts [B, d_sae] to acts of the same shape.


def topk(pre_acts, k):
    """Keep the k largest of each row, where positive; zero the rest."""
    indices = largest(pre_acts, k)
    return torch.zeros_like(pre_acts).scatter(-1, indices, pre_acts.gather(-1, indices).relu())


def largest(x, k, fold=8):
    """Indices of the k largest of each row of x [..., n], in no order: x.topk(k).indices, several times faster.

    Fold the row into n / 8 columns of 8. The k largest lie in the k columns whose maxima are largest, so a search
    among n / 8 numbers (folded again, while that pays) and one among 8 k take the place of one among n.
    """
    n = x.shape[-1]
    if n % fold or n < 4 * fold * k:
        return x.topk(k, dim=-1, sorted=False).indices
    columns = x.unflatten(-1, (fold, n // fold))
    best = largest(columns.amax(-2), k)
    inside = columns.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], fold, k)).flatten(-2)
    winners = inside.topk(k, dim=-1, sorted=False).indices
    return winners // k * (n // fold) + best.gather(-1, winners % k)


def batchtopk(pre_acts, k):
    """Keep the k * B largest of the whole batch, so that an input may use more latents than another."""
    return topk(pre_acts.flatten(), k * len(pre_acts)).view_as(pre_acts)


def jumprelu(pre_acts, threshold):
    """Keep what exceeds the threshold [d_sae]: batchtopk for an input that comes without a batch."""
    return pre_acts.relu() * (pre_acts > threshold)


class SAE(nn.Module):
    """A sparse autoencoder. `arch` picks the activation rule, and for matryoshka the nested prefixes.

    In train mode batchtopk and matryoshka select over the batch; in eval mode each latent is compared with
    `threshold`, so that what an input activates does not depend on its neighbours. An `arch` of
    "jumprelu" is what a SAELens file of either is called; such an SAE can be used, not trained.
    """

    def __init__(self, d_in, d_sae, arch="topk", k=0):
        super().__init__()
        self.d_in, self.d_sae, self.arch, self.k = d_in, d_sae, arch, k
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)  # so that a feature's weights lie together in memory
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.metadata = {}  # of a loaded SAE: where it came from
        # Matryoshka: nested dictionaries of 1/32, 3/32, 7/32, 15/32 and all of the latents. Each prefix must
        # reconstruct x by itself, so general features come first. Every other architecture has one group.
        self.group_sizes = [d_sae]
        if arch == "matryoshka":
            first = [d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4]
            self.group_sizes = [*first, d_sae - sum(first)]
        self.register_buffer("group_ends", torch.tensor(self.group_sizes).cumsum(0), persistent=False)

    def pre_acts(self, x):
        """[B, d_in] -> [B, d_sae]"""
        # Equal to (x - b_dec) @ W_enc + b_enc. The last term is zero; it carries b_dec's gradient, which is then
        # a product of a vector with W_enc. Through x - b_dec it would cost one more product over the batch.
        # (Adding -b_dec @ W_enc to b_enc would do too, but in bfloat16 it cancels badly against x @ W_enc.)
        b_dec = self.b_dec.detach()
        return F.linear(x - b_dec, self.W_enc.T, self.b_enc + (b_dec - self.b_dec) @ self.W_enc)

    def activate(self, pre_acts, k):
        if self.arch == "relu":
            return pre_acts.relu()
        if self.arch == "topk":
            return topk(pre_acts, k)
        if self.training and self.arch != "jumprelu":
            return batchtopk(pre_acts, k)
        return jumprelu(pre_acts, self.threshold)

    def encode(self, x):
        """[B, d_in] -> acts [B, d_sae]"""
        return self.activate(self.pre_acts(x), self.k)

    def decode_prefixes(self, acts):
        """The reconstructions [B, d_in] by each nested prefix of the latents, the last being x_hat."""
        groups = zip(acts.split(self.group_sizes, dim=-1), self.W_dec.split(self.group_sizes))
        return [*accumulate((acts @ W_dec for acts, W_dec in groups), initial=self.b_dec)][1:]

    def decode(self, acts):
        """acts [B, d_sae] -> x_hat [B, d_in]"""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    def save(self, folder, metadata=None):
        """Write `folder` as a SAELens SAE: cfg.json and sae_weights.safetensors, float32, on raw activations."""
        folder = make_folder(folder)
        jump = self.arch in ("batchtopk", "matryoshka", "jumprelu")
        names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * jump
        tensors = {name: getattr(self, name).detach().float().cpu().contiguous() for name in names}
        cfg = {
            "architecture": "jumprelu" if jump else {"relu": "standard"}.get(self.arch, self.arch),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            # SAELens drops all metadata of a file that does not claim to be of its version 6
            "metadata": {"sae_lens_version": "6.0.0", "arch": self.arch, "k": self.k} | (metadata or {}),
        }
        if self.arch == "topk":
            cfg |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        with replacing(folder / "sae_weights.safetensors") as path:
            save_file(tensors, path)
        write_json(folder / "cfg.json", cfg)

    @staticmethod
    def load(folder):
        """Read an SAE from a SAELens folder, or one of dictionary_learning. Raises UsageError. See `load`."""
        return load(folder)


# ---------------------------------------------------------------------------------------------------
# The forward pass of training, twice: as the formula says, and from the active entries alone. Both return
# (pre_acts [B, d_sae], acts, the prefixes' reconstructions [B, d_in], how often each latent fired [d_sae]).


def dense_pass(sae, x, k):
    """The formula. All that ReLU SAEs can do, and what the tests hold sparse_pass against."""
    pre_acts = sae.pre_acts(x)
    acts = sae.activate(pre_acts, k)
    return pre_acts, acts, sae.decode_prefixes(acts), (acts > 0).sum(0)


def sparse_pass(sae, x, k):
    """The same from the k * B active entries of acts; here acts is [k * B], the values of those alone.

    An entry that was not chosen is zero: it adds nothing to x_hat and its pre_act gets no gradient. So of the six
    dense products of a step (three forward and backward for encoder and decoder each) only the first is needed.
    """
    with torch.no_grad():
        pre_acts = F.linear(x - sae.b_dec, sae.W_enc.T, sae.b_enc)
        # An entry is the number row * d_sae + latent
        entries = largest_of_rows(pre_acts, k) if sae.arch == "topk" else largest(pre_acts.flatten(), k * len(x))
    acts = pick(sae, x, pre_acts, entries).relu()
    rows, latents = entries // sae.d_sae, entries % sae.d_sae
    fired = torch.zeros(sae.d_sae, device=x.device).index_add_(0, latents, (acts > 0).float())
    # Matryoshka's groups make sums of their own, one block of rows each, and a prefix adds up the first of them
    groups = torch.searchsorted(sae.group_ends, latents, right=True)
    n_sums = len(sae.group_sizes) * len(x)
    by_group = WeightedSums.apply(acts, latents, sae.W_dec, groups * len(x) + rows, n_sums).split(len(x))
    prefixes = [*accumulate(by_group, initial=sae.b_dec)][1:]
    return pre_acts, acts, prefixes, fired


def largest_of_rows(pre_acts, k):
    """The k largest of each row of pre_acts [B, d_sae] as entries row * d_sae + latent, [k * B]."""
    starts = torch.arange(0, pre_acts.numel(), pre_acts.shape[1], device=pre_acts.device)
    return (largest(pre_acts, k) + starts[:, None]).flatten()


def weighted_sums(weights, sources, vectors, targets, n):
    """out [n, width], where out[t] = sum of weights[e] * vectors[sources[e]] over the entries e with targets[e] = t."""
    targets, order = targets.sort()
    starts = torch.searchsorted(targets, torch.arange(n, device=targets.device))
    return F.embedding_bag(sources[order], vectors, starts, mode="sum", per_sample_weights=weights[order])


class WeightedSums(torch.autograd.Function):
    """weighted_sums with another backward pass: the entries of a source together, so that its vector is read once."""

    @staticmethod
    def forward(ctx, weights, sources, vectors, targets, n):
        ctx.save_for_backward(weights, sources, vectors, targets)
        return weighted_sums(weights, sources, vectors, targets, n)

    @staticmethod
    def backward(ctx, gradient):
        weights, sources, vectors, targets = ctx.saved_tensors
        # The gradient of the vectors is the same sum with sources and targets exchanged. That of weight e is the dot
        # product of gradient[targets[e]] and vectors[sources[e]]: how (of_vectors * vectors).sum() depends on it.
        with torch.enable_grad():
            weights = weights.detach().requires_grad_()
            of_vectors = weighted_sums(weights, targets, gradient, sources, len(vectors))
        (of_weights,) = torch.autograd.grad(of_vectors, weights, vectors)
        return of_weights, None, of_vectors.detach(), None, None


def pick(sae, x, pre_acts, entries):
    """pre_acts.flatten()[entries], with the gradient that pre_acts itself, computed without one, does not have."""
    values = pre_acts.flatten()[entries].to(x.dtype)
    return Pick.apply(values, x, sae.W_enc, sae.b_enc, sae.b_dec, entries)


class Pick(torch.autograd.Function):
    """Values of ((x - b_dec) @ W_enc + b_enc).flatten()[entries] in, the same out; backward to W_enc and biases."""

    @staticmethod
    def forward(ctx, values, x, W_enc, b_enc, b_dec, entries):
        ctx.save_for_backward(x, W_enc, b_dec, entries)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        x, W_enc, b_dec, entries = ctx.saved_tensors
        rows, latents = entries // W_enc.shape[1], entries % W_enc.shape[1]
        of_W_enc = weighted_sums(gradient, rows, x - b_dec, latents, W_enc.shape[1]).T
        of_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, latents, gradient)
        return None, None, of_W_enc, of_b_enc, -(W_enc @ of_b_enc), None


# ---------------------------------------------------------------------------------------------------
# Initialisation


@torch.no_grad()
def initialise(sae, hp, first_batch):
    """Draw the weights from hp.seed, on the CPU, so that every device starts alike."""
    generator = torch.Generator().manual_seed(hp.seed)

    def kaiming_uniform(fan_in, fan_out):
        bound = (6 / fan_in) ** 0.5  # gain of ReLU
        return torch.empty(fan_in, fan_out).uniform_(-bound, bound, generator=generator)

    W_dec = kaiming_uniform(hp.d_sae, hp.d_in)
    if hp.tied_init or hp.unit_norm:
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(W_dec)
    sae.W_enc.copy_(W_dec.T if hp.tied_init else kaiming_uniform(hp.d_in, hp.d_sae))
    if hp.biases:
        sae.b_dec.copy_(geometric_median(first_batch))


def geometric_median(x, steps=100, tolerance=1e-5):
    """The point [d_in] with the least summed distance to the rows of x [B, d_in], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
        previous, median = median, (weight * x).sum(0) / weight.sum()
        if (median - previous).norm() < tolerance:
            break
    return median


# ---------------------------------------------------------------------------------------------------
# The loss: reconstruction + sparsity + l1 * P1(W_enc, W_dec) + l2 * P2(W_enc, W_dec) + auxiliary


# The forms that the study uses, of a matrix W [d_sae, d_in] with a feature in each row
L1_FORMS = {
    "sum": lambda W: W.abs().sum(),  # Pythia
    "mean": lambda W: W.abs().mean(),  # MNIST
}
L2_FORMS = {
    "squares": lambda W: W.norm() ** 2,  # the paper's formula, everywhere: the sum of squares
    "norms": lambda W: W.norm(),  # the released notebook for MNIST with tied initialisation and unit norm
}


def weight_penalty(sae, l1, l2, l1_form="sum", l2_form="squares"):
    """The paper's subject: l1 * P1(W_enc, W_dec) + l2 * P2(W_enc, W_dec), a scalar tensor; biases go free.

    It belongs to the loss and so passes through Adam; AdamW's decoupled weight decay is another thing.
    """
    weights, penalty = (sae.W_enc.T, sae.W_dec), sae.W_enc.new_zeros(())
    if l1:
        penalty = penalty + l1 * sum(L1_FORMS[l1_form](W) for W in weights)
    if l2:
        penalty = penalty + l2 * sum(L2_FORMS[l2_form](W) for W in weights)
    return penalty


def squared_error(x_hat, x, reduction):
    """Squared error, averaged over the batch, summed or averaged over d_in."""
    error = (x_hat - x).square()
    return error.sum(1).mean() if reduction == "sum" else error.mean()


def auxiliary_loss(sae, x, pre_acts, residual, dead):
    """Gao et al. 2024 (arXiv:2406.04093), A.2: dead latents reconstruct what the living ones left over.

    Only the d_in / 2 strongest of the `dead` [d_sae] take part. The residual x - x_hat is a constant here, and
    the error is measured in units of its variance. Zero where no latent is dead.
    """
    # topk(candidates, d_in / 2) @ W_dec, by way of the active entries as in sparse_pass
    candidates = torch.where(dead, pre_acts.detach(), 0)
    entries = largest_of_rows(candidates, max(1, min(sae.d_in // 2, sae.d_sae)))
    acts = pick(sae, x, candidates, entries).relu()
    reconstruction = WeightedSums.apply(acts, entries % sae.d_sae, sae.W_dec, entries // sae.d_sae, len(x))
    variance = squared_error(residual.mean(0), residual, "sum")
    return dead.any() * squared_error(reconstruction, residual, "sum") / variance.clamp(min=1e-12)


def total_loss(sae, hp, x, k, dead=None, dense=False):
    """The training loss on x [B, d_in]; `dead` [d_sae] marks the latents for the auxiliary loss, if any.

    Returns the loss and, for the log, a dict of its parts with acts and fired (see dense_pass) and x_hat [B, d_in].
    """
    few_active = hp.arch in ("topk", "batchtopk", "matryoshka") and not dense
    forward = sparse_pass if few_active else dense_pass
    pre_acts, acts, prefixes, fired = forward(sae, x, k)
    recon = sum(squared_error(x_hat, x, hp.reduction) for x_hat in prefixes) / len(prefixes)
    penalty = weight_penalty(sae, hp.l1, hp.l2, hp.l1_form, hp.l2_form)
    loss = recon + penalty
    if hp.arch == "relu" and hp.sparsity:
        loss = loss + hp.sparsity * (acts.sum(1).mean() if hp.reduction == "sum" else acts.mean())
    if dead is not None:
        loss = loss + hp.aux * auxiliary_loss(sae, x, pre_acts, (x - prefixes[-1]).detach(), dead)
    return loss, {"recon": recon, "penalty": penalty, "acts": acts.detach(), "fired": fired, "x_hat": prefixes[-1]}


# ---------------------------------------------------------------------------------------------------
# The training step


@torch.no_grad()
def rescale_decoder(sae):
    """Put every decoder row back to norm 1."""
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def remove_parallel_gradient(sae):
    """Remove the part of the decoder's gradient that is parallel to its row and would only change its norm."""
    W_dec = sae.W_dec  # its rows have norm 1
    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec


def learning_rate(hp, step):
    """Linear warm-up from 0, constant, linear decay to 0."""
    warm = min(1.0, step / hp.warmup) if hp.warmup else 1.0
    left = (hp.steps - step) / (hp.steps * hp.decay) if hp.decay else 1.0
    return hp.lr * min(warm, left, 1.0)


def annealed_k(hp, step):
    """k at this step: from d_in down to hp.k over the first hp.k_anneal of the steps."""
    share = min(1.0, step / (hp.steps * hp.k_anneal)) if hp.k_anneal else 1.0
    return int(hp.k + (1 - share) * max(0, min(hp.d_in, hp.d_sae) - hp.k))


def use_bfloat16(dtype, device):
    """Whether matrix products run in bfloat16: where `dtype` says so, or is auto and the device has units for it."""
    if dtype == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return cuda or (device.type == "cpu" and any(unit in cpu_flags() for unit in ("amx_bf16", "avx512_bf16")))
    return dtype == "bfloat16"


def cpu_flags():
    """The processor's instruction sets, where the system tells them (Linux)."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


class Trainer:
    """One SAE in training: weights, Adam's moments, counters, metrics. Everything a checkpoint holds."""

    def __init__(self, hp, first_batch, device="cpu"):
        self.hp, self.device = hp, torch.device(device)
        self.sae = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k)
        initialise(self.sae, hp, first_batch.cpu())
        for bias in (self.sae.b_enc, self.sae.b_dec):
            bias.requires_grad_(hp.biases)
        self.sae.to(self.device).train()
        # W_enc's transpose, in the same memory: row-major, as torch's fused Adam likes it (else it copies the gradient)
        self.W_enc_rows = nn.Parameter(self.sae.W_enc.detach().T)
        trained = [self.W_enc_rows, *(p for p in (self.sae.W_dec, self.sae.b_enc, self.sae.b_dec) if p.requires_grad)]
        self.optimizer = torch.optim.Adam(trained, lr=hp.lr, fused=True)
        self.bfloat16 = use_bfloat16(hp.dtype, self.device)
        self.step = 0
        self.inputs_since_fired = torch.zeros(hp.d_sae, dtype=torch.long, device=self.device)
        self.metrics = []  # the lines of metrics.jsonl

    def train_step(self, x):
        """One update on x [B, d_in], on the trainer's device. Raises RunError where the loss is not finite."""
        hp, sae = self.hp, self.sae
        self.optimizer.param_groups[0]["lr"] = learning_rate(hp, self.step)
        # Whether any latent is dead is known on the device only; asking at log steps is often enough
        any_dead = hp.arch != "relu" and hp.aux and self.metrics and self.metrics[-1]["dead"]
        dead = self.inputs_since_fired >= hp.dead_after if any_dead else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, parts = total_loss(sae, hp, x, annealed_k(hp, self.step), dead)
        loss.backward()
        # The usual practice for the TopK family; the study's ReLU SAEs are rescaled after the step and no more. Note
        # that it removes the L2 penalty's gradient on the decoder too, leaving the penalty on the encoder alone.
        if hp.unit_norm and hp.arch != "relu":
            remove_parallel_gradient(sae)
        if hp.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), hp.clip)
        self.W_enc_rows.grad = sae.W_enc.grad.T
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.W_enc.grad = None
        if hp.unit_norm:
            rescale_decoder(sae)

        self.inputs_since_fired += len(x)
        self.inputs_since_fired.masked_fill_(parts["fired"] > 0, 0)
        if hp.arch in ("batchtopk", "matryoshka"):
            self.update_threshold(parts["acts"])
        self.step += 1
        if self.step % LOG_EVERY == 0 or self.step == hp.steps:
            self.log(x, loss, parts)

    def update_threshold(self, acts):
        """The smallest activation that batchtopk keeps, as a running mean from threshold_start on."""
        start = min(self.hp.threshold_start, self.hp.steps // 2)  # short runs need a threshold too
        if self.step < start:
            return
        smallest = torch.where(acts > 0, acts, torch.inf).min().float()
        smallest = torch.where(smallest.isfinite(), smallest, self.sae.threshold)  # a batch may keep nothing
        self.sae.threshold.lerp_(smallest, 1.0 if self.step == start else 1 - self.hp.threshold_beta)

    @torch.no_grad()
    def log(self, x, loss, parts):
        error, variance = squared_error(parts["x_hat"], x, "sum"), squared_error(x.mean(0), x, "sum")
        row = {
            "step": self.step,
            "loss": loss.item(),
            "recon": parts["recon"].item(),
            "l0": parts["fired"].sum().item() / len(x),
            "fve": 1 - (error / variance.clamp(min=1e-12)).item(),
            "penalty": parts["penalty"].item(),
            "dead": int((self.inputs_since_fired >= self.hp.dead_after).sum()),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.metrics.append(row)
        self.check_finite(row["loss"])

    def check_finite(self, loss=0.0):
        """Raise RunError where the loss or a weight is not a finite number."""
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in self.sae.parameters())):
            raise RunError(f"the loss is not finite at step {self.step}: lower --lr, --l1 or --l2")

    def save_checkpoint(self, folder, stream_state=None):
        """Write everything that `resume` needs to go on as if nothing had happened."""
        self.check_finite()  # resuming from weights that are not numbers would fail for ever
        state = {"hparams": asdict(self.hp), "step": self.step, "metrics": self.metrics}
        state |= {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"inputs_since_fired": self.inputs_since_fired, "stream": stream_state or {}}
        with replacing(make_folder(folder) / "checkpoint.pt") as path:
            torch.save(state, path)
        self.write_metrics(folder)

    def resume(self, folder):
        """Go on from the checkpoint in `folder`, if there is one, and return the state of the stream at that step.

        Raises UsageError where the checkpoint is unusable.
        """
        path = Path(folder) / "checkpoint.pt"
        if not path.exists():
            return {}
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if changed := difference(state["hparams"], self.hp):
                raise UsageError(f"{path} is of a run with {changed}: delete it")
            self.sae.load_state_dict(state["sae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.inputs_since_fired.copy_(state["inputs_since_fired"])
            self.step, self.metrics = int(state["step"]), list(state["metrics"])
            shapes = [moment.shape for p in self.optimizer.state.values() for moment in (p["exp_avg"], p["exp_avg_sq"])]
            trained = self.optimizer.param_groups[0]["params"]
            if self.step > self.hp.steps or (shapes and shapes != [p.shape for p in trained for _ in range(2)]):
                raise ValueError("its step or its moments do not fit this run")
            return state["stream"]
        except DAMAGE as error:
            raise UsageError(f"{path} is damaged ({first_line(error)}): delete it to start over") from None

    def write_metrics(self, folder):
        with replacing(Path(folder) / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.metrics))

    def finish(self, folder, metadata, scale=1.0):
        """Write the trained SAE. The run counts as complete once hparams.json says so, which comes last.

        It was trained on x / scale; the SAE that is saved takes x.
        """
        self.check_finite()
        with torch.no_grad():
            for shift in (self.sae.b_enc, self.sae.b_dec, self.sae.threshold):
                shift *= scale
        self.sae.save(folder, metadata)
        self.write_metrics(folder)
        write_hparams(folder, self.hp, complete=True, bfloat16=self.bfloat16)
        (Path(folder) / "checkpoint.pt").unlink(missing_ok=True)


def fit(trainers, stream, stop, stream_state=dict):
    """Train all of {folder: Trainer} on the same stream of batches x [B, d_in] until each has had its steps.

    The stream starts at the step of the one that is furthest behind; others wait there. Checkpoints are written
    every CHECKPOINT_SECONDS (less often where that would take over a twentieth of the time), and before the
    RunError that answers `stop` (an event, see stop_signal); `stream_state()` goes into them, for the caller to
    start the stream from again.
    """
    step = min(trainer.step for trainer in trainers.values())
    steps = max(trainer.hp.steps for trainer in trainers.values())
    name = next(iter(trainers)).name if len(trainers) == 1 else f"{len(trainers)} SAEs"
    due = time.monotonic() + CHECKPOINT_SECONDS
    with tqdm(total=steps, initial=step, desc=name, unit="step") as progress:
        while step < steps:
            x = next(stream)
            for trainer in trainers.values():
                if trainer.step == step < trainer.hp.steps:
                    trainer.train_step(x)
            step += 1
            progress.update()
            row = next(iter(trainers.values())).metrics[-1:]
            if row and row[0]["step"] == step:
                progress.set_postfix_str("loss {loss:.4f} fve {fve:.3f} l0 {l0:.0f}".format(**row[0]))
            stopping = stop.is_set()
            if stopping or time.monotonic() > due:
                start = time.monotonic()
                for folder, trainer in trainers.items():
                    if trainer.step == step:  # one that waits has its own, of a later place in the stream
                        trainer.save_checkpoint(folder, stream_state())
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - start))
            if stopping:
                raise RunError(f"interrupted at step {step} of {name}: the same command goes on from there")


# ---------------------------------------------------------------------------------------------------
# Run folders


def write_hparams(folder, hp, complete, bfloat16):
    """hparams.json: the settings, whether training is complete, and what it ran on."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        commit = None
    ran_on = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git_commit": commit,
        "matrix_products": "bfloat16" if bfloat16 else "float32",
        "threads": torch.get_num_threads(),
    }
    write_json(make_folder(folder) / "hparams.json", {"hparams": asdict(hp), "complete": complete, "ran_on": ran_on})


def is_complete(folder, hp):
    """Whether `folder` holds the finished run of hp. Raises UsageError where it holds another one."""
    path = Path(folder) / "hparams.json"
    if not path.exists():
        return False
    found = read_json(path)
    if changed := difference(read_hparams(folder), hp):
        raise UsageError(f"{folder} holds a run with {changed}: give another --out, or delete that folder")
    return bool(found.get("complete")) and (Path(folder) / "sae_weights.safetensors").exists()


def read_hparams(folder):
    """The settings in a run folder's hparams.json, a dict. Raises UsageError.

    A setting that the file lacks has its default, so that a fork with a new one keeps its finished runs.
    """
    path = Path(folder) / "hparams.json"
    hparams = read_json(path).get("hparams")
    if not isinstance(hparams, dict):
        raise UsageError(f"{path}: has no settings in it: delete it or the folder it is in")
    return asdict(Hparams()) | hparams


def difference(found, hp):
    """In words, how the settings found in a file differ from hp; "" where they do not."""
    found, wanted = asdict(Hparams()) | found, asdict(hp)
    names = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    return ", ".join(f"{flag(name)} {found.get(name)} instead of {wanted.get(name)}" for name in names)


def load(folder):
    """Read an SAE from `folder`, in eval mode, float32, on the CPU; `.metadata` says where it came from.

    Takes SAELens' layout (cfg.json, sae_weights.safetensors; architectures standard, topk, jumprelu), and that
    of dictionary_learning (config.json, ae.pt). Whatever such a file may scale or shift is folded into the
    weights, so `encode` and `decode` give what the library of its origin gives. Raises UsageError.
    """
    folder = Path(folder)
    try:
        if (folder / "cfg.json").exists():
            arch, k, tensors, metadata = read_saelens(folder)
        elif (folder / "ae.pt").exists():
            arch, k, tensors, metadata = read_dictionary_learning(folder)
        else:
            hint = "; its training is unfinished" if (folder / "checkpoint.pt").exists() else ""
            raise UsageError(f"{folder}: no SAE here (neither cfg.json and sae_weights.safetensors, nor ae.pt){hint}")
        d_in, d_sae = tensors["W_enc"].shape
        if arch == "topk" and not 1 <= k <= d_sae:
            raise UsageError(f"{folder}: a TopK SAE of {d_sae} latents with k = {k}")
        sae = SAE(d_in, d_sae, arch, k)
        threshold = tensors.pop("threshold", torch.zeros(()))
        tensors["threshold"] = threshold.float().clamp(min=0).expand(d_sae).clone()
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        if not all(tensor.norm().isfinite() for tensor in tensors.values()):
            raise UsageError(f"{folder}: its weights are not finite numbers")
        sae.load_state_dict(tensors)
    except pickle.UnpicklingError:
        raise UsageError(f"{folder / 'ae.pt'}: holds more than tensors, so it was not opened") from None
    except DAMAGE as error:
        raise UsageError(f"{folder}: not a whole SAE ({type(error).__name__}: {first_line(error)})") from None
    sae.metadata = metadata
    return sae.eval()


def read_saelens(folder):
    cfg = read_json(folder / "cfg.json")
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    names = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    arch = names.get(cfg.get("architecture"))
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"  # before SAELens 6
    if arch == "relu" and activation == "topk":
        arch = "topk"
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k") or metadata.get("k") or 0
    if arch is None or activation not in ("relu", "topk"):
        raise UsageError(f"{folder}: architecture {cfg.get('architecture')} with {activation} is not supported")
    normalize = cfg.get("normalize_activations") or "none"
    if normalize not in ("none", "expected_average_only_in"):
        raise UsageError(f"{folder}: normalize_activations {normalize} depends on the input, so it cannot be folded")
    weights = load_file(folder / "sae_weights.safetensors")
    tensors = {name: weights[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if arch == "jumprelu":
        tensors["threshold"] = weights["threshold"]
    if cfg.get("rescale_acts_by_decoder_norm"):  # latents compete by their effect on x_hat
        norm = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"] *= norm
        tensors["b_enc"] *= norm
        tensors["W_dec"] /= norm.clamp(min=1e-12)[:, None]
    if not cfg.get("apply_b_dec_to_input", True):
        tensors["b_enc"] += tensors["b_dec"] @ tensors["W_enc"]
    if arch == "jumprelu" and metadata.get("arch") in ("batchtopk", "matryoshka"):
        arch = metadata["arch"]
    return arch, int(k), tensors, metadata


def read_dictionary_learning(folder):
    trainer = read_json(folder / "config.json")["trainer"]
    kind = trainer.get("dict_class")
    archs = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk"}
    archs |= {"MatryoshkaBatchTopKSAE": "matryoshka", "JumpReluAutoEncoder": "jumprelu"}
    if kind not in archs:
        raise UsageError(f"{folder}: dict_class {kind} is none of {', '.join(archs)}")
    # weights_only: a pickle may hold code, and this file may come from anyone
    state = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    if "encoder.weight" in state:  # nn.Linear keeps the transpose
        tensors = {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T}
        b_dec = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        tensors |= {"b_enc": state["encoder.bias"], "b_dec": state[b_dec]}
    else:
        tensors = {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):  # these do not centre their input
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    if archs[kind] not in ("relu", "topk"):
        tensors["threshold"] = state["threshold"]
    metadata = {name: trainer[name] for name in ("seed", "lm_name", "layer", "submodule_name") if name in trainer}
    return archs[kind], int(state.get("k", 0)), tensors, metadata


# ---------------------------------------------------------------------------------------------------
# What every script needs: files that appear whole, Ctrl-C between two steps, one-line errors


@contextmanager
def replacing(path):
    """Yield a temporary path that becomes `path` at the end, so that nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write into one folder
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"cannot write {path} ({first_line(error)}): make room, then run the same command") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in a file. Raises UsageError."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({first_line(error)}): delete it or the folder it is in") from None


def make_folder(folder):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder} ({error.strerror})") from None
    return Path(folder)


def check_writable(folder, option):
    """Raise UsageError now, not after an hour's training, where `folder` cannot be written or made."""
    folder = Path(folder).absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise UsageError(f"{option} {folder}: {error.strerror}; give another folder") from None
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UsageError(f"{option} {folder}: nothing can be written in {existing}; give another folder")


def pick_device(name):
    """The torch device of --device: "auto" is CUDA where there is one, else the CPU. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"--device {name}: not usable here ({first_line(error)}); try --device cpu") from None


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises UsageError, for one line instead of a page."""

    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


@contextmanager
def stop_signal():
    """Yield an event that Ctrl-C or SIGTERM sets, for a loop to stop between two steps. A second one kills."""
    stop = threading.Event()

    def request(number, frame):
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def tune_cpu():
    """Two settings of the process that make training on a CPU faster; to be called before anything else."""
    # Under Adam an L2 penalty takes a latent that never fires to zero, through denormal numbers, on which a CPU
    # is several times slower. Set before the first parallel operation, so that every thread has it.
    torch.set_flush_denormal(True)
    # glibc hands a large block back to the system as soon as a tensor is freed, and the next step gets it again,
    # page by page: up to a quarter of a TopK step. It shall keep what it has. (Other systems have no mallopt.)
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the system
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back


def run_command(main):
    """Run a script's main; an error that the user can act on ends with one line and its exit status."""
    tune_cpu()
    try:
        main()
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: out of GPU memory ({first_line(error)}): give a smaller batch or fewer SAEs", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        sys.exit(1)
