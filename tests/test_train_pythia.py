"""train_pythia.py: hooks, tokens, the stream of activations, sweeps and resuming, on tiny models made here."""

import functools
import gzip
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, line, stop_at_checkpoint, tiny_model

import evaluate
import sae as sae_module
import train_pythia
from sae import ARCHS, SAE, UserError
from train_pythia import Activations, blocks, documents, fetch, open_tokens, parse, residual_stream, tokenise

ROOT = Path(__file__).resolve().parent.parent
REAL_LM = os.environ.get("SAE_LM_DIR")
needs_lm = pytest.mark.skipif(not REAL_LM, reason="SAE_LM_DIR names no folder with a language model and its tokens")


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 96, 6000).astype(np.uint16).tofile(path)
    return path


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch, tmp_path):
    monkeypatch.setattr(train_pythia, "BUFFER", 1000)
    monkeypatch.setattr(train_pythia, "FORWARD", 128)
    monkeypatch.setattr(train_pythia, "CACHE", tmp_path / "cache")


# --- model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_reads_the_residual_stream_and_nothing_later_runs(family):
    model, tokens = tiny_model(family), torch.randint(0, 97, (3, 20))
    states = model(tokens, output_hidden_states=True).hidden_states
    ran = []
    for number, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    for layer in range(3):  # transformers applies the final norm to the last one
        ran.clear()
        assert torch.equal(residual_stream(model, tokens, layer), states[layer + 1])
        assert ran == list(range(layer + 1))
    assert torch.allclose(
        model(tokens).logits, model.lm_head(states[-1]) if family != "gpt_neox" else model(tokens).logits
    )


def test_the_hook_is_gone_afterwards():
    model, tokens = tiny_model(), torch.randint(0, 97, (1, 9))
    before = model(tokens).logits
    residual_stream(model, tokens, 1)
    assert torch.equal(model(tokens).logits, before)


# --- activations


def stream_of(tokens, batch_size=50, context=16, data_seed=0, layer=2, state=None, bfloat16=False):
    return Activations(
        tiny_model(), layer, tokens, context, batch_size, data_seed, torch.device("cpu"), state, bfloat16
    )


def some_tokens(n=6000):
    return np.random.default_rng(1).integers(0, 96, n).astype(np.uint16)


def test_nothing_is_lost_or_repeated_within_a_pass(monkeypatch):
    def numbered(model, tokens, layer):  # an activation that tells which token it is of
        return torch.stack([tokens.float(), torch.ones(tokens.shape)], -1).repeat(1, 1, 8)

    monkeypatch.setattr(train_pythia, "residual_stream", numbered)
    tokens = np.arange(6000).astype(np.uint16) + 1000  # norms differ by less than 10 times
    stream, got = stream_of(tokens), []
    for _ in range(200):
        got += (next(stream) * stream.scale)[:, 0].round().int().tolist()
    waiting = stream.buffer[stream.order[stream.served * 50 :], 0].int().tolist()
    contexts = (stream.filling + 1) * stream.contexts_per_filling  # that were read, 375 to a pass
    passes, more = divmod(contexts, 375)
    assert passes >= 1
    counts = np.bincount(got + waiting, minlength=7000)[1000:]
    in_contexts = counts.reshape(375, 16)
    assert (in_contexts[:, 0] == 0).all(), "first positions are dropped"
    assert (in_contexts[:, 1:] == in_contexts[:, 1:2]).all(), "a context comes as a whole"
    assert sorted(in_contexts[:, 1]) == [passes] * (375 - more) + [passes + 1] * more


def test_the_stream_is_shuffled_across_contexts():
    tokens = np.repeat(np.arange(90, dtype=np.uint16), 64)  # each context is one token: its activations are alike
    stream = stream_of(tokens)
    batch = next(stream)
    assert len(batch.mul(100).round().unique(dim=0)) > 20
    order = torch.cat([next(stream) for _ in range(10)])
    same_neighbour = torch.isclose(order[1:], order[:-1], atol=1e-3).all(1).float().mean()
    assert same_neighbour < 0.1


def test_the_stream_is_a_function_of_the_data_seed():
    streams = [stream_of(some_tokens(), data_seed=seed) for seed in (0, 0, 1)]
    for _ in range(60):
        a, b, c = (next(stream) for stream in streams)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_bfloat16_harvest_rounds_products_and_keeps_float32_sums():
    exact, rounded = (next(stream_of(some_tokens(), bfloat16=bfloat16)) for bfloat16 in (False, True))
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.02 * (exact - exact.mean(0)).norm()
    assert not torch.equal(rounded, rounded.bfloat16().float()), "the residual stream itself is not rounded"


