"""Train SAEs on the residual stream of a language model.

    python train_pythia.py --l2 1e-4 --seed 0                                       the study's SAE, on one GPU
    python train_pythia.py --k 40 80 150 320 --l2 0 1e-4 --seed 0 1 2               its grid of 24, in one pass
    python train_pythia.py --model gpt2 --layer 6 --data book.txt --tokens 2e6      any causal model, any text
    torchrun --nproc-per-node 8 train_pythia.py --k 40 80 150 320 --seed 0 1 2      the SAEs divided among 8 GPUs

Lists sweep: the product of all of them is trained, every SAE on the same stream of activations, so the language
model runs once. A finished SAE is not trained again, and an interrupted command goes on where it was. Read it
from top to bottom: model, activations, training; then where the tokens come from, and the command line.
"""

import gzip
import hashlib
import json
import os
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import requests
import torch
import transformers
from filelock import FileLock
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae import (
    Parser,
    Trainer,
    UserError,
    first_line,
    fit,
    is_complete,
    make_folder,
    pick_device,
    replacing,
    resume,
    run_command,
    save_run,
    sweep,
    use_bfloat16,
    write_hparams,
)

STUDY = {"model": "EleutherAI/pythia-70m-deduped", "layer": 3, "context": 1024, "data": "pile", "sparsity": 0.06}
PILE = "https://huggingface.co/datasets/EleutherAI/pile-deduped-pythia-preshuffled/resolve/main/"
PILE_FILE = "document-00000-of-00020.bin"  # uint16 token ids in rows of 2,049, as Pythia-deduped saw them
CACHE = Path("data")  # downloaded and tokenised text
HELD_OUT = 500_000  # tokens that evaluate.py measures on: the first of the pile; the last of a file, at most a tenth
BUFFER = 250_000  # activations shuffled together
FORWARD = 16_384  # tokens that the language model reads at once
DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


# ---------------------------------------------------------------------------------------------------
# Model: any causal language model of transformers, and the residual stream after one of its blocks


@contextmanager
def loading(name):
    """Turn what transformers raises for a model that is not there into a UserError with the way out."""
    try:
        yield
    except Exception as error:  # of many kinds, where a configuration is not whole
        way_out = "give a folder with a model in it, or a name of the hub and a network"
        raise UserError(f"--model {name}: cannot be loaded ({first_line(error)}): {way_out}") from None


def load_model(name, device, bfloat16=True):
    """The model, in eval mode, and its tokenizer. Raises UserError where there is no such model."""
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


class Reached(Exception):
    """Thrown to end a forward pass after the block that is read."""


