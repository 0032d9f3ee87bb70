"""Measure speed on this machine, by hand: python tests/benchmark.py [PART...]

Parts, all of them by default: mnist, steps, memory, growth, sweep, language_model, matching,
steering. Every line stands alone. What is compared runs in turns within one process, and medians of
the rounds are compared. dictionary_learning takes part where it can be imported. The "floor" is
what no training step can do without: the encoder's product, one top-k of its result, one pass of
Adam. SAE_LM_DIR names a folder with a language model; without it, one of Pythia-70M's shape with
random weights takes its place.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sae as sae_module
from sae import ARCHS, SAE, Hparams, Rows, Trainer, pick_device, use_bfloat16

D_IN, D_SAE, K, BATCH = 512, 16_384, 40, 2048  # the study's
DEVICE = pick_device("auto")
BFLOAT16 = use_bfloat16("auto", DEVICE)
SPARSE = [name for name, arch in ARCHS.items() if arch.chosen_from]


def seconds(function, n=1):
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(n):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def medians(functions, rounds=3, n=1):
    """Median seconds of each of {name: function}, taken in turns after one round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function, n))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


# --------------------------------------------------------------------------------------------------
# The training step


def random_batch(d_in=D_IN):
    x = torch.randn(BATCH, d_in, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE) / d_in**0.5


def our_step(arch, d_in=D_IN, d_sae=D_SAE, k=K, dense=False, **others):
    """A function that takes one training step of ours."""
    hp = Hparams(arch=arch, d_in=d_in, d_sae=d_sae, k=k, k_anneal=0.0, **others)
    trainer, x = Trainer(hp, DEVICE), random_batch(d_in)
    forward_pass = sae_module.dense_pass if dense else sae_module.fast_pass

    def step():
        sae_module.fast_pass, original = forward_pass, sae_module.fast_pass
        trainer.train_step(x)
        sae_module.fast_pass = original

    return step


