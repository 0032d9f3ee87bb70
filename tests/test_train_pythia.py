"""train_pythia.py: families of models, streams of activations, runs, files, downloads."""

import functools
import http.server
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from conftest import line, stop_at_checkpoint, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import evaluate
import sae as sae_module
import train_pythia
from sae import ARCHS, SAE, Hparams, UserError
from train_pythia import (
    Activations,
    Run,
    Stream,
    anatomy,
    blocks,
    check_model,
    cut_contexts,
    decode_parts,
    documents,
    end_tokens,
    fetch,
    final_norm,
    fingerprint,
    is_rows,
    load_model,
    open_rows,
    open_run,
    open_tokens,
    parse,
    read_run,
    read_tokens,
    residual_stream,
    spliced,
    tokenise,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
REAL_LM = os.environ.get("SAE_LM_DIR")
needs_lm = pytest.mark.skipif(
    not REAL_LM, reason="SAE_LM_DIR names no folder with a language model"
)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch, tmp_path):
    monkeypatch.setattr(train_pythia, "BUFFER", 1000)
    monkeypatch.setattr(train_pythia, "FORWARD", 128)
    monkeypatch.setattr(train_pythia, "CACHE", tmp_path / "cache")


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 96, 6000).astype(np.uint16).tofile(path)
    return path


def some_tokens(n=6000):
    return np.random.default_rng(1).integers(0, 96, n).astype(np.uint16)


# --------------------------------------------------------------------------------------------------
# Model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EARS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_blocks": 3,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 16,
    "nemo_conv_channels": 16,
    "depthwise_separable_out_channel": 16,
}
# Families of transformers, and what their configurations need beside SIZES, None for nothing there.
FAMILIES = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": {"text_config": SIZES, "vision_config": TOWER},  # a text model inside another
    "gemma4_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 4,
        "global_head_dim": 8,
    },
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "opt with a projection and no last norm, as OPT-350M": {
        "ffn_dim": 32,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
    },
    "phi": {},
    "phi3": {},
    "phi4_multimodal": {"vision_config": TOWER, "audio_config": EARS},  # three lists of blocks
    "mistral": {},
    "mamba": {"state_size": 4},
    "mamba2": {
        "num_heads": 4,
        "state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "bloom": {},
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 2,
        "attention_types": [[["global", "local", "global"], 1]],
    },
    "falcon": {"head_dim": None},
    "olmo2": {},
    "smollm3": {},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "xlm": {"n_words": 97, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "causal": True},
    "openai-gpt": {},  # its blocks put out lists, and no norm follows the last one
    "minicpm3": {"kv_lora_rank": 8, "q_lora_rank": 8},  # divides by a constant after the norm
    "rwkv": {},
}


def tiny_config(family):
    name = family.split()[0]
    more = FAMILIES.get(family, {})
    sizes = {} if name == "xlm" else SIZES
    settings = {key: value for key, value in {**sizes, **more}.items() if value is not None}
    if "text_config" in settings:
        settings = more
    try:
        return transformers.AutoConfig.for_model(name, **settings)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} has no such family ({error})")


@functools.cache
def tiny_family(family):
    """A model with random weights, norms and biases included, so that no two modules are alike."""
    config = tiny_config(family)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


PROBE = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def reported_streams(model):
    """What transformers itself says comes out of every block but the last."""
    states = model(PROBE, output_hidden_states=True, use_cache=False).hidden_states
    embeddings = model.get_input_embeddings()(PROBE)
    assert len(states) == 4
    # Mamba and RWKV begin with what block 0 puts out, all others with what goes into it
    begins_with_block_0 = "Mamba" in type(model).__name__ or "Rwkv" in type(model).__name__
    assert embeddings.shape == states[0].shape or not begins_with_block_0
    return states[:2] if begins_with_block_0 else states[1:3]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_read_where_transformers_says_and_no_later_block_runs(family):
    model = tiny_family(family)
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(blocks(model))
    ]
    for layer, expected in enumerate(reported_streams(model)):
        ran.clear()
        assert torch.equal(residual_stream(model, PROBE, layer), expected)
        assert ran == list(range(layer + 1))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_spliced_in_reaches_the_logits_after_every_block(family):
    model = tiny_family(family)
    before = model(PROBE, use_cache=False).logits
    for layer in range(3):
        with spliced(model, layer, torch.zeros_like):
            assert not torch.allclose(model(PROBE, use_cache=False).logits, before, atol=1e-3)
        with spliced(model, layer, lambda resid: resid.clone()):
            assert torch.equal(model(PROBE, use_cache=False).logits, before)
    assert torch.equal(model(PROBE, use_cache=False).logits, before), "the hooks are gone"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_leads_from_the_last_block_to_the_models_own_logits(family):
    model = tiny_family(family)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    with spliced(model, 2, lambda resid: x):
        expected = model(PROBE, use_cache=False).logits
    found = model.get_output_embeddings()(final_norm(model)(x))
    # Soft caps and constant factors change how large logits are, and not their order
    assert torch.equal(found.argsort(-1)[..., -5:], expected.argsort(-1)[..., -5:])


