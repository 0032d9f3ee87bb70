"""Train SAEs on the residual stream of a language model, or on activations that you have already.

    python train_pythia.py --l2 1e-4 --seed 0                      the study's SAE, on one GPU
    python train_pythia.py --k 40 80 --l2 0 1e-4 --seed 0 1 2      a grid of 12, in one pass
    python train_pythia.py --model gpt2 --layer 6 --data a.jsonl --tokens 2e6 --lr 1e-3 --warmup 100
    python train_pythia.py --data acts.npy --tokens 2e7            rows [N, d_in]; no language model
    torchrun --nproc-per-node 8 train_pythia.py --k 40 80 --seed 0 1 2 3      divided among 8 GPUs

--data is "pile", the text that Pythia was trained on, of which only as much is downloaded as it
takes; or a file: text (.txt, or .jsonl with a "text" in each line), token ids (.bin of uint16, or a
one-dimensional .npy of any integers), or activations (.npy or .pt, [N, d_in]).

Flags that take several values are swept: every combination is trained, all on the same stream of
activations, so that the language model runs once. A finished SAE is not trained again, and an
interrupted command goes on where it was.

Read from top to bottom: the model and how its residual stream is read and replaced; the stream of
activations that SAEs are trained on, and the one they are measured on; training. Below the banner
"Machinery" stands where tokens come from, and the command line.
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae import (
    SAE,
    Parser,
    Rows,
    UserError,
    check_contents,
    first_line,
    is_complete,
    make_folder,
    pick_device,
    read_hparams,
    replacing,
    run_command,
    sweep,
    train,
    use_bfloat16,
)

# The study's settings for Pythia-70M. It trained no ReLU SAEs there: the sparsity is ours.
STUDY = {
    "model": "EleutherAI/pythia-70m-deduped",
    "layer": 3,
    "context": 1024,
    "data": "pile",
    "sparsity": 0.06,
}
BUFFER = 250_000  # activations shuffled together
FORWARD = 16_384  # tokens that the language model reads at once in training
EVALUATED = 8_192  # and in evaluation, where it goes on to the logits
HELD_OUT = 500_000  # tokens that no SAE is trained on, at most


# --------------------------------------------------------------------------------------------------
# Model: any causal language model of transformers, and the residual stream after one of its blocks


def load_model(name, device, bfloat16=True):
    """A language model, in eval mode, and its tokenizer.

    `name` is a name of the hub or a folder. With `bfloat16`, matrix products are in bfloat16.
    Raises UserError where there is no such model, or where it is not clear how to read it.
    """
    # On a CPU the weights stay in float32 and only products are in bfloat16 (see `precision`). That
    # is as fast, and the residual stream, which is a long sum, is not rounded.
    on_cpu = device.type == "cpu"
    dtype = torch.bfloat16 if bfloat16 and not on_cpu else torch.float32
    dtype_argument = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    with as_user_error(f"--model {name}", MODELS):
        model = AutoModelForCausalLM.from_pretrained(name, **{dtype_argument: dtype})
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = model.to(device).eval().requires_grad_(False)
        model.bfloat16_products = bfloat16 and on_cpu
        anatomy(model)  # to find out now that a model cannot be read, and not after hours
    return model, tokenizer


class Anatomy(NamedTuple):
    """The parts of a language model that matter here."""

    blocks: nn.ModuleList  # in order; block i puts out the residual stream [B, context, d_in]
    final_norm: nn.Module  # turns the last block's output into the unembedding's input


def anatomy(model):
    """The Anatomy of a model, found by running it once, and then kept with it."""
    if not hasattr(model, "anatomy"):
        model.anatomy = find_anatomy(model)
    return model.anatomy


def blocks(model):
    """The transformer blocks, in order, whatever the family calls them."""
    return anatomy(model).blocks


def final_norm(model):
    """The module between the last block and the unembedding.

    It is a norm in most families. Some have none there: then it is the identity, or in OPT-350M the
    projection to the width of the embeddings.
    """
    return anatomy(model).final_norm


class Call(NamedTuple):
    """A module that ran in a forward pass."""

    module: nn.Module
    inputs: tuple  # its positional arguments
    output: Any  # what it returned; of a tuple or list, the first


@torch.no_grad()
def find_anatomy(model):
    """Run a few tokens, and find the parts of the model by what they put out. Raises UserError.

    Names and numbers of layers would be guesses: some families have several lists of modules of the
    same length, or norms after the last block that belong to something else.
    """
    # Tokens from the middle of the vocabulary, since special ones stand at its ends: [2, 4]
    middle = model.get_input_embeddings().num_embeddings // 2
    tokens = torch.arange(middle, middle + 8, device=model.device).view(2, 4)
    calls = []

    def record(module, inputs, output):
        first = output[0] if isinstance(output, (tuple, list)) else output
        calls.append(Call(module, inputs, first))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        result = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = result.hidden_states
    outputs = {call.module: call.output for call in calls}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # hidden_states begins with the embeddings, but in Mamba and its relatives with the output of
    # block 0. Its last entry has usually been through the final norm, so the last block is
    # recognised by that norm instead.
    for start in (1, 0):  # the entry that is the output of block 0
        for candidate in lists:
            if len(candidate) != len(states) - 1:
                continue
            pairs = zip(candidate[:-1], states[start:])
            if all(equal(outputs.get(block), state) for block, state in pairs):
                norm = find_final_norm(model, candidate, calls, outputs)
                if norm is not None:
                    return Anatomy(candidate, norm)
    raise UserError(
        f"--model {model.name_or_path}: no list of its blocks puts out the residual stream "
        "[B, context, d_in] that it reports, and leads to its unembedding: choose another family"
    )


def find_final_norm(model, candidate, calls, outputs):
    """The module that turns the output of the last block of `candidate` into what is unembedded.

    None where there is none, so that the candidates cannot be the blocks.
    """
    last = outputs.get(candidate[-1])
    unembedding = model.get_output_embeddings()
    reached = [call.inputs[0] for call in calls if call.module is unembedding and call.inputs]
    if not reached:
        return None
    inside = set(candidate.modules())
    for call in reversed(calls):
        if call.module in inside or not call.inputs:
            continue
        if parallel(call.inputs[0], last) and parallel(call.output, reached[-1]):
            return call.module
    return nn.Identity() if parallel(last, reached[-1]) else None


def equal(a, b):
    """Whether two things are equal tensors."""
    tensors = torch.is_tensor(a) and torch.is_tensor(b)
    return tensors and a.dtype == b.dtype and torch.equal(a, b)


def parallel(a, b):
    """Whether two things are tensors [B, context, d] of the same directions.

    Their lengths may differ, since some families divide by a constant before the unembedding.
    """
    if not (torch.is_tensor(a) and torch.is_tensor(b)) or a.shape != b.shape or a.dim() != 3:
        return False
    return bool((F.cosine_similarity(a.float(), b.float(), dim=-1) > 0.999).all())


HOOK = "hook_resid_post"  # what TransformerLens calls the place that `site` reads


def site(model, layer):
    """The module whose output is read and replaced.

    To train SAEs on something else than the residual stream, but of the same width, change this
    line and HOOK, which goes into the SAE's file, and give another --out: for MLP outputs of Pythia
    `return blocks(model)[layer].mlp` and "hook_mlp_out". An SAE of another place is refused.
    """
    return blocks(model)[layer]


@contextmanager
def spliced(model, layer, replace):
    """Put replace(x) in place of the residual stream x after block `layer`, for a `with` block.

    Both are [B, context, d_in]; context is 1 in generation with a cache.
    """

    def hook(module, inputs, output):
        if isinstance(output, (tuple, list)):
            return (replace(output[0]), *output[1:])
        return replace(output)

    handle = site(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Reached(Exception):
    """Raised to end a forward pass at the block that is read."""


@torch.no_grad()
def residual_stream(model, tokens, layer):
    """The residual stream after block `layer`, [B, context, d_in], of tokens [B, context].

    Later blocks do not run.
    """
    found = []

    def read(resid):
        found.append(resid)
        raise Reached

    with suppress(Reached), spliced(model, layer, read), precision(model):
        model(input_ids=tokens, use_cache=False)
    return found[0]


@torch.no_grad()
def cross_entropy(model, contexts):
    """Mean cross-entropy, in nats, of each next token of contexts, an iterable of [B, context]."""
    total = 0.0
    n_tokens = 0
    for tokens in contexts:
        with precision(model):
            logits = model(input_ids=tokens, use_cache=False).logits  # [B, context, vocabulary]
        predicted = logits[:, :-1].flatten(0, 1).float()
        following = tokens[:, 1:].flatten()
        total += F.cross_entropy(predicted, following, reduction="sum").item()
        n_tokens += len(following)
    return total / n_tokens


def precision(model):
    """A `with` block in which float32 models multiply in bfloat16, if load_model was told to."""
    enabled = getattr(model, "bfloat16_products", False)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


# --------------------------------------------------------------------------------------------------
# Activations: which positions SAEs are trained on, the stream of them, and those that are held out


def outlier_limit(resid):
    """The norm above which an activation is an outlier, as the study has it: 10 times the median of
    those in resid [B, context, d_in], first positions aside."""
    return 10 * resid[:, 1:].float().norm(dim=-1).median().item()


def is_trained_on(resid, limit):
    """Which positions of resid [B, context, d_in] SAEs are trained on, [B, context] bool.

    The first position of a context is left out, and so are norms above the limit. Language models
    use both as places to put attention, with norms that would dominate the loss. Raises UserError.
    """
    norms = resid[:, 1:].float().norm(dim=-1)
    if not norms.isfinite().all():
        way_out = "give --dtype float32, or another --layer"
        raise UserError(f"the language model's activations are not finite numbers: {way_out}")
    return F.pad(norms <= limit, (1, 0), value=False)


class Activations:
    """The source of activations of a language model that reads text, in an endless shuffled stream.

    Contexts are taken in random order, without repetition within a pass over the tokens. They fill
    a buffer of about BUFFER activations, which is shuffled and served in batches. What does not
    make a batch stays for the next filling, so nothing is lost. Activations are divided by `scale`,
    so that the mean squared norm of those of the first filling is 1.

    The stream follows from the tokens, the data seed, and a state that is small enough for a
    checkpoint: the number of the filling, how many batches of it were served, and the activations
    that were left over from the filling before.
    """

    def __init__(self, model, layer, context, tokens, held_out_tokens=(), buffer_size=None):
        """`tokens` and `held_out_tokens` are flat arrays of token ids, on disk as a rule.

        buffer_size is how many activations are shuffled together, BUFFER by default.
        """
        self.model = model
        self.layer = layer
        self.context = context
        self.tokens = tokens
        self.held_out_tokens = held_out_tokens
        self.d_in = model.config.get_text_config().hidden_size
        self.n_contexts = len(tokens) // context
        self.contexts_per_filling = max(1, (buffer_size or BUFFER) // (context - 1))
        # Where the stream stands, which `batches` sets.
        self.scale = None  # what activations are divided by; known from the first filling on
        self.limit = None  # the norm above which an activation is an outlier; likewise
        self.filling = 0  # the number of the filling that is being served
        self.served = 0  # how many of its batches were served
        self.leftover = None  # [fewer than a batch, d_in]: what the filling before did not serve
        self.metadata = {
            "model_name": model.name_or_path,
            "hook_name": f"blocks.{layer}.{HOOK}",
            "context_size": context,
            "prepend_bos": False,
        }

    def batches(self, hp, step=0, state=None):
        """An endless iterator of x / scale, [hp.batch_size, d_in] float32.

        It starts at `state`, which is what state() gave, or else at the beginning. `step` is not
        needed here, but by Rows.
        """
        # Allocated once: every filling overwrites the one before.
        capacity = self.contexts_per_filling * (self.context - 1) + hp.batch_size
        options = {"dtype": self.model.dtype, "device": self.model.device}
        self.buffer = torch.empty(capacity, self.d_in, **options)
        self.data_seed = hp.data_seed
        state = state or {}
        self.scale = state.get("scale")
        self.limit = state.get("limit")
        self.filling = state.get("filling", 0)
        self.served = state.get("served", 0)
        self.leftover = state.get("leftover", self.buffer[:0].clone())
        return self.serve(hp.batch_size)

    def state(self):
        """What `batches` needs to go on after the batch that it gave last."""
        return {
            "filling": self.filling,
            "served": self.served,
            "scale": self.scale,
            "limit": self.limit,
            "leftover": self.leftover.cpu(),
        }

    def held_out(self):
        """Activations that no SAE is trained on, raw: batches [n, d_in] float32, maybe none."""
        if len(self.held_out_tokens) < self.context:
            return []
        n_tokens, device = len(self.held_out_tokens), self.model.device
        contexts = cut_contexts(self.held_out_tokens, n_tokens, self.context, device)
        return Stream(self.model, self.layer, contexts)

    def serve(self, batch_size):
        while True:
            order = self.fill()
            while (self.served + 1) * batch_size <= len(order):
                chosen = order[self.served * batch_size : (self.served + 1) * batch_size]
                self.served += 1
                yield self.buffer[chosen].float() / self.scale
            self.leftover = self.buffer[order[self.served * batch_size :]].clone()
            self.filling += 1
            self.served = 0

    def fill(self):
        """Fill the buffer with what was left over and the activations of the next contexts.

        Returns the order in which to serve them, the numbers of the rows that are filled.
        """
        count = len(self.leftover)
        self.buffer[:count] = self.leftover
        first = self.filling * self.contexts_per_filling
        contexts = self.contexts(first, self.contexts_per_filling)
        parts = contexts.split(max(1, FORWARD // self.context))
        for part in tqdm(parts, desc="reading activations", unit="batch", leave=False, delay=2):
            resid = residual_stream(self.model, part, self.layer)
            if self.limit is None:
                self.limit = outlier_limit(resid)
            new = resid[is_trained_on(resid, self.limit)]
            self.buffer[count : count + len(new)] = new
            count += len(new)
        if self.scale is None:
            # In parts, since float32 copies of the whole would take several times its memory.
            parts = self.buffer[:count].split(8192)
            squared_norms = torch.cat([part.float().square().sum(1) for part in parts])
            self.scale = squared_norms.mean().sqrt().item()
        order = torch.randperm(count, generator=self.generator("shuffle", self.filling))
        return order.to(self.model.device)

    def contexts(self, first, n):
        """Contexts number `first` to `first + n` of the endless sequence, [n, context] ids."""
        found = []
        order = None
        for number in range(first, first + n):
            epoch, index = divmod(number, self.n_contexts)
            if order is None or index == 0:  # every pass over the tokens has an order of its own
                order = torch.randperm(self.n_contexts, generator=self.generator("order", epoch))
            start = order[index].item() * self.context
            found.append(self.tokens[start : start + self.context].astype(np.int64))
        return torch.from_numpy(np.stack(found)).to(self.model.device)

    def generator(self, purpose, number):
        """A random generator that depends on the data seed, the purpose and the number alone."""
        digest = hashlib.sha256(repr((self.data_seed, purpose, number)).encode()).digest()
        seed = int.from_bytes(digest[:7], "big")  # 56 bits, and manual_seed takes up to 64
        return torch.Generator().manual_seed(seed)


class Stream:
    """What SAEs are measured on: the residual stream after block `layer`, in the order of the text,
    at the positions that SAEs are trained on.

    `contexts` is a list of batches of token ids [B, context]. Iterating over the Stream gives the
    activations of each batch, [n, d_in] float32, unscaled. Outliers are judged by the median of the
    first batch here, not of the first in training.
    """

    def __init__(self, model, layer, contexts):
        self.model = model
        self.layer = layer
        self.contexts = contexts
        self.limit = outlier_limit(residual_stream(model, contexts[0], layer))

    def __iter__(self):
        for tokens in self.contexts:
            resid = residual_stream(self.model, tokens, self.layer)
            yield resid[self.keeps(resid)].float()

    def keeps(self, resid):
        """Which positions of resid [B, context, d_in] are in the stream, [B, context] bool."""
        return is_trained_on(resid, self.limit)

    def cross_entropy(self, replace=None):
        """The language model's cross-entropy, in nats per token, with replace(x) in place of x.

        x is the stream, [n, d_in]. Without `replace` it is the model's own cross-entropy.
        """
        if replace is None:
            return cross_entropy(self.model, self.contexts)

        def splice(resid):
            resid = resid.clone()
            kept = self.keeps(resid)
            # `replace` is an SAE, and runs in float32, as it does on the stream itself.
            with torch.autocast(resid.device.type, enabled=False):
                resid[kept] = replace(resid[kept].float()).to(resid.dtype)
            return resid

        with spliced(self.model, self.layer, splice):
            return cross_entropy(self.model, self.contexts)


# The language model and the text of a trained SAE, to measure it again


class Run(NamedTuple):
    """A run folder, and what the SAE in it reads."""

    folder: Path
    model: str  # a name of the hub, or a folder
    layer: int  # the block after which the residual stream is read
    context: int  # tokens that the language model reads together
    data: str  # what it was trained on: "pile", or a file
    dtype: str  # of the language model's matrix products


def read_run(folder):
    """The Run of a folder of ours, or of one whose cfg.json names model, hook and context.

    Raises UserError where it is not of a language model, or of another place in it.
    """
    folder = Path(folder)
    if (folder / "hparams.json").exists():
        hp = read_hparams(folder)
        if hp["model"]:
            # A fork may read another place, which is no setting but stands in the SAE's file.
            hook = SAE.load(folder).metadata.get("hook_name")
            block_of_hook(folder, str(hook))  # refuses such an SAE
            return Run(folder, hp["model"], hp["layer"], hp["context"], hp["data"], hp["dtype"])
        if hp["data"]:
            none = "there is no language model to measure it with"
            raise UserError(f"{folder}: trained on {hp['data']}, so {none}")
    else:
        origin = SAE.load(folder).metadata  # by the same names, whichever library wrote it
        model, hook = origin.get("model_name"), origin.get("hook_name")
        context = origin.get("context_size")
        named = isinstance(model, str) and isinstance(hook, str)
        if named and type(context) is int and context > 1:
            if origin.get("hook_name_out") not in (None, hook):
                raise UserError(f"{folder}: it reads {hook} and gives {origin['hook_name_out']}")
            loading = origin.get("model_from_pretrained_kwargs")
            if isinstance(loading, dict) and loading.get("center_writing_weights"):
                reason = "it reads a residual stream without its mean (center_writing_weights)"
                raise UserError(f"{folder}: {reason}, which is not supported")
            if origin.get("prepend_bos"):
                print(f"note: {folder} was trained with a BOS token, which is not put in here")
            layer = block_of_hook(folder, hook)
            # Nothing says where the tokens of its data set are.
            return Run(folder, hub_name(model), layer, context, "pile", "auto")
    raise UserError(
        f"{folder}: not a run of train_pythia.py, and its files do not name model_name, "
        "hook_name and context_size: there is no language model to measure it with"
    )


def block_of_hook(folder, hook):
    """The block whose output a hook of TransformerLens names. Raises UserError."""
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    if found:
        layer, place = int(found[1]), found[2]
        if place == HOOK:
            return layer
        if place == "hook_resid_pre" and HOOK == "hook_resid_post" and layer > 0:
            return layer - 1  # what goes into a block is what the one before it puts out
    way_out = f"only such a place as blocks.3.{HOOK} can be read"
    raise UserError(f"{folder}: of hook_name {hook}: {way_out}")


def hub_name(name):
    """The name on the hub of a model that TransformerLens, and so SAELens, names differently."""
    if name == "gpt2-small":
        return "gpt2"
    for family, owner in (("pythia-", "EleutherAI"), ("gemma-", "google")):
        if name.startswith(family):
            return f"{owner}/{name}"
    return name


class OpenRun(NamedTuple):
    """A language model, and text in its tokens."""

    model: nn.Module
    tokenizer: Any  # of one of transformers' many classes
    tokens: np.ndarray  # a flat array of token ids


def open_run(run, device, data=None, n_trained=0):
    """The language model of a Run, and tokens for it: those that training holds out.

    With n_trained they are the first so many of those that training draws from, though a short run
    may not have come to them; with `data` all tokens of that file. What an SAE of another library
    was trained on is not known, so it may have seen the tokens held out here. Raises UserError.
    """
    check_model(run)
    model, tokenizer = load_model(run.model, device, use_bfloat16(run.dtype, device))
    if data:
        return OpenRun(model, tokenizer, read_tokens(data, tokenizer, model))
    check_data(run.folder, run.data)
    train_tokens, held_out_tokens = open_tokens(run.data, n_trained, run.context, model, tokenizer)
    tokens = train_tokens[:n_trained] if n_trained else held_out_tokens
    return OpenRun(model, tokenizer, tokens)


def cut_contexts(tokens, n_tokens, length, device):
    """The first n_tokens of a flat array as a list of batches of contexts [B, length], on the
    device. Raises UserError where they are fewer than one context."""
    n_tokens = min(int(n_tokens), len(tokens))
    n_contexts = n_tokens // length
    if n_contexts < 1:
        few = f"{n_tokens} tokens are fewer than one context of {length}"
        raise UserError(f"{few}: give more --tokens, or --data with more text")
    contexts = torch.from_numpy(tokens[: n_contexts * length].astype(np.int64)).view(-1, length)
    return list(contexts.to(device).split(max(1, EVALUATED // length)))


# --------------------------------------------------------------------------------------------------
# Training


def main(argv=None):
    args, runs = parse(argv)
    runs = share_of(runs)
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "0"))  # among the processes of this machine
        args.device = f"cuda:{number % torch.cuda.device_count()}"
    device = pick_device(args.device)
    missing = [folder for folder, hp in runs.items() if not is_complete(folder, hp)]
    if not missing:
        print(f"all {len(runs)} SAEs are finished, in {args.out}")
        return
    source = open_rows_source(args.data) if is_rows(args.data) else open_text_source(args, device)
    make_folder(args.out)
    print(f"training {len(missing)} of {len(runs)} SAEs on {args.data}, {device}, into {args.out}")
    train(runs, source, device)


def open_text_source(args, device):
    """The activations of the language model of a command line on its text. Raises UserError."""
    if args.data != "pile" and not Path(args.data).is_file():  # known before a model is loaded
        raise UserError(f"--data {args.data}: there is no such file: {FORMATS}")
    model, tokenizer = load_model(args.model, device, use_bfloat16(args.dtype, device))
    # A little more than asked for, since first positions and outliers are dropped. (Of the pile so
    # many are downloaded. Should they not suffice, a second pass over them begins.)
    n_tokens = int(args.tokens * 1.01)
    train_tokens, held_out_tokens = open_tokens(args.data, n_tokens, args.context, model, tokenizer)
    # A run that is shorter than the buffer reads no more than it trains on, in whole contexts.
    buffer_size = min(BUFFER, n_tokens + args.context)
    # With far fewer tokens than the buffer holds, contexts would be in one filling several times.
    enough = max(min(BUFFER, int(args.tokens)), args.context)
    if len(train_tokens) < enough:
        has = f"{len(train_tokens):,} tokens to train on"
        raise UserError(f"--data {args.data}: {has}, give at least {enough:,} or lower --tokens")
    return Activations(
        model, args.layer, args.context, train_tokens, held_out_tokens, buffer_size=buffer_size
    )


def open_rows_source(data):
    """The rows of an activations file as a source. Raises UserError."""
    rows, held_out = open_rows(data)
    metadata = {
        "model_name": data,
        "hook_name": "activations",
        "context_size": 1,
        "prepend_bos": False,
    }
    return Rows(rows, held_out, metadata=metadata)


def share_of(runs):
    """Those of the runs that this process trains. Raises UserError.

    torchrun puts the number of the process, and how many there are, into the environment. They
    share nothing but the files that are downloaded.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < ranks:
        raise UserError(f"RANK {rank} of WORLD_SIZE {ranks} is set, not as by torchrun: unset both")
    share = dict(list(runs.items())[rank::ranks])
    if ranks > 1:  # schedulers set both as well, where there is no other process to do the rest
        print(f"RANK is {rank} and WORLD_SIZE {ranks}: {len(share)} of {len(runs)} SAEs are ours")
    return share


