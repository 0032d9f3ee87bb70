"""Train SAEs on the residual stream of a language model.

    python train_pythia.py --l2 1e-4 --seed 0                                       the study's SAE, on one GPU
    python train_pythia.py --k 40 80 150 320 --l2 0 1e-4 --seed 0 1 2               its grid of 24, in one pass
    python train_pythia.py --model gpt2 --layer 6 --data book.txt --tokens 2e6      any causal model, any text
    torchrun --nproc-per-node 8 train_pythia.py --k 40 80 150 320 --seed 0 1 2      the SAEs divided among 8 GPUs

Lists sweep: the product of all of them is trained, every SAE on the same stream of activations, so the language
model runs once. A finished SAE is not trained again, and an interrupted command goes on where it was. Read it
from top to bottom: model, tokens, activations, training.
"""

import argparse
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import random
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae import (
    ARCHS,
    L2_FORMS,
    Hparams,
    Parser,
    RunError,
    Trainer,
    UsageError,
    check_writable,
    first_line,
    fit,
    initialise,
    is_complete,
    make_folder,
    pick_device,
    replacing,
    run_command,
    run_name,
    stop_signal,
    use_bfloat16,
    write_hparams,
)

PILE = "https://huggingface.co/datasets/EleutherAI/pile-deduped-pythia-preshuffled/resolve/main/"
PILE_FILE = "document-00000-of-00020.bin"  # uint16 token ids in rows of 2,049, as Pythia-deduped saw them
CACHE = Path("data")  # downloaded and tokenised text
HELD_OUT = 500_000  # tokens at the end that evaluate.py measures on; of a small file at most a tenth
BUFFER = 250_000  # activations shuffled together
FORWARD = 16_384  # tokens that the language model reads at once
DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
RANKS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


# ---------------------------------------------------------------------------------------------------
# Model: any causal language model of transformers, and the residual stream after one of its blocks


@contextmanager
def loading(name):
    """Turn what transformers raises for a model that is not there into a UsageError with the way out."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        way_out = "give a folder with a model in it, or a name of the hub and a network"
        raise UsageError(f"--model {name}: cannot be loaded ({first_line(error)}): {way_out}") from None


def load_model(name, device, bfloat16=True):
    """The model, in eval mode, and its tokenizer. Raises UsageError where there is no such model."""
    # On a CPU the weights stay in float32, and Activations multiplies in bfloat16: the better half of both
    dtype = torch.bfloat16 if bfloat16 and device.type != "cpu" else torch.float32
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(name, **{DTYPE: dtype})
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(device).eval().requires_grad_(False), tokenizer


def blocks(model):
    """The transformer blocks, in order, whatever the family calls them (gpt_neox.layers, transformer.h, ...)."""
    depth = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


class Reached(Exception):
    """Thrown by a hook to end a forward pass after the block it is on."""


@torch.no_grad()
def residual_stream(model, tokens, layer):
    """The residual stream after block `layer` [B, context, d_in], of tokens [B, context]; later blocks do not run."""
    found = []

    def hook(module, inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    handle = blocks(model)[layer].register_forward_hook(hook)
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    except Reached:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def spliced(model, layer, replace):
    """Within it, the residual stream after block `layer` [B, context, d_in] is what `replace` makes of it."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    handle = blocks(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------
# Tokens: flat arrays of token ids