def test_a_stream_that_is_no_tensor_of_three_dimensions_is_refused():
    name = "gemma3n_text"
    try:
        config = transformers.AutoConfig.for_model(
            name,
            **SIZES,
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=4,
            num_kv_shared_layers=0,
            laurel_rank=4,
            layer_types=["full_attention"] * 3,
            activation_sparsity_pattern=[0.0] * 3,
        )
    except ValueError:
        pytest.skip("no Gemma 3n in this version of transformers")
    with pytest.raises(UserError, match="choose another family"):
        anatomy(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_a_model_of_one_block_is_told_by_what_follows_it():
    model = tiny_model(layers=1)
    assert blocks(model) is model.gpt_neox.layers
    assert final_norm(model) is model.gpt_neox.final_layer_norm


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_not_taken_for_a_model_that_cannot_be_read(
    error, model_folder, monkeypatch
):
    def fail(model):
        raise error

    monkeypatch.setattr(train_pythia, "anatomy", fail)
    with pytest.raises(error):
        load_model(model_folder, CPU)


def test_what_stands_between_norm_and_unembedding_unseen_is_refused():
    model = tiny_model()

    def turn(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.roll(1, -1)
        return output

    model.gpt_neox.register_forward_hook(turn)
    with pytest.raises(UserError, match="choose another family"):
        anatomy(model)


def test_a_model_that_nests_its_text_model_is_known_by_that(tmp_path):
    tiny_config("gemma3").save_pretrained(tmp_path)
    run = Run(tmp_path, str(tmp_path), 2, 64, "", "auto")
    assert check_model(run) == 16
    for wrong, message in (({"layer": 3}, "blocks 0 to 2"), ({"context": 65}, "at most 64")):
        with pytest.raises(UserError, match=message):
            check_model(run._replace(**wrong))


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3"])
def test_a_text_ends_at_every_token_that_model_or_tokenizer_ends_it_at(family, model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)  # 96 ends a text
    model = tiny_family(family)
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer) == {2, 7, 9, 96}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == {2, 96}


# --------------------------------------------------------------------------------------------------
# Activations: the stream for training


def stream_of(tokens=None, context=16, layer=2, **others):
    tokens = some_tokens() if tokens is None else tokens
    return Activations(tiny_model(), layer, context, tokens, **others)


def batches_of(source, batch_size=50, data_seed=0, state=None):
    return source.batches(Hparams(batch_size=batch_size, data_seed=data_seed), 0, state or {})


def take(batches, n):
    return torch.cat([next(batches) for _ in range(n)])


@pytest.fixture
def numbered(monkeypatch):
    """Activations that tell which token they are of, in their first number."""

    def read(model, tokens, layer):
        pairs = torch.stack([tokens.float(), torch.ones(tokens.shape)], -1)
        return pairs.repeat(1, 1, 8)

    monkeypatch.setattr(train_pythia, "residual_stream", read)
    return np.arange(6000).astype(np.uint16) + 1000  # their norms differ by less than 10 times


def test_the_stream_has_the_order_that_finished_runs_were_trained_in(numbered):
    source = stream_of(numbered)
    x = take(batches_of(source, data_seed=3), 60) * source.scale
    found = x[:, 0].round().int().tolist()
    assert found[:8] == [2769, 3540, 4001, 2426, 5305, 6242, 5351, 4814]
    assert found[-50:-42] == [4767, 6862, 2135, 6076, 3841, 4731, 5947, 3159]


def test_nothing_is_lost_or_repeated_within_a_pass(numbered):
    source = stream_of(numbered)
    contexts_read = []
    fill = source.fill

    def counted_fill():
        contexts_read.append(source.contexts_per_filling)
        order = fill()
        source.current_order = order
        return order

    source.fill = counted_fill
    batches = batches_of(source)
    served = (take(batches, 200) * source.scale)[:, 0].round().int().tolist()
    waiting = source.buffer[source.current_order[source.served * 50 :], 0].int().tolist()
    passes, more = divmod(sum(contexts_read), 375)  # 375 contexts are a pass
    assert passes >= 1
    counts = np.bincount(served + waiting, minlength=7000)[1000:].reshape(375, 16)
    assert (counts[:, 0] == 0).all(), "first positions are dropped"
    assert (counts[:, 1:] == counts[:, 1:2]).all(), "a context comes as a whole"
    assert sorted(counts[:, 1]) == [passes] * (375 - more) + [passes + 1] * more


def test_a_filling_is_what_the_model_makes_of_its_contexts():
    tokens = some_tokens(66 * 16)  # one filling, so that every context comes once
    source = stream_of(tokens)
    x = take(batches_of(source, batch_size=66), 15) * source.scale
    contexts = torch.from_numpy(tokens.astype(np.int64)).view(66, 16)
    states = tiny_model()(contexts, output_hidden_states=True).hidden_states[3]
    expected = states[:, 1:].flatten(0, 1)
    assert torch.cdist(x, expected).argmin(1).unique().tolist() == list(range(990))
    assert torch.cdist(x, expected).amin(1).max() < 1e-3


def test_the_stream_is_shuffled_across_contexts():
    # Each context is one token, so that its activations are alike
    source = stream_of(np.repeat(np.arange(90, dtype=np.uint16), 64))
    x = take(batches_of(source), 11)
    assert len(x[:50].mul(100).round().unique(dim=0)) > 20
    same_neighbour = torch.isclose(x[1:], x[:-1], atol=1e-3).all(1).float().mean()
    assert same_neighbour < 0.1


def test_the_stream_is_a_function_of_the_data_seed():
    first, again, other = (batches_of(stream_of(), data_seed=seed) for seed in (0, 0, 1))
    for _ in range(30):
        x = next(first)
        assert torch.equal(x, next(again))
        assert not torch.equal(x, next(other))


def test_activations_have_unit_mean_squared_norm():
    source = stream_of()
    x = take(batches_of(source), 19)
    assert x.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert x.dtype == torch.float32
    assert x.shape[1] == source.d_in


def test_outliers_and_first_positions_are_dropped(monkeypatch):
    def with_outliers(model, tokens, layer):
        x = torch.randn(*tokens.shape, 16, generator=torch.Generator().manual_seed(0))
        x[:, 0, 0] = 40.0
        x[:, 5] *= 100
        return x

    monkeypatch.setattr(train_pythia, "residual_stream", with_outliers)
    source = stream_of()
    x = take(batches_of(source), 40) * source.scale
    assert x.norm(dim=1).max() < source.limit < 100
    assert not (x[:, 0] == 40.0).any()


def test_activations_that_are_not_numbers_are_refused_at_once(monkeypatch):
    def with_a_hole(model, tokens, layer):
        x = torch.randn(*tokens.shape, 16)
        x[0, 3, 2] = torch.nan
        return x

    monkeypatch.setattr(train_pythia, "residual_stream", with_a_hole)
    with pytest.raises(UserError, match="not finite numbers"):
        next(batches_of(stream_of()))
    with pytest.raises(UserError, match="not finite numbers"):
        next(iter(Stream(tiny_model(), 2, [torch.zeros(2, 16, dtype=torch.long)])))


@pytest.mark.parametrize("at", [0, 1, 19, 20, 21, 55])
def test_a_stream_goes_on_from_its_state(at):
    source = stream_of()
    batches = batches_of(source)
    for _ in range(at):
        next(batches)
    state = source.state()
    if at:
        assert sum(v.nelement() for v in state.values() if torch.is_tensor(v)) < 50 * 16
    again = stream_of()
    batches_again = batches_of(again, state=state)
    assert again.scale == source.scale, "an SAE that is finished already needs it to be saved"
    for _ in range(25):
        assert torch.equal(next(batches), next(batches_again))


def test_refilling_makes_no_copy_of_the_buffer():
    source = stream_of()
    batches = batches_of(source)
    address = source.buffer.data_ptr()
    take(batches, 60)
    assert source.filling > 1
    assert source.buffer.data_ptr() == address


def test_a_batch_may_be_larger_than_the_buffer(numbered):
    source = stream_of(numbered, buffer_size=30)
    x = take(batches_of(source, batch_size=100), 10) * source.scale
    numbers = x[:, 0].round().int()
    assert len(numbers.unique()) == 1000


def test_the_buffer_holds_no_more_than_is_asked_for(model_folder, tokens_file, tmp_path):
    flags = line(model_folder, tokens_file, tmp_path, "--tokens", "300")
    args, _ = parse(flags)
    source = train_pythia.open_text_source(args, CPU)
    batches = batches_of(source)
    take(batches, 6)
    assert source.filling == 0, "one filling is enough"
    assert len(source.buffer) == 21 * 15 + 50, "and 21 contexts for it"


# --------------------------------------------------------------------------------------------------
# Activations: the stream for evaluation


def some_contexts(batches=3):
    tokens = torch.from_numpy(some_tokens(batches * 64).astype(np.int64))
    return list(tokens.view(-1, 16).split(4))


def test_held_out_activations_are_the_models_own_without_first_positions():
    model = tiny_model()
    found = torch.cat(list(Stream(model, 1, some_contexts())))
    states = model(torch.cat(some_contexts()), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(found, states[:, 1:].flatten(0, 1), atol=1e-5)
    source = stream_of(held_out_tokens=some_tokens(192), layer=1)
    assert torch.allclose(torch.cat(list(source.held_out())), found, atol=1e-5)
    assert list(stream_of(held_out_tokens=some_tokens(15)).held_out()) == []


def test_the_cross_entropy_of_a_stream_is_that_of_transformers():
    model = tiny_model()
    tokens = torch.cat(some_contexts())
    expected = model(tokens, labels=tokens).loss.item()
    stream = Stream(model, 1, some_contexts())
    assert stream.cross_entropy() == pytest.approx(expected, rel=1e-5)
    assert stream.cross_entropy(lambda x: x) == pytest.approx(expected, rel=1e-5)


def test_a_replacement_leaves_first_positions_and_outliers_as_they_are(monkeypatch):
    model = tiny_model()
    contexts = some_contexts()
    stream = Stream(model, 1, contexts)
    norms = residual_stream(model, contexts[0], 1)[:, 1:].norm(dim=-1)
    stream.limit = norms.median().item()  # half of them are outliers now
    kept = stream.keeps(residual_stream(model, contexts[0], 1))
    assert 0.4 < kept[:, 1:].float().mean() < 0.6
    assert not kept[:, 0].any()
    assert torch.equal(next(iter(stream)), residual_stream(model, contexts[0], 1)[kept])

    def slow(resid):  # the same, position by position
        resid = resid.clone()
        for row in range(len(resid)):
            for position in range(1, resid.shape[1]):
                if resid[row, position].norm() <= stream.limit:
                    resid[row, position] = -resid[row, position]
        return resid

    with spliced(model, 1, slow):
        expected = train_pythia.cross_entropy(model, contexts)
    assert stream.cross_entropy(lambda x: -x) == pytest.approx(expected, rel=1e-6)


def test_on_a_cpu_both_streams_multiply_in_bfloat16_and_add_in_float32(model_folder):
    exact, rounded = (load_model(model_folder, CPU, bfloat16)[0] for bfloat16 in (False, True))
    a, b = (torch.cat(list(Stream(model, 2, some_contexts()))) for model in (exact, rounded))
    assert not torch.equal(a, b)
    assert (a - b).norm() < 0.02 * (a - a.mean(0)).norm()
    assert not torch.equal(b, b.bfloat16().float()), "the residual stream itself is not rounded"
    source = Activations(rounded, 2, 16, some_tokens(1000))
    trained_on = next(batches_of(source)) * source.scale
    measured_on = torch.cat(
        list(Stream(rounded, 2, cut_contexts(some_tokens(1000), 1000, 16, CPU)))
    )
    assert torch.cdist(trained_on, measured_on).amin(1).max() < 1e-3
    inside = []

    def replace(x):
        inside.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x

    loss = Stream(rounded, 2, some_contexts()).cross_entropy(replace)
    assert set(inside) == {(torch.float32, False)}, "an SAE computes as it does by itself"
    assert loss == pytest.approx(Stream(exact, 2, some_contexts()).cross_entropy(), rel=0.01)


def test_contexts_are_cut_one_after_the_other_and_the_rest_is_left():
    tokens = np.arange(100)
    cut = cut_contexts(tokens, 75, 10, CPU)
    assert torch.cat(cut).flatten().tolist() == list(range(70))
    with pytest.raises(UserError, match=r"^9 tokens are fewer than one context of 10: "):
        cut_contexts(tokens, 9, 10, CPU)
    with pytest.raises(UserError, match=r"^0 tokens are .*--data with more text"):
        cut_contexts(tokens[:0], 500, 10, CPU)


# --------------------------------------------------------------------------------------------------
# Opening runs


def saelens_folder(folder, **metadata):
    names = {"model_name": "gpt2-small", "hook_name": "blocks.9.hook_resid_post"}
    names["context_size"] = 128
    SAE(4, 8, "relu").save(folder, {**names, **metadata})
    return folder


def test_a_run_of_ours_says_what_its_sae_reads(run_folder, model_folder):
    run = read_run(run_folder[0])
    assert (run.model, run.layer, run.context) == (str(model_folder), 2, 16)
    (run_folder[0] / "hparams.json").unlink()
    run = read_run(run_folder[0])
    assert (run.model, run.layer, run.context) == (str(model_folder), 2, 16), "as does its cfg.json"


def test_a_saelens_folder_says_what_its_sae_reads(tmp_path):
    folder = saelens_folder(tmp_path / "run")
    assert read_run(folder) == Run(folder, "gpt2", 9, 128, "pile", "auto")
    saelens_folder(folder, hook_name="blocks.9.hook_resid_pre", model_name="pythia-70m-deduped")
    assert read_run(folder) == Run(folder, "EleutherAI/pythia-70m-deduped", 8, 128, "pile", "auto")
    old = {"model_name": "some/model", "hook_name": "blocks.0.hook_resid_post", "context_size": 64}
    (folder / "cfg.json").write_text(json.dumps(old))
    assert read_run(folder) == Run(folder, "some/model", 0, 64, "pile", "auto")


@pytest.mark.parametrize(
    "hook",
    ["blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "hook_embed"],
)
def test_an_sae_of_another_place_is_refused(hook, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"hook_name {hook}: only")):
        read_run(saelens_folder(tmp_path, hook_name=hook))


def test_first_positions_do_not_count_for_the_limit_of_outliers():
    resid = torch.ones(2, 2, 3)
    resid[:, 0] = 0
    assert train_pythia.outlier_limit(resid) == pytest.approx(10 * 3**0.5)


def test_an_sae_of_no_language_model_is_refused(tmp_path):
    for context_size in (None, "many", [64], True, 0):
        folder = saelens_folder(tmp_path, context_size=context_size)
        with pytest.raises(UserError, match=r"not a run of train_pythia\.py"):
            read_run(folder)


def test_an_sae_that_reads_or_gives_something_else_is_refused(tmp_path):
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for others in (centred, {"hook_name_out": "blocks.10.hook_resid_post"}):
        with pytest.raises(UserError):
            read_run(saelens_folder(tmp_path, **others))


def test_a_run_is_opened_with_the_tokens_that_are_asked_for(run_folder, tokens_file):
    run = read_run(run_folder[0])
    tokens = np.fromfile(run.data, np.uint16)
    assert len(tokens) == 6000
    assert open_run(run, CPU).tokens.tolist() == tokens[-592:].tolist(), "37 contexts, a tenth"
    assert open_run(run, CPU, n_trained=100).tokens.tolist() == tokens[:100].tolist()
    other = open_run(run, CPU, data=str(tokens_file)).tokens
    assert other.tolist() == np.fromfile(tokens_file, np.uint16).tolist()
    with pytest.raises(UserError, match="blocks 0 to 3"):
        open_run(run._replace(layer=4), CPU)


# --------------------------------------------------------------------------------------------------
# Training


def run_folders(out):
    return {path.name: path for path in Path(out).iterdir() if (path / "cfg.json").exists()}


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def test_an_sae_alone_equals_the_same_sae_within_a_sweep(model_folder, tokens_file, tmp_path):
    grid = ["--arch", *ARCHS, "--l2", "0", "1e-4"]
    train_pythia.main(line(model_folder, tokens_file, tmp_path / "sweep", *grid))
    runs = run_folders(tmp_path / "sweep")
    assert len(runs) == 2 * len(ARCHS)
    for arch in list(ARCHS)[1:4:2]:
        one = ["--arch", arch, "--l2", "1e-4"]
        train_pythia.main(line(model_folder, tokens_file, tmp_path / "single", *one))
    for name, folder in run_folders(tmp_path / "single").items():
        assert weights(folder) == weights(runs[name])


def test_a_saved_sae_takes_raw_activations(model_folder, tokens_file, tmp_path):
    more = ["--tokens", 10_000, "--arch", "topk", "batchtopk"]
    train_pythia.main(line(model_folder, tokens_file, tmp_path, *more))
    source = stream_of(np.fromfile(tokens_file, np.uint16))
    raw = next(batches_of(source)) * source.scale
    assert source.scale < 0.9
    for folder in run_folders(tmp_path).values():
        sae = SAE.load(folder)
        error = (sae(raw) - raw).square().sum() / (raw - raw.mean(0)).square().sum()
        assert error < 0.6
        assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post"
        assert sae.metadata["model_name"] == str(model_folder)
        l0 = (sae.encode(raw) > 0).sum(1).float().mean().item()
        assert l0 == pytest.approx(4, abs=1.5)


def test_interrupted_and_repeated_ends_with_the_same_weights(model_folder, tokens_file, tmp_path):
    patched = "import train_pythia, sae; train_pythia.BUFFER = 1000; train_pythia.FORWARD = 128; "
    patched += "sae.CHECKPOINT_SECONDS = 0.05; sae.run_command(train_pythia.main)"

    def flags(out):
        more = ["--tokens", "7500", "--seed", "0", "1", "--l2", "1e-4"]
        return line(model_folder, tokens_file, tmp_path / out, *more)

    running = {}
    for how in (signal.SIGINT, signal.SIGKILL):  # side by side, since it takes seconds to start one
        words = [sys.executable, "-c", patched, *flags(how.name)]
        # Into a file: a pipe that nobody reads stops a process once it is full
        with open(tmp_path / f"{how.name}.txt", "w") as messages:
            process = subprocess.Popen(words, cwd=ROOT, stderr=messages)
        running[how] = (process, tmp_path / how.name)
    stop_at_checkpoint(running)
    last_line = (tmp_path / f"{signal.SIGINT.name}.txt").read_text().splitlines()[-1]
    assert last_line.startswith("interrupted: ")
    train_pythia.main(flags("whole"))
    for how in running:
        train_pythia.main(flags(how.name))
        for name, folder in run_folders(tmp_path / "whole").items():
            assert weights(folder) == weights(tmp_path / how.name / name)


def test_ranks_divide_the_sweep_and_their_union_equals_one_process(
    model_folder, tokens_file, tmp_path, monkeypatch, capsys
):
    grid = ["--l2", "0", "1e-4", "--seed", "0", "1", "2"]
    train_pythia.main(line(model_folder, tokens_file, tmp_path / "one", *grid))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        train_pythia.main(line(model_folder, tokens_file, tmp_path / "two", *grid))
        assert len(run_folders(tmp_path / "two")) == 3 * (rank + 1)
        assert f"RANK is {rank} and WORLD_SIZE 2: 3 of 6 SAEs" in capsys.readouterr().out
    one, two = run_folders(tmp_path / "one"), run_folders(tmp_path / "two")
    assert set(one) == set(two)
    assert len(one) == 6
    for name in one:
        assert weights(one[name]) == weights(two[name])


def test_a_rank_without_its_number_of_processes_is_refused(
    monkeypatch, refusal, model_folder, tokens_file, tmp_path
):
    monkeypatch.setenv("RANK", "1")
    assert "unset" in refusal(train_pythia.main, line(model_folder, tokens_file, tmp_path))


def test_each_rank_of_a_node_has_a_gpu_of_its_own(monkeypatch, model_folder, tokens_file, tmp_path):
    asked = []

    def pick(name):
        asked.append(name)
        raise UserError("enough")

    monkeypatch.setattr(train_pythia, "pick_device", pick)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "6")
    for device in ("auto", "cuda", "cuda:1", "cpu"):
        with pytest.raises(UserError, match="enough"):
            train_pythia.main([*line(model_folder, tokens_file, tmp_path), "--device", device])
    assert asked == ["cuda:2", "cuda:2", "cuda:1", "cpu"]


@needs_lm
def test_a_short_run_on_a_real_model_explains_its_activations(tmp_path, monkeypatch):
    monkeypatch.setattr(train_pythia, "BUFFER", 100_000)
    monkeypatch.setattr(train_pythia, "FORWARD", 4096)
    monkeypatch.setattr(train_pythia, "EVALUATED", 1024)
    flags = ["--model", REAL_LM, "--data", f"{REAL_LM}/train.bin", "--context", "256"]
    flags += ["--d-sae", "256", "--k", "32", "--tokens", "20000", "--batch-size", "256"]
    flags += ["--lr", "3e-3", "--warmup", "5", "--out", str(tmp_path)]
    train_pythia.main(flags)
    (folder,) = run_folders(tmp_path).values()
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["fve"] > 0.6


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def acts(tmp_path):
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "acts.npy", x.numpy())
    torch.save(x, tmp_path / "acts.pt")
    return x


