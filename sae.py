"""Sparse autoencoders (SAEs) with weight regularization: settings, architectures, penalties, loss, training step.

After "Stable and Steerable Sparse Autoencoders with Weight Regularization" (arXiv:2603.04198). An SAE explains an
activation x by a few of many features. Train two from different seeds and they find different features, unless an
L1 or L2 penalty on the weights makes the same ones recur. Read down to the banner "Machinery": that is the whole
method. Below it stands what makes the same thing fast, safe to interrupt and readable by other programs.

    hp = Hparams(arch="topk", d_in=512, d_sae=16_384, k=40, l2=1e-4, steps=24_000)
    trainer = Trainer(hp, device="cuda")
    for x in batches:                       # x [B, d_in]
        trainer.train_step(x)
    trainer.sae.save("runs/mine")           # opens in SAELens; SAE.load("runs/mine") reads it back

Notation, as in the paper: d_in the width of the input, d_sae the number of latents (features), B the batch.

    pre_acts = (x - b_dec) @ W_enc + b_enc     [B, d_sae]    W_enc [d_in, d_sae], b_enc [d_sae]
    acts     = activation(pre_acts)            [B, d_sae]    few are not zero
    x_hat    = acts @ W_dec + b_dec            [B, d_in]     W_dec [d_sae, d_in], b_dec [d_in]
    loss     = |x_hat - x|^2 + l1 * sum |W| + l2 * sum W^2 (over both matrices) + sparsity and auxiliary terms

Feature i is the encoder column W_enc[:, i] and the decoder row W_dec[i].
"""

import argparse
import ctypes
import itertools
import json
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

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

LOG_EVERY = 100  # steps between lines of metrics.jsonl and looks for dead latents, both of which wait for the device
CHECKPOINT_SECONDS = 30  # between checkpoints; longer where writing one takes over a twentieth of that


# ---------------------------------------------------------------------------------------------------
# Settings. Each is named here and nowhere else: it is a flag of the command lines, with this help and these bounds.


def setting(default, text, choices=list, low=0, high=sys.float_info.max, stream=False):
    """A field of Hparams. choices() lists what is allowed, if not everything; called late, since tables stand below.
    `stream` marks what decides the stream of batches, which the SAEs of a command share; all else may be swept."""
    about = {"help": text, "choices": choices, "low": low, "high": high, "stream": stream}
    return field(default=default, metadata=about)


@dataclass
class Hparams:
    """All that decides how one SAE turns out, by default as in the study for Pythia-70M. Raises UserError."""

    arch: str = setting("topk", "architecture", lambda: [name for name, arch in ARCHS.items() if arch.train])
    d_in: int = setting(512, "width of the input", low=1)
    d_sae: int = setting(16_384, "number of latents", low=1, high=2**31)
    k: int = setting(40, "latents active per input (batchtopk, matryoshka: on average)", low=1)
    sparsity: float = setting(0.0, "weight of the sparsity term (relu)")
    l1: float = setting(0.0, "weight of the penalty on absolute weights, summed; the study has 1e-4")
    l2: float = setting(0.0, "weight of the penalty on squared weights, summed; the study has 1e-4, for MNIST 1e-5")
    l1_mean: float = setting(0.0, "weight of the penalty on absolute weights, averaged; for MNIST the study has 1e-3")
    l2_norm: float = setting(0.0, "weight of the penalty on the matrices' norms; the study's notebook for MNIST: 1e-5")
    tied_init: bool = setting(True, "start with unit decoder rows and the encoder as their transpose; else draw each")
    unit_norm: bool = setting(False, "keep decoder rows at norm 1")
    biases: bool = setting(True, "train b_enc and b_dec, else both stay 0")
    reduction: str = setting(
        "sum", "how errors over d_in, and acts over d_sae, become one number", lambda: ["sum", "mean"]
    )
    aux: float = setting(1 / 32, "weight of the auxiliary loss (all but relu)")
    dead_after: int = setting(10_000_000, "inputs without firing after which a latent counts as dead", high=2**62)
    lr: float = setting(5e-5, "learning rate of Adam", low=1e-30)
    batch_size: int = setting(2048, "inputs per step", low=1, high=2**31, stream=True)
    steps: int = setting(24_414, "training steps; 50M tokens", low=1, high=2**40)
    warmup: int = setting(1000, "steps of linear warm-up from 0")
    decay: float = setting(0.2, "the last share of the steps, over which lr falls linearly to 0", high=1)
    clip: float = setting(1.0, "clip the norm of the whole gradient to this; 0: never")
    k_anneal: float = setting(0.01, "the first share of the steps, over which k falls linearly from d_in to k", high=1)
    threshold_start: int = setting(1000, "first step of the running mean that becomes the threshold at inference")
    threshold_beta: float = setting(0.99, "of that mean; the study's 0.999 lags behind weights that shrink", high=1)
    seed: int = setting(0, "initialisation", high=2**63 - 1)
    data_seed: int = setting(0, "order of the data", high=2**40, stream=True)
    data: str = setting("", "what is trained on", stream=True)
    model: str = setting("", "language model: a name of the hub, or a folder", stream=True)
    layer: int = setting(0, "the block after which the residual stream is read, from 0", stream=True)
    context: int = setting(0, "tokens that the language model reads together", stream=True)
    dtype: str = setting("auto", "of matrix products", lambda: ["auto", "float32", "bfloat16"], stream=True)
    length: str = setting("", "of the training, in words such as 20 epochs; the steps say the same")

    def __post_init__(self):
        for known in fields(self):
            name, value, about = known.name, getattr(self, known.name), known.metadata
            if (choices := about["choices"]()) and value not in choices:
                raise UserError(f"{flag(name)} {value}: choose from {', '.join(choices)}")
            if known.type in (int, float) and not about["low"] <= value <= about["high"]:
                raise UserError(f"{flag(name)} {value}: give a number from {about['low']:g} to {about['high']:g}")
            # Reset what only other architectures use: it must not make a second run of the same SAE
            if name not in ARCHS[self.arch].settings and any(name in other.settings for other in ARCHS.values()):
                setattr(self, name, known.default)
        if "k" in ARCHS[self.arch].settings and self.k > self.d_sae:
            raise UserError(f"--k {self.k}: give a number from 1 to --d-sae, which is {self.d_sae}")
        if 0 in group_sizes(self.arch, self.d_sae):
            raise UserError(f"--d-sae {self.d_sae}: too few latents for the nested groups of {self.arch}")