# ==================================================================================================
# Machinery: where tokens and activations come from, downloads, the command line
# ==================================================================================================

PILE = "https://huggingface.co/datasets/EleutherAI/pile-deduped-pythia-preshuffled/resolve/main/"
PILE_FILE = "document-00000-of-00020.bin"  # uint16 ids in rows of 2,049, as Pythia-deduped saw them
PILE_SAMPLE = ("Hello, I am", [12092, 13, 309, 717])  # a text, and its ids by Pythia's tokenizer
CACHE = Path("data")  # downloaded and tokenised text
MODELS = "give a folder with a model in it, or a name of the hub and a network"
FORMATS = (
    "give text (.txt, or .jsonl with a text in each line), token ids (.bin of uint16, or a "
    "one-dimensional .npy of integers) or activations (.npy or .pt, [N, d_in])"
)


@contextmanager
def as_user_error(subject, way_out):
    """A `with` block in which any exception but a lack of memory becomes a UserError of one line.

    Over a model or a file that is missing or damaged, libraries raise nearly every kind.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):  # of memory run_command knows more
        raise
    except Exception as error:
        message = f"{subject}: cannot be read ({first_line(error)}): {way_out}"
        raise UserError(message) from None


# --------------------------------------------------------------------------------------------------
# Tokens: flat arrays of token ids


def open_tokens(data, n_tokens, context, model, tokenizer):
    """Token ids to train on and held-out ones, two flat arrays on disk. Raises UserError.

    Of the pile the first HELD_OUT are held out, and n_tokens follow to train on. Of a file the last
    tenth is held out, in whole contexts and at most HELD_OUT, and all others are to train on.
    """
    if data == "pile":
        text, ids = PILE_SAMPLE
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            way_out = "give --data FILE, such as a .txt"
            name = model.name_or_path
            raise UserError(f"--data pile: has tokens of Pythia's, not of {name}: {way_out}")
        path = fetch(PILE + PILE_FILE, CACHE / PILE_FILE, 2 * (HELD_OUT + n_tokens))
        tokens = np.memmap(path, np.uint16, "r", shape=(HELD_OUT + n_tokens,))
        check_ids(tokens, data, model)
        return tokens[HELD_OUT:], tokens[:HELD_OUT]
    tokens = read_tokens(data, tokenizer, model)
    n_held_out = min(HELD_OUT, len(tokens) // 10) // context * context
    end = len(tokens) - n_held_out
    return tokens[:end], tokens[end:]


def read_tokens(data, tokenizer, model):
    """All token ids of a file of text or ids, a flat array on disk. Raises UserError."""
    path = Path(data)
    with as_user_error(f"--data {data}", FORMATS):
        if path.suffix == ".bin":
            tokens = np.memmap(path, np.uint16, "r")
            check_width(tokens, data, model)
        elif path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"{tokens.dtype} of shape {tokens.shape} are no token ids")
        else:
            tokens = np.memmap(tokenise(path, tokenizer), np.uint32, "r")
    check_ids(tokens, data, model)
    return tokens


def check_width(tokens, data, model):
    """Raise UserError where the ids of a .bin cannot have been uint16."""
    way_out = "save them as a one-dimensional .npy, which says how wide its numbers are"
    n = model.get_input_embeddings().num_embeddings
    if n > 2**16:
        raise UserError(f"--data {data}: ids of {n:,} tokens do not fit into uint16: {way_out}")
    if not tokens[1:1_000_000:2].any():
        raise UserError(f"--data {data}: every second id is 0, as in wider numbers: {way_out}")


def check_ids(tokens, data, model):
    """Raise UserError where there is a token that the model does not have."""
    n = model.get_input_embeddings().num_embeddings
    for start in range(0, len(tokens), 10_000_000):
        part = tokens[start : start + 10_000_000]
        for token in (int(part.min()), int(part.max())):
            if not 0 <= token < n:
                name = model.name_or_path
                raise UserError(f"--data {data}: token id {token}, but --model {name} has {n:,}")


def tokenise(path, tokenizer):
    """The path of the token ids of a text file, uint32, in the cache. Raises UserError.

    Every document (a .txt is one, a .jsonl has one a line) follows an end-of-text token. The text
    is read in pieces, so memory does not depend on its length.
    """
    now = path.stat()
    version = [str(path.resolve()), now.st_size, now.st_mtime_ns, fingerprint(tokenizer)]
    digest = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:12]
    target = CACHE / "tokens" / f"{path.name}-{digest}.uint32"
    make_folder(target.parent)
    with FileLock(f"{target}.lock"):  # of the processes of torchrun the first one tokenises
        if target.exists():
            return target
        with replacing(target) as temporary, open(temporary, "wb") as file:
            for piece in tqdm(documents(path), desc=f"tokenising {path.name}", unit="piece"):
                ids = []
                if piece.starts_document and tokenizer.eos_token_id is not None:
                    ids.append(tokenizer.eos_token_id)
                # A special token that is spelled out in the text is text like any other
                options = {"add_special_tokens": False, "split_special_tokens": True}
                ids += tokenizer(piece.text, verbose=False, **options)["input_ids"]
                np.array(ids, dtype=np.uint32).tofile(file)
    return target


def fingerprint(tokenizer):
    """What tells one tokenizer from another, and is the same in every process."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"


