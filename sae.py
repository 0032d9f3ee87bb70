"""Sparse autoencoders (SAEs) with weight regularization: architectures, penalties, loss, training.

After "Stable and Steerable Sparse Autoencoders with Weight Regularization" (arXiv:2603.04198). An
SAE explains an activation x of a network by a few of many features. Train two SAEs from different
seeds and they find different features, unless a penalty on the weights makes the same ones recur.
Read down to the banner "Machinery": that is the whole method. Below it stands what makes the same
method fast, safe to interrupt and readable by other programs.

    x = ...                                              # activations [N, 512], from anywhere
    hp = Hparams(d_in=512, d_sae=4096, k=32, l2=1e-5, lr=1e-3, warmup=100, steps=2000)
    sae = train_sae(hp, Rows(x))
    acts = sae.encode(x[:8])                             # [8, 4096], 32 at most in a row are not 0
    sae.save("runs/mine")                                # SAELens opens it, and SAE.load does

Notation, as in the paper: d_in the width of the input, d_sae the number of latents (features), B
the number of inputs in a batch.

    pre_acts = (x - b_dec) @ W_enc + b_enc     [B, d_sae]    W_enc [d_in, d_sae], b_enc [d_sae]
    acts     = activation(pre_acts)            [B, d_sae]    few are not zero
    x_hat    = acts @ W_dec + b_dec            [B, d_in]     W_dec [d_sae, d_in], b_dec [d_in]
    loss     = |x_hat - x|^2 + l1 * sum |W| + l2 * sum W^2 + sparsity and auxiliary terms,
               where the sums are over all entries of both matrices, W_enc and W_dec

Feature i is the encoder column W_enc[:, i] and the decoder row W_dec[i].
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# The SAE


class SAE(nn.Module):
    """A sparse autoencoder of one of the architectures in ARCHS.

    In train mode, batchtopk and matryoshka choose the active latents over the whole batch. In eval
    mode they compare each latent with `threshold` instead, so that what one input activates does
    not depend on which others happen to be in its batch.
    """

    def __init__(self, d_in, d_sae, arch="topk", k=0):
        super().__init__()
        self.d_in, self.d_sae, self.arch, self.k = d_in, d_sae, arch, k
        # The encoder is kept transposed: a feature is a row of it, as it is of W_dec.
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for tensor in ARCHS[arch].tensors:
            values = torch.full((d_sae,), tensor.first_value)
            if tensor.trained:
                self.register_parameter(tensor.name, nn.Parameter(values))
            else:
                self.register_buffer(tensor.name, values)
        self.group_sizes = group_sizes(arch, d_sae)
        self.metadata = {}  # of a loaded SAE: what its file says about it

    @property
    def W_enc(self):
        """The encoder as the paper writes it, [d_in, d_sae]."""
        return self.encoder.T

    def pre_acts(self, x):
        """(x - b_dec) @ W_enc + b_enc, from x [B, d_in] to [B, d_sae]."""
        return F.linear(x - self.b_dec, self.encoder, self.b_enc)

    def activate(self, pre_acts, k):
        """From pre_acts [B, d_sae] to acts of the same shape, by the rule of the architecture."""
        arch = ARCHS[self.arch]
        rule = arch.train_rule if self.training else arch.eval_rule
        return rule(self, pre_acts, k)

    def encode(self, x):
        """The activations of all features, from x [B, d_in] to acts [B, d_sae]."""
        return self.activate(self.pre_acts(x), self.k)

    def decode(self, acts):
        """acts @ W_dec + b_dec, from acts [B, d_sae] to x_hat [B, d_in]."""
        return acts @ self.W_dec + self.b_dec

    def decode_prefixes(self, acts):
        """The reconstructions [B, d_in] by each nested prefix of the latents; the last is x_hat.

        Matryoshka's prefixes are 1/32, 3/32, 7/32, 15/32 and all of the latents. Each must
        reconstruct by itself, so that general features come first (Bussmann et al. 2025,
        arXiv:2503.17547). Every other architecture has one group, and so one prefix.
        """
        groups = zip(acts.split(self.group_sizes, dim=-1), self.W_dec.split(self.group_sizes))
        return running_sums(self.b_dec, (a @ W for a, W in groups))

    def forward(self, x):
        """The reconstruction of x [B, d_in], of the same shape."""
        return self.decode(self.encode(x))

    def save(self, folder, metadata=None):
        """Write `folder` as a SAELens SAE in float32. Raises UserError. See write_saelens."""
        write_saelens(self, folder, metadata or {})

    @staticmethod
    def load(folder):
        """Read an SAE of ours, SAELens, dictionary_learning or sparsify. See load_sae."""
        return load_sae(folder)


def running_sums(start, parts):
    """[start + part 1, start + part 1 + part 2, ...], a list of tensors."""
    total, sums = start, []
    for part in parts:
        total = total + part
        sums.append(total)
    return sums


# --------------------------------------------------------------------------------------------------
# The paper's subject: penalties on the weights of encoder and decoder


def sum_of_squares(W):
    return W.norm() ** 2  # the same as W.square().sum(), with no temporary matrix


def sum_of_absolutes(W):
    return W.abs().sum()


def both(function):
    """The penalty function(W) of encoder plus that of decoder, as in the paper.

    W is [d_sae, d_in], with a feature in each row, for the encoder as well.
    """
    return lambda sae: function(sae.encoder) + function(sae.W_dec)


def encoder_only(function):
    """The penalty function(W) of the encoder alone."""
    return lambda sae: function(sae.encoder)


def decoder_only(function):
    """The penalty function(W) of the decoder alone."""
    return lambda sae: function(sae.W_dec)


# The name of a penalty: a function of the SAE that returns a scalar tensor. A new penalty is one
# line here and one setting of the same name in Hparams, which is its weight.
PENALTIES = {
    "l1": both(sum_of_absolutes),
    "l2": both(sum_of_squares),
    # The study's variants on MNIST: the mean of |W|, and the Frobenius norm, which is not squared.
    "l1_mean": both(lambda W: W.abs().mean()),
    "l2_norm": both(torch.norm),
}


def weight_penalty(sae, hp):
    """The sum of all penalties, each times its weight: a scalar tensor. Biases are not penalised.

    It is part of the loss, so Adam rescales its gradient together with that of the reconstruction.
    AdamW's weight decay bypasses that rescaling, and is a different regularizer.
    """
    penalty = sae.W_dec.new_zeros(())
    for name, function in PENALTIES.items():
        weight = getattr(hp, name)
        if weight:
            penalty = penalty + weight * function(sae)
    return penalty


# --------------------------------------------------------------------------------------------------
# Architectures. A rule takes (sae, pre_acts [B, d_sae], k) and gives acts of the same shape.


def relu(sae, pre_acts, k):
    """Keep what is positive."""
    return pre_acts.relu()


def topk(sae, pre_acts, k):
    """Keep the k largest of each row, where positive (Gao et al. 2024, arXiv:2406.04093)."""
    return keep_largest(pre_acts, k)


def batchtopk(sae, pre_acts, k):
    """Keep the k * B largest of the whole batch, so that one input may use more than another
    (Bussmann et al. 2024, arXiv:2412.06410)."""
    return keep_largest(pre_acts.flatten(), k * len(pre_acts)).view_as(pre_acts)


def jumprelu(sae, pre_acts, k):
    """Keep what is positive and above the latent's threshold (Rajamanoharan et al. 2024,
    arXiv:2407.14435). Also the rule of batchtopk for an input that comes without a batch."""
    return pre_acts.relu() * Above.apply(pre_acts, sae.threshold)


def keep_largest(pre_acts, k):
    """Keep the k largest of each row of pre_acts [..., n], where positive; zero the rest."""
    index = largest(pre_acts, k)  # [..., k], the indices that torch.topk finds
    return torch.zeros_like(pre_acts).scatter(-1, index, pre_acts.gather(-1, index).relu())


def sum_of_acts(sae, pre_acts, acts):
    """What ReLU's sparsity term adds up, [B, d_sae]: the activations, their L1 norm."""
    return acts


def number_of_acts(sae, pre_acts, acts):
    """What JumpReLU's sparsity term adds up, [B, d_sae]: 1 for an active latent, their L0 norm."""
    return Above.apply(pre_acts, sae.threshold)


class OwnTensor(NamedTuple):
    """A tensor [d_sae] that an architecture has and others lack."""

    name: str  # as an attribute of the SAE
    first_value: float
    trained: bool  # whether Adam trains it; if not, it is a buffer that Trainer updates
    scales_with_x: bool  # whether it must double when all inputs double
    saelens_name: str  # in SAELens' files