def test_activations_have_unit_mean_squared_norm_and_the_first_position_is_dropped():
    stream = stream_of(some_tokens())
    assert torch.cat([next(stream) for _ in range(19)]).square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    first = residual_stream(tiny_model(), torch.from_numpy(some_tokens()[:1600].astype(np.int64)).view(-1, 16), 2)[:, 0]
    rows = torch.cat([next(stream_of(some_tokens())) for _ in range(1)]) * stream.scale
    assert torch.cdist(rows, first).min() > 1e-3


def test_outliers_are_dropped(monkeypatch):
    def with_outliers(model, tokens, layer):
        x = torch.randn(*tokens.shape, 16, generator=torch.Generator().manual_seed(0))
        x[:, 5] *= 100
        return x

    monkeypatch.setattr(train_pythia, "residual_stream", with_outliers)
    stream = stream_of(some_tokens())
    assert max((next(stream) * stream.scale).norm(dim=1).max() for _ in range(40)) < stream.limit < 100


@pytest.mark.parametrize("at", [0, 1, 17, 19, 20, 21, 55, 77])
def test_a_stream_goes_on_from_its_state(at):
    stream = stream_of(some_tokens())
    for _ in range(at):
        next(stream)
    state = stream.state()
    assert sum(value.nelement() for value in state.values() if torch.is_tensor(value)) < 50 * 16
    again = stream_of(some_tokens(), state=state)
    for _ in range(50):
        assert torch.equal(next(stream), next(again))


def test_refilling_makes_no_copy_of_the_buffer():
    stream = stream_of(some_tokens())
    address = stream.buffer.data_ptr()
    for _ in range(60):
        next(stream)
    assert stream.filling > 1
    assert stream.buffer.data_ptr() == address


# --- training


def run_folders(out):
    return {path.name: path for path in Path(out).iterdir() if (path / "cfg.json").exists()}


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def test_an_sae_alone_equals_the_same_sae_within_a_sweep(model_folder, tokens_file, tmp_path):
    archs = [name for name, arch in ARCHS.items() if arch.train]
    grid = ["--arch", *archs, "--l2", "0", "1e-4", "--seed", "0", "1"]
    train_pythia.main(line(model_folder, tokens_file, tmp_path / "sweep", *grid))
    runs = run_folders(tmp_path / "sweep")
    assert len(runs) == 4 * len(archs)
    for arch in ("topk", "matryoshka"):
        one = ["--arch", arch, "--l2", "1e-4", "--seed", "1"]
        train_pythia.main(line(model_folder, tokens_file, tmp_path / "single", *one))
    for name, folder in run_folders(tmp_path / "single").items():
        assert weights(folder) == weights(runs[name])


def test_runs_are_measured_on_their_held_out_tokens(model_folder, tokens_file, tmp_path, capsys):
    more = ["--arch", "topk", "batchtopk", "--tokens", 3000]
    train_pythia.main(line(model_folder, tokens_file, tmp_path / "runs", *more))
    evaluate.main(["quality", str(tmp_path / "runs"), "--json", str(tmp_path / "all.json"), "--device", "cpu"])
    assert "loss recovered" in capsys.readouterr().out
    for folder in run_folders(tmp_path / "runs").values():
        result = json.loads((folder / "quality.json").read_text())
        assert result["inputs"] == 592 // 16 * 15
        assert {"fve", "l0", "alive", "dead_by_weight", "dead_by_use", "enc_dec_cos", "orthogonality"} <= set(result)
        assert {"ce", "ce_reconstructed", "ce_zeroed", "loss_recovered"} <= set(result)
        assert result["outliers"] == 0
    assert len(json.loads((tmp_path / "all.json").read_text())["runs"]) == 2


def test_a_saved_sae_takes_raw_activations(model_folder, tokens_file, tmp_path):
    train_pythia.main(line(model_folder, tokens_file, tmp_path, "--tokens", 20_000, "--arch", "topk", "batchtopk"))
    stream = stream_of(np.fromfile(tokens_file, np.uint16))
    raw = next(stream) * stream.scale
    assert stream.scale < 0.9
    for folder in run_folders(tmp_path).values():
        sae = SAE.load(folder)
        error = (sae(raw) - raw).square().sum() / (raw - raw.mean(0)).square().sum()
        assert error < 0.6
        assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post"
        assert sae.metadata["model_name"] == str(model_folder)
        assert (sae.encode(raw) > 0).sum(1).float().mean().item() == pytest.approx(4, abs=1.5)


