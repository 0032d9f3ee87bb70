"""Measure speed on this machine, by hand: python tests/benchmark.py [PART...]

Parts, all by default: mnist, steps, memory, growth, sweep, language_model, matching, steering. Every line stands alone;
what is compared runs in turns within one process, and medians of the rounds are compared. dictionary_learning takes
part where it can be imported. `floor` is what no training step can do without: the encoder's product, one top-k of
its result, one pass of Adam. SAE_LM_DIR names a folder with a language model; without it, one of Pythia-70M's shape
with random weights.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import sae as sae_module
from sae import ARCHS, SAE, Hparams, Trainer, pick_device, total_loss, use_bfloat16

D_IN, D_SAE, K, BATCH = 512, 16_384, 40, 2048  # the study's
DEVICE = pick_device("auto")
BFLOAT16 = use_bfloat16("auto", DEVICE)
FAMILY = [name for name, arch in ARCHS.items() if arch.chosen_from]


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


# --- the training step


def batch(d_in=D_IN):
    return torch.randn(BATCH, d_in, generator=torch.Generator().manual_seed(0)).to(DEVICE) / d_in**0.5


def our_step(arch, d_in=D_IN, d_sae=D_SAE, k=K, dense=False, **others):
    """A function that takes one training step of ours."""
    trainer = Trainer(Hparams(arch=arch, d_in=d_in, d_sae=d_sae, k=k, k_anneal=0.0, **others), DEVICE)
    x = batch(d_in)

    def step():
        sae_module.total_loss = (lambda *args: total_loss(*args, dense=True)) if dense else total_loss
        trainer.train_step(x)

    return step


def their_step(arch):
    """The same of dictionary_learning, float32 on a CPU, bfloat16 autocast on a GPU; None where it is not installed."""
    try:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer
    except ImportError:
        return None
    trainers = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}
    groups = {"group_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]} if arch == "matryoshka" else {}
    size = {"steps": 24_414, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 3, "lm_name": "pythia"}
    trainer = trainers[arch](**size, lr=5e-5, seed=0, device=str(DEVICE), **groups)
    x, count = batch(), iter(range(1, 10**9))

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            trainer.update(next(count), x)

    return step


def floor_step(d_in=D_IN, d_sae=D_SAE, k=K):
    """The bare product, top-k and Adam of a step."""
    dtype = torch.bfloat16 if BFLOAT16 else torch.float32
    x, W = batch(d_in).to(dtype), torch.randn(d_in, d_sae, device=DEVICE, dtype=dtype)
    weights = [torch.nn.Parameter(torch.randn(d_sae, d_in, device=DEVICE)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=5e-5, fused=True)

    def step():
        (x @ W).topk(k, dim=1, sorted=False)
        optimizer.step()

    return step


VARIANTS = {
    "sparse": our_step,
    "sparse, l2 1e-4": lambda arch: our_step(arch, l2=1e-4),
    "sparse float32": lambda arch: our_step(arch, dtype="float32"),
    "dense bfloat16": lambda arch: our_step(arch, dense=True, dtype="bfloat16"),
    "dense float32": lambda arch: our_step(arch, dense=True, dtype="float32"),
    "dictionary_learning": their_step,
    "floor": lambda arch: floor_step(),
}


def steps():
    for arch in FAMILY:
        functions = {name: make(arch) for name, make in VARIANTS.items()}
        found = medians({name: step for name, step in functions.items() if step}, rounds=5, n=4)
        for name, time_taken in found.items():
            ratios = f"{time_taken / found['sparse']:5.2f} of ours, {time_taken / found['floor']:5.2f} of the floor"
            print(f"step {arch:10} {name:20} {1e3 * time_taken:7.0f} ms  {ratios}", flush=True)


def memory():
    for name in VARIANTS:
        print(f"peak memory of a topk step, {name:20} {peak('topk', name):6.0f} MB", flush=True)


def peak(arch, name):
    """Peak memory of a step in MB beyond what is there between steps (weights, moments), in a process of its own."""
    command = [sys.executable, __file__, "peak", arch, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(arch, name):
    step = VARIANTS[name](arch)
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
    print(used / 1e6)


def resident(what):
    """Bytes of memory in use (VmRSS) or at the peak (VmHWM), as Linux counts them."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))