def open_tokens(args, tokenizer, vocab_size):
    """Token ids of --data for training and, from its end, held out: two flat arrays. Raises UsageError, RunError.

    `args` has data, tokens (how many of the pile), context and model, as Hparams and the command line do.
    """
    tokens = read_tokens(args, tokenizer, vocab_size)
    held_out = min(HELD_OUT, len(tokens) // 10) // args.context * args.context
    train = tokens[: len(tokens) - held_out]
    if len(train) < BUFFER:
        raise UsageError(f"--data {args.data}: {len(train):,} tokens to train on, give at least {BUFFER:,}")
    return train, tokens[len(tokens) - held_out :]


def read_tokens(args, tokenizer, vocab_size):
    """All token ids of --data, a flat array on disk. Raises UsageError, RunError."""
    if args.data == "pile":
        n_tokens = int(args.tokens * 1.01) + HELD_OUT  # a little more, for the activations that are dropped
        tokens = np.memmap(fetch(PILE + PILE_FILE, CACHE / PILE_FILE, 2 * n_tokens), np.uint16, "r")[:n_tokens]
    else:
        path = Path(args.data)
        if not path.is_file():
            raise UsageError(f"--data {path}: no such file; give pile, or a .bin, .txt, .jsonl or .jsonl.gz")
        if path.suffix == ".bin":
            if path.stat().st_size % 2:
                raise UsageError(f"--data {path}: an odd number of bytes cannot be uint16 token ids")
        else:
            path = tokenise(path, tokenizer)
        if path.stat().st_size == 0:
            raise UsageError(f"--data {args.data}: no text in it")
        tokens = np.memmap(path, np.uint32 if path.suffix == ".bin32" else np.uint16, "r")
    largest = max(int(tokens[i : i + 10_000_000].max()) for i in range(0, len(tokens), 10_000_000))
    if largest >= vocab_size:
        raise UsageError(f"--data {args.data}: token id {largest}, but --model {args.model} has {vocab_size} tokens")
    return tokens


@contextmanager
def locked(path):
    """One process at a time: of the ranks of a node the first one downloads or tokenises, the others wait."""
    make_folder(path.parent)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(url, path, n_bytes, tries=6):
    """Make `path` hold at least the first n_bytes of url, by range requests; what is there already is kept.

    A connection that breaks is taken up where it broke, after growing waits. Raises RunError.
    """

    def give_up(reason):
        return RunError(f"cannot download {url} ({reason}); the same command goes on from what is in {path}")

    with locked(path), open(path, "ab") as file, tqdm(total=n_bytes, desc=path.name, unit="B", unit_scale=True) as bar:
        reason = ""
        for attempt in range(tries + 1):
            have = file.tell()
            bar.update(min(have, n_bytes) - bar.n)
            if have >= n_bytes:
                return path
            if attempt == tries:
                raise give_up(f"{reason}, {tries} times")
            if attempt:
                time.sleep(2**attempt * random.uniform(0.25, 0.5))
            try:
                headers = {"Range": f"bytes={have}-{n_bytes - 1}", "Accept-Encoding": "identity"}
                with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
                    reason = f"status {reply.status_code}"
                    if reply.status_code in (400, 401, 403, 404, 416):
                        raise give_up(reason)
                    if reply.status_code == 200:
                        raise give_up("the server ignores the range asked for")
                    if reply.status_code != 206:
                        continue
                    if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                        raise give_up(f"the server sends another range: {reply.headers.get('Content-Range')}")
                    if "text/html" in reply.headers.get("Content-Type", ""):
                        raise give_up("the server sends a page, not data")
                    reason = "the connection broke off"
                    for piece in reply.iter_content(1 << 20):
                        piece = piece[: n_bytes - file.tell()]
                        file.write(piece)
                        bar.update(len(piece))
            except requests.RequestException as error:
                reason = type(error).__name__
            except OSError as error:
                raise give_up(error.strerror) from None
            file.flush()


def tokenise(path, tokenizer):
    """Token ids of a text file, in the cache: uint16, or uint32 (.bin32) for a large vocabulary.

    Every document (a .txt is one, a .jsonl has one a line) follows an end-of-text token. The text is read in
    pieces, so memory does not depend on its length. Raises UsageError where it is not text.
    """
    wide = len(tokenizer) > 2**16
    about = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {tokenizer.get_vocab()!r}"
    name = f"{path.name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.bin{'32' if wide else ''}"
    target = CACHE / "tokens" / name
    with locked(target):
        if target.exists():
            return target
        with replacing(target) as temporary, open(temporary, "wb") as file:
            for new, text in tqdm(documents(path), desc=f"tokenising {path.name}", unit="piece"):
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                start = [tokenizer.eos_token_id] if new and tokenizer.eos_token_id is not None else []
                np.array(start + ids, dtype=np.uint32 if wide else np.uint16).tofile(file)
    return target


def documents(path):
    """Pieces of text of a .txt, .jsonl or .jsonl.gz: pairs (starts a document, text). Raises UsageError."""
    names = path.name.split(".")
    opener = gzip.open if names[-1] == "gz" else open
    kind = names[-2] if names[-1] == "gz" and len(names) > 1 else names[-1]
    if kind not in ("txt", "jsonl"):
        raise UsageError(f"--data {path}: of unknown kind; give a .bin, .txt, .jsonl or .jsonl.gz")
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if kind == "txt":
                for number, piece in enumerate(iter(lambda: "".join(file.readlines(1 << 20)), "")):
                    yield number == 0, piece
            for text in file if kind == "jsonl" else ():
                line += 1
                if text.strip():
                    yield True, json.loads(text)["text"]
    except UnicodeDecodeError as error:
        raise UsageError(f"--data {path}: not UTF-8 text ({error.reason} after line {line})") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"--data {path}: damaged ({first_line(error)}): fetch it again") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f'--data {path}: line {line} is not a JSON object with a "text"') from None