def row_flags(path, out, *more):
    flags = ["--data", path, "--d-sae", 64, "--k", 4, "--tokens", 1500, "--batch-size", 50]
    flags += ["--lr", 1e-2, "--warmup", 3, "--out", out, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


def test_own_activations_are_trained_on_without_a_language_model(acts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pythia, "load_model", None)
    monkeypatch.setattr(train_pythia, "AutoConfig", None)
    for suffix in ("npy", "pt"):
        train_pythia.main(row_flags(tmp_path / f"acts.{suffix}", tmp_path / suffix))
    (by_npy,), (by_pt,) = (run_folders(tmp_path / name).values() for name in ("npy", "pt"))
    assert weights(by_npy) == weights(by_pt)
    hp = sae_module.read_hparams(by_npy)
    assert (hp["model"], hp["d_in"], hp["layer"], hp["context"]) == ("", 16, 0, 0)
    assert (
        by_npy.name == "topk_k4_l2-0_d-sae-64_lr-0.01_batch-size-50_warmup-3_0.0015M-tokens_seed0"
    )
    with pytest.raises(UserError, match=r"trained on .*acts\.npy, so there is no language model"):
        read_run(by_npy)
    # As if from a notebook, on all but the last tenth
    direct = sae_module.train_sae(Hparams(**hp), sae_module.Rows(acts[:-40]), "cpu")
    assert torch.equal(direct.W_dec, SAE.load(by_npy).W_dec)


def test_other_contents_under_the_name_of_a_data_file_are_noticed(acts, tmp_path):
    path, out = tmp_path / "acts.npy", tmp_path / "runs"
    train_pythia.main(row_flags(path, out))
    evaluate.main(["quality", str(out), "--device", "cpu"])
    np.save(path, acts.numpy()[::-1])
    with pytest.raises(UserError, match=r"acts\.npy has changed since .* give another --out"):
        train_pythia.main(row_flags(path, out))
    with pytest.raises(UserError, match=r"acts\.npy has changed since .* give --data"):
        evaluate.main(["quality", str(out), "--device", "cpu"])
    evaluate.main(["quality", str(out), "--device", "cpu", "--data", str(path)])
    np.save(path, acts.numpy())
    train_pythia.main(row_flags(path, out))
    # Runs of before do not say what they were trained on.
    (folder,) = run_folders(out).values()
    content = json.loads((folder / "hparams.json").read_text())
    del content["hparams"]["data_hash"]
    (folder / "hparams.json").write_text(json.dumps(content))
    train_pythia.main(row_flags(path, out))


def test_the_last_tenth_of_the_rows_is_held_out(acts, tmp_path):
    for suffix in ("npy", "pt"):
        train, held_out = open_rows(tmp_path / f"acts.{suffix}")
        assert torch.equal(train, acts[:360])
        assert torch.equal(held_out, acts[360:])
    np.save(tmp_path / "half.npy", acts.half().numpy())
    assert open_rows(tmp_path / "half.npy")[1].dtype == torch.float32


def test_one_dimension_of_integers_is_token_ids(tokens_file, tmp_path):
    tokens = np.fromfile(tokens_file, np.uint16)
    np.save(tmp_path / "ids.npy", tokens.astype(np.int64))
    assert not is_rows(tmp_path / "ids.npy")
    assert read_tokens(tmp_path / "ids.npy", None, tiny_model()).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros((9, 4), int), "not one tensor"),
        ("a.npy", np.zeros((3, 9, 4)), "not one tensor"),
        ("a.npy", np.full((9, 4), np.nan), "finite"),
        ("a.npy", np.ones((1, 4)), "too few"),
        ("a.npy", np.array([{"code": "is never run"}]), "cannot be read"),
        ("a.pt", {"acts": torch.zeros(3)}, "not one tensor"),
        ("a.pt", Path("a"), "cannot be read"),
        ("a.pt", None, "cannot be read"),
    ],
)
def test_activations_that_cannot_be_used_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        train_pythia.main(row_flags(path, tmp_path / "out"))