def command(arguments, **others):
    patched = "import train_pythia, sae; train_pythia.BUFFER = 1000; train_pythia.FORWARD = 128; "
    patched += "sae.CHECKPOINT_SECONDS = 0.05; sae.run_command(train_pythia.main)"
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | others.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", patched, *arguments], cwd=ROOT, env=environment, text=True, **others)


def test_interrupted_and_repeated_ends_with_the_same_weights(model_folder, tokens_file, tmp_path):
    more = ["--tokens", "15000", "--seed", "0", "1", "--l2", "1e-4"]

    def start(out):
        return command(line(model_folder, tokens_file, tmp_path / out, *more), stderr=subprocess.PIPE)

    # Side by side, since most of the time goes into starting them
    whole, running = start("whole"), {how: start(how.name) for how in (signal.SIGINT, signal.SIGKILL)}
    stop_at_checkpoint({how: (process, tmp_path / how.name) for how, process in running.items()})
    assert whole.wait() == 0
    said = {how: process.communicate()[1] for how, process in running.items()}
    assert said[signal.SIGINT].splitlines()[-1].startswith("interrupted: the same command goes on")
    again = [start(how.name) for how in running]
    assert [process.wait() for process in again] == [0, 0]
    for how in running:
        for name, folder in run_folders(tmp_path / "whole").items():
            assert weights(folder) == weights(tmp_path / how.name / name)


def test_ranks_divide_the_sweep_and_their_union_equals_one_process(model_folder, tokens_file, tmp_path):
    grid = ["--l2", "0", "1e-4", "--seed", "0", "1", "2"]
    processes = [command(line(model_folder, tokens_file, tmp_path / "one", *grid))]
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
        processes.append(command(line(model_folder, tokens_file, tmp_path / "two", *grid), env=environment))
    assert [process.wait() for process in processes] == [0, 0, 0]
    one, two = run_folders(tmp_path / "one"), run_folders(tmp_path / "two")
    assert set(one) == set(two)
    assert len(one) == 6
    for name in one:
        assert weights(one[name]) == weights(two[name])


# --- tokens


def read(path, tokenizer_folder):
    from transformers import AutoTokenizer

    return np.fromfile(tokenise(path, AutoTokenizer.from_pretrained(tokenizer_folder)), np.uint16).tolist()


def ids(text):
    return [95 if c == "\n" else ord(c) - 32 for c in text]


def test_text_becomes_tokens_with_documents_apart(model_folder, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read(tmp_path / "a.txt", model_folder) == [96, *ids("one\ntwo")]
    rows = [{"text": "one"}, {"text": "two\nthree", "meta": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    expected = [96, *ids("one"), 96, *ids("two\nthree")]
    assert read(tmp_path / "b.jsonl", model_folder) == expected
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    assert read(tmp_path / "c.jsonl.gz", model_folder) == expected


def test_a_long_text_is_read_in_pieces_and_comes_out_whole(tmp_path):
    text = "".join(f"line {i}\n" for i in range(400_000))
    (tmp_path / "long.txt").write_text(text)
    pieces = list(documents(tmp_path / "long.txt"))
    assert len(pieces) > 3
    assert "".join(piece for _, piece in pieces) == text
    assert [new for new, _ in pieces] == [True] + [False] * (len(pieces) - 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 is not a JSON object"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "some words"}\n' * 500)[:-20], "damaged"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 50, "damaged"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 is not a JSON object"),
        ("a.txt", b"", "no text in it"),
        ("a.bin", b"123", "odd number of bytes"),
        ("a.bin", b"", "no text in it"),
        ("a.bin", b"\x05\x00" * 500, "452 tokens to train on, give at least 1,000"),
        ("a.bin", b"\x61\x00" * 2000, "token id 97"),
        ("a.pdf", b"%PDF", "unknown kind"),
        ("nothing.txt", None, "no such file"),
    ],
)
def test_data_that_cannot_work_says_why(name, content, message, model_folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        train_pythia.main(line(model_folder, tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "4"], "--layer 4: .* has blocks 0 to 3"),
        (["--layer", "-1"], "--layer -1"),
        (["--out", "x" * 300], "File name too long"),
        (["--model", "nowhere/at-all"], "--model nowhere/at-all: cannot be loaded"),
        (["--context", "65"], "--context 65: .* at most 64"),
        (["--tokens", "10"], "--tokens 10"),
        (["--context", "1"], "--context 1: give at least 2"),
        (["--layer", "2", "3"], "unrecognized arguments: 3"),
        (["--tokens", "nan"], "--tokens nan"),
        (["--batch-size", "501"], "--batch-size 501: give at most 500"),
        (["--k", "65"], "--k 65"),
    ],
)
def test_a_command_line_that_cannot_work_says_why(flags, message, model_folder, tokens_file, tmp_path, refusal):
    main = lambda line: sae_module.run_command(functools.partial(train_pythia.main, line))
    assert re.search(message, refusal(main, line(model_folder, tokens_file, tmp_path / "out", *flags)))
    assert not (tmp_path / "out").exists()