def their_step(arch):
    """The same of dictionary_learning, as it comes: float32 on a CPU, bfloat16 on a GPU.

    None where it is not installed.
    """
    try:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer
    except ImportError:
        return None
    trainers = {
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "matryoshka": MatryoshkaBatchTopKTrainer,
    }
    settings = {
        "steps": 24_414,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "layer": 3,
        "lm_name": "pythia",
        "lr": 5e-5,
        "seed": 0,
        "device": str(DEVICE),
    }
    if arch == "matryoshka":
        settings["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    trainer, x, numbers = trainers[arch](**settings), random_batch(), itertools.count(1)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            trainer.update(next(numbers), x)

    return step


def floor_step(d_in=D_IN, d_sae=D_SAE, k=K):
    """The bare product, top-k and Adam of a step."""
    dtype = torch.bfloat16 if BFLOAT16 else torch.float32
    x, W = random_batch(d_in).to(dtype), torch.randn(d_in, d_sae, device=DEVICE, dtype=dtype)
    weights = [torch.nn.Parameter(torch.randn(d_sae, d_in, device=DEVICE)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=5e-5, fused=True)

    def step():
        (x @ W).topk(k, dim=1, sorted=False)
        optimizer.step()

    return step


def make_step(variant, arch):
    """The step of a line of VARIANTS, or None."""
    if variant == "floor":
        return floor_step()
    if variant == "dictionary_learning":
        return their_step(arch)
    return our_step(arch, **VARIANTS[variant])


VARIANTS = {
    "sparse": {},
    "sparse, l2 1e-4": {"l2": 1e-4},
    "sparse float32": {"dtype": "float32"},
    "dense bfloat16": {"dense": True, "dtype": "bfloat16"},
    "dense float32": {"dense": True, "dtype": "float32"},
    "dictionary_learning": {},
    "floor": {},
}


def steps():
    for arch in SPARSE:
        functions = {variant: make_step(variant, arch) for variant in VARIANTS}
        there = {name: step for name, step in functions.items() if step}
        found = medians(there, rounds=5, n=4)
        for name, duration in found.items():
            ours, floor = duration / found["sparse"], duration / found["floor"]
            ratios = f"{ours:5.2f} of ours, {floor:5.2f} of the floor"
            print(f"step {arch:10} {name:20} {1e3 * duration:7.0f} ms  {ratios}", flush=True)


def memory():
    """Each in a process of its own, whose peak so far is forgotten after the first step."""
    for variant in VARIANTS:
        command = [sys.executable, __file__, "peak", "topk", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory of a topk step, {variant:20} {done.stdout.strip():>6} MB", flush=True)


def print_peak(arch, variant):
    """Peak memory of a step in MB, beyond what is there between steps (weights, moments)."""
    step = make_step(variant, arch)
    if step is None:
        print("no")
        return
    step()  # Adam's moments are made in the first step
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        used = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        step()
        used = resident("VmHWM") - before
    print(round(used / 1e6))


def resident(name):
    """Bytes of memory in use (VmRSS) or at the peak (VmHWM), as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def growth():
    sizes = [(d_sae, K) for d_sae in (4096, 16_384, 65_536, 131_072)]
    sizes += [(D_SAE, k) for k in (20, 80, 160, 320)]
    for d_sae, k in sizes:
        step, floor = our_step("topk", d_sae=d_sae, k=k), floor_step(d_sae=d_sae, k=k)
        found = medians({"step": step, "floor": floor})
        ours, bare = 1e3 * found["step"], 1e3 * found["floor"]
        times = f"{ours:7.0f} ms  floor {bare:7.0f} ms  ratio {ours / bare:.2f}"
        print(f"growth d_sae {d_sae:7} k {k:4}  {times}", flush=True)


# --------------------------------------------------------------------------------------------------
# A language model


class Reading(NamedTuple):
    """A language model and what it reads."""

    model: torch.nn.Module
    layer: int
    context: int
    tokens: np.ndarray


def open_language_model():
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    from train_pythia import load_model

    folder = os.environ.get("SAE_LM_DIR")
    if folder:
        model, _ = load_model(folder, DEVICE)
        return Reading(model, 3, 256, np.memmap(Path(folder) / "train.bin", np.uint16, "r"))
    config = GPTNeoXConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=50_304,
        max_position_embeddings=2048,
    )
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).to(DEVICE, dtype)
    tokens = np.random.default_rng(0).integers(0, 50_000, 1_000_000).astype(np.uint16)
    return Reading(model.eval().requires_grad_(False), 3, 1024, tokens)


def stream_of(reading):
    """The source of the model's activations, and its batches."""
    from train_pythia import Activations

    source = Activations(reading.model, reading.layer, reading.context, reading.tokens)
    hp = Hparams(d_in=source.d_in, batch_size=BATCH)
    return source, source.batches(hp)


def language_model():
    """Where the time of a million tokens goes: the language model, the SAE's step, and all else."""
    import train_pythia

    source, batches = stream_of(open_language_model())
    read, in_model = train_pythia.residual_stream, []

    def timed_read(*arguments):
        start = time.perf_counter()
        resid = read(*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        in_model.append(time.perf_counter() - start)
        return resid

    train_pythia.residual_stream = timed_read
    start = time.perf_counter()
    next(batches)
    n_batches = len(source.buffer) // BATCH - 2  # of the first filling, which drops less than two
    for _ in range(n_batches - 1):
        next(batches)
    total = time.perf_counter() - start
    train_pythia.residual_stream = read

    per_million = 1e6 / (n_batches * BATCH)
    d_in = source.d_in
    step = seconds(our_step("topk", d_in=d_in, d_sae=16 * d_in, k=32), n=5)
    buffer = source.buffer.numel() * source.buffer.element_size() / 1e6
    parts = [
        f"a million tokens (d_in {d_in}, d_sae {16 * d_in}, {n_batches} batches):",
        f"language model {per_million * sum(in_model):.1f} s,",
        f"SAE {step * 1e6 / BATCH:.1f} s,",
        f"all else {per_million * (total - sum(in_model)):.1f} s;",
        f"buffer {buffer:.0f} MB, process {resident('VmHWM') / 1e6:.0f} MB",
    ]
    print(" ".join(parts), flush=True)


def sweep():
    """The cost of each of n SAEs on one stream, the language model's share included."""
    source, batches = stream_of(open_language_model())
    filling = seconds(lambda: next(batches))
    reading = filling / (len(source.buffer) // BATCH)  # seconds of the language model for a batch
    d_in, alone = source.d_in, None
    for n in (1, 6, 24):
        several = [our_step("topk", d_in, 16 * d_in, 32, seed=seed) for seed in range(n)]

        def step(several=several):
            for one in several:
                one()

        each = (medians({"step": step})["step"] + reading) / n
        alone = alone or each
        ratio = f"{each / alone:.2f} of one alone"
        print(f"sweep of {n:2}: {1e3 * each:6.0f} ms per SAE and step, {ratio}", flush=True)


def steering():
    """Texts a second, generated together and one at a time."""
    from steer import generate

    reading, n, length = open_language_model(), 256, 30
    vectors = torch.randn(n, reading.model.config.hidden_size, device=DEVICE)
    uniform = torch.rand(n, length, device=DEVICE)
    settings = SimpleNamespace(steer_prompt=False, temperature=0.7, top_p=0.9)

    def texts(first, last):
        rows = slice(first, last)
        prompt = [5, 6, 7]
        generate(reading.model, reading.layer, prompt, vectors[rows], uniform[rows], settings)

    def one_by_one():
        for i in range(8):
            texts(i, i + 1)

    found = medians({"together": lambda: texts(0, n), "alone": one_by_one})
    many, one = n / found["together"], 8 / found["alone"]
    rates = f"{many:.0f} texts a second together, {one:.1f} one at a time"
    print(f"steering: {rates}, ratio {many / one:.1f}", flush=True)


# --------------------------------------------------------------------------------------------------
# Matching


def similar_saes(n, shared=0.3, d_in=D_IN):
    """Two SAEs of n features, a share of which is the same but for noise, on both sides."""
    generator = torch.Generator().manual_seed(0)
    saes = [SAE(d_in, n) for _ in range(2)]
    common = torch.randn(int(shared * n), d_in, generator=generator)
    with torch.no_grad():
        for sae in saes:
            for W in (sae.W_dec, sae.encoder):
                W.copy_(torch.randn(n, d_in, generator=generator))
                W[: len(common)] = common + 0.5 * torch.randn(common.shape, generator=generator)
    return saes


def matching():
    """Encoders and decoders of two SAEs, matched side by side and one after the other."""
    import evaluate

    for n in (2048, 4096, 8192, D_SAE):
        a, b = similar_saes(n)

        def in_turn(a=a, b=b):
            evaluate.match(a.W_dec.detach(), b.W_dec.detach())
            evaluate.match(a.encoder.detach(), b.encoder.detach())

        together = seconds(lambda a=a, b=b: evaluate.match_pair(a, b))
        times = f"{together:7.1f} s, one matrix at a time {seconds(in_turn):7.1f} s"
        print(f"matching {n:6} features: {times}", flush=True)


# --------------------------------------------------------------------------------------------------
# Images


def mnist():
    """Seconds an epoch in the study's settings, and of the five products that a ReLU step needs."""
    from train_mnist import parse

    ink = torch.rand(60_000, 784) < 0.2  # about as many pixels are inked in MNIST
    source = Rows((torch.rand(60_000, 784) * ink).to(DEVICE), scale=1.0)
    x, acts = source.x[:512], torch.rand(512, 1568, device=DEVICE)
    W_enc, W_dec = torch.rand(784, 1568, device=DEVICE), torch.rand(1568, 784, device=DEVICE)

    def floor():
        x @ W_enc  # pre_acts
        acts @ W_dec  # x_hat
        x @ W_dec.T  # gradient of acts
        acts.T @ x  # of W_dec
        x.T @ acts  # of W_enc

    for flags in (
        "--l2 0",
        "--l2 1e-5",
        "--l2 1e-5 --tied-init --unit-norm",
        "--l1-mean 1e-3",
    ):
        _, runs = parse(flags.split())
        (hp,) = runs.values()
        trainer, batches = Trainer(hp, DEVICE), source.batches(hp, 0, {})

        def step(trainer=trainer, batches=batches):
            trainer.train_step(next(batches))

        found = medians({"step": step, "floor": floor}, rounds=9, n=10)
        ours, bare = 118 * found["step"], 118 * found["floor"]  # steps an epoch
        times = f"{ours:6.2f} s/epoch  floor {bare:6.2f} s/epoch  ratio {ours / bare:.2f}"
        print(f"mnist {flags:38} {times}", flush=True)


PARTS = {
    "mnist": mnist,
    "steps": steps,
    "memory": memory,
    "growth": growth,
    "sweep": sweep,
    "language_model": language_model,
    "matching": matching,
    "steering": steering,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print_peak(*sys.argv[2:])
    else:
        sae_module.tune_cpu()  # not for the peak of memory: what is kept would not count as used
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