class Piece(NamedTuple):
    text: str
    starts_document: bool


def documents(path):
    """The Pieces of text of a .txt or .jsonl.

    Raises UserError where a line has no text, and ValueError where the file is of another kind.
    """
    if path.suffix == ".txt":
        with open(path, encoding="utf-8") as file:
            starts_document = True
            while lines := file.readlines(1 << 20):
                yield Piece("".join(lines), starts_document)
                starts_document = False
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # to see that it is a string, without lone surrogates
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    problem = f'line {number} is not a JSON object with a "text"'
                    raise UserError(f"--data {path}: {problem}") from None
                yield Piece(text, True)
    else:
        raise ValueError(f"{path.suffix or 'a file without a suffix'} is of unknown kind")


def decode_parts(tokenizer, parts):
    """The text of each of `parts`, lists of token ids that follow each other.

    Joined, the texts are that of all parts together. Decoded by itself, a part loses the space
    before it in SentencePiece's tokenizers, and in byte-level ones half a character becomes a
    replacement character. So the text of the whole is cut: a part ends where the text up to it
    ceases to agree with the whole, and a divided character belongs to the part that completes it.
    """
    tokens = [token for part in parts for token in part]
    whole = tokenizer.decode(tokens)
    texts = []
    start = n_tokens = 0
    for part in parts:
        n_tokens += len(part)
        up_to_here = tokenizer.decode(tokens[:n_tokens])
        end = start
        while end < len(up_to_here) and up_to_here[: end + 1] == whole[: end + 1]:
            end += 1
        texts.append(whole[start:end])
        start = end
    return texts