@torch.no_grad()
def residual_stream(model, tokens, layer):
    """The residual stream after block `layer` [B, context, d_in], of tokens [B, context]; later blocks do not run."""
    found = []

    def read(resid):
        found.append(resid)
        raise Reached

    with suppress(Reached), spliced(model, layer, read):
        model.base_model(input_ids=tokens, use_cache=False)
    return found[0]


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

    STATE = ("filling", "served", "scale", "limit", "leftover")

    def __init__(self, model, layer, tokens, context, batch_size, data_seed, device, state=None, bfloat16=False):
        self.model, self.layer, self.tokens, self.context = model, layer, tokens, context
        self.batch_size, self.data_seed, self.device = batch_size, data_seed, device
        # A model in float32 may still multiply in bfloat16; what it adds up, the residual stream, stays in float32
        self.autocast = torch.autocast(device.type, torch.bfloat16, bfloat16 and model.dtype == torch.float32)
        self.n_contexts = len(tokens) // context
        self.contexts_per_filling = max(1, BUFFER // (context - 1))
        rows = self.contexts_per_filling * (context - 1) + batch_size
        self.buffer = torch.empty(rows, model.config.hidden_size, dtype=model.dtype, device=device)
        state = state or {"filling": 0, "served": 0, "scale": None, "limit": None, "leftover": self.buffer[:0].clone()}
        self.filling, self.served, self.scale, self.limit, self.leftover = (state[name] for name in self.STATE)
        self.fill()

    def state(self):
        """What a new stream needs to go on from here."""
        return {name: getattr(self, name) for name in self.STATE} | {"leftover": self.leftover.cpu()}

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
        rows = self.order[self.served * self.batch_size : (self.served + 1) * self.batch_size]
        batch = self.buffer[rows].float() / self.scale
        self.served += 1
        if (self.served + 1) * self.batch_size > len(self.order):
            self.leftover = self.buffer[self.order[self.served * self.batch_size :]].clone()
            self.filling, self.served = self.filling + 1, 0
            self.fill()
        return batch


# ---------------------------------------------------------------------------------------------------
# Training


def main(argv=None):
    args, runs = parse(argv)
    # torchrun says which of how many processes this is; SAEs are dealt out, and nothing else is shared
    try:
        rank, ranks, local_rank = map(int, map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("0", "1", "0")))
        if not 0 <= rank < ranks:
            raise ValueError
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK are set, not as torchrun does: unset them") from None
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    device, runs = pick_device(args.device), dict([*runs.items()][rank::ranks])
    missing = {folder: hp for folder, hp in runs.items() if not is_complete(folder, hp)}
    if not missing:
        print(f"all {len(runs)} SAEs are finished, in {args.out}")
        return
    bfloat16 = use_bfloat16(args.dtype, device)
    model, tokenizer = load_model(args.model, device, bfloat16)
    # A little more, for the activations that are dropped
    tokens, _ = open_tokens(args, int(args.tokens * 1.01), tokenizer, model)
    if len(tokens) < BUFFER:
        raise UserError(f"--data {args.data}: {len(tokens):,} tokens to train on, give at least {BUFFER:,}")
    make_folder(args.out)
    print(f"training {len(missing)} of {len(runs)} SAEs on {args.data}, {device}, into {args.out}")
    trainers, states = {folder: Trainer(hp, device) for folder, hp in missing.items()}, {}
    for folder, trainer in trainers.items():
        states[folder] = resume(trainer, folder)
        write_hparams(trainer, folder)
    behind = min(trainers, key=lambda folder: trainers[folder].step)
    where = (model, args.layer, tokens, args.context, args.batch_size, args.data_seed, device)
    stream = Activations(*where, states[behind], bfloat16)
    fit(trainers, stream, stream.state)
    metadata = {"model_name": args.model, "hook_name": f"blocks.{args.layer}.hook_resid_post"}
    metadata |= {"context_size": args.context, "prepend_bos": False}
    for folder, trainer in trainers.items():
        save_run(trainer, folder, metadata, stream.scale)
        row = trainer.metrics[-1]
        print(f"{folder}: fve {row['fve']:.4f}, l0 {row['l0']:.1f}, dead {row['dead']} of {trainer.hp.d_sae}")


# ---------------------------------------------------------------------------------------------------
# Tokens: flat arrays of token ids