# ---------------------------------------------------------------------------------------------------
# The SAE


class SAE(nn.Module):
    """A sparse autoencoder of one of ARCHS. In train mode batchtopk and matryoshka choose over the batch; in eval mode
    each latent is compared with `threshold`, so that what an input activates does not depend on its neighbours."""

    def __init__(self, d_in, d_sae, arch="topk", k=0):
        super().__init__()
        self.d_in, self.d_sae, self.arch, self.k = d_in, d_sae, arch, k
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))  # W_enc.T: a feature in each row, as in W_dec
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))
        for name, first_value in ARCHS[arch].parameters:
            setattr(self, name, nn.Parameter(torch.full((d_sae,), first_value)))
        self.group_sizes = group_sizes(arch, d_sae)
        self.register_buffer("group_ends", torch.tensor(self.group_sizes).cumsum(0), persistent=False)
        self.n_revived = max(1, min(d_in // 2, d_sae))  # dead latents that take part in the auxiliary loss
        self.metadata = {}  # of a loaded SAE: what its file says about it

    @property
    def W_enc(self):
        """[d_in, d_sae]"""
        return self.encoder.T

    def pre_acts(self, x):
        """[B, d_in] -> [B, d_sae]: (x - b_dec) @ W_enc + b_enc"""
        return F.linear(x - self.b_dec, self.encoder, self.b_enc)

    def activate(self, pre_acts, k):
        train, infer = ARCHS[self.arch].train, ARCHS[self.arch].infer
        rule = (train or infer) if self.training else (infer or train)
        return rule(self, pre_acts, k)

    def encode(self, x):
        """[B, d_in] -> acts [B, d_sae]"""
        return self.activate(self.pre_acts(x), self.k)

    def decode(self, acts):
        """acts [B, d_sae] -> x_hat [B, d_in]"""
        return acts @ self.W_dec + self.b_dec

    def decode_prefixes(self, acts):
        """The reconstructions [B, d_in] by each nested prefix of the latents, the last being x_hat. Matryoshka's are
        1/32, 3/32, 7/32, 15/32 and all of them: each must do by itself, so general features come first. Every other
        architecture has one group."""
        groups = zip(acts.split(self.group_sizes, dim=-1), self.W_dec.split(self.group_sizes))
        return [*itertools.accumulate((a @ W for a, W in groups), initial=self.b_dec)][1:]  # without b_dec alone

    def forward(self, x):
        return self.decode(self.encode(x))

    def save(self, folder, metadata=None):
        """Write `folder` as a SAELens SAE, float32, on raw activations. See write_saelens."""
        write_saelens(self, folder, metadata or {})

    @staticmethod
    def load(folder):
        """Read an SAE from a SAELens folder, or one of dictionary_learning. Raises UserError. See load_sae."""
        return load_sae(folder)


# ---------------------------------------------------------------------------------------------------
# The paper's subject: penalties on the weights of encoder and decoder

# name: function of W [d_sae, d_in], a feature in each row. A new one is a line here, and a setting of that name above
PENALTIES = {
    "l1": lambda W: W.abs().sum(),
    "l2": lambda W: W.norm() ** 2,  # the sum of squares, without a matrix of squares in memory
    "l1_mean": lambda W: W.abs().mean(),
    "l2_norm": lambda W: W.norm(),
}


def weight_penalty(sae, hp):
    """The sum of all penalties, each of both matrices and times its weight, a scalar tensor; biases go free.

    It belongs to the loss and so passes through Adam; AdamW's decoupled weight decay is another thing.
    """
    matrices, penalty = (sae.encoder, sae.W_dec), sae.W_dec.new_zeros(())
    for name, function in PENALTIES.items():
        if weight := getattr(hp, name):
            penalty = penalty + weight * sum(function(W) for W in matrices)
    return penalty


# ---------------------------------------------------------------------------------------------------
# Architectures: activation rules, from pre_acts [B, d_sae] to acts of the same shape, and what goes with them


def topk(pre_acts, k):
    """Keep the k largest of each row, where positive; zero the rest."""
    index = largest(pre_acts, k)  # [B, k], as of torch.topk
    return torch.zeros_like(pre_acts).scatter(-1, index, pre_acts.gather(-1, index).relu())


def batchtopk(pre_acts, k):
    """Keep the k * B largest of the whole batch, so that an input may use more latents than another."""
    return topk(pre_acts.flatten(), k * len(pre_acts)).view_as(pre_acts)


def jumprelu(pre_acts, threshold):
    """Keep what exceeds the threshold [d_sae], and is positive: batchtopk for an input that comes without a batch."""
    return pre_acts.relu() * (pre_acts > threshold)


@dataclass(frozen=True)
class Architecture:
    """All in which an architecture differs from the others; nothing else asks for one by its name."""

    saelens: str  # its name in SAELens' files
    train: Callable | None  # (sae, pre_acts, k) -> acts in training; None for one that can be used, not trained
    infer: Callable | None = None  # the same for inputs that come one by one; None for the same rule
    settings: tuple = ()  # those of Hparams that apply to it and not to every architecture
    chosen_from: str = ""  # k latents of each "row", or k * B of the "batch"; "" for other rules. For fast_pass
    sparsity: Callable = lambda sae, pre_acts, acts: acts  # [B, d_sae], what the sparsity term adds up, if it applies
    groups: tuple = ()  # shares of d_sae, the nested groups before the last
    parameters: tuple = ()  # of its own: pairs (name, first value), each [d_sae]


TOPK = Architecture(
    "topk", lambda sae, pre_acts, k: topk(pre_acts, k), settings=("k", "k_anneal", "aux"), chosen_from="row"
)
JUMPRELU = Architecture("jumprelu", None, lambda sae, pre_acts, k: jumprelu(pre_acts, sae.threshold))
BATCHTOPK = replace(  # at inference, and in SAELens' files, a JumpReLU SAE
    JUMPRELU,
    train=lambda sae, pre_acts, k: batchtopk(pre_acts, k),
    settings=(*TOPK.settings, "threshold_start", "threshold_beta"),
    chosen_from="batch",
)
ARCHS = {
    "relu": Architecture("standard", lambda sae, pre_acts, k: pre_acts.relu(), settings=("sparsity",)),
    "topk": TOPK,
    "batchtopk": BATCHTOPK,
    "matryoshka": replace(BATCHTOPK, groups=(1 / 32, 1 / 16, 1 / 8, 1 / 4)),
    "jumprelu": JUMPRELU,
}


def group_sizes(arch, d_sae):
    """How many latents are in each nested group: the shares of the table, and the rest."""
    first = [int(d_sae * share) for share in ARCHS[arch].groups]
    return [*first, d_sae - sum(first)]


# ---------------------------------------------------------------------------------------------------
# The loss


def dense_pass(sae, x, k, dead=None, pre_acts=None):
    """The forward pass of training, as the formulas say, on x [B, d_in]; pre_acts may be known. Returns a dict:

    pre_acts and acts [B, d_sae]; kept, acts of any shape, beyond which all are 0; prefixes, a list of reconstructions
    [B, d_in], the last being x_hat; fired [d_sae], how often each latent was on; and revived [B, d_in], what the
    d_in / 2 strongest of the `dead` [d_sae] latents add up to (Gao et al. 2024, arXiv:2406.04093, A.2).
    """
    pre_acts = sae.pre_acts(x) if pre_acts is None else pre_acts
    acts = sae.activate(pre_acts, k)
    parts = {"pre_acts": pre_acts, "acts": acts, "kept": acts, "prefixes": sae.decode_prefixes(acts)}
    if dead is not None:
        parts["revived"] = topk(torch.where(dead, pre_acts, 0), sae.n_revived) @ sae.W_dec
    return parts | {"fired": (acts > 0).sum(0)}


def squared_error(x_hat, x, reduction):
    """Squared error, averaged over the batch, summed or averaged over d_in."""
    error = (x_hat - x).square()
    return error.sum(1).mean() if reduction == "sum" else error.mean()


def auxiliary_loss(revived, residual, dead):
    """Dead latents are to reconstruct what the living ones leave over: the error of `revived` [B, d_in] on the residual
    x - x_hat [B, d_in], in units of its variance. Zero where no latent is dead."""
    variance = squared_error(residual.mean(0), residual, "sum")
    return dead.any() * squared_error(revived, residual, "sum") / variance.clamp(min=1e-12)


def total_loss(sae, hp, x, k, dead=None, dense=False):
    """The training loss on x [B, d_in], and its parts: those of dense_pass, recon, penalty. `dead` [d_sae] marks the
    latents for the auxiliary loss, if any. Training takes fast_pass (below the banner), which gives the same."""
    parts = (dense_pass if dense else fast_pass)(sae, x, k, dead)
    errors = [squared_error(x_hat, x, hp.reduction) for x_hat in parts["prefixes"]]
    recon, penalty = sum(errors) / len(errors), weight_penalty(sae, hp)
    loss = recon + penalty
    if hp.sparsity:
        active = ARCHS[sae.arch].sparsity(sae, parts["pre_acts"], parts["acts"])
        loss = loss + hp.sparsity * (active.sum(1).mean() if hp.reduction == "sum" else active.mean())
    if dead is not None:
        residual = (x - parts["prefixes"][-1]).detach()
        loss = loss + hp.aux * auxiliary_loss(parts["revived"], residual, dead)
    return loss, parts | {"recon": recon, "penalty": penalty}


# ---------------------------------------------------------------------------------------------------
# The training step, and then what it is made of


class Trainer:
    """One SAE in training: weights, Adam's moments, counters, metrics. Everything a checkpoint holds."""

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
        self.metrics = []  # the lines of metrics.jsonl

    def train_step(self, x):
        """One update on x [B, d_in], on the trainer's device. Raises UserError where the loss is not finite."""
        hp, sae, applies = self.hp, self.sae, ARCHS[self.hp.arch].settings
        if self.step == 0 and hp.biases:
            sae.b_dec.data.copy_(geometric_median(x.cpu()))  # on the CPU, so that every device starts alike
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(hp, self.step)
        # As of the last log: asking the device at every step would stall it
        any_dead = "aux" in applies and hp.aux and self.metrics and self.metrics[-1]["dead"]
        dead = self.inputs_since_fired >= hp.dead_after if any_dead else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, parts = total_loss(sae, hp, x, annealed_k(hp, self.step), dead)
        loss.backward()
        # The gradient along a row would only change its norm. To remove it is usual for the TopK family; the study's
        # ReLU SAEs are rescaled after the step and no more. This cancels l2 and l2_norm on the decoder, too.
        if hp.unit_norm and "k" in applies and sae.W_dec.grad is not None:
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec.data).sum(1, keepdim=True) * sae.W_dec.data
        if hp.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), hp.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hp.unit_norm:
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True).clamp(min=1e-12)

        self.inputs_since_fired += len(x)
        self.inputs_since_fired.masked_fill_(parts["fired"] > 0, 0)
        if "threshold_beta" in applies:
            self.update_threshold(parts["kept"].detach())
        self.step += 1
        if self.step % LOG_EVERY == 0 or self.step == hp.steps:
            self.log(x, loss, parts)

    def update_threshold(self, kept):
        """One threshold for all: a running mean of the smallest act that batchtopk keeps, from threshold_start on."""
        start = min(self.hp.threshold_start, self.hp.steps // 2)  # short runs need a threshold too
        if self.step < start:
            return
        smallest = torch.where(kept > 0, kept, torch.inf).min().float()
        smallest = torch.where(smallest.isfinite(), smallest, self.sae.threshold)  # a batch may keep nothing
        self.sae.threshold.lerp_(smallest, 1.0 if self.step == start else 1 - self.hp.threshold_beta)

    @torch.no_grad()
    def log(self, x, loss, parts):
        """A line of metrics.jsonl: l0, latents on per input; fve, fraction of variance explained; dead latents."""
        error = squared_error(parts["prefixes"][-1], x, "sum")
        variance = squared_error(x.mean(0), x, "sum")
        row = {"step": self.step, "loss": loss.item(), "recon": parts["recon"].item()}
        row |= {"l0": parts["fired"].sum().item() / len(x), "fve": 1 - (error / variance.clamp(min=1e-12)).item()}
        row |= {"penalty": parts["penalty"].item(), "dead": int((self.inputs_since_fired >= self.hp.dead_after).sum())}
        self.metrics.append(row | {"lr": self.optimizer.param_groups[0]["lr"]})
        check_finite(self, row["loss"])


def fit(trainers, stream, stream_state=dict):
    """Train all of {folder: Trainer} on the same stream of batches x [B, d_in] until each has had its steps.

    The stream starts at the step of the one that is furthest behind; others wait there. Checkpoints are written
    every CHECKPOINT_SECONDS (less often where that would take over a twentieth of the time); `stream_state()` goes
    into them, for the caller to start the stream from again.
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
            if time.monotonic() > due:
                start = time.monotonic()
                for folder, trainer in trainers.items():
                    if trainer.step == step:  # one that waits has its own, of a later place in the stream
                        save_checkpoint(trainer, folder, stream_state())
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * (time.monotonic() - start))


@torch.no_grad()
def initialise(sae, hp):
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


def geometric_median(x, steps=100, tolerance=1e-5):
    """The point [d_in] with the least summed distance to the rows of x [B, d_in], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
        previous, median = median, (weight * x).sum(0) / weight.sum()
        if (median - previous).norm() < tolerance:
            break
    return median


def learning_rate(hp, step):
    """Linear warm-up from 0, constant, linear decay to 0."""
    warm = min(1.0, step / hp.warmup) if hp.warmup else 1.0
    left = (hp.steps - step) / (hp.steps * hp.decay) if hp.decay else 1.0
    return hp.lr * min(warm, left, 1.0)


def annealed_k(hp, step):
    """k at this step: from d_in down to hp.k over the first hp.k_anneal of the steps."""
    share = min(1.0, step / (hp.steps * hp.k_anneal)) if hp.k_anneal else 1.0
    return int(hp.k + (1 - share) * max(0, min(hp.d_in, hp.d_sae) - hp.k))


# ===================================================================================================
# Machinery. Nothing below changes what is computed.
# ===================================================================================================


# The same forward pass from the active entries alone. An entry is the number row * d_sae + latent.


def fast_pass(sae, x, k, dead=None):
    """dense_pass by a shorter way. Where k latents an input are chosen, all others are zero: they add nothing to x_hat,
    and their pre_acts get no gradient. So of the six dense products of a step (three forward and backward for encoder
    and decoder each) only the first is needed. There is no matrix `acts` then, and `kept` is [k * B]."""
    chosen_from = ARCHS[sae.arch].chosen_from
    if not chosen_from:
        # Equal to sae.pre_acts(x), the last term being zero. It carries b_dec's gradient, which is then a product of a
        # vector with W_enc; through x - b_dec it would cost one more product over the batch. (Adding -b_dec @ W_enc to
        # b_enc would do too, but in bfloat16 it cancels badly against x @ W_enc.)
        b_dec = sae.b_dec.detach()
        pre_acts = F.linear(x - b_dec, sae.encoder, sae.b_enc + (b_dec - sae.b_dec) @ sae.W_enc)
        return dense_pass(sae, x, k, dead, pre_acts)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x)
        entries = largest_entries(pre_acts if chosen_from == "row" else pre_acts.view(1, -1), k * len(x))
    kept, rows, latents = pick(sae, x, pre_acts, entries)
    # Nested groups make sums of their own, one block of rows each, and a prefix adds up the first of them
    blocks = len(x) * torch.searchsorted(sae.group_ends, latents, right=True)
    sums = weighted_sums(kept, latents, sae.W_dec, blocks + rows, len(sae.group_sizes) * len(x)).split(len(x))
    fired = torch.zeros(sae.d_sae, device=x.device).index_add_(0, latents, (kept > 0).float())
    parts = {"pre_acts": pre_acts, "kept": kept, "fired": fired}
    if dead is not None:
        candidates = torch.where(dead, pre_acts, 0)
        acts, rows, latents = pick(sae, x, candidates, largest_entries(candidates, sae.n_revived * len(x)))
        parts["revived"] = weighted_sums(acts, latents, sae.W_dec, rows, len(x))
    return parts | {"prefixes": [*itertools.accumulate(sums, initial=sae.b_dec)][1:]}