def end_tokens(model, tokenizer):
    """The set of token ids at which a text ends: those of the tokenizer, and of the model, which
    may name more of them."""
    ids = {tokenizer.eos_token_id}
    for config in (model.config.get_text_config(), model.generation_config):
        end = getattr(config, "eos_token_id", None)
        ids.update(end if isinstance(end, (list, tuple)) else [end])
    return ids - {None}


# --------------------------------------------------------------------------------------------------
# Rows: activations computed beforehand


def is_rows(data):
    """Whether --data names a file of activations, rather than text or token ids.

    Raises UserError where a .npy cannot be read.
    """
    path = Path(data)
    if path.suffix != ".npy":
        return path.suffix == ".pt"
    with as_user_error(f"--data {data}", FORMATS):
        return np.load(path, mmap_mode="r", allow_pickle=False).ndim != 1


def data_hash(data):
    """What tells the contents of a data file apart: a hash of its size, first and last megabyte.

    Empty where there is no such file, as for the pile.
    """
    path = Path(data)
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ends = file.read(1_000_000)
        file.seek(max(0, size - 1_000_000))
        ends += file.read()
    return hashlib.sha256(size.to_bytes(8, "big") + ends).hexdigest()[:16]


def check_data(folder, data):
    """Raise UserError where the file `data` has changed since the run in `folder` was trained."""
    if (Path(folder) / "hparams.json").exists():
        trained_on = read_hparams(folder)["data_hash"]
        check_contents(folder, trained_on, data_hash(data), data, "give --data, or train again")


