"""Measure speed on this machine, by hand: python tests/benchmark.py

MNIST: seconds per epoch and SAE in each of the study's settings, against the floor, a bare loop of the five matrix
products that a step cannot do without. Rounds of both are interleaved, and the medians compared.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sae import Trainer, pick_device
from train_mnist import batches, parse, sweep

ROUNDS, STEPS = 9, 10


def timed(function, device):
    """Seconds per call, over STEPS calls."""
    start = time.perf_counter()
    for _ in range(STEPS):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def mnist(device):
    images = torch.rand(60_000, 784, device=device) * (torch.rand(60_000, 784, device=device) < 0.2)  # as sparse as ink
    x, acts = images[:512], torch.rand(512, 1568, device=device)
    W_enc, W_dec = torch.rand(784, 1568, device=device), torch.rand(1568, 784, device=device)

    def floor():
        x @ W_enc  # pre_acts
        acts @ W_dec  # x_hat
        x @ W_dec.T  # gradient of acts
        acts.T @ x  # of W_dec
        x.T @ acts  # of W_enc

    settings = (["--l2", "0"], ["--l2", "1e-5"], ["--l2", "1e-5", "--tied-init", "--unit-norm"], ["--l1", "1e-3"])
    for flags in settings:
        (hp,) = sweep(parse(flags)).values()
        trainer, stream = Trainer(hp, images[:512], device), batches(images, hp)

        def step(trainer=trainer, stream=stream):
            trainer.train_step(next(stream))

        rounds = [(timed(step, device), timed(floor, device)) for _ in range(ROUNDS + 1)]
        ours, bare = (statistics.median(column) for column in zip(*rounds[1:]))
        name = " ".join(flags)
        print(f"mnist {name:38} {118 * ours:6.2f} s/epoch   floor {118 * bare:6.2f} s/epoch   ratio {ours / bare:.2f}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    mnist(pick_device("auto"))