def test_the_last_slice_is_held_out(model_folder, tokens_file):
    args, _ = parse(line(model_folder, tokens_file, "out"))
    train, held_out = open_tokens(args, 0, None, tiny_model())
    assert len(held_out) == 592  # a tenth, in whole contexts of 16
    assert np.concatenate([train, held_out]).tolist() == np.fromfile(tokens_file, np.uint16).tolist()


# --- download, from a local server that can misbehave


class Server(http.server.BaseHTTPRequestHandler):
    content, faults, seen = bytes(range(256)) * 400, [], []

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else None
        self.seen.append((fault, self.headers.get("Range")))
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        if isinstance(fault, int) and fault >= 300:
            self.send_response(fault)
            self.end_headers()
            return
        if fault == "ignores":
            self.send_response(200)
            body = self.content
        elif not body:
            self.send_response(416)
            self.end_headers()
            return
        else:
            self.send_response(206)
            other = 1 if fault == "shifted" else 0
            self.send_header("Content-Range", f"bytes {first + other}-{last}/{len(self.content)}")
        if fault == "html":
            self.send_header("Content-Type", "text/html")
            body = b"<html>please log in</html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Handler", (Server,), {"faults": [], "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{running.server_port}/file"
        running.shutdown()


def test_a_download_asks_for_just_the_bytes_it_needs_and_keeps_them(server, tmp_path):
    handler, url = server
    path = tmp_path / "tokens.bin"
    assert fetch(url, path, 50_000).read_bytes() == handler.content[:50_000]
    fetch(url, path, 40_000)
    assert len(handler.seen) == 1, "nothing is fetched twice"
    fetch(url, path, 60_000)
    assert handler.seen[-1] == (None, "bytes=50000-59999")
    assert path.read_bytes() == handler.content[:60_000]


@pytest.mark.parametrize("fault", ["short", 500, 503, 429])
def test_a_download_that_breaks_is_taken_up_where_it_broke(fault, server, tmp_path):
    handler, url = server
    handler.faults.append(fault)
    said = "broke off|ChunkedEncodingError|ConnectionError" if fault == "short" else f"status {fault}"
    with pytest.raises(UserError, match=rf"cannot download .*({said}).* the same command goes on"):
        fetch(url, tmp_path / "f", 50_001)
    have = (tmp_path / "f").stat().st_size
    assert have <= (25_000 if fault == "short" else 0)
    assert fetch(url, tmp_path / "f", 50_001).read_bytes() == handler.content[:50_001]
    assert handler.seen[-1] == (None, f"bytes={have}-50000")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores", "ignores the range"),
        ("shifted", "sends another range"),
        ("html", "sends a page, not data"),
        (404, "status 404"),
        (401, "status 401"),
    ],
)
def test_a_download_gives_up_on_faults_that_stay_and_keeps_what_it_has(fault, message, server, tmp_path):
    handler, url = server
    fetch(url, tmp_path / "f", 1000)
    handler.faults.append(fault)
    with pytest.raises(UserError, match=message):
        fetch(url, tmp_path / "f", 2000)
    assert (tmp_path / "f").read_bytes() == handler.content[:1000]
    assert fetch(url, tmp_path / "f", 2000).read_bytes() == handler.content[:2000]


def test_a_server_that_is_not_there_is_given_up_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot download .* \(ConnectionError\)") as error:
        fetch("http://127.0.0.1:9/nothing", tmp_path / "g", 1000)
    assert "\n" not in str(error.value)