def read_rows(data):
    """The tensor [N, d_in] in a .npy or .pt, as it is on disk. Raises UserError."""
    path = Path(data)
    with as_user_error(f"--data {data}", FORMATS):
        if path.suffix == ".npy":
            # "c" leaves the file as it is and on disk, but lets torch take it for writable
            rows = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        else:
            rows = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not torch.is_tensor(rows) or rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError("not one tensor [N, d_in] of real numbers")
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} rows, too few to hold one out")
    return rows


def open_rows(data):
    """The rows [N, d_in] of a file of activations in two: those to train on, as they are on disk,
    and the last tenth, which is held out, float32. Raises UserError."""
    rows = read_rows(data)
    n_held_out = max(1, len(rows) // 10)
    return rows[:-n_held_out], rows[-n_held_out:].float()


# --------------------------------------------------------------------------------------------------
# Downloads


def fetch(url, path, n_bytes):
    """Make `path` hold at least the first n_bytes of url, and return it. Raises UserError.

    What is there already is kept, so that the same command takes a download up where it broke.
    """
    make_folder(path.parent)
    with FileLock(f"{path}.lock"):  # of the processes of torchrun the first one downloads
        try:
            with open(path, "ab") as file:
                if file.tell() < n_bytes:
                    append_range(url, file, n_bytes)
        except OSError as error:  # of the disk, or of requests
            reason = error.strerror or first_line(error)
            way_out = f"the same command goes on from what is in {path}"
            raise UserError(f"cannot download {url} ({reason}): {way_out}") from None
    return path


def append_range(url, file, n_bytes):
    """Append what follows in url to a file until it has n_bytes. Raises OSError."""
    start = file.tell()
    headers = {"Range": f"bytes={start}-{n_bytes - 1}", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
        sent = reply.headers.get("Content-Range", "")
        if reply.status_code == 200:
            raise OSError("the server ignores the range asked for")
        if reply.status_code != 206:
            raise OSError(f"status {reply.status_code}")
        if not sent.startswith(f"bytes {start}-"):
            raise OSError(f"the server sends another range: {sent}")
        if "text/html" in reply.headers.get("Content-Type", ""):
            raise OSError("the server sends a page, not data")
        name = Path(file.name).name
        with tqdm(total=n_bytes, initial=start, desc=name, unit="B", unit_scale=True) as progress:
            for piece in reply.iter_content(1 << 16):
                piece = piece[: n_bytes - file.tell()]
                file.write(piece)
                progress.update(len(piece))
    if file.tell() < n_bytes:
        raise OSError("the connection broke off")


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The arguments, and the SAEs they ask for: {run folder: Hparams}. Raises UserError."""
    parser = Parser(description=__doc__)
    parser.add_settings(("d_in", "data_hash", "steps", "length"), **STUDY)
    parser.add_argument(
        "--tokens",
        type=float,
        default=50e6,
        help="activations to train on, in as many passes as it takes (default 50e6)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default="runs/pythia",
        metavar="DIR",
        help="where run folders go (default runs/pythia)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if args.context < 2:
        parser.error(f"--context {args.context}: give at least 2")
    if not 1 <= args.batch_size <= args.tokens < float("inf"):
        numbers = f"--tokens {args.tokens:g} --batch-size {args.batch_size}"
        parser.error(f"{numbers}: give at least one batch of tokens")
    without_model = is_rows(args.data)
    if without_model:
        d_in = read_rows(args.data).shape[1]
        # A flag that says what is the default anyway cannot be told from one that is not there.
        for name in ("model", "layer", "context"):
            value = getattr(args, name)
            if value != STUDY[name]:
                idle = "no language model reads the activations in --data: leave this out"
                parser.error(f"--{name} {value}: {idle}")
    else:
        d_in = check_model(args)
    contents = data_hash(args.data)

    def complete(settings, args):
        """The settings that follow from others: see `sweep`."""
        follow = {
            "d_in": d_in,
            "data_hash": contents,
            "steps": int(args.tokens) // settings["batch_size"],
            "length": f"{args.tokens / 1e6:g}M tokens",
        }
        if without_model:
            follow["model"], follow["layer"], follow["context"] = "", 0, 0
        return follow

    runs = {args.out / name: hp for name, hp in sweep(parser, args, complete).items()}
    return args, runs


def check_model(run):
    """The width of the residual stream, by the model's configuration alone. Raises UserError.

    `run` has model, layer and context, as a Run or the arguments of a command line.
    """
    with as_user_error(f"--model {run.model}", MODELS):
        config = AutoConfig.from_pretrained(run.model).get_text_config()
        width, depth = config.hidden_size, config.num_hidden_layers
    if not 0 <= run.layer < depth:
        raise UserError(f"--layer {run.layer}: {run.model} has blocks 0 to {depth - 1}")
    longest = getattr(config, "max_position_embeddings", None) or run.context
    if run.context > longest:
        raise UserError(f"--context {run.context}: {run.model} reads at most {longest} tokens")
    return width


if __name__ == "__main__":
    run_command(main)