def growth():
    for d_sae in (4096, 16_384, 65_536, 131_072):
        found = medians({"step": our_step("topk", d_sae=d_sae), "floor": floor_step(d_sae=d_sae)}, rounds=3)
        print_growth(f"d_sae {d_sae:7} k {K:4}", found)
    for k in (20, 80, 160, 320):
        print_growth(
            f"d_sae {D_SAE:7} k {k:4}", medians({"step": our_step("topk", k=k), "floor": floor_step(k=k)}, rounds=3)
        )


def print_growth(name, found):
    ratio = found["step"] / found["floor"]
    print(
        f"growth {name}  {1e3 * found['step']:7.0f} ms  floor {1e3 * found['floor']:7.0f} ms  ratio {ratio:.2f}",
        flush=True,
    )


# --- a language model


def language_model():
    """A model, a layer of it, and tokens."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    if folder := os.environ.get("SAE_LM_DIR"):
        from train_pythia import load_model

        model, _ = load_model(folder, DEVICE)
        return model, 3, np.memmap(Path(folder) / "train.bin", np.uint16, "r"), 256
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape, vocab_size=50_304, max_position_embeddings=2048))
    model = model.to(DEVICE, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16).eval().requires_grad_(False)
    return model, 3, np.random.default_rng(0).integers(0, 50_000, 1_000_000).astype(np.uint16), 1024


def per_million_tokens():
    """Where the time of a million tokens goes: the language model, the SAE's step, and all else."""
    import train_pythia

    model, layer, tokens, context = language_model()
    d_in, in_model, read = model.config.hidden_size, [], train_pythia.residual_stream

    def timed_read(*args):
        found = []
        in_model.append(seconds(lambda: found.append(read(*args))))
        return found[0]

    train_pythia.residual_stream = timed_read
    try:
        start = time.perf_counter()
        stream = train_pythia.Activations(model, layer, tokens, context, BATCH, 0, DEVICE, bfloat16=BFLOAT16)
        n_batches = len(stream.order) // BATCH - 1
        x = [next(stream) for _ in range(n_batches)]
        total = time.perf_counter() - start
    finally:
        train_pythia.residual_stream = read
    each = 1e6 / (n_batches * BATCH)
    step = medians({"step": our_step("topk", d_in=d_in, d_sae=16 * d_in, k=32)})["step"] * 1e6 / BATCH
    buffer, process = stream.buffer.numel() * stream.buffer.element_size() / 1e6, resident("VmHWM") / 1e6
    size = f"d_in {d_in}, d_sae {16 * d_in}, {len(x)} batches"
    print(f"a million tokens ({size}): language model {each * sum(in_model):.1f} s, SAE {step:.1f} s, ", end="")
    print(
        f"all else {each * (total - sum(in_model)):.1f} s; buffer {buffer:.0f} MB, process {process:.0f} MB",
        flush=True,
    )


def sweep():
    """The cost of each of n SAEs on one stream, the language model's included."""
    from train_pythia import Activations

    model, layer, tokens, context = language_model()
    d_in, alone = model.config.hidden_size, None
    stream = Activations(model, layer, tokens, context, BATCH, 0, DEVICE, bfloat16=BFLOAT16)
    harvest = seconds(stream.fill) / (len(stream.order) / BATCH)
    for n in (1, 6, 24):
        several = [our_step("topk", d_in=d_in, d_sae=16 * d_in, k=32, seed=seed) for seed in range(n)]

        def step(several=several):
            next(stream)
            for one in several:
                one()

        each = (medians({"step": step}, rounds=3)["step"] + harvest) / n
        alone = alone or each
        print(f"sweep of {n:2}: {1e3 * each:6.0f} ms per SAE and step, {each / alone:.2f} of one alone", flush=True)