@dataclass(frozen=True)
class Architecture:
    """Everything that is particular to an architecture. No other code asks which one it has."""

    saelens: str  # its name in SAELens' files
    train_rule: Callable  # from pre_acts to acts in training
    eval_rule: Callable  # the same for inputs that come one by one
    settings: tuple  # those of Hparams that concern it and not every architecture
    chosen_from: str = ""  # "row": keeps k of each input; "batch": k * B of all; "": neither
    sparsity: Callable | None = None  # (sae, pre_acts, acts) -> [B, d_sae], which its term sums
    sparsity_weight: str = ""  # the setting that is the weight of that term
    groups: tuple = ()  # nested groups before the last one, as shares of d_sae
    tensors: tuple = ()  # OwnTensors


OF_TOPK = ("k", "k_anneal", "aux")
# A running mean of the smallest activation that a batch keeps: see Trainer.update_threshold.
AVERAGED = OwnTensor("threshold", 0.0, trained=False, scales_with_x=True, saelens_name="threshold")
BATCHTOPK = Architecture(
    saelens="jumprelu",  # which it is at inference
    train_rule=batchtopk,
    eval_rule=jumprelu,
    settings=(*OF_TOPK, "threshold_start", "threshold_beta"),
    chosen_from="batch",
    tensors=(AVERAGED,),
)
ARCHS = {
    "relu": Architecture(
        saelens="standard",
        train_rule=relu,
        eval_rule=relu,
        settings=("sparsity",),
        sparsity=sum_of_acts,
        sparsity_weight="sparsity",
    ),
    "topk": Architecture(
        saelens="topk",
        train_rule=topk,
        eval_rule=topk,
        settings=OF_TOPK,
        chosen_from="row",
    ),
    "batchtopk": BATCHTOPK,
    "matryoshka": replace(BATCHTOPK, groups=(1 / 32, 1 / 16, 1 / 8, 1 / 4)),
    "jumprelu": Architecture(
        saelens="jumprelu",
        train_rule=jumprelu,
        eval_rule=jumprelu,
        settings=("l0_weight",),
        sparsity=number_of_acts,
        sparsity_weight="l0_weight",
        tensors=(AVERAGED._replace(first_value=0.01, trained=True),),
    ),
}


def group_sizes(arch, d_sae):
    """How many latents are in each nested group: the shares of the table, then the rest."""
    sizes = [int(d_sae * share) for share in ARCHS[arch].groups]
    return [*sizes, d_sae - sum(sizes)]


# --------------------------------------------------------------------------------------------------
# The loss


class Forward(NamedTuple):
    """What a forward pass of training finds on x [B, d_in]."""

    pre_acts: torch.Tensor  # [B, d_sae]
    acts: torch.Tensor  # [B, d_sae]; fast_pass, where k is fixed, has only those kept, [k * B]
    prefixes: list  # reconstructions [B, d_in] by each nested prefix, the last one being x_hat
    fired: torch.Tensor  # [d_sae], on how many inputs each latent was active
    revived: torch.Tensor | None  # [B, d_in], the dead latents' contribution, where there are any


def dense_pass(sae, x, k, dead=None):
    """The forward pass as the formulas say it, on x [B, d_in].

    `dead` [d_sae] marks latents that have not fired for a long time. For each input the d_in / 2
    of them with the largest pre_acts are decoded too, into `revived`, for the auxiliary loss.
    """
    return forward_from(sae, sae.pre_acts(x), k, dead)


def forward_from(sae, pre_acts, k, dead):
    """The forward pass of dense_pass, once pre_acts [B, d_sae] are there."""
    acts = sae.activate(pre_acts, k)
    revived = None
    if dead is not None:
        revived = keep_largest(torch.where(dead, pre_acts, 0), n_revived(sae)) @ sae.W_dec
    return Forward(pre_acts, acts, sae.decode_prefixes(acts), (acts > 0).sum(0), revived)