def open_tokens(hp, n_tokens, tokenizer, model):
    """Token ids to train on and held-out ones, two flat arrays on disk, of hp.data: of the pile n_tokens behind those
    held out, of a file all before them. Raises UserError.

    `hp` has data, model and context, as Hparams and the command line do.
    """
    if hp.data == "pile":
        path = fetch(PILE + PILE_FILE, CACHE / PILE_FILE, 2 * (HELD_OUT + n_tokens))
        tokens = np.memmap(path, np.uint16, "r")[: HELD_OUT + n_tokens]
        held_out, train = tokens[:HELD_OUT], tokens[HELD_OUT:]
    else:
        tokens = read_tokens(hp.data, tokenizer)
        end = len(tokens) - min(HELD_OUT, len(tokens) // 10) // hp.context * hp.context
        train, held_out = tokens[:end], tokens[end:]
    check_ids(tokens, hp, model)
    return train, held_out


def read_tokens(data, tokenizer):
    """All token ids of a file, a flat array on disk. Raises UserError."""
    path = Path(data)
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; give a .bin, .txt, .jsonl or .jsonl.gz, or leave --data out")
    if path.suffix != ".bin":
        path = tokenise(path, tokenizer)
    elif path.stat().st_size % 2:
        raise UserError(f"--data {path}: an odd number of bytes cannot be uint16 token ids")
    if path.stat().st_size == 0:
        raise UserError(f"--data {data}: no text in it")
    return np.memmap(path, np.uint32 if path.suffix == ".bin32" else np.uint16, "r")


def check_ids(tokens, hp, model):
    """Raise UserError where tokens hold an id that the model does not have."""
    largest = max(int(tokens[i : i + 10_000_000].max()) for i in range(0, len(tokens), 10_000_000))
    if largest >= (n := model.get_input_embeddings().num_embeddings):
        raise UserError(f"--data {hp.data}: token id {largest}, but --model {hp.model} has {n} tokens")


def fetch(url, path, n_bytes):
    """Make `path` hold at least the first n_bytes of url, by a range request; what is there already is kept, so the
    same command takes a download up where it broke. Raises UserError."""

    def check(condition, reason):
        if not condition:
            raise UserError(f"cannot download {url} ({reason}); the same command goes on from what is in {path}")

    make_folder(path.parent)
    with FileLock(f"{path}.lock"), open(path, "ab") as file:  # of the ranks of a node the first one downloads
        have = file.tell()
        if have >= n_bytes:
            return path
        headers = {"Range": f"bytes={have}-{n_bytes - 1}", "Accept-Encoding": "identity"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
                sent = reply.headers.get("Content-Range", "")
                check(reply.status_code != 200, "the server ignores the range asked for")
                check(reply.status_code == 206, f"status {reply.status_code}")
                check(sent.startswith(f"bytes {have}-"), f"the server sends another range: {sent}")
                check("text/html" not in reply.headers.get("Content-Type", ""), "the server sends a page, not data")
                with tqdm(total=n_bytes, initial=have, desc=path.name, unit="B", unit_scale=True) as progress:
                    for piece in reply.iter_content(1 << 16):
                        progress.update(file.write(piece[: n_bytes - file.tell()]))
        except OSError as error:  # of the disk, or of requests
            check(False, error.strerror or type(error).__name__)
        check(file.tell() == n_bytes, "the connection broke off")
    return path


def tokenise(path, tokenizer):
    """Token ids of a text file, in the cache: uint16, or uint32 (.bin32) for a large vocabulary.

    Every document (a .txt is one, a .jsonl has one a line) follows an end-of-text token. The text is read in
    pieces, so memory does not depend on its length. Raises UserError where it is not text.
    """
    wide = len(tokenizer) > 2**16
    about = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {tokenizer.get_vocab()!r}"
    name = f"{path.name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.bin{'32' if wide else ''}"
    target = CACHE / "tokens" / name
    make_folder(target.parent)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        with replacing(target) as temporary, open(temporary, "wb") as file:
            for new, text in tqdm(documents(path), desc=f"tokenising {path.name}", unit="piece"):
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                start = [tokenizer.eos_token_id] if new and tokenizer.eos_token_id is not None else []
                np.array(start + ids, dtype=np.uint32 if wide else np.uint16).tofile(file)
    return target


def documents(path):
    """Pieces of text of a .txt, .jsonl or .jsonl.gz: pairs (starts a document, text). Raises UserError."""
    names = path.name.split(".")
    opener = gzip.open if names[-1] == "gz" else open
    kind = names[-2] if names[-1] == "gz" and len(names) > 1 else names[-1]
    if kind not in ("txt", "jsonl"):
        raise UserError(f"--data {path}: of unknown kind; give a .bin, .txt, .jsonl or .jsonl.gz")
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if kind == "txt":
                for number, piece in enumerate(iter(lambda: "".join(file.readlines(1 << 20)), "")):
                    yield number == 0, piece
            for text in file if kind == "jsonl" else ():
                line += 1
                if text.strip():
                    text = json.loads(text)["text"]
                    text.encode()  # a string, and of characters that there are
                    yield True, text
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text ({error.reason} after line {line})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"--data {path}: damaged ({first_line(error)}): fetch it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'--data {path}: line {line} is not a JSON object with a "text"') from None


# ---------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The arguments, and the SAEs they ask for: {run folder: Hparams}. UserError where there is no such model."""
    parser = Parser(description=__doc__)
    parser.add_settings(("d_in", "steps", "length"), **STUDY)
    add = parser.add_argument
    add("--tokens", type=float, default=50e6, help="activations to train on, in as many passes as it takes (50e6)")
    add("--out", type=Path, default="runs/pythia", metavar="DIR", help="where run folders go (default runs/pythia)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if args.context < 2:
        parser.error(f"--context {args.context}: give at least 2")
    if not 1 <= args.batch_size <= BUFFER // 2:
        parser.error(f"--batch-size {args.batch_size}: give at most {BUFFER // 2}, half the shuffled buffer")
    if not args.batch_size <= args.tokens < float("inf"):
        parser.error(f"--tokens {args.tokens:g} --batch-size {args.batch_size}: give at least one batch of tokens")
    d_in = check_model(args)

    def complete(given, args):
        steps = int(args.tokens) // given["batch_size"]
        return {"d_in": d_in, "steps": steps, "length": f"{args.tokens / 1e6:g}M tokens"}

    return args, {args.out / name: hp for name, hp in sweep(parser, args, complete).items()}


def check_model(args):
    """The width of the residual stream, from the model's configuration. Raises UserError."""
    with loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
        width, depth = config.hidden_size, config.num_hidden_layers
    if not 0 <= args.layer < depth:
        raise UserError(f"--layer {args.layer}: {args.model} has blocks 0 to {depth - 1}")
    longest = getattr(config, "max_position_embeddings", None) or args.context
    if args.context > longest:
        raise UserError(f"--context {args.context}: {args.model} reads at most {longest} tokens")
    return width


if __name__ == "__main__":
    run_command(main)
