"""What several test files use: tiny models, trained runs, a chat endpoint. Nothing needs a network.

A script is imported where it is used, so that the tests of one file need no other file to be whole.
"""

import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path

# One thread, here and in the processes that tests start. The matrices are tiny, and threads that
# wait for each other on a busy machine make the same tests ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from sae import UserError

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "gpt_neox": transformers.GPTNeoXConfig,
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "phi": transformers.PhiConfig,
}

# --------------------------------------------------------------------------------------------------
# Language models and runs on them


def tiny_model(family="gpt_neox", layers=4, vocab=97, width=16):
    """A language model with random weights, always the same ones."""
    config = FAMILIES[family](
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2
    )
    config.intermediate_size = 32
    config.num_key_value_heads = 2
    config.max_position_embeddings = 64
    config.n_positions = 64
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model and its tokenizer on disk: the bytes of ASCII are tokens, number 96 ends a text."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    vocab = {chr(32 + i): i for i in range(95)}
    vocab["\n"] = 95
    vocab["<|endoftext|>"] = 96
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return folder


def line(model_folder, tokens_file, out, *more):
    """A command line of train_pythia.py that trains for 30 steps."""
    flags = ["--model", model_folder, "--data", tokens_file, "--layer", 2, "--context", 16]
    flags += ["--d-sae", 64, "--k", 4, "--tokens", 1500, "--batch-size", 50]
    flags += ["--lr", 1e-2, "--warmup", 3, "--out", out, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="session")
def run_tokens(tmp_path_factory):
    """The file of what the runs below are trained on: 6,000 random tokens, as uint16."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 96, (6000,), generator=generator)
    tokens.to(torch.uint16).numpy().tofile(path)
    return path


@pytest.fixture(scope="session")
def trained_runs(model_folder, run_tokens, tmp_path_factory):
    """A folder with the runs of two seeds. Read only: `run_folder` is a copy for one test."""
    import train_pythia

    out = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pythia, "BUFFER", 1000)
        train_pythia.main(line(model_folder, run_tokens, out, "--seed", 0, 1))
    return out


@pytest.fixture
def run_folder(trained_runs, run_tokens, tmp_path):
    """The folders of two trained SAEs, seeds 0 and 1, with their tokens.bin beside them."""
    shutil.copytree(trained_runs, tmp_path / "out")
    shutil.copy(run_tokens, tmp_path)
    return sorted((tmp_path / "out").iterdir())


# --------------------------------------------------------------------------------------------------
# Scripts


def stop_at_checkpoint(running):
    """Send each of {signal: (process, its folder)} its signal once the folder has a checkpoint."""
    waiting = dict(running)
    while waiting:
        for signal, (process, folder) in list(waiting.items()):
            if list(folder.glob("*/checkpoint.pt")) or process.poll() is not None:
                process.send_signal(signal)
                del waiting[signal]
        time.sleep(0.01)
    for process, folder in running.values():
        process.wait()
        assert list(folder.glob("*/checkpoint.pt")), "it was not over yet"


@pytest.fixture
def refusal(capsys):
    """What a script's main says to a command line that cannot work, by either way of saying it."""

    def refused(main, arguments):
        try:
            main([str(argument) for argument in arguments])
        except UserError as error:
            return str(error)
        except SystemExit as stop:
            assert stop.code in (1, 2)
            return capsys.readouterr().err
        raise AssertionError("it works")

    return refused


def autointerp_line(run, chat, *more):
    """A command line of evaluate.py."""
    flags = ["--judge", "wise", "--base-url", chat.url, "--n", 10, "--context", 32]
    flags += ["--half-window", 3, "--device", "cpu", *more]
    return [str(flag) for flag in ("autointerp", run, *flags)]


def autointerp(run, chat, *more):
    import evaluate

    evaluate.main(autointerp_line(run, chat, *more))


# --------------------------------------------------------------------------------------------------
# A judge


class ChatServer(http.server.ThreadingHTTPServer):
    """An endpoint on this machine that speaks OpenAI's protocol.

    `answer` makes a text of a prompt. `faults` come first, one for each request: (status, headers,
    body), where a body of None is the answer; "hang" says nothing for 3 s; "cut" ends in the middle
    of the answer and "stall" stops there for 3 s; or a function of the request that gives one of
    these. The body of every request is kept in `requests`, and its headers in `headers`.
    """

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.answer = lambda prompt: "None"
        self.faults, self.requests, self.headers = [], [], []
        self.lock = threading.Lock()
        self.ended = False

    def start(self):
        arguments = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=arguments, daemon=True).start()
        return self

    def end(self):
        self.ended = True  # so that connections which clients keep are closed, too
        self.shutdown()
        self.server_close()


class ChatHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # in which connections are kept

    def do_POST(self):
        if self.server.ended:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        origin = {"path": self.path, "port": self.client_address[1]}
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append({**self.headers, **origin})
            fault = self.server.faults.pop(0) if self.server.faults else None
        if callable(fault):
            fault = fault(body)
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
            return
        status, headers, text = fault if isinstance(fault, tuple) else (200, {}, None)
        if text is None:
            content = self.server.answer(body["messages"][0]["content"])
            choice = {"message": {"content": content}}
            text = json.dumps({"choices": [choice], "usage": {"total_tokens": 7}})
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            time.sleep(3 if fault == "stall" else 0)
            self.close_connection = True
            return
        self.wfile.write(payload)

    def log_message(self, *args):
        pass  # nothing on standard error


@pytest.fixture
def chat():
    server = ChatServer().start()
    yield server
    server.end()