def n_revived(sae):
    """How many dead latents take part in the auxiliary loss: d_in / 2, as Gao et al. have it."""
    return max(1, min(sae.d_in // 2, sae.d_sae))


def squared_error(x_hat, x, reduction):
    """The squared error, averaged over the batch, and summed or averaged over d_in."""
    error = (x_hat - x).square()
    return error.sum(1).mean() if reduction == "sum" else error.mean()


def auxiliary_loss(revived, residual, dead):
    """The error of dead latents at reconstructing what the others missed (arXiv:2406.04093, A.2).

    The squared error of `revived` [B, d_in] on the residual x - x_hat [B, d_in], in units of the
    residual's variance; zero where no latent is dead.
    """
    variance = squared_error(residual.mean(0), residual, "sum")
    return dead.any() * squared_error(revived, residual, "sum") / variance.clamp(min=1e-12)


class Loss(NamedTuple):
    """The training loss, the two of its terms that are logged, and the pass they came from."""

    total: torch.Tensor  # what is minimised, a scalar as the next two
    recon: torch.Tensor  # the reconstruction error, averaged over the nested prefixes
    penalty: torch.Tensor  # l1 * sum |W| + l2 * sum W^2, as weight_penalty returns it
    forward: Forward


def total_loss(sae, hp, x, k, dead=None, dense=False):
    """The training loss on x [B, d_in]: reconstruction, penalty, sparsity and auxiliary terms.

    `dead` [d_sae] marks the latents for the auxiliary loss, None if there are none. With `dense`
    the forward pass is dense_pass; else it is fast_pass (below the banner), which gives the same.
    """
    forward = dense_pass(sae, x, k, dead) if dense else fast_pass(sae, x, k, dead)
    # One error for every architecture but Matryoshka, which averages those of its prefixes.
    errors = [squared_error(x_hat, x, hp.reduction) for x_hat in forward.prefixes]
    recon = sum(errors) / len(errors)
    penalty = weight_penalty(sae, hp)
    total = recon + penalty
    arch = ARCHS[sae.arch]
    if arch.sparsity is not None:
        active = arch.sparsity(sae, forward.pre_acts, forward.acts)  # [B, d_sae]
        per_input = active.sum(1).mean() if hp.reduction == "sum" else active.mean()
        total = total + getattr(hp, arch.sparsity_weight) * per_input
    if dead is not None:
        residual = (x - forward.prefixes[-1]).detach()  # dead latents must not move the others
        total = total + hp.aux * auxiliary_loss(forward.revived, residual, dead)
    return Loss(total, recon, penalty, forward)


# --------------------------------------------------------------------------------------------------
# Settings. Each is named here and nowhere else: a field is also a flag of the command lines, with
# this help and these bounds. The defaults are the study's for Pythia-70M.


def setting(default, group, text, choices=(), low=0, high=sys.float_info.max, stream=False):
    """A field of Hparams: its default, its group of flags, its help, and what it may be.

    `stream` marks what decides the stream of batches. The SAEs of one command are trained on the
    same stream, so such a setting has one value there; every other one may be swept.
    """
    limits = {"choices": choices, "low": low, "high": high, "stream": stream}
    return field(default=default, metadata={"group": group, "help": text, **limits})


DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class Hparams:
    """All that decides how one SAE turns out. Raises UserError where a value is out of its range.

    A setting that does not apply to the architecture is reset to its default: a sweep over k then
    trains one ReLU SAE, not several equal ones.
    """

    arch: str = setting("topk", "SAE", "architecture", choices=tuple(ARCHS))
    d_in: int = setting(512, "SAE", "width of the input", low=1)
    d_sae: int = setting(16_384, "SAE", "number of latents", low=1, high=2**31)
    k: int = setting(40, "SAE", "latents active per input, or on average (batchtopk)", low=1)
    sparsity: float = setting(0.0, "SAE", "weight of the L1 norm of activations (relu)")
    l0_weight: float = setting(3e-3, "SAE", "weight of the number of active latents (jumprelu)")
    l1: float = setting(0.0, "penalties", "weight of the sum of |W|; the study has 1e-4")
    l2: float = setting(0.0, "penalties", "weight of the sum of W^2; the study 1e-4, MNIST 1e-5")
    l1_mean: float = setting(0.0, "penalties", "weight of the mean |W|; the study, MNIST: 1e-3")
    l2_norm: float = setting(0.0, "penalties", "weight of the norm |W|; its MNIST notebook: 1e-5")
    penalty_from: float = setting(0.0, "penalties", "share of steps from which they act", high=1)
    tied_init: bool = setting(True, "SAE", "start with unit decoder rows, encoder as transpose")
    unit_norm: bool = setting(False, "SAE", "keep decoder rows at norm 1")
    biases: bool = setting(True, "SAE", "train b_enc and b_dec, else both stay 0")
    reduction: str = setting("sum", "optimiser", "of errors over d_in", choices=("sum", "mean"))
    aux: float = setting(1 / 32, "SAE", "weight of the auxiliary loss for dead latents (topk)")
    dead_after: int = setting(10_000_000, "SAE", "inputs unfired to count as dead", high=2**62)
    lr: float = setting(5e-5, "optimiser", "learning rate of Adam", low=1e-30)
    batch_size: int = setting(2048, "optimiser", "inputs a step", low=1, high=2**31, stream=True)
    steps: int = setting(24_414, "optimiser", "training steps, of 50M tokens", low=1, high=2**40)
    warmup: int = setting(1000, "optimiser", "steps of linear warm-up from 0")
    decay: float = setting(0.2, "optimiser", "last share of steps, lr falling to 0", high=1)
    clip: float = setting(1.0, "optimiser", "clip the gradient's norm to this; 0: never")
    k_anneal: float = setting(0.01, "SAE", "share of steps in which k falls from d_in", high=1)
    threshold_start: int = setting(1000, "SAE", "step from which the threshold is averaged")
    threshold_beta: float = setting(0.99, "SAE", "memory of it; 0.999 lags in short runs", high=1)
    seed: int = setting(0, "SAE", "of the initial weights", high=2**63 - 1)
    data_seed: int = setting(0, "data", "of the order of the data", high=2**40, stream=True)
    data: str = setting("", "data", "what is trained on", stream=True)
    data_hash: str = setting("", "data", "what tells its contents apart, if known", stream=True)
    model: str = setting("", "data", "language model: hub name or folder", stream=True)
    layer: int = setting(0, "data", "block whose output is read, from 0", stream=True)
    context: int = setting(0, "data", "tokens that the model reads together", stream=True)
    dtype: str = setting("auto", "optimiser", "of matrix products", choices=DTYPES, stream=True)
    length: str = setting("", "optimiser", "of the training in words; the steps say the same")

    def __post_init__(self):
        for one in fields(self):
            value, limits = getattr(self, one.name), one.metadata
            if limits["choices"] and value not in limits["choices"]:
                choices = ", ".join(limits["choices"])
                raise UserError(f"{flag(one.name)} {value}: choose from {choices}")
            if one.type in (int, float) and not limits["low"] <= value <= limits["high"]:
                bounds = f"from {limits['low']:g} to {limits['high']:g}"
                raise UserError(f"{flag(one.name)} {value}: give a number {bounds}")
            if not applies(one.name, self.arch):
                setattr(self, one.name, one.default)
        if applies("k", self.arch) and self.k > self.d_sae:
            raise UserError(f"--k {self.k}: give at most --d-sae, which is {self.d_sae}")
        if 0 in group_sizes(self.arch, self.d_sae):
            raise UserError(f"--d-sae {self.d_sae}: too few for the nested groups of {self.arch}")


def applies(name, arch):
    """Whether a setting applies to an architecture: if it lists it, or if no architecture does."""
    listed = [other for other, table in ARCHS.items() if name in table.settings]
    return arch in listed or not listed


# --------------------------------------------------------------------------------------------------
# The training step

# Both need a number from the device, and so make the CPU wait for it: not at every step.
LOG_EVERY = 100  # steps between lines of metrics.jsonl
LOOK_FOR_DEAD_EVERY = 100  # steps between checks whether any latent is dead


class Trainer:
    """One SAE in training: weights, Adam's moments, counters, metrics; what a checkpoint holds."""

    def __init__(self, hp, device="cpu"):
        self.hp, self.device = hp, torch.device(device)
        self.sae = SAE(hp.d_in, hp.d_sae, hp.arch, hp.k)
        initialise(self.sae, hp)
        for bias in (self.sae.b_enc, self.sae.b_dec):
            bias.requires_grad_(hp.biases)
        self.sae.to(self.device).train()
        trained = [p for p in self.sae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=hp.lr, fused=True)
        self.bfloat16 = use_bfloat16(hp.dtype, self.device)
        self.step = 0
        self.inputs_since_fired = torch.zeros(hp.d_sae, dtype=torch.long, device=self.device)
        self.any_dead = False
        self.metrics = []  # the lines of metrics.jsonl

    def train_step(self, x):
        """One update on x [B, d_in]: activations divided by the source's scale, on the device.

        Raises UserError where the loss is no longer a finite number.
        """
        hp, sae = self.hp, self.sae
        if self.step == 0 and hp.biases:
            # An SAE explains deviations from b_dec, so it starts in the middle of the data. This is
            # computed on the CPU, so that every device starts from the same numbers.
            sae.b_dec.data.copy_(geometric_median(x.cpu()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(hp, self.step)

        # Penalties need not act all the time: on language models the last fifth of training is
        # enough, and more features stay alive (--penalty-from 0.8). This is not in the paper.
        if self.step / hp.steps < hp.penalty_from:
            hp = replace(hp, **dict.fromkeys(PENALTIES, 0.0))

        # The loss. Weights stay in float32, while products may be of bfloat16 numbers.
        dead = self.inputs_since_fired >= hp.dead_after if self.any_dead else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = total_loss(sae, hp, x, annealed_k(hp, self.step), dead)

        # The update. The penalty is part of the loss, so its gradient is clipped and rescaled too.
        loss.total.backward()
        if hp.unit_norm:
            self.project_decoder_gradient()
        if hp.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), hp.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hp.unit_norm:
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True).clamp(min=1e-12)

        # What must be counted: latents that stay silent, and the threshold for inference.
        self.inputs_since_fired += len(x)
        self.inputs_since_fired.masked_fill_(loss.forward.fired > 0, 0)
        if applies("threshold_beta", hp.arch):
            self.update_threshold(loss.forward.acts.detach())
        self.step += 1
        if applies("aux", hp.arch) and hp.aux and self.step % LOOK_FOR_DEAD_EVERY == 0:
            self.any_dead = bool((self.inputs_since_fired >= hp.dead_after).any())
        if self.step % LOG_EVERY == 0 or self.step == hp.steps:
            self.log(x, loss)

    def project_decoder_gradient(self):
        """Remove from the gradient what would only change the norms of decoder rows.

        The TopK family does this where decoder rows have norm 1; the study's ReLU SAEs only rescale
        the rows after the step. It also removes the gradient of an L2 penalty on the decoder.
        """
        W_dec = self.sae.W_dec
        if applies("k", self.hp.arch) and W_dec.grad is not None:
            W_dec.grad -= (W_dec.grad * W_dec.data).sum(1, keepdim=True) * W_dec.data

    def update_threshold(self, acts):
        """The threshold of batchtopk at inference, one for all latents.

        A running mean, from threshold_start on, of the smallest act that a batch keeps.
        """
        start = min(
            self.hp.threshold_start, self.hp.steps // 2
        )  # so that a short run has a threshold too
        if self.step < start:
            return
        smallest = torch.where(acts > 0, acts, torch.inf).min().float()
        # A batch may keep nothing at all; then the mean stays where it is.
        smallest = torch.where(smallest.isfinite(), smallest, self.sae.threshold)
        weight = 1.0 if self.step == start else 1 - self.hp.threshold_beta
        self.sae.threshold.lerp_(smallest, weight)

    @torch.no_grad()
    def log(self, x, loss):
        """Append a line to the metrics; see the README for l0, fve and dead."""
        error = squared_error(loss.forward.prefixes[-1], x, "sum")
        variance = squared_error(x.mean(0), x, "sum").clamp(min=1e-12)
        row = {
            "step": self.step,
            "loss": loss.total.item(),
            "recon": loss.recon.item(),
            "l0": loss.forward.fired.sum().item() / len(x),
            "fve": 1 - (error / variance).item(),
            "penalty": loss.penalty.item(),
            "dead": int((self.inputs_since_fired >= self.hp.dead_after).sum()),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.metrics.append(row)
        check_finite(self, row["loss"])


@torch.no_grad()
def initialise(sae, hp):
    """Draw the weights from hp.seed, on the CPU, so that every device starts alike.

    Tied, a feature starts by reading what it writes: its encoder column is its decoder row. This
    holds for the first step only, after which both are free.
    """
    generator = torch.Generator().manual_seed(hp.seed)

    def kaiming_uniform(fan_in, fan_out):
        bound = math.sqrt(6 / fan_in)  # the gain of ReLU
        return torch.empty(fan_in, fan_out).uniform_(-bound, bound, generator=generator)

    W_dec = kaiming_uniform(hp.d_sae, hp.d_in)
    if hp.tied_init or hp.unit_norm:
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(W_dec)
    sae.W_enc.copy_(W_dec.T if hp.tied_init else kaiming_uniform(hp.d_in, hp.d_sae))


def geometric_median(x, steps=100, tolerance=1e-5):
    """The point [d_in] with the least summed distance to the rows of x [B, d_in].

    Weiszfeld's iteration: a weighted mean, with the weight 1 / (distance to the last estimate).
    """
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
        previous, median = median, (weight * x).sum(0) / weight.sum()
        if (median - previous).norm() < tolerance:
            break
    return median


def learning_rate(hp, step):
    """Linear warm-up from 0, then constant, then linear decay to 0."""
    warm = min(1.0, step / hp.warmup) if hp.warmup else 1.0
    left = (hp.steps - step) / (hp.steps * hp.decay) if hp.decay else 1.0
    return hp.lr * min(warm, left, 1.0)


def annealed_k(hp, step):
    """k at this step: from d_in down to hp.k over the first hp.k_anneal of the steps.

    With many latents active at first, hardly any of them dies for want of a gradient.
    """
    share = min(1.0, step / (hp.steps * hp.k_anneal)) if hp.k_anneal else 1.0
    return int(hp.k + (1 - share) * max(0, min(hp.d_in, hp.d_sae) - hp.k))


# --------------------------------------------------------------------------------------------------
# Training: SAEs, and a source of the activations that they learn to explain
#
# A source is any object with these six; Rows is one, Activations in train_pythia.py the other.
#   d_in                      the width of an activation
#   scale                     the number that activations are divided by, known once `batches` has
#                             begun; it makes their mean squared norm 1 (but is 1 for pixels)
#   batches(hp, step, state)  an endless iterator of x / scale, each [hp.batch_size, d_in], from
#                             step number `step` on; state is what state() gave at that step
#   state()                   what a checkpoint must hold to go on from here, a dict of tensors
#                             and numbers
#   held_out()                batches [B, d_in] of x itself that no training sees, maybe none
#   metadata                  what the SAE's file is to say about its origin, a dict

CHECKPOINT_SECONDS = 30  # between checkpoints, longer where writing one takes more than a second
HELD_OUT_BATCHES = 4  # on which a trained SAE is measured for the line that is printed about it


class Rows:
    """The source that serves the rows of a tensor x [N, d_in]: pixels, or cached activations.

    The order depends on hp.data_seed and the number of the epoch alone. All rows are served once an
    epoch, so that its last batch may be smaller. `scale` None makes the mean squared norm 1, as the
    study has it for language models; pixels have the scale 1. `held_out` [M, d_in] is kept apart.
    Raises UserError unless both are matrices of finite floating-point numbers.
    """

    def __init__(self, x, held_out=None, scale=None, metadata=None):
        self.x = torch.as_tensor(x)
        self.d_in = self.x.shape[-1]
        mean_square = mean_squared_norm(self.x, self.d_in)
        self.scale = math.sqrt(mean_square) if scale is None else scale
        self.test = self.x[:0]
        if held_out is not None:
            self.test = torch.as_tensor(held_out)
            mean_squared_norm(self.test, self.d_in)
        self.metadata = metadata or {}

    def batches(self, hp, step, state):
        per_epoch = math.ceil(len(self.x) / hp.batch_size)
        for epoch in itertools.count(step // per_epoch):
            generator = torch.Generator().manual_seed(hp.data_seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            for index in range(step % per_epoch, per_epoch):
                rows = order[index * hp.batch_size : (index + 1) * hp.batch_size]
                yield self.x[rows].float() / self.scale
            step = 0

    def state(self):
        return {}  # the step says it all

    def held_out(self):
        for start in range(0, len(self.test), 4096):
            yield self.test[start : start + 4096].float()


def mean_squared_norm(x, d_in):
    """The mean squared norm of the rows of x [N, d_in]. UserError unless they are finite floats."""
    if x.ndim != 2 or x.shape[1] != d_in or len(x) == 0 or not x.is_floating_point():
        kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise UserError(f"activations must be floating-point numbers [N, {d_in}], not {kind}")
    total = sum(part.double().square().sum().item() for part in x.split(65_536))
    if not math.isfinite(total) or total == 0:
        raise UserError("activations must be finite numbers, and not all zero")
    return total / len(x)


def train_sae(hp, source, device="auto"):
    """Train one SAE in memory and return it, in eval mode, on the CPU, for inputs as they are.

    Nothing is written: for a notebook. Raises UserError.
    """
    trainer = Trainer(hp, prepare([hp], source, device))
    batches = source.batches(hp, 0, {})
    for _ in tqdm(range(hp.steps), desc="training", unit="step"):
        trainer.train_step(next(batches).to(trainer.device))
    return finished_sae(trainer, source.scale)


def train(runs, source, device="auto"):
    """Train all SAEs of {folder: Hparams} on one stream, and save each in its folder.

    What is finished is not trained again, and what was interrupted goes on from its last checkpoint
    to the same weights, so the same call may always be repeated. An SAE that diverges is given up,
    and named when the others are finished. Raises UserError.
    """
    unfinished = {}
    for folder, hp in runs.items():
        if is_complete(folder, hp):
            remove_leftovers(folder)
        else:
            unfinished[Path(folder)] = hp
    if not unfinished:
        return
    device = prepare(list(unfinished.values()), source, device)
    trainers, states = {}, {}
    for folder, hp in unfinished.items():
        trainers[folder] = Trainer(hp, device)
        states[folder] = resume(trainers[folder], folder)
        write_hparams(trainers[folder], folder)
    # The language model costs far more than an SAE, so all SAEs share one stream. After an
    # interruption it starts at the smallest step of any SAE; those that are further ahead skip the
    # batches that they have seen.
    behind = min(trainers, key=lambda folder: trainers[folder].step)
    step = trainers[behind].step
    batches = source.batches(unfinished[behind], step, states[behind])
    held_out, diverged, total = None, [], max(hp.steps for hp in unfinished.values())
    title = behind.name if len(unfinished) == 1 else f"{len(unfinished)} SAEs"
    due = time.monotonic() + CHECKPOINT_SECONDS
    with tqdm(total=total, initial=step, desc=title, unit="step") as progress:
        while trainers:
            x = next(batches).to(device)
            for folder, trainer in list(trainers.items()):
                if trainer.step > step:
                    continue  # its checkpoint is of a later step
                try:
                    if step < trainer.hp.steps:
                        trainer.train_step(x)
                    if trainer.step >= trainer.hp.steps:
                        sae = save_run(trainer, folder, source, x)
                        if held_out is None:
                            held_out = list(itertools.islice(source.held_out(), HELD_OUT_BATCHES))
                        progress.write(closing_line(sae, trainer, folder, held_out))
                        del trainers[folder]
                except Diverged as error:  # one learning rate too many costs the others nothing
                    del trainers[folder]
                    diverged.append(f"{folder}: {error}")
                    if trainers:
                        progress.write(diverged[-1])
            step += 1
            progress.update(min(step, total) - progress.n)
            show_metrics(progress, trainers)
            if time.monotonic() > due:
                start = time.monotonic()
                for folder, trainer in trainers.items():
                    if trainer.step == step:  # one that waits has a checkpoint of a later step
                        with suppress(Diverged):  # which will be noticed above, at its next metrics
                            save_checkpoint(trainer, folder, source.state())
                # A checkpoint may take a twentieth of the time, and no more.
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - start))
    if diverged:
        raise Diverged("; ".join(diverged))


def show_metrics(progress, trainers):
    """The newest metrics of the first SAE, at the end of the progress bar."""
    trainer = next(iter(trainers.values()), None)
    if trainer is None or not trainer.metrics:
        return
    row = trainer.metrics[-1]
    text = f"loss {row['loss']:.4f} fve {row['fve']:.3f} l0 {row['l0']:.0f}"
    progress.set_postfix_str(text, refresh=False)


@torch.no_grad()
def closing_line(sae, trainer, folder, held_out):
    """A line about a trained SAE: fve and l0 on held-out batches, else on the last of training."""
    row = trainer.metrics[-1]
    where, fve, l0 = "on the last batch", row["fve"], row["l0"]
    if held_out:
        x = torch.cat(held_out).cpu()
        x_hat, active = [], 0
        for part in x.split(1024):
            acts = sae.encode(part)
            active += (acts > 0).sum().item()
            x_hat.append(sae.decode(acts))
        variance = squared_error(x.mean(0), x, "sum").clamp(min=1e-12)
        fve = 1 - (squared_error(torch.cat(x_hat), x, "sum") / variance).item()
        where, l0 = "on held-out inputs", active / len(x)
    silent = f"{row['dead']} of {trainer.hp.d_sae} latents silent for long"
    return f"{folder}: {where} fve {fve:.4f}, l0 {l0:.1f}; {silent}"


def prepare(hparams, source, device):
    """Check what all SAEs of a stream must agree on; return the device. Raises UserError."""
    tune_cpu()
    for one in fields(Hparams):
        values = {getattr(hp, one.name) for hp in hparams}
        if one.metadata["stream"] and len(values) > 1:
            raise UserError(f"{flag(one.name)}: SAEs of one stream need the same, not {values}")
    for hp in hparams:
        if hp.d_in != source.d_in:
            raise UserError(f"--d-in {hp.d_in}: the activations have the width {source.d_in}")
    if any(hp.warmup > hp.steps / 5 for hp in hparams):
        shortest = min(hp.steps for hp in hparams)
        print(f"note: --warmup takes over a fifth of {shortest} steps: lower it, or train longer")
    for hp in hparams:
        n_inputs = hp.steps * hp.batch_size
        if applies("aux", hp.arch) and hp.aux and hp.dead_after >= n_inputs:
            never = f"--dead-after {hp.dead_after:,} is not reached within {n_inputs:,} inputs"
            print(f"note: {never}, so the auxiliary loss will revive no latents")
            break
    return pick_device(device)


# ==================================================================================================
# Machinery. Nothing below changes the method.
# ==================================================================================================
#
# The forward pass from the active entries alone. Of a TopK step, six products of a matrix with a
# matrix would be dense (three each for encoder and decoder, forward and backward). Where k latents
# an input are chosen, all others are zero: they add nothing to x_hat, and their pre_acts get no
# gradient. So only the first product, which finds the k, is needed in full. At the study's size and
# on two cores that makes a step of 170 ms out of one of 900.
#
# An entry is one place in the matrix pre_acts [B, d_sae], as the number row * d_sae + latent.


def fast_pass(sae, x, k, dead=None):
    """dense_pass by a shorter way, with the same values and gradients; `acts` are [k * B]."""
    chosen_from = ARCHS[sae.arch].chosen_from
    if not chosen_from:
        return forward_from(sae, pre_acts_with_cheap_bias_gradient(sae, x), k, dead)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x)
        rows = pre_acts if chosen_from == "row" else pre_acts.view(1, -1)
        entries = largest_entries(rows, k * len(x))
    kept = active_at(sae, x, pre_acts, entries)
    prefixes = decode_entries(sae, kept, len(x))
    fired = torch.zeros(sae.d_sae, device=x.device)
    fired.index_add_(0, kept.latents, (kept.acts > 0).float())
    revived = None
    if dead is not None:
        candidates = torch.where(dead, pre_acts, 0)
        entries = largest_entries(candidates, n_revived(sae) * len(x))
        extra = active_at(sae, x, candidates, entries)
        revived = weighted_sums(extra.acts, extra.latents, sae.W_dec, extra.rows, len(x))
    return Forward(pre_acts, kept.acts, prefixes, fired, revived)


def pre_acts_with_cheap_bias_gradient(sae, x):
    """sae.pre_acts(x), with the gradient of b_dec by a product of a vector instead of a batch.

    The term (b_dec - b_dec) @ W_enc is zero and carries that gradient; through x - b_dec it would
    cost a sixth of the step. (Adding -b_dec @ W_enc to b_enc would do as well, but in bfloat16 it
    cancels badly against x @ W_enc.)
    """
    b_dec = sae.b_dec.detach()
    return F.linear(x - b_dec, sae.encoder, sae.b_enc + (b_dec - sae.b_dec) @ sae.W_enc)


class Active(NamedTuple):
    """Entries of acts [B, d_sae] that may be other than zero, each field [n]."""

    acts: torch.Tensor
    rows: torch.Tensor
    latents: torch.Tensor


def active_at(sae, x, pre_acts, entries):
    """The relu of pre_acts at the entries [n], with the gradient that pre_acts itself lacks."""
    values = pre_acts.flatten()[entries].to(x.dtype)
    values = PreActsAt.apply(values, x, sae.encoder, sae.b_enc, sae.b_dec, entries)
    return Active(values.relu(), entries // sae.d_sae, entries % sae.d_sae)


class PreActsAt(torch.autograd.Function):
    """((x - b_dec) @ W_enc + b_enc).flatten()[entries], whose values [n] are there already.

    Forward hands them on; backward is that of the formula, for the encoder and the biases.
    """

    @staticmethod
    def forward(ctx, values, x, encoder, b_enc, b_dec, entries):
        ctx.save_for_backward(x, encoder, b_dec, entries)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        x, encoder, b_dec, entries = ctx.saved_tensors
        d_sae = len(encoder)
        rows, latents = entries // d_sae, entries % d_sae
        encoder_gradient = weighted_sums(gradient, rows, x - b_dec, latents, d_sae)
        b_enc_gradient = torch.zeros_like(encoder[:, 0]).index_add_(0, latents, gradient)
        b_dec_gradient = -(encoder.T @ b_enc_gradient)
        return None, None, encoder_gradient, b_enc_gradient, b_dec_gradient, None


def decode_entries(sae, kept, B):
    """SAE.decode_prefixes from the active entries: a list of reconstructions [B, d_in].

    Each nested group makes sums of its own, B rows of them, and a prefix adds up the first groups.
    """
    ends = torch.tensor(sae.group_sizes, device=kept.latents.device).cumsum(0)
    group = torch.searchsorted(ends, kept.latents, right=True)
    n_sums = len(sae.group_sizes) * B
    sums = weighted_sums(kept.acts, kept.latents, sae.W_dec, B * group + kept.rows, n_sums)
    return running_sums(sae.b_dec, sums.split(B))


def weighted_sums(weights, sources, vectors, targets, n):
    """out [n, width] with out[t] = the sum of weights[e] * vectors[sources[e]] over targets[e] = t.

    embedding_bag does this without a matrix of the vectors that it adds up.
    """
    targets, order = targets.sort()
    starts = torch.searchsorted(targets, torch.arange(n, device=targets.device))
    weights = weights[order]
    return F.embedding_bag(sources[order], vectors, starts, mode="sum", per_sample_weights=weights)


def largest_entries(rows, n):
    """The entries of the n / R largest of each row of rows [R, width], as a tensor [n]."""
    starts = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device)
    return (largest(rows, n // len(rows)) + starts[:, None]).flatten()


def largest(x, k, fold=8):
    """The indices of the k largest of each row of x [..., n], in no order, [..., k].

    The set of x.topk(k).indices, up to ties, and faster: 30 ms of a step instead of 130. Fold
    the row into n / 8 columns of 8. The k largest numbers lie in the k columns whose maxima are
    largest. So a search among n / 8 numbers (which is folded again, while that pays) and one among
    8 * k take the place of one among n.
    """
    n = x.shape[-1]
    if n % fold or n < 4 * fold * k:
        return x.topk(k, dim=-1, sorted=False).indices
    columns = x.unflatten(-1, (fold, n // fold))  # [..., 8, n / 8]
    best = largest(columns.amax(-2), k)  # [..., k], numbers of columns
    inside = columns.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], fold, k)).flatten(-2)
    winners = inside.topk(k, dim=-1, sorted=False).indices  # [..., k], of 8 * k
    return winners // k * (n // fold) + best.gather(-1, winners % k)


class Above(torch.autograd.Function):
    """1 where pre_acts [B, d_sae] exceed the threshold [d_sae], and 0 elsewhere.

    The derivative by the threshold is zero everywhere but at the jump, where there is none, so
    nothing could be learned from it. In its place stands that of a ramp as wide as BANDWIDTH (the
    straight-through estimator of arXiv:2407.14435, equation 12). In `jumprelu` the
    product rule multiplies it by pre_acts, where equation 11 has the threshold.
    """

    @staticmethod
    def forward(ctx, pre_acts, threshold):
        ctx.save_for_backward(pre_acts, threshold)
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx, gradient):
        pre_acts, threshold = ctx.saved_tensors
        near = (pre_acts - threshold).abs() < BANDWIDTH / 2
        return None, -(gradient * near / BANDWIDTH).sum(0)


BANDWIDTH = 0.03  # in units of pre_acts, for inputs whose mean squared norm is 1


def use_bfloat16(dtype, device):
    """Whether matrix products run in bfloat16: if asked for, or for "auto" where units exist."""
    if dtype == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto" and device.type == "cpu" and CPU_INFO.exists():
        return bool(re.search("amx_bf16|avx512_bf16", CPU_INFO.read_text()))
    return dtype == "bfloat16"


CPU_INFO = Path("/proc/cpuinfo")  # where Linux lists the instructions that a processor has


def tune_cpu():
    """Two settings of the process that make training on a CPU faster."""
    # Under Adam an L2 penalty takes a latent that never fires to zero, through denormal numbers, on
    # which a CPU is several times slower. Threads that run already keep their own setting, so the
    # scripts call this before anything else.
    torch.set_flush_denormal(True)
    # glibc hands a large block back to the system as soon as a tensor is freed, and the next step
    # gets it again, page by page: up to a quarter of a TopK step. These two calls make it keep
    # freed memory. Systems without glibc have no mallopt.
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the system
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back


# --------------------------------------------------------------------------------------------------
# Checkpoints and run folders


def check_finite(trainer, loss=0.0):
    """Raise Diverged where the loss or a weight is not a finite number."""
    if not all(torch.as_tensor(n).isfinite().all() for n in (loss, *trainer.sae.parameters())):
        way_out = "lower --lr or the weight of the penalty"
        raise Diverged(f"the loss is not finite at step {trainer.step}: {way_out}")


def save_checkpoint(trainer, folder, stream_state):
    """Write all that `resume` needs to go on as if nothing had happened."""
    check_finite(trainer)  # going on from weights that are not numbers would fail for ever
    state = {
        "step": trainer.step,
        "metrics": trainer.metrics,
        "sae": trainer.sae.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "inputs_since_fired": trainer.inputs_since_fired,
        "any_dead": trainer.any_dead,
        "stream": stream_state,
    }
    with replacing(make_folder(folder) / "checkpoint.pt") as path:
        torch.save(state, path)
    write_metrics(trainer, folder)


def resume(trainer, folder):
    """Go on from the checkpoint in `folder`, if there is one; returns the stream's state, else {}.

    Raises UserError where it cannot be read, or was written by code with other parameters.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return {}
    try:
        # weights_only: no code that a file may hold is ever run.
        state = torch.load(path, map_location=trainer.device, weights_only=True)
    except Exception as error:
        reason = f"damaged ({first_line(error)})"
        raise UserError(f"{path} is {reason}: move it away to start over") from None
    try:
        trainer.sae.load_state_dict(state["sae"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in trainer.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError("moments of other shapes")
        trainer.inputs_since_fired.copy_(state["inputs_since_fired"])
        trainer.any_dead = bool(state["any_dead"])
        trainer.step = int(state["step"])
        trainer.metrics = [dict(row) for row in state["metrics"]]
        return dict(state["stream"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        # Which parameters are missing or too many, where that is the reason.
        reason = " ".join(str(e).split())
        way_out = "give another --out, or go back to the code that wrote it"
        raise UserError(f"{path} does not fit this code ({reason}): {way_out}") from None


def finished_sae(trainer, scale):
    """A copy of the trained SAE that takes x itself, where training saw x / scale.

    (x / scale - b) @ W + c = ((x - scale * b) @ W + scale * c) / scale, and activations may be
    larger by that factor as well, so it is enough to multiply biases and thresholds.
    """
    sae = SAE(trainer.sae.d_in, trainer.sae.d_sae, trainer.sae.arch, trainer.sae.k)
    sae.load_state_dict(trainer.sae.state_dict())
    scaled = [sae.b_enc, sae.b_dec]
    for tensor in ARCHS[sae.arch].tensors:
        if tensor.scales_with_x:
            scaled.append(getattr(sae, tensor.name))
    for tensor in scaled:
        tensor.data *= scale
    return sae.eval().requires_grad_(False)


def save_run(trainer, folder, source, x):
    """Write the trained SAE, read it back, and return it, for inputs as they are.

    What was read back must agree with the SAE in memory on x [B, d_in], the last training batch.
    Only then does hparams.json call the run complete, and only then does the checkpoint go. Raises
    UserError.
    """
    check_finite(trainer)
    sae = finished_sae(trainer, source.scale)
    settings = {name: getattr(trainer.hp, name) for name in (*PENALTIES, "seed", "data_seed")}
    sae.save(folder, {**source.metadata, **settings})
    check_written(trainer, folder, source.scale, x)
    write_metrics(trainer, folder)
    write_hparams(trainer, folder, complete=True)
    remove_leftovers(folder)
    return sae


@torch.no_grad()
def check_written(trainer, folder, scale, x):
    """Raise UserError unless the SAE in `folder` does to x * scale what the trained one does to x.

    A fork may give an architecture a tensor of its own and forget to say how it is written; hours
    of training must not be lost to that.
    """
    trained, written = trainer.sae.eval(), SAE.load(folder)
    expected = trained(x) - trained.b_dec
    found = written(x.cpu() * scale) / scale - written.b_dec / scale
    # Rounding may turn the order of two nearly equal latents, so a small difference is none.
    difference = (found - expected.cpu()).norm()
    if not difference <= 1e-2 * expected.norm().cpu() + 1e-6:
        reason = "what was written does not do what the trained SAE does"
        way_out = "see the tensors in ARCHS; the checkpoint is kept"
        raise UserError(f"{folder}: {reason}: {way_out}")


def remove_leftovers(folder):
    """Remove what a finished run no longer needs: its checkpoint, and half-written files."""
    for pattern in ("checkpoint.pt", "*.tmp"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def write_metrics(trainer, folder):
    with replacing(Path(folder) / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in trainer.metrics))


def write_hparams(trainer, folder, complete=False):
    """hparams.json: the settings, whether training is complete, and what it ran on."""
    here = str(Path(__file__).resolve().parent)
    commit = None
    with suppress(OSError):
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        found = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or None
    settings = asdict(trainer.hp)
    changed = [one.name for one in fields(Hparams) if settings[one.name] != one.default]
    ran_on = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git_commit": commit,
        "matrix_products": "bfloat16" if trainer.bfloat16 else "float32",
        "threads": torch.get_num_threads(),
    }
    content = {
        "hparams": settings,
        "not_default": changed,
        "complete": complete,
        "ran_on": ran_on,
    }
    write_json(make_folder(folder) / "hparams.json", content)


def read_hparams(folder):
    """The settings in the hparams.json of a run folder, a dict. Raises UserError.

    A setting that the file lacks has its default, so that a fork with a new one keeps its finished
    runs. One that this code lacks must have had its default, or else the run is not what it seems.
    """
    path = Path(folder) / "hparams.json"
    content = read_json(path)
    found = content.get("hparams")
    if not isinstance(found, dict):
        raise UserError(f"{path}: has no settings in it; move that folder away")
    settings = {}
    for one in fields(Hparams):
        value = found.get(one.name, one.default)
        kinds = (float, int) if one.type is float else one.type
        if not isinstance(value, kinds):
            raise UserError(f"{path}: {one.name} is no {one.type.__name__}; move it away")
        settings[one.name] = value
    for name in found.keys() - settings.keys():
        # Files of before have no list of what was changed; there, what is not "off" counts.
        changed = content.get("not_default", [name] if found[name] else [])
        if name in changed:
            way_out = "read it with the code that wrote it"
            raise UserError(f"{path}: {name} {found[name]} is unknown here: {way_out}")
    return settings


def is_complete(folder, hp):
    """Whether `folder` holds the finished run of hp. Raises UserError where it holds another."""
    path = Path(folder) / "hparams.json"
    if not path.exists():
        return False
    found, wanted = read_hparams(folder), asdict(hp)
    check_contents(folder, found["data_hash"], hp.data_hash, hp.data, "give another --out")
    for name, value in wanted.items():
        # length only puts the steps into words
        if name not in ("data_hash", "length") and found[name] != value:
            differs = f"{flag(name)} {found[name]} instead of {value}"
            raise UserError(f"{folder} holds a run with {differs}: give another --out")
    return bool(read_json(path).get("complete")) and (path.parent / WEIGHTS).exists()


def check_contents(folder, trained_on, found, data, way_out):
    """Raise UserError where a run was trained on other contents of the file `data` than it has now.

    Both hashes may be empty: those of runs of before, and of data that have no file or lost it.
    """
    if trained_on and found and trained_on != found:
        raise UserError(f"{folder}: {data} has changed since this run was trained on it: {way_out}")


# --------------------------------------------------------------------------------------------------
# Formats: SAELens', which is ours too, dictionary_learning's and sparsify's

WEIGHTS = "sae_weights.safetensors"


def write_saelens(sae, folder, metadata):
    """cfg.json and sae_weights.safetensors, as SAELens' SAE.load_from_disk takes them."""
    folder, arch = make_folder(folder), ARCHS[sae.arch]
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    for tensor in arch.tensors:
        tensors[tensor.saelens_name] = getattr(sae, tensor.name)
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().float().cpu().contiguous()
    origin = {
        # SAELens drops all metadata of a file that does not claim to be of its version 6, and
        # names its own version as that of the training unless there is one.
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "arch": sae.arch,
    }
    cfg = {
        "architecture": arch.saelens,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if applies("k", sae.arch):
        origin["k"] = sae.k
    if arch.saelens == "topk":
        cfg["k"] = sae.k
        cfg["rescale_acts_by_decoder_norm"] = False
    cfg["metadata"] = {"model_from_pretrained_kwargs": {}, **metadata, **origin}
    with replacing(folder / WEIGHTS) as path:
        save_file(tensors, path)
    write_json(folder / "cfg.json", cfg)


class Found(NamedTuple):
    """An SAE as a reader found it, in our terms."""

    arch: str
    k: int
    tensors: dict  # W_enc, b_enc, W_dec, b_dec, and the architecture's own by their SAELens name
    metadata: dict  # all that the file says


def load_sae(folder):
    """Read an SAE, in eval mode, float32, on the CPU. `.metadata` is what the file says about it.

    Takes the folders of SAELens (cfg.json and sae_weights.safetensors; standard, topk, jumprelu and
    gated), of dictionary_learning (config.json and ae.pt) and of sparsify (cfg.json and
    sae.safetensors). Whatever such a file scales or shifts is folded into the weights, so that
    encode and decode give what the library of its origin gives. Raises UserError.
    """
    folder = Path(folder)
    try:
        if (folder / WEIGHTS).exists():
            found = read_saelens(folder)
        elif (folder / "sae.safetensors").exists():
            found = read_sparsify(folder)
        elif (folder / "ae.pt").exists():
            found = read_dictionary_learning(folder)
        else:
            unfinished = (folder / "checkpoint.pt").exists()
            hint = "; its training is unfinished" if unfinished else ""
            raise UserError(f"{folder}: no SAE here ({WEIGHTS}, sae.safetensors or ae.pt){hint}")
        tensors = found.tensors
        d_in, d_sae = tensors["W_enc"].shape
        if 0 in (d_in, d_sae):
            raise UserError(f"{folder}: an SAE of no features")
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            if found.metadata.get(name) not in (None, size):
                configured = f"{name} {found.metadata[name]}"
                raise UserError(f"{folder}: its cfg says {configured}, its weights {size}")
        if ARCHS[found.arch].saelens == "topk" and not 1 <= found.k <= d_sae:
            raise UserError(f"{folder}: a TopK SAE of {d_sae} latents with k = {found.k}")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{folder}: its weights are not finite numbers")
        sae = SAE(d_in, d_sae, found.arch, found.k)
        tensors["encoder"] = tensors.pop("W_enc").T
        for tensor in ARCHS[found.arch].tensors:
            tensors[tensor.name] = tensors.pop(tensor.saelens_name)
        sae.load_state_dict(tensors)
    except UserError:
        raise
    except Exception as error:  # of as many kinds as there are ways to damage a file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder}: not a whole SAE ({reason})") from None
    sae.metadata = found.metadata
    return sae.eval().requires_grad_(False)


def in_float32(tensors, names):
    """The tensors of a file in float32, before anything is folded: bfloat16 is too coarse for that.

    Raises ValueError unless they are `names`, all of them and no other, and real numbers of the
    right shapes: W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_dec [d_in], every other one [d_sae].
    """
    if tensors.keys() != set(names):
        missing = ", ".join(sorted(set(names) - tensors.keys())) or "nothing"
        unknown = ", ".join(sorted(tensors.keys() - set(names))) or "nothing"
        raise ValueError(f"it lacks {missing}, and has {unknown} too many")
    d_in, d_sae = tensors["W_enc"].shape
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    result = {}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (d_sae,))
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ValueError(f"{name} is {found}, where floating-point {list(shape)} belongs")
        result[name] = tensor.float()
    return result


def whole_number(value):
    """The k of a file as an int. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"k is {value!r}")
    return int(value)


def switch(cfg, name, default):
    """What a file says that must be true or false. Raises ValueError."""
    value = cfg.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, neither true nor false")
    return value


# SAELens' name of an architecture: ours, and the tensors in its files.
LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
SAELENS = {
    "standard": ("relu", LINEAR),
    "topk": ("topk", LINEAR),
    "jumprelu": ("jumprelu", (*LINEAR, "threshold")),
    "gated": ("jumprelu", ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")),
}


def read_saelens(folder):
    cfg = read_json(folder / "cfg.json")
    metadata = cfg.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no object")
    if "sae_lens_version" not in metadata:
        modernise(cfg)
    architecture, ours = cfg.get("architecture"), metadata.get("arch")
    written_by_us = ours in list(ARCHS) and ARCHS[ours].saelens == architecture
    if written_by_us:  # SAELens has one name for what we train as several architectures
        arch = ours
        names = (*LINEAR, *(tensor.saelens_name for tensor in ARCHS[ours].tensors))
    elif architecture in list(SAELENS):
        arch, names = SAELENS[architecture]
    else:
        readable = ", ".join(SAELENS)
        raise UserError(f"{folder}: architecture {architecture!r} is none of {readable}")
    normalize = cfg.get("normalize_activations", "none")
    if normalize not in ("none", "expected_average_only_in"):
        reason = "is not a part of its weights and not supported"
        raise UserError(f"{folder}: normalize_activations {normalize!r} {reason}")
    tensors = load_file(folder / WEIGHTS)
    # Of activations, in decoding alone. SAELens 2 wrote it always, and where it is 1 it is nothing.
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not cfg.get("finetuning_scaling_factor"):
            if not torch.allclose(tensors.pop(name).float(), torch.ones(())):
                reason = "is not 1, and finetuning_scaling_factor is not set"
                raise UserError(f"{folder}: {name} {reason}")
        elif name in tensors:
            names = (*names, name)
    tensors = in_float32(tensors, names)
    if architecture == "gated" and not written_by_us:
        ungate(tensors)
    if architecture == "topk" and switch(cfg, "rescale_acts_by_decoder_norm", False):
        move_decoder_norms(tensors)
    if not switch(cfg, "apply_b_dec_to_input", True):
        undo_centring(tensors)
    scaler = folder / "activation_scaler.json"
    if normalize == "expected_average_only_in" and scaler.exists():
        # A checkpoint of SAELens was trained on x times this, which a finished SAE has folded in.
        factor = read_json(scaler)["scaling_factor"]
        tensors["W_enc"] = tensors["W_enc"] * factor
        tensors["W_dec"] = tensors["W_dec"] / factor
        tensors["b_dec"] = tensors["b_dec"] / factor
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            tensors["W_dec"] = tensors["W_dec"] * tensors.pop(name)[:, None]
    k = 0
    if applies("k", arch):
        k = whole_number(cfg.get("k") if architecture == "topk" else metadata.get("k"))
    return Found(arch, k, tensors, {**metadata, **cfg})


def modernise(cfg):
    """Put the cfg.json of SAELens before version 6 into the words of version 6."""
    arguments = cfg.get("activation_fn_kwargs") or {}
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise ValueError(f"activation_fn {activation!r} is not supported")
    cfg.setdefault("architecture", "standard")
    if activation == "topk":
        cfg["architecture"] = "topk"
    if cfg["architecture"] == "topk" and "k" in arguments:
        cfg["k"] = arguments["k"]
    normalize = cfg.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if "hook_point" in cfg:
        cfg.setdefault("hook_name", cfg["hook_point"])


# A class of dictionary_learning: our architecture, and the tensors in its files by our names.
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}  # as nn.Linear keeps them
WITH_BIAS = {**TRANSPOSED, "encoder.bias": "b_enc"}
OURS = {name: name for name in LINEAR}
GATED = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
DICTIONARIES = {
    "AutoEncoder": ("relu", {**WITH_BIAS, "bias": "b_dec"}),
    "AutoEncoderNew": ("relu", {**WITH_BIAS, "decoder.bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", {**WITH_BIAS, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", {**WITH_BIAS, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {**OURS, "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", {**OURS, "threshold": "threshold"}),
    "GatedAutoEncoder": ("jumprelu", {**TRANSPOSED, **GATED}),
}


def read_dictionary_learning(folder):
    config = read_json(folder / "config.json")
    trainer = config.pop("trainer")
    kind = trainer.get("dict_class")
    if kind not in list(DICTIONARIES):
        raise UserError(f"{folder}: dict_class {kind!r} is none of {', '.join(DICTIONARIES)}")
    arch, names = DICTIONARIES[kind]
    try:
        # weights_only: a pickle may hold code, and this file may come from anyone.
        state = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    except UnpicklingError:  # whose own text recommends to run that code
        reason = "ae.pt is damaged, or holds more than tensors, such as code"
        raise UserError(f"{folder}: not a whole SAE ({reason})") from None
    k = trainer.get("k")
    if applies("k", arch) and "k" in state:
        in_weights = state.pop("k").item()
        if k not in (None, in_weights):
            raise ValueError(f"k is {k!r} in config.json and {in_weights} in ae.pt")
        k = in_weights
    if arch == "topk":
        state.pop("threshold", None)  # of a mode that is off unless asked for
    if arch == "matryoshka":
        state.pop("group_sizes")  # matter in training alone
    tensors = {}
    for name, tensor in state.items():
        tensors[names.get(name, name)] = tensor.T if name in TRANSPOSED else tensor
    if "threshold" in tensors and tensors["threshold"].ndim == 0:  # one for all latents
        tensors["threshold"] = tensors["threshold"].expand(tensors["W_enc"].shape[1])
    unknown = state.keys() - names.keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is not of {kind}")
    tensors = in_float32(tensors, names.values())
    if kind == "GatedAutoEncoder":
        ungate(tensors)
    if kind == "AutoEncoder":  # its loader moves the norms of decoder rows to the encoder
        move_decoder_norms(tensors)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        undo_centring(tensors)
    origin = {
        "d_in": trainer.get("activation_dim"),
        "d_sae": trainer.get("dict_size"),
        "model_name": trainer.get("lm_name"),
    }
    layer = trainer.get("layer")
    if str(trainer.get("submodule_name")).startswith("resid_post") and isinstance(layer, int):
        origin["hook_name"] = f"blocks.{layer}.hook_resid_post"
    if isinstance(config.get("buffer"), dict):
        origin["context_size"] = config["buffer"].get("ctx_len")
    k = whole_number(k) if applies("k", arch) else 0
    return Found(arch, k, tensors, {**config, **trainer, **origin})


def read_sparsify(folder):
    cfg = read_json(folder / "cfg.json")
    if cfg.get("transcode") or cfg.get("skip_connection"):
        raise UserError(f"{folder}: a transcoder, not an SAE")
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed"):
        named = "signed" if cfg.get("signed") else cfg["activation"]
        raise UserError(f"{folder}: activation {named!r} is not supported")
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_enc"] = tensors.pop("encoder.weight").T
    tensors["b_enc"] = tensors.pop("encoder.bias")
    tensors = in_float32(tensors, LINEAR)
    d_sae = cfg.get("num_latents") or cfg["d_in"] * cfg["expansion_factor"]
    origin = {"d_sae": d_sae, **sparsify_origin(folder.resolve())}
    return Found("topk", whole_number(cfg["k"]), tensors, {**cfg, **origin})


def sparsify_origin(folder):
    """The place in the model: sparsify tells it by the folder's name and the run's config.json."""
    origin = {}
    block = re.fullmatch(r"(layers|h)\.(\d+)", folder.name)
    if block:
        origin["hook_name"] = f"blocks.{block[2]}.hook_resid_post"
    with suppress(UserError):  # the run's own file may be missing, or be another's
        run = read_json(folder.parent / "config.json")
        origin["model_name"], origin["context_size"] = run.get("model"), run.get("ctx_len")
    return origin


def ungate(tensors):
    """Make a Gated SAE (Rajamanoharan et al. 2024, arXiv:2404.16014) the JumpReLU that it equals.

    A latent is on where x @ W + b_gate > 0, and then has the value e^r * (x @ W) + b_mag if that is
    positive. With pre_acts = e^r * (x @ W) + b_mag, it is on where pre_acts > b_mag - e^r * b_gate.
    """
    factor = tensors.pop("r_mag").exp()
    if factor.min() < 1e-6:  # b_mag - e^r * b_gate would be b_mag in float32, and the gate lost
        raise ValueError("r_mag is too small for float32")
    b_mag = tensors.pop("b_mag")
    tensors["W_enc"] = tensors["W_enc"] * factor
    tensors["b_enc"] = b_mag
    tensors["threshold"] = b_mag - factor * tensors.pop("b_gate")


def move_decoder_norms(tensors):
    """Decoder rows of norm 1, and latents that compete by their effect on x_hat."""
    norm = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"] = tensors["W_enc"] * norm
    tensors["b_enc"] = tensors["b_enc"] * norm
    tensors["W_dec"] = tensors["W_dec"] / norm.clamp(min=1e-12)[:, None]


def undo_centring(tensors):
    """Make an encoder that reads x one that reads x - b_dec, as ours do."""
    tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]


# --------------------------------------------------------------------------------------------------
# Command lines


def flag(name):
    """The command-line flag of a setting: d_sae -> --d-sae."""
    return "--" + name.replace("_", "-")


def spell(name, value, joint="-"):
    """A setting as folders name it, "l2-1e-05", and with the joint " " as labels do, "l2 1e-05"."""
    words = flag(name)[2:]
    if name == "arch":
        return value
    if name == "k":
        return f"k{value}"
    if isinstance(value, bool):
        return words if value else f"{words}{joint}off"
    if isinstance(value, float):
        value = f"{value:.12g}"
    return f"{words}{joint}{value}"


def at_least(low, number=int, high=2**63 - 1):
    """An argparse type: a number from `low` to `high`."""

    def convert(text):
        if not low <= number(text) <= high:
            bounds = f"{low} or more" if high == 2**63 - 1 else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give {bounds}")
        return number(text)

    convert.__name__ = number.__name__  # for argparse's messages
    return convert


def on_or_off(text):
    """An argparse type: a switch."""
    values = {"on": True, "off": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"{text}: give on or off")
    return values[text]


class Parser(argparse.ArgumentParser):
    """argparse, with one line instead of a page where a command line is wrong (exit status 2)."""

    def __init__(self, **others):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **others)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.splitlines())} (--help lists the flags)\n")

    def add_settings(self, leave_out, **defaults):
        """A flag for every setting of Hparams that is not in `leave_out`, in groups.

        `defaults` are a script's own. A setting that may be swept takes a list of values.
        """
        groups = {}
        for one in fields(Hparams):
            if one.name in leave_out:
                continue
            limits = one.metadata
            if limits["group"] not in groups:
                groups[limits["group"]] = self.add_argument_group(limits["group"])
            default = defaults.get(one.name, one.default)
            shown = default
            options = {"metavar": one.type.__name__.upper(), "type": one.type}
            if one.type is bool:
                shown = "on" if default else "off"
                options = {"metavar": "on|off", "type": on_or_off}
            text = limits["help"]
            if limits["choices"]:
                text += ": " + ", ".join(limits["choices"])
            options["help"] = f"{text} (default {shown})"
            if not limits["stream"]:
                default = [default]
                options["nargs"] = "*" if one.type is bool else "+"  # a switch alone means on
            groups[limits["group"]].add_argument(flag(one.name), default=default, **options)


def sweep(parser, args, complete):
    """The SAEs of a command line, the product of its lists: {name of the run: Hparams}.

    `complete` takes a dict of settings and the arguments, and gives those settings that follow from
    them. What cannot work ends the program as argparse does.
    """
    default_args = parser.parse_args([])
    defaults = {name: values[0] for name, values in lists_of_settings(default_args).items()}
    lists = lists_of_settings(args)
    runs = {}
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values))
        try:
            hp = Hparams(**{**settings, **complete(settings, args)})
            # The run of the same architecture with all flags left alone.
            at_rest = {**defaults, "arch": hp.arch}
            plain = Hparams(**{**at_rest, **complete(at_rest, default_args)})
        except UserError as error:
            parser.error(str(error))
        runs[run_name(hp, plain, lists)] = hp
    return runs


def lists_of_settings(args):
    """{name of a setting: the list of values that a command line gives it}."""
    lists = {}
    for one in fields(Hparams):
        if hasattr(args, one.name):
            value = getattr(args, one.name)
            if not isinstance(value, list):
                value = [value]
            lists[one.name] = value or [True]  # a switch without a word is on
    return lists


def run_name(hp, plain, names):
    """The name of a run, such as topk_k40_l2-0.0001_seed0.

    Every name has the architecture, k, l2 and the seed, and each other setting of `names` that
    differs from the script's default (`plain`). Where the data come from is not in it.
    """
    parts = [hp.arch]
    if applies("k", hp.arch):
        parts.append(spell("k", hp.k))
    parts.append(spell("l2", hp.l2))
    for name in names:
        if name in ("arch", "k", "l2", "seed", "data", "model", "context"):
            continue
        value = getattr(hp, name)
        if value != getattr(plain, name):
            parts.append(spell(name, value))
    if hp.length != plain.length:
        parts.append(hp.length.replace(" ", "-"))
    parts.append(f"seed{hp.seed}")
    return "_".join(parts)


# --------------------------------------------------------------------------------------------------
# Files that appear whole, devices, one-line errors


class UserError(Exception):
    """What the user can mend, told in one line: flag or file, what is wrong, the way out."""


class Diverged(UserError):
    """Training has led to numbers that are not finite, and cannot go on from there."""


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def replacing(path):
    """Yield a temporary path that becomes `path` at the end, so nobody ever sees half a file."""
    path = Path(path)
    # With the number of the process, since two of them may write into one folder.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        way_out = "make room, then run the same command"
        raise UserError(f"cannot write {path} ({first_line(error)}): {way_out}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in a file, a dict. Raises UserError."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}): move it away") from None


def make_folder(folder):
    """The folder as a Path, made if need be. Raises UserError where nothing can be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission to write")
    except OSError as error:
        reason = f"nothing can be written in {folder} ({error.strerror})"
        raise UserError(f"{reason}: give another folder") from None
    return folder


def pick_device(name):
    """The torch device of --device: "auto" is CUDA where there is one, else the CPU.

    Raises UserError where it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = f"not usable here ({first_line(error)})"
        raise UserError(f"--device {name}: {reason}; try --device cpu") from None


def run_command(main):
    """Run a script's main. What the user can mend ends with one line and exit status 1."""
    tune_cpu()
    try:
        main()
        return
    except (UserError, OSError) as error:
        message = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        # torch says it of a CPU in words alone, and raises OutOfMemoryError for a GPU
        words = "allocate memory" in str(error) or "not enough memory" in str(error)
        if not (words or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        way_out = "lower --batch-size, --d-sae or the number of SAEs"
        message = f"error: out of memory ({first_line(error)}): {way_out}"
    except KeyboardInterrupt:
        message = "interrupted: what is finished is kept, and the same command goes on from there"
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(1)