@pytest.mark.parametrize("flag", [("--model", "nonsense"), ("--layer", 7), ("--context", 64)])
def test_a_flag_of_language_models_is_refused_beside_activations(flag, acts, tmp_path, refusal):
    said = refusal(train_pythia.main, row_flags(tmp_path / "acts.npy", tmp_path / "out", *flag))
    name, value = flag
    assert f"{name} {value}: no language model reads" in said


# --------------------------------------------------------------------------------------------------
# Tokens


def ids(text):
    return [95 if c == "\n" else ord(c) - 32 for c in text]


@pytest.fixture
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


def read(path, tokenizer):
    return read_tokens(path, tokenizer, tiny_model()).tolist()


def test_text_becomes_tokens_with_documents_apart(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read(tmp_path / "a.txt", tokenizer) == [96, *ids("one\ntwo")]
    rows = [{"text": "one"}, {"text": "two\nthree", "meta": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(tmp_path / "b.jsonl", tokenizer) == [96, *ids("one"), 96, *ids("two\nthree")]


def test_a_special_token_that_is_spelled_out_in_a_text_is_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    assert read(tmp_path / "a.txt", tokenizer) == [96, *ids("a<|endoftext|>b")]


def test_a_text_is_tokenised_once_for_each_tokenizer(
    model_folder, tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokenise(path, tokenizer)
    monkeypatch.setattr(train_pythia, "documents", None)
    for _ in range(5):  # each has its vocabulary in another order
        again = transformers.AutoTokenizer.from_pretrained(model_folder)
        assert tokenise(path, again) == first
        assert fingerprint(again) == fingerprint(tokenizer)
    other = byte_tokenizer()
    assert fingerprint(other) != fingerprint(tokenizer)
    with pytest.raises(TypeError):
        tokenise(path, other)
    path.write_text("another text")
    with pytest.raises(TypeError):
        tokenise(path, tokenizer)


def test_a_long_text_is_read_in_pieces_and_comes_out_whole(tmp_path):
    text = "".join(f"line {i}\n" for i in range(400_000))
    (tmp_path / "long.txt").write_text(text)
    pieces = list(documents(tmp_path / "long.txt"))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)


TEXT = "I think that the king is « naïve » , the kings of 日本 don't : 🙂 é 🙃 and so on.\n" * 4


def trained_tokenizer(backend, **options):
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, **options)
    backend.train_from_iterator(["the king of kings is that, I think that the king"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_tokenizer():
    """As GPT-2's and Pythia's: a character may be several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return trained_tokenizer(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_tokenizer():
    """As Llama 2's: a space is the beginning of a token, and rare characters are bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return trained_tokenizer(backend)


def metaspace_tokenizer():
    """As T5's and Gemma's of before."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return trained_tokenizer(backend)


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer, metaspace_tokenizer])
def test_the_texts_of_parts_are_together_the_text_of_the_whole(make):
    tokenizer = make()
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(tokens)
    generator = random.Random(0)
    for _ in range(20):
        n_cuts = generator.randrange(1, 20)
        cuts = [0, *sorted(generator.choices(range(len(tokens)), k=n_cuts)), len(tokens)]
        parts = [tokens[start:end] for start, end in itertools.pairwise(cuts)]
        assert "".join(decode_parts(tokenizer, parts)) == whole
    one_by_one = decode_parts(tokenizer, [[token] for token in tokens])
    assert "".join(one_by_one) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in text for text in one_by_one), "no half characters"


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer, metaspace_tokenizer])
def test_a_continuation_keeps_the_space_before_it(make):
    tokenizer = make()
    prompt = tokenizer("I think that", add_special_tokens=False)["input_ids"]
    tokens = tokenizer("I think that the king", add_special_tokens=False)["input_ids"]
    assert tokens[: len(prompt)] == prompt
    parts = [prompt, tokens[len(prompt) :]]
    assert decode_parts(tokenizer, parts) == ["I think that", " the king"]


def test_half_a_character_belongs_to_the_token_that_completes_it():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a日b", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 5
    assert decode_parts(tokenizer, [[token] for token in tokens]) == ["a", "", "", "日", "b"]
    assert decode_parts(tokenizer, [tokens[:2], []]) == ["a\ufffd", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 is not a JSON object"),
        ("a.txt", b"", "cannot be read"),
        ("a.bin", b"123", "cannot be read"),
        ("a.bin", np.arange(3000, dtype=np.uint32) % 90, "every second id is 0"),
        ("a.bin", np.full(500, 5, np.uint16), "452 tokens to train on, give at least 1,000"),
        ("a.bin", np.full(2000, 97, np.uint16), "token id 97"),
        ("a.npy", np.full(2000, -1), "token id -1"),
        ("a.npy", np.zeros(9), "no token ids"),
        ("a.pdf", b"%PDF", "unknown kind"),
    ],
)
def test_data_that_cannot_be_read_is_refused(name, content, message, model_folder, tmp_path):
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, content)
    elif isinstance(content, np.ndarray):
        content.tofile(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        train_pythia.main(line(model_folder, path, tmp_path / "out"))
    assert str(error.value).startswith(f"--data {path}: ")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named_before_a_model_is_loaded(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_pythia, "load_model", None)
    for name in ("a.txt", "a.jsonl", "a.bin", "no-suffix"):
        with pytest.raises(UserError, match=f"^--data .*{name}: there is no such file: "):
            train_pythia.main(line(model_folder, tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ids_of_a_large_vocabulary_are_not_read_as_uint16(tokens_file):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPTNeoXConfig(
            vocab_size=2**16 + 1,
            hidden_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=2,
        )
    )
    with pytest.raises(UserError, match=r"do not fit into uint16.*npy"):
        read_tokens(tokens_file, None, model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "4"], "--layer 4: .* has blocks 0 to 3"),
        (["--out", "x" * 300], "File name too long"),
        (["--model", "nowhere/at-all"], "--model nowhere/at-all: cannot be read"),
        (["--context", "65"], "--context 65: .* at most 64"),
        (["--context", "1"], "--context 1: give at least 2"),
        (["--tokens", "10"], "--tokens 10"),
        (["--tokens", "nan"], "--tokens nan"),
        (["--layer", "2", "3"], "unrecognized arguments: 3"),
        (["--k", "65"], "--k 65"),
    ],
)
def test_a_command_line_that_cannot_work_says_why(
    flags, message, model_folder, tokens_file, tmp_path, refusal
):
    def main(arguments):
        sae_module.run_command(functools.partial(train_pythia.main, arguments))

    message_found = refusal(main, line(model_folder, tokens_file, tmp_path / "out", *flags))
    assert re.search(message, message_found)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Downloads, from a local server that can misbehave


class Server(http.server.BaseHTTPRequestHandler):
    content = bytes(range(256)) * 400
    faults: ClassVar = []
    seen: ClassVar = []

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else None
        self.seen.append((fault, self.headers.get("Range")))
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        if isinstance(fault, int):
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
def server():
    handler = type("Handler", (Server,), {"faults": [], "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
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


@pytest.mark.parametrize("fault", ["short", "ignores", "shifted", "html", 503, 404])
def test_a_download_that_breaks_is_taken_up_where_it_broke(fault, server, tmp_path):
    handler, url = server
    fetch(url, tmp_path / "f", 1000)
    handler.faults.append(fault)
    with pytest.raises(UserError, match=r"cannot download .*: the same command goes on"):
        fetch(url, tmp_path / "f", 50_001)
    have = (tmp_path / "f").read_bytes()
    assert have == handler.content[: len(have)], "nothing that the server should not have sent"
    assert len(have) <= 25_500
    assert fetch(url, tmp_path / "f", 50_001).read_bytes() == handler.content[:50_001]
    assert handler.seen[-1] == (None, f"bytes={len(have)}-50000")


def test_a_file_that_ends_too_early_or_is_not_there_is_said_in_one_line(server, tmp_path):
    handler, url = server
    longer = len(handler.content) + 10
    cases = [(url, "broke off"), (url, "status 416"), ("http://127.0.0.1:9/nothing", "refused")]
    for address, reason in cases:
        with pytest.raises(UserError, match=rf"cannot download .*{reason}") as error:
            fetch(address, tmp_path / address[-4:], longer)
        assert "\n" not in str(error.value)


@pytest.fixture
def pile(server, monkeypatch):
    """A small pile, of which 500 tokens are held out, in the tokens of the tiny model: [20490]."""
    handler, url = server
    tokens = np.random.default_rng(0).integers(1, 96, 20_490).astype("<u2")
    handler.content = tokens.tobytes()
    monkeypatch.setattr(train_pythia, "PILE", url[:-4])
    monkeypatch.setattr(train_pythia, "HELD_OUT", 500)
    monkeypatch.setattr(train_pythia, "PILE_SAMPLE", ("ab", ids("ab")))
    return tokens


def test_the_pile_is_fetched_by_range_and_cut_to_what_is_asked_for(pile, server, tokenizer):
    handler, _ = server
    for n_tokens in (5050, 5053, 9090):
        train, held_out = open_tokens("pile", n_tokens, 16, tiny_model(), tokenizer)
        assert train.tolist() == pile[500 : 500 + n_tokens].tolist()
        assert held_out.tolist() == pile[:500].tolist(), "the same text for runs of any length"
    n_requests = len(handler.seen)
    _, held_out = open_tokens("pile", 0, 16, tiny_model(), tokenizer)
    assert held_out.tolist() == pile[:500].tolist()
    assert len(handler.seen) == n_requests


def test_a_download_that_broke_off_within_a_token_is_read_where_it_suffices(pile, tokenizer):
    path = train_pythia.CACHE / train_pythia.PILE_FILE
    path.parent.mkdir()
    path.write_bytes(pile.tobytes()[:9001])
    train, _ = open_tokens("pile", 3000, 16, tiny_model(), tokenizer)
    assert train.tolist() == pile[500:3500].tolist()


def test_the_pile_is_refused_to_a_model_with_other_tokens(model_folder, tmp_path):
    with pytest.raises(UserError, match="tokens of Pythia's"):
        train_pythia.main(line(model_folder, "pile", tmp_path))


def test_a_run_on_the_pile_is_trained_and_opened_on_the_tokens_it_should(
    pile, model_folder, tmp_path
):
    train_pythia.main(line(model_folder, "pile", tmp_path, "--tokens", "5003"))
    (folder,) = run_folders(tmp_path).values()
    run = read_run(folder)
    assert open_run(run, CPU).tokens.tolist() == pile[:500].tolist()
    assert open_run(run, CPU, n_trained=2000).tokens.tolist() == pile[500:2500].tolist()