def largest_entries(rows, n):
    """The entries of the n / R largest of each row of rows [R, width], [n]."""
    starts = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device)
    return (largest(rows, n // len(rows)) + starts[:, None]).flatten()


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


def weighted_sums(weights, sources, vectors, targets, n):
    """out [n, width], where out[t] = sum of weights[e] * vectors[sources[e]] over the entries e with targets[e] = t."""
    targets, order = targets.sort()
    starts = torch.searchsorted(targets, torch.arange(n, device=targets.device))
    return F.embedding_bag(sources[order], vectors, starts, mode="sum", per_sample_weights=weights[order])


def pick(sae, x, pre_acts, entries):
    """The relu of pre_acts at the entries, their rows and their latents, each [n]. The values have the gradient that
    pre_acts itself, computed without one, does not have."""
    values = pre_acts.flatten()[entries].to(x.dtype)
    values = Pick.apply(values, x, sae.encoder, sae.b_enc, sae.b_dec, entries)
    return values.relu(), entries // sae.d_sae, entries % sae.d_sae


class Pick(torch.autograd.Function):
    """Values of ((x - b_dec) @ W_enc + b_enc).flatten()[entries] in, the same out; backward to encoder and biases."""

    @staticmethod
    def forward(ctx, values, x, encoder, b_enc, b_dec, entries):
        ctx.save_for_backward(x, encoder, b_dec, entries)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        x, encoder, b_dec, entries = ctx.saved_tensors
        rows, latents = entries // len(encoder), entries % len(encoder)
        of_encoder = weighted_sums(gradient, rows, x - b_dec, latents, len(encoder))
        of_b_enc = torch.zeros_like(encoder[:, 0]).index_add_(0, latents, gradient)
        return None, None, of_encoder, of_b_enc, -(encoder.T @ of_b_enc), None


def use_bfloat16(dtype, device):
    """Whether matrix products run in bfloat16: where `dtype` says so, or is auto and the device has units for it."""
    if dtype == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto" and device.type == "cpu" and CPU.exists():
        return bool(re.search("amx_bf16|avx512_bf16", CPU.read_text()))
    return dtype == "bfloat16"


CPU = Path("/proc/cpuinfo")  # where Linux lists the instructions that a processor has


# ---------------------------------------------------------------------------------------------------
# Checkpoints and run folders


def check_finite(trainer, loss=0.0):
    """Raise UserError where the loss or a weight is not a finite number."""
    if not all(torch.as_tensor(number).isfinite().all() for number in (loss, *trainer.sae.parameters())):
        raise UserError(f"the loss is not finite at step {trainer.step}: lower --lr or the weight of the penalty")


def save_checkpoint(trainer, folder, stream_state=None):
    """Write all that `resume` needs to go on as if nothing had happened."""
    check_finite(trainer)  # resuming from weights that are not numbers would fail for ever
    state = {"step": trainer.step, "metrics": trainer.metrics}
    state |= {"sae": trainer.sae.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    state |= {"inputs_since_fired": trainer.inputs_since_fired, "stream": stream_state or {}}
    with replacing(make_folder(folder) / "checkpoint.pt") as path:
        torch.save(state, path)
    write_metrics(trainer, folder)


def resume(trainer, folder):
    """Go on from the checkpoint in `folder`, if there is one; returns the state of the stream at that step, else {}.

    Raises UserError where it cannot be read, or was written by code with other parameters.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return {}
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)  # no code in it is ever run
    except Exception as error:  # there are many ways to be damaged
        raise UserError(f"{path} is damaged ({first_line(error)}): move it away to start over") from None
    try:
        trainer.sae.load_state_dict(state["sae"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        for p, moments in trainer.optimizer.state.items():
            if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape:
                raise ValueError("moments of other shapes")
        trainer.inputs_since_fired.copy_(state["inputs_since_fired"])
        trainer.step, trainer.metrics = int(state["step"]), [row | {"step": row["step"]} for row in state["metrics"]]
        return state["stream"]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())  # which parameters are missing or too many, where that is the reason
        raise UserError(
            f"{path} does not fit this code ({said}): give another --out, or go back to that code"
        ) from None


def write_metrics(trainer, folder):
    with replacing(Path(folder) / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in trainer.metrics))


def save_run(trainer, folder, metadata, scale=1.0):
    """Write the trained SAE. The run counts as complete once hparams.json says so, which comes last.

    It was trained on x / scale; the SAE that is saved takes x.
    """
    check_finite(trainer)
    with torch.no_grad():
        for shift in (trainer.sae.b_enc, trainer.sae.b_dec, trainer.sae.threshold):
            shift *= scale
    settings = {name: getattr(trainer.hp, name) for name in (*PENALTIES, "seed", "data_seed")}
    trainer.sae.save(folder, settings | metadata)
    write_metrics(trainer, folder)
    write_hparams(trainer, folder, complete=True)
    for path in Path(folder).glob("checkpoint.pt*"):  # with halves that a kill left
        path.unlink(missing_ok=True)


def write_hparams(trainer, folder, complete=False):
    """hparams.json: the settings, whether training is complete, and what it ran on."""
    git, commit = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"], None
    with suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    ran_on = {"python": platform.python_version(), "torch": torch.__version__, "git_commit": commit}
    ran_on |= {"matrix_products": "bfloat16" if trainer.bfloat16 else "float32", "threads": torch.get_num_threads()}
    content = {"hparams": asdict(trainer.hp), "complete": complete, "ran_on": ran_on}
    write_json(make_folder(folder) / "hparams.json", content)


def read_hparams(folder):
    """The settings in a run folder's hparams.json, a dict. Raises UserError.

    A setting that the file lacks has its default, so that a fork with a new one keeps its finished runs.
    """
    hparams = read_json(Path(folder) / "hparams.json").get("hparams")
    if not isinstance(hparams, dict):
        raise UserError(f"{folder}/hparams.json: has no settings in it; move that folder away")
    for old, form, new in (("l1", "mean", "l1_mean"), ("l2", "norms", "l2_norm")):  # as named in older runs
        if hparams.pop(f"{old}_form", "") == form:
            hparams |= {new: hparams.get(old, 0.0), old: 0.0}
    for known in fields(Hparams):
        kinds = (float, int) if known.type is float else known.type
        if not isinstance(hparams.setdefault(known.name, known.default), kinds):
            raise UserError(f"{folder}/hparams.json: {known.name} is no {known.type.__name__}; move that folder away")
    return hparams


def is_complete(folder, hp):
    """Whether `folder` holds the finished run of hp. Raises UserError where it holds another one."""
    path = Path(folder) / "hparams.json"
    if not path.exists():
        return False
    found, wanted = read_hparams(folder), asdict(hp)
    changed = [name for name in wanted if name != "length" and found[name] != wanted[name]]
    if changed:
        said = ", ".join(f"{flag(name)} {found[name]} instead of {wanted[name]}" for name in changed)
        raise UserError(f"{folder} holds a run with {said}: give another --out")
    return bool(read_json(path).get("complete")) and (Path(folder) / "sae_weights.safetensors").exists()


# ---------------------------------------------------------------------------------------------------
# Files of others: SAELens' format, which is ours too, and dictionary_learning's


def write_saelens(sae, folder, metadata):
    """cfg.json and sae_weights.safetensors, as SAELens' SAE.load_from_disk takes them."""
    folder, architecture = make_folder(folder), ARCHS[sae.arch].saelens
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (architecture == "jumprelu")
    tensors = {name: getattr(sae, name).detach().float().cpu().contiguous() for name in names}
    cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    # SAELens drops all metadata of a file that does not claim to be of its version 6; its users unpack the keywords
    about = {"sae_lens_version": "6.0.0", "arch": sae.arch, "k": sae.k, "model_from_pretrained_kwargs": {}}
    cfg["metadata"] = about | metadata
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    with replacing(folder / "sae_weights.safetensors") as path:
        save_file(tensors, path)
    write_json(folder / "cfg.json", cfg)


def load_sae(folder):
    """Read an SAE from `folder`, in eval mode, float32, on the CPU; `.metadata` is all that the file says about it.

    Takes SAELens' layout (cfg.json, sae_weights.safetensors; architectures standard, topk, jumprelu), and that
    of dictionary_learning (config.json, ae.pt). Whatever such a file may scale or shift is folded into the
    weights, so `encode` and `decode` give what the library of its origin gives. Raises UserError.
    """
    folder = Path(folder)
    try:
        if (folder / "cfg.json").exists():
            arch, k, weights, cfg = read_saelens(folder)
        elif (folder / "ae.pt").exists():
            arch, k, weights, cfg = read_dictionary_learning(folder)
        else:
            hint = "; its training is unfinished" if (folder / "checkpoint.pt").exists() else ""
            raise UserError(f"{folder}: no SAE here (neither cfg.json and sae_weights.safetensors, nor ae.pt){hint}")
        W_enc, b_enc, W_dec, b_dec = (weights[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        if cfg.get("rescale_acts_by_decoder_norm"):  # latents compete by their effect on x_hat
            norm = W_dec.norm(dim=1)
            W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm.clamp(min=1e-12)[:, None]
        if not cfg.get("apply_b_dec_to_input", True):
            b_enc = b_enc + b_dec @ W_enc
        if cfg.get("finetuning_scaling_factor"):  # of acts, in decoding alone
            factor = weights["scaling_factor" if "scaling_factor" in weights else "finetuning_scaling_factor"]
            W_dec = W_dec * factor.float()[:, None]
        d_in, d_sae = W_enc.shape
        if 0 in (d_in, d_sae):
            raise UserError(f"{folder}: an SAE of no features")
        if ARCHS[arch].saelens == "topk" and not 1 <= k <= d_sae:
            raise UserError(f"{folder}: a TopK SAE of {d_sae} latents with k = {k}")
        sae = SAE(d_in, d_sae, arch, k)
        tensors = {"encoder": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": torch.zeros(d_sae)}
        if ARCHS[arch].saelens == "jumprelu":
            tensors["threshold"] = weights["threshold"].float().clamp(min=0).expand(d_sae)
        if not all(tensor.norm().isfinite() for tensor in tensors.values()):
            raise UserError(f"{folder}: its weights are not finite numbers")
        sae.load_state_dict(tensors)
    except UserError:
        raise
    except Exception as error:  # there are many ways to be damaged, and to hold more than tensors
        raise UserError(f"{folder}: not a whole SAE ({type(error).__name__}: {first_line(error)})") from None
    sae.metadata = cfg
    return sae.eval()


def read_saelens(folder):
    cfg = read_json(folder / "cfg.json")
    metadata = dict(cfg.pop("metadata", None) or {})
    architecture = cfg.get("architecture") or "standard"
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"  # before SAELens 6
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    arch = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}.get(architecture)
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k") or metadata.get("k") or 0
    if arch is None or activation not in ("relu", "topk"):
        raise UserError(f"{folder}: architecture {architecture} with {activation} is not supported")
    normalize = cfg.get("normalize_activations") or "none"
    if normalize not in ("none", "expected_average_only_in"):
        raise UserError(f"{folder}: normalize_activations {normalize} depends on the input, so it cannot be folded")
    weights = load_file(folder / "sae_weights.safetensors")
    mine = ARCHS.get(metadata.get("arch"))  # which of those that SAELens gives one name
    return metadata["arch"] if mine and mine.saelens == architecture else arch, int(k), weights, cfg | metadata


def read_dictionary_learning(folder):
    config = read_json(folder / "config.json")
    trainer = config.pop("trainer")
    kind = trainer.get("dict_class")
    archs = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk"}
    archs |= {"MatryoshkaBatchTopKSAE": "matryoshka", "JumpReluAutoEncoder": "jumprelu"}
    if kind not in archs:
        raise UserError(f"{folder}: dict_class {kind} is none of {', '.join(archs)}")
    # weights_only: a pickle may hold code, and this file may come from anyone
    state = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    if "encoder.weight" in state:  # nn.Linear keeps the transpose
        b_dec = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        state |= {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T}
        state |= {"b_enc": state["encoder.bias"], "b_dec": state[b_dec]}
    # AutoEncoder's loader moves the decoder's norms to the encoder; the two others do not centre their input
    folded = {"rescale_acts_by_decoder_norm": kind == "AutoEncoder"}
    folded["apply_b_dec_to_input"] = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    return archs[kind], int(state.get("k", 0)), state, config | trainer | folded


# ---------------------------------------------------------------------------------------------------
# Command lines


def flag(name):
    """The command-line flag of a setting: d_sae -> --d-sae."""
    return "--" + name.replace("_", "-")


def at_least(low, number=int, high=2**63 - 1):
    """An argparse type: a number from `low` to `high`."""

    def convert(text):
        if not low <= number(text) <= high:
            more = "or more" if high == 2**63 - 1 else f"to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give {low} {more}")
        return number(text)

    convert.__name__ = number.__name__  # for argparse's messages
    return convert


class Parser(argparse.ArgumentParser):
    """argparse, with one line instead of a page where a command line is wrong (exit status 2)."""

    def __init__(self, **others):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **others)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.splitlines())} (--help lists the flags)\n")

    def add_settings(self, leave_out, **defaults):
        """A flag for every setting of Hparams but those of leave_out; `defaults` are a script's own."""

        def on_or_off(text):
            return ("off", "on").index(text) == 1

        for known in [known for known in fields(Hparams) if known.name not in leave_out]:
            name, about, several = known.name, known.metadata, "*" if known.type is bool else "+"
            default = defaults.get(name, known.default)
            shown = {True: "on", False: "off"}[default] if known.type is bool else default
            options = {"metavar": name.upper(), "type": on_or_off if known.type is bool else known.type}
            options |= {"default": default} if about["stream"] else {"default": [default], "nargs": several}
            choices = "".join(f", {name}" for name in about["choices"]())
            self.add_argument(flag(name), help=f"{about['help']}{choices} (default {shown})", **options)


def sweep(parser, args, complete):
    """The SAEs of a command line, the product of its lists: {name of the run: Hparams}. `complete` makes of a dict of
    settings and the arguments those that follow from them. What cannot work ends the program as argparse does."""

    def listed(args):
        values = {known.name: getattr(args, known.name) for known in fields(Hparams) if hasattr(args, known.name)}
        return {name: value if isinstance(value, list) else [value] for name, value in values.items()}

    usual_args, runs = parser.parse_args([]), {}
    usual = {name: values[0] for name, values in listed(usual_args).items()}
    for values in itertools.product(*(values or [True] for values in listed(args).values())):  # a bare switch is on
        given = dict(zip(usual, values))
        try:
            hp = Hparams(**given | complete(given, args))
            plain = Hparams(**usual | {"arch": hp.arch} | complete(usual, usual_args))
        except UserError as error:
            parser.error(str(error))
        runs[run_name(hp, plain, usual)] = hp
    return runs


def run_name(hp, plain, names):
    """`topk_k40_l2-0.0001_seed0`: architecture, k, l2 and seed, and those of `names` in which hp and `plain` differ,
    except for where the data come from; then how long it is trained, if that differs."""
    parts = [hp.arch, *[f"k{hp.k}"] * ("k" in ARCHS[hp.arch].settings), f"l2-{hp.l2:.12g}"]
    always = ("arch", "k", "l2", "seed", "data", "model", "context")
    for name in [name for name in names if name not in always and getattr(hp, name) != getattr(plain, name)]:
        value = getattr(hp, name)
        text = f"-{value:.12g}" if isinstance(value, float) else f"-{value}"
        parts.append(flag(name)[2:] + {"-True": "", "-False": "-off"}.get(text, text))
    return "_".join([*parts, *[hp.length.replace(" ", "-")] * (hp.length != plain.length), f"seed{hp.seed}"])


# ---------------------------------------------------------------------------------------------------
# Files that appear whole, devices, one-line errors


@contextmanager
def replacing(path):
    """Yield a temporary path that becomes `path` at the end, so that nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write into one folder
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({first_line(error)}): make room, then run the same command") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in a file. Raises UserError."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}): move it away") from None


def make_folder(folder):
    """The folder as a Path, made if need be. Raises UserError where nothing can be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission to write")
    except OSError as error:
        raise UserError(f"nothing can be written in {folder} ({error.strerror}): give another folder") from None
    return folder


def pick_device(name):
    """The torch device of --device: "auto" is CUDA where there is one, else the CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name}: not usable here ({first_line(error)}); try --device cpu") from None


class UserError(Exception):
    """What the user can mend, told in one line: flag or file, what is wrong, the way out. Exit status 1."""


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    """Run a script's main; an error that the user can act on ends with one line and exit status 1."""
    tune_cpu()
    try:
        main()
        return
    except (UserError, OSError) as error:
        said = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        said = f"error: out of memory ({first_line(error)}): lower --batch-size, --d-sae or the number of SAEs"
    except KeyboardInterrupt:
        said = "interrupted: the same command goes on from its last checkpoint, and with what is finished"
    print(" ".join(said.splitlines()), file=sys.stderr)
    sys.exit(1)