# ---------------------------------------------------------------------------------------------------
# Activations


class Activations:
    """An endless, shuffled stream of activations [batch_size, d_in], float32, of unit mean squared norm.

    Contexts are taken in random order, without repetition within a pass over the tokens. About BUFFER activations
    of as many contexts as it takes fill one buffer in place, are shuffled by index and served; the few that do
    not make a batch stay for the next filling, so nothing is lost. The first position of each context is dropped,
    and so are outliers: norms above 10 times the median. Memory: (BUFFER + batch_size) * d_in numbers.

    Everything follows from the tokens, data_seed, and a state small enough for a checkpoint: the number of the
    filling, the batches served of it, and the activations left over from the one before.
    """

    def __init__(self, model, layer, tokens, context, batch_size, data_seed, device, state=None, bfloat16=False):
        self.model, self.layer, self.tokens, self.context = model, layer, tokens, context
        self.batch_size, self.data_seed, self.device = batch_size, data_seed, device
        # A model in float32 may still multiply in bfloat16; what it adds up, the residual stream, stays in float32
        self.autocast = torch.autocast(device.type, torch.bfloat16, bfloat16 and model.dtype == torch.float32)
        self.n_contexts = len(tokens) // context
        self.contexts_per_filling = max(1, BUFFER // (context - 1))
        rows = self.contexts_per_filling * (context - 1) + batch_size
        self.buffer = torch.empty(rows, model.config.hidden_size, dtype=model.dtype, device=device)
        self.filling, self.served, self.leftover = 0, 0, self.buffer[:0].clone()
        self.scale = self.limit = None
        if state:
            self.filling, self.served, self.scale, self.limit = (
                state[k] for k in ("filling", "served", "scale", "limit")
            )
            self.leftover = state["leftover"].to(self.buffer)
        self.fill()

    def state(self):
        """What a new stream needs to go on from here."""
        names = ("filling", "served", "scale", "limit")
        return {name: getattr(self, name) for name in names} | {"leftover": self.leftover.cpu()}

    def generator(self, *numbers):
        """A generator that depends on data_seed and the numbers alone."""
        digest = hashlib.sha256(repr((self.data_seed, *numbers)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def contexts(self, first, n):
        """Contexts number `first` to `first + n` of the endless sequence, [n, context] token ids."""
        rows = []
        for number in range(first, first + n):
            epoch, index = divmod(number, self.n_contexts)
            if index == 0 or not rows:
                order = torch.randperm(self.n_contexts, generator=self.generator("order", epoch))
            start = order[index].item() * self.context
            rows.append(self.tokens[start : start + self.context].astype(np.int64))
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def fill(self):
        """Fill the buffer: what was left over, then the activations of the next contexts."""
        count = len(self.leftover)
        self.buffer[:count] = self.leftover
        contexts = self.contexts(self.filling * self.contexts_per_filling, self.contexts_per_filling)
        for part in contexts.split(max(1, FORWARD // self.context)):
            with self.autocast:
                new = residual_stream(self.model, part, self.layer)[:, 1:].flatten(0, 1)
            norm = new.float().norm(dim=1)
            if self.limit is None:
                self.limit = 10 * norm.median().item()
            new = new[norm <= self.limit]
            self.buffer[count : count + len(new)] = new
            count += len(new)
        if self.scale is None:
            self.scale = self.buffer[:count].float().square().sum(1).mean().sqrt().item()
        self.order = torch.randperm(count, generator=self.generator("shuffle", self.filling)).to(self.device)

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.peek()
        self.served += 1
        if (self.served + 1) * self.batch_size > len(self.order):
            self.leftover = self.buffer[self.order[self.served * self.batch_size :]].clone()
            self.filling, self.served = self.filling + 1, 0
            self.fill()
        return batch

    def peek(self):
        """The next batch, without taking it."""
        rows = self.order[self.served * self.batch_size : (self.served + 1) * self.batch_size]
        return self.buffer[rows].float() / self.scale


# ---------------------------------------------------------------------------------------------------
# Training


def hparams(args, d_in, arch, k, l1, l2, seed):
    """The study's settings for Pythia, the defaults of Hparams, with what the command line changes of them."""
    return Hparams(
        arch=arch,
        d_in=d_in,
        d_sae=args.d_sae,
        k=k if arch != "relu" else Hparams.k,
        sparsity=args.sparsity if arch == "relu" else 0.0,
        l1=l1,
        l2=l2,
        l2_form=args.l2_form,
        unit_norm=args.unit_norm,
        lr=args.lr,
        batch_size=args.batch_size,
        steps=int(args.tokens) // args.batch_size,
        warmup=args.warmup,
        seed=seed,
        data_seed=args.data_seed,
        data=args.data,
        model=args.model,
        layer=args.layer,
        context=args.context,
        dtype=args.dtype,
    )


def sweep(args, d_in):
    """The SAEs of the command line, the product of its lists: {name of the run: hyperparameters}."""
    usual = parse(["--model", args.model, "--data", args.data])
    runs = {}
    for arch, k, l1, l2, seed in itertools.product(args.arch, args.k, args.l1, args.l2, args.seed):
        hp = hparams(args, d_in, arch, k, l1, l2, seed)
        runs[run_name(hp, hparams(usual, d_in, arch, 40, 0.0, 0.0, 0))] = hp
    return runs


def finish(trainer, folder, scale):
    """Write a trained SAE so that it takes raw activations."""
    hp = trainer.hp
    metadata = {name: getattr(hp, name) for name in ("l1", "l2", "l1_form", "l2_form", "seed", "data_seed")}
    metadata |= {"model_name": hp.model.rstrip("/").split("/")[-1], "hook_name": f"blocks.{hp.layer}.hook_resid_post"}
    metadata |= {"context_size": hp.context, "prepend_bos": False}
    trainer.finish(folder, metadata, scale)
    row = trainer.metrics[-1]
    print(f"{folder}: fve {row['fve']:.4f}, l0 {row['l0']:.1f}, dead {row['dead']} of {hp.d_sae}")


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="EleutherAI/pythia-70m-deduped", help="a name of the hub, or a folder")
    add("--layer", type=int, default=3, help="the block after which the residual stream is read, from 0")
    add("--data", default="pile", metavar="pile|FILE", help="a .bin of uint16 ids, .txt, .jsonl or .jsonl.gz")
    add("--tokens", type=float, default=50e6, help="activations to train on, in as many passes as it takes")
    add("--arch", nargs="+", default=["topk"], metavar="ARCH", help=f"any of {', '.join(ARCHS)}")
    add("--k", nargs="+", type=int, default=[40], help="active latents, all but relu")
    add("--l1", nargs="+", type=float, default=[0.0], help="weight of the L1 penalty; the study's is 1e-4")
    add("--l2", nargs="+", type=float, default=[0.0], help="weight of the L2 penalty; the study's is 1e-4")
    add("--l2-form", default="squares", help=f"of the L2 penalty, one of {', '.join(L2_FORMS)}")
    add("--seed", nargs="+", type=int, default=[0], help="initialisation")
    add("--data-seed", type=int, default=0, help="order of the contexts and activations")
    add("--d-sae", type=int, default=16_384, help="number of latents")
    add("--unit-norm", action="store_true", help="decoder rows are kept at norm 1")
    add("--sparsity", type=float, default=0.06, help="weight of the summed activations, relu only")
    add("--batch-size", type=int, default=2048, help="activations per step")
    add("--context", type=int, default=1024, help="tokens that the language model reads together")
    add("--lr", type=float, default=5e-5)
    add("--warmup", type=int, default=1000, help="steps of linear warm-up")
    add("--dtype", default="auto", help="of matrix products: float32, bfloat16, or auto: the faster one here")
    add("--out", default="runs/pythia", metavar="DIR", help="where run folders go")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if args.context < 2:
        raise UsageError(f"--context {args.context}: give at least 2")
    if args.batch_size < 1 or not args.batch_size <= args.tokens < float("inf"):
        raise UsageError(f"--tokens {args.tokens:g} --batch-size {args.batch_size}: give at least one batch of tokens")
    args.out = Path(args.out)
    return args


def check_model(args):
    """The width of the residual stream, from the model's configuration. Raises UsageError."""
    with loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
    if not 0 <= args.layer < config.num_hidden_layers:
        raise UsageError(f"--layer {args.layer}: {args.model} has blocks 0 to {config.num_hidden_layers - 1}")
    longest = getattr(config, "max_position_embeddings", None) or args.context
    if args.context > longest:
        raise UsageError(f"--context {args.context}: {args.model} reads at most {longest} tokens")
    return config.hidden_size


def main(argv=None):
    args = parse(argv)
    if args.batch_size > BUFFER // 2:
        raise UsageError(f"--batch-size {args.batch_size}: give at most {BUFFER // 2}, half the shuffled buffer")
    # torchrun says which of how many processes this is; SAEs are dealt out, and nothing else is shared
    rank, ranks, local_rank = (int(os.environ.get(name, usual)) for name, usual in RANKS)
    if args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    device = pick_device(args.device)
    runs = {args.out / name: hp for name, hp in list(sweep(args, check_model(args)).items())[rank::ranks]}
    check_writable(args.out, "--out")
    missing = {folder: hp for folder, hp in runs.items() if not is_complete(folder, hp)}
    if not missing:
        print(f"all {len(runs)} SAEs are finished, in {args.out}")
        return
    bfloat16 = use_bfloat16(args.dtype, device)
    model, tokenizer = load_model(args.model, device, bfloat16)
    tokens, _ = open_tokens(args, tokenizer, model.get_input_embeddings().num_embeddings)
    print(f"training {len(missing)} of {len(runs)} SAEs on {args.data}, {device}, into {args.out}")
    stream_at = (model, args.layer, tokens, args.context, args.batch_size, args.data_seed, device)
    trainers, states = {}, {}
    for folder, hp in missing.items():
        trainers[folder] = Trainer(hp, torch.zeros(1, hp.d_in), device)
        states[folder] = trainers[folder].resume(folder)
    behind = min(trainers, key=lambda folder: trainers[folder].step)
    stream = Activations(*stream_at, states[behind], bfloat16)
    for folder, hp in missing.items():
        if trainers[folder].step == 0:  # now that there are activations
            initialise(trainers[folder].sae, hp, stream.peek().cpu())
        write_hparams(folder, hp, complete=False, bfloat16=trainers[folder].bfloat16)
    with stop_signal() as stop:
        fit(trainers, stream, stop, stream.state)
    for folder, trainer in trainers.items():
        finish(trainer, folder, stream.scale)


if __name__ == "__main__":
    run_command(main)