def test_a_file_that_ends_too_early_is_said(server, tmp_path):
    handler, url = server
    for said in ("broke off", "status 416"):
        with pytest.raises(UserError, match=said):
            fetch(url, tmp_path / "f", len(handler.content) + 10)


def test_the_pile_is_fetched_by_range_and_cut_to_what_is_asked_for(server, model_folder, tmp_path, monkeypatch):
    handler, url = server
    handler.content = np.random.default_rng(0).integers(0, 96, 20_490).astype("<u2").tobytes()
    monkeypatch.setattr(train_pythia, "PILE", url[:-4])
    monkeypatch.setattr(train_pythia, "HELD_OUT", 500)
    found = []
    for tokens, asked_for in (("5000", 5050), ("5003", 5053), ("9000", 9090)):
        args, _ = parse(line(model_folder, "pile", tmp_path, "--tokens", tokens))
        train, held_out = open_tokens(args, int(args.tokens * 1.01), None, tiny_model())
        assert len(train) == asked_for
        assert np.concatenate([held_out, train]).tobytes() == handler.content[: 2 * (500 + asked_for)]
        found.append(held_out.tolist())
    assert found[0] == found[1] == found[2], (
        "runs of any length are measured on the same text, which none is trained on"
    )
    asked = len(handler.seen)
    _, held_out = open_tokens(args, 0, None, tiny_model())
    assert held_out.tolist() == found[0]
    assert len(handler.seen) == asked


def test_a_run_on_the_pile_is_trained_measured_and_explained_from_the_tokens_it_should(
    server, model_folder, tmp_path, monkeypatch
):
    handler, url = server
    handler.content = np.random.default_rng(0).integers(0, 96, 20_490).astype("<u2").tobytes()
    monkeypatch.setattr(train_pythia, "PILE", url[:-4])
    monkeypatch.setattr(train_pythia, "HELD_OUT", 500)
    train_pythia.main(line(model_folder, "pile", tmp_path, "--tokens", "5003"))
    (folder,) = run_folders(tmp_path).values()
    hp = evaluate.read_run(folder)
    ids = np.frombuffer(handler.content, np.uint16)
    _, _, held_out = evaluate.language_model_and_tokens(hp, torch.device("cpu"))
    assert held_out.tolist() == ids[:500].tolist()
    _, _, trained_on = evaluate.language_model_and_tokens(hp, torch.device("cpu"), n_tokens=2000)
    assert trained_on.tolist() == ids[500:2500].tolist()
    evaluate.main(["quality", str(folder), "--device", "cpu"])


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("RANK", "1"), ("RANK", "-1"), ("WORLD_SIZE", "0")])
def test_a_rank_that_torchrun_would_not_give_is_refused(
    name, value, monkeypatch, refusal, model_folder, tokens_file, tmp_path
):
    monkeypatch.setenv(name, value)
    assert "unset them" in refusal(train_pythia.main, line(model_folder, tokens_file, tmp_path))


def test_each_rank_of_a_node_has_a_gpu_of_its_own(monkeypatch, model_folder, tokens_file, tmp_path):
    asked = []

    def pick(name):
        asked.append(name)
        raise UserError("enough")

    monkeypatch.setattr(train_pythia, "pick_device", pick)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device in ("auto", "cuda", "cuda:1", "cpu"):
        monkeypatch.setenv("LOCAL_RANK", "6")
        with pytest.raises(UserError, match="enough"):
            train_pythia.main([*line(model_folder, tokens_file, tmp_path), "--device", device])
    assert asked == ["cuda:2", "cuda:2", "cuda:1", "cpu"]


# --- the real thing


@needs_lm
def test_a_short_run_on_a_real_model_explains_its_activations(tmp_path, monkeypatch):
    monkeypatch.setattr(train_pythia, "BUFFER", 20_000)
    monkeypatch.setattr(train_pythia, "FORWARD", 16_384)
    flags = ["--model", REAL_LM, "--data", f"{REAL_LM}/train.bin", "--context", "256", "--d-sae", "512", "--k", "32"]
    flags += ["--tokens", "40000", "--batch-size", "512", "--lr", "1e-3", "--warmup", "5", "--out", str(tmp_path)]
    train_pythia.main(flags)
    (folder,) = run_folders(tmp_path).values()
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["fve"] > 0.6
