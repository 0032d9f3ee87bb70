"""Models, SAEs, forks and an endpoint made here in seconds. No test needs the network: said before transformers."""

import functools
import http.server
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import evaluate
import steer  # noqa: F401, so that the originals are there to come back after a fork
import train_mnist  # noqa: F401
import train_pythia
from sae import UserError

ROOT = Path(__file__).parents[1]
FORKS = ROOT / ".readme" / "forks"
FORKED = ("sae", "evaluate", "train_mnist", "train_pythia", "steer")  # modules
FAMILIES = {
    "gpt_neox": transformers.GPTNeoXConfig,
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "phi": transformers.PhiConfig,
}


def tiny_model(family="gpt_neox", layers=4, vocab=97, width=16):
    config = FAMILIES[family](vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2)
    config.intermediate_size = 32
    config.num_key_value_heads = 2
    config.max_position_embeddings = config.n_positions = 64
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model and its tokenizer on disk: bytes of ASCII are the tokens, number 96 ends a text."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    vocab = {chr(32 + i): i for i in range(95)} | {"\n": 95, "<|endoftext|>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def line(model_folder, tokens_file, out, *more):
    """A command line that trains for 30 steps."""
    flags = ["--model", model_folder, "--data", tokens_file, "--layer", 2, "--d-sae", 64, "--k", 4, "--tokens", 1500]
    flags += ["--batch-size", 50, "--context", 16, "--lr", 1e-2, "--warmup", 3, "--out", out, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


@pytest.fixture
def run_folder(model_folder, tmp_path, monkeypatch):
    """The folders of two trained SAEs, seeds 0 and 1."""

    monkeypatch.setattr(train_pythia, "BUFFER", 1000)
    tokens = tmp_path / "tokens.bin"
    torch.randint(0, 96, (6000,), generator=torch.Generator().manual_seed(0)).to(torch.uint16).numpy().tofile(tokens)
    train_pythia.main(line(model_folder, tokens, tmp_path / "out", "--seed", 0, 1))
    return sorted((tmp_path / "out").iterdir())


def stop_at_checkpoint(running):
    """Send each of {signal: (process, its folder)} its signal as soon as there is a checkpoint in the folder."""
    waiting = dict(running)
    while waiting:
        for how, (process, folder) in list(waiting.items()):
            if list(folder.glob("*/checkpoint.pt")) or process.poll() is not None:
                process.send_signal(how)
                del waiting[how]
        time.sleep(0.01)
    for process, folder in running.values():
        process.wait()
        assert list(folder.glob("*/checkpoint.pt")), "it was not over yet"


@pytest.fixture
def refusal(capsys):
    """What a script's main says of a command line that cannot work: argparse's line, or the UserError."""

    def said(main, arguments):
        try:
            main([str(argument) for argument in arguments])
        except UserError as error:
            return str(error)
        except SystemExit as stop:
            assert stop.code in (1, 2)
            return capsys.readouterr().err
        raise AssertionError("it works")

    return said


def autointerp_line(run, chat, *more):
    """A command line of evaluate.py."""
    flags = ["--judge", "wise", "--base-url", chat.url, "--n", 10, "--context", 32, "--half-window", 3]
    return [str(flag) for flag in ("autointerp", run, *flags, "--device", "cpu", *more)]


def autointerp(run, chat, *more):
    evaluate.main(autointerp_line(run, chat, *more))


class Fork:
    """The modules of a folder, and short training runs on drawn digits with them."""

    def __init__(self, folder):
        self.folder = folder
        for name in FORKED:
            setattr(self, name, importlib.import_module(name))
        assert Path(self.sae.__file__).parent == folder
        self.train_mnist.DATA["glyphs"] = (400, 2, self.train_mnist.IMAGES | {"d_sae": 64, "batch_size": 20})
        self.train_pythia.check_model = lambda args: 512
        self.sae.LOG_EVERY = 10

    @functools.cached_property
    def splits(self):
        """Training and test images."""
        return self.train_mnist.load_images("glyphs")

    def train(self, *flags, save=None):
        """The trainers of a command line after 40 steps; their runs go into the folder `save`, where that is given."""
        line = ["--data", "glyphs", "--device", "cpu", "--lr", "0.01", *map(str, flags)]
        _, runs = self.train_mnist.parse([*line, "--out", str(save)])
        trainers = {folder: self.sae.Trainer(hp) for folder, hp in runs.items()}
        for folder, trainer in trainers.items():
            self.sae.fit({folder: trainer}, self.train_mnist.batches(self.splits[0], trainer.hp))
            if save:
                self.sae.save_run(trainer, folder, {})
        return list(trainers.values())

    def sizes(self, *flags):
        """The summed norms of the features of encoder and decoder after a training."""
        (trainer,) = self.train(*flags)
        return SimpleNamespace(
            enc=trainer.sae.encoder.norm(dim=1).sum().item(), dec=trainer.sae.W_dec.norm(dim=1).sum().item()
        )

    def script(self, name, monkeypatch, capsys, *arguments):
        """What a script of the recipe prints."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(self.folder / name), run_name="__main__")
        return capsys.readouterr().out


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A function: a clean copy of the five files with recipes applied, imported in place of the originals."""

    def applied(*names):
        folder = tmp_path / ("_".join(names) or "original")
        folder.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        for name in names:
            subprocess.run(["git", "apply", FORKS / f"{name}.diff"], cwd=folder, check=True)
        for module in FORKED:
            monkeypatch.delitem(sys.modules, module, raising=False)  # the originals come back after the test
        monkeypatch.syspath_prepend(folder)
        return Fork(folder)

    return applied


class ChatServer(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback. `answer` makes a text of a prompt; `faults`, one a request, are a
    (status, headers, body), "hang" or "cut", and come first. Every request's body is kept in `requests`."""

    daemon_threads, ended = True, False

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.answer, self.faults, self.requests, self.headers = lambda prompt: "None", [], [], []
        self.lock = threading.Lock()

    def start(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def end(self):
        self.ended = True  # connections that were kept are closed, too
        self.shutdown()
        self.server_close()


class ChatHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept

    def do_POST(self):
        if self.server.ended:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers) | {"path": self.path, "port": self.client_address[1]})
            fault = self.server.faults.pop(0) if self.server.faults else None
        if callable(fault):
            fault = fault(body)
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
            return
        status, headers, text = 200, {}, None
        if isinstance(fault, tuple):
            status, headers, text = fault
        if text is None:
            text = self.server.answer(body["messages"][0]["content"])
            text = json.dumps({"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}})
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if fault == "cut" else payload)
        self.close_connection = self.close_connection or fault == "cut"

    def log_message(self, *args):
        pass


@pytest.fixture
def chat():
    server = ChatServer().start()
    yield server
    server.end()