def steering():
    """Texts a second, generated together and one at a time."""
    import steer

    model, layer, _, _ = language_model()
    n, length = 256, 30
    vectors = torch.randn(n, model.config.hidden_size, device=DEVICE)
    uniform = torch.rand(n, length, device=DEVICE)

    def one_by_one():
        for i in range(8):
            steer.generate(model, layer, [5, 6, 7], vectors[i : i + 1], uniform[i : i + 1])

    functions = {"together": lambda: steer.generate(model, layer, [5, 6, 7], vectors, uniform), "alone": one_by_one}
    found = medians(functions, rounds=3)
    many, one = n / found["together"], 8 / found["alone"]
    print(
        f"steering: {many:.0f} texts a second together, {one:.1f} one at a time, ratio {many / one:.1f}",
        flush=True,
    )


# --- matching


def similar_saes(n, shared=0.3, d_in=D_IN):
    """Two SAEs of n features, a share of which is the same but for noise, encoder and decoder alike."""
    generator = torch.Generator().manual_seed(0)
    saes = [SAE(d_in, n) for _ in range(2)]
    common = torch.randn(int(shared * n), d_in, generator=generator)
    with torch.no_grad():
        for sae in saes:
            for W in (sae.W_dec, sae.W_enc.T):
                W.copy_(torch.randn(n, d_in, generator=generator))
                W[: len(common)] = common + 0.5 * torch.randn(common.shape, generator=generator)
    return saes


def matching():
    for n in (2048, 4096, 8192, D_SAE):
        a, b = similar_saes(n)

        def in_turn(a=a, b=b):
            for W in (lambda sae: sae.W_dec, lambda sae: sae.W_enc.T):
                evaluate.match(W(a).detach(), W(b).detach(), 0.7)

        side_by_side, one_by_one = seconds(lambda a=a, b=b: evaluate.match_pair(a, b)), seconds(in_turn)
        print(f"matching {n:6} features: {side_by_side:7.1f} s, one matrix at a time {one_by_one:7.1f} s", flush=True)


# --- images


def mnist():
    """Seconds per epoch in the study's settings, against the five matrix products that a ReLU step needs."""
    from train_mnist import batches, parse

    images = torch.rand(60_000, 784, device=DEVICE) * (torch.rand(60_000, 784, device=DEVICE) < 0.2)  # as sparse as ink
    x, acts = images[:512], torch.rand(512, 1568, device=DEVICE)
    W_enc, W_dec = torch.rand(784, 1568, device=DEVICE), torch.rand(1568, 784, device=DEVICE)

    def floor():
        x @ W_enc  # pre_acts
        acts @ W_dec  # x_hat
        x @ W_dec.T  # gradient of acts
        acts.T @ x  # of W_dec
        x.T @ acts  # of W_enc

    for flags in (
        ["--l2", "0"],
        ["--l2", "1e-5"],
        ["--l2", "1e-5", "--tied-init", "--unit-norm"],
        ["--l1-mean", "1e-3"],
    ):
        (hp,) = parse(flags)[1].values()
        trainer, stream = Trainer(hp, DEVICE), batches(images, hp)
        found = medians({"step": lambda t=trainer, s=stream: t.train_step(next(s)), "floor": floor}, rounds=9, n=10)
        ours, bare = (118 * found[name] for name in ("step", "floor"))
        print(
            f"mnist {' '.join(flags):38} {ours:6.2f} s/epoch  floor {bare:6.2f} s/epoch  ratio {ours / bare:.2f}",
            flush=True,
        )


PARTS = {
    "mnist": mnist,
    "steps": steps,
    "memory": memory,
    "growth": growth,
    "sweep": sweep,
    "language_model": per_million_tokens,
}
PARTS |= {"matching": matching, "steering": steering}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print_peak(*sys.argv[2:])
    else:
        sae_module.tune_cpu()  # not for the peak of memory: what is kept would not count as used
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
