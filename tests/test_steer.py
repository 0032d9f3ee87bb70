"""steer.py: generation against one text at a time, measures and statistics against slow ones."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import evaluate
import steer
from sae import SAE, UserError
from steer import Settings, Setup, Text
from train_pythia import residual_stream, spliced

LAYER = 2
PROMPT = [5, 17, 40]
SMALL = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 64, "num_key_value_heads": 2}
GPT_NEO = {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]]}
FAMILIES = {  # the settings of each that SMALL does not make small
    "gpt_neox": {},
    "gpt2": {"n_positions": 64},
    "gpt_neo": {**GPT_NEO, "window_size": 4},
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "bloom": {},
    "falcon": {},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
    "recurrent_gemma": {"lru_width": 16, "num_key_value_heads": 1},
    "rwkv": {"attention_hidden_size": 16},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "BACKOFF", 0.001)
    monkeypatch.setattr(steer, "RESAMPLES", 1000)


@pytest.fixture
def no_pictures(monkeypatch):
    """Files without anything drawn in them, which takes most of the time of a short command."""
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: path.touch())


def tiny_model(family="gpt_neox"):
    """A random model whose predictions are not all alike."""
    settings = {**SMALL, **FAMILIES[family]}
    if family == "gpt_neo":  # takes no other name for these two
        del settings["num_hidden_layers"], settings["num_attention_heads"]
    if family in ("mamba", "mamba2"):
        del settings["intermediate_size"]
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= 8
    return model


def directions(n=3):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(1))


def as_long_as_activations(model):
    """Vectors [n, d_in] that matter to this model."""
    resid = residual_stream(model, torch.tensor([PROMPT]), LAYER)
    return directions() * resid.square().mean().sqrt()


def uniform(n=3, steps=6):
    return torch.rand(n, steps, generator=torch.Generator().manual_seed(2))


def tiny_sae(seed=3, d_sae=64):
    """An SAE whose encoder sees its decoder."""
    sae = SAE(16, d_sae, "topk", 4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.normal_(generator=generator)
        sae.encoder.copy_(sae.W_dec + 0.1 * torch.randn(d_sae, 16, generator=generator))
        sae.b_enc.normal_(generator=generator)
    return sae.eval()


def one_at_a_time(model, vectors, draws, settings):
    """What generate is to write, each text by itself and read anew at every step."""
    texts = []
    for vector, text_draws in zip(vectors, draws):
        tokens = list(PROMPT)
        for draw in text_draws:

            def steered(resid, vector=vector):
                added = torch.zeros_like(resid)
                added[:, 0 if settings.steer_prompt else len(PROMPT) :] = vector
                return resid + added

            with spliced(model, LAYER, steered), torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1]
            sampling = (settings.temperature, settings.top_p)
            tokens.append(steer.sample(logits, draw[None], *sampling).item())
        texts.append(tokens[len(PROMPT) :])
    return texts


class Forgetful(dict):
    """The output of a model, without its cache."""

    @property
    def logits(self):
        return self["logits"]


# --- generate


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_one_text_at_a_time_without_a_cache(family):
    model = tiny_model(family)
    vectors = as_long_as_activations(model)
    for settings in (Settings(), Settings(steer_prompt=True)):
        texts = steer.generate(model, LAYER, PROMPT, vectors, uniform(), settings)
        assert texts.tolist() == one_at_a_time(model, vectors, uniform(), settings)
    unsteered = steer.generate(model, LAYER, PROMPT, 0 * vectors, uniform(), settings)
    assert not torch.equal(texts, unsteered), "steering should matter, or this shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_vector_generates_the_models_own_greedy_text(family):
    model = tiny_model(family)
    settings = Settings(temperature=0.0)
    own = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :]
    for zero in (torch.zeros(1, 16), -torch.zeros(1, 16)):
        text = steer.generate(model, LAYER, PROMPT, zero, uniform(1), settings)
        assert text[0].tolist() == own.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_returns_no_cache_writes_the_same(family, monkeypatch):
    model = tiny_model(family)
    vectors = as_long_as_activations(model)
    texts = steer.generate(model, LAYER, PROMPT, vectors, uniform(), Settings())
    lengths = []
    forward = model.forward

    def forget(input_ids, use_cache, cache=None, past_key_values=None):
        assert cache is None and past_key_values is None
        lengths.append(input_ids.shape[1])
        return Forgetful(logits=forward(input_ids=input_ids, use_cache=False).logits)

    monkeypatch.setattr(model, "forward", forget)
    again = steer.generate(model, LAYER, PROMPT, vectors, uniform(), Settings())
    assert torch.equal(texts, again)
    assert lengths == [len(PROMPT) + step for step in range(6)]


def test_generation_in_half_precision_stays_there():
    model, sae = tiny_model().bfloat16(), tiny_sae()
    vectors = as_long_as_activations(model.float()) * 0.1
    model = model.bfloat16()
    tokens = steer.generate(model, LAYER, PROMPT, vectors, uniform(), Settings())
    assert tokens.shape == (3, 6)
    setup = Setup(model, None, LAYER, sae)
    acts, perplexity = steer.read_back(setup, PROMPT, tokens, [0, 1, 2], {96})
    assert acts.isfinite().all()
    assert perplexity.isfinite().all()
    assert steer.promoted_tokens(model, vectors, 3).shape == (3, 3)


def test_sampling_follows_the_tempered_distribution_within_top_p():
    logits, n = torch.tensor([[2.0, 0.0, 1.0, -3.0, 1.5]]), 40_000
    tokens = steer.sample(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, 0.7, 0.9)
    p = (logits[0] / 0.7).softmax(0)
    kept, total = [], 0.0
    for token in p.argsort(descending=True).tolist():  # the likeliest that together reach top_p
        kept.append(token)
        total += p[token].item()
        if total >= 0.9:
            break
    assert len(kept) < 5
    expected = torch.tensor([p[token] / total if token in kept else 0.0 for token in range(5)])
    assert torch.allclose(tokens.bincount(minlength=5) / n, expected, atol=1e-3)
    for extreme in (0.0, 1 - 2**-24):
        assert steer.sample(logits, torch.tensor([extreme]), 0.7, 0.9).item() in kept
    assert steer.sample(logits, torch.tensor([1.0]), 0.7, 0.9).item() == kept[-1], "by rounding"
    assert steer.sample(logits, torch.tensor([0.999]), 0.7, 1e-6).item() == 0
    assert steer.sample(logits, torch.tensor([0.99]), 0, 0.9).item() == 0


def test_strength_is_a_length_or_a_multiple_of_the_rms_or_a_rise_of_the_pre_activation():
    sae, features = tiny_sae(), [3, 9, 30]
    unit = sae.W_dec[features] / sae.W_dec[features].norm(dim=1, keepdim=True)
    fixed = steer.steering_vectors(sae, features, "fixed", 5)
    assert torch.allclose(fixed, 5 * unit)
    assert torch.allclose(steer.steering_vectors(sae, features, "rms", 0.5, rms=8.0), 4 * unit)
    x = torch.randn(1, 16)
    raised = x + steer.steering_vectors(sae, features, "preact", 2.5)
    rise = sae.pre_acts(raised)[range(3), features] - sae.pre_acts(x)[0, features]
    assert torch.allclose(rise, torch.full((3,), 2.5), atol=1e-4)
    with torch.no_grad():
        sae.encoder[9] = -sae.W_dec[9]
    assert (steer.encoder_gain(sae, features) > 0).tolist() == [True, False, True]


def test_controls_are_random_directions_of_the_same_length():
    sae, features = tiny_sae(d_sae=2000), list(range(2000))
    steered = steer.steering_vectors(sae, features, "preact", 3.0).float()
    control = steer.control_vectors(features, 0, like=steered)
    assert torch.allclose(control.norm(dim=1), steered.norm(dim=1), rtol=1e-5)
    unit = control / control.norm(dim=1, keepdim=True)
    # Of directions that are uniform on the sphere the mean is 0 and the covariance 1 / 16.
    assert unit.mean(0).norm() < 4 / 2000**0.5
    assert torch.allclose(unit.T @ unit / 2000, torch.eye(16) / 16, atol=0.01)
    assert not torch.equal(control, steer.control_vectors(features, 1, like=steered))


# --- read back


def test_what_comes_after_the_first_end_of_text_does_not_count():
    tokens = torch.tensor([[1, 2, 9, 3], [9, 1, 1, 1], [1, 8, 9, 4], [1, 2, 3, 4]])
    before = steer.before_end(tokens, {9, 8})
    assert before.sum(1).tolist() == [2, 0, 1, 4]
    assert (before.long().diff(dim=1) <= 0).all(), "nothing counts again after an end"
    assert steer.before_end(tokens, set()).all()


def test_reading_back_equals_a_text_at_a_time():
    model, sae, features = tiny_model(), tiny_sae(), [3, 9, 30]
    vectors = as_long_as_activations(model)
    tokens = steer.generate(model, LAYER, PROMPT, vectors, uniform(), Settings())
    ends = {tokens[0, 3].item(), tokens[1, 0].item()}  # one text ends early, and one at once
    setup = Setup(model, None, LAYER, sae)
    acts, perplexity = steer.read_back(setup, PROMPT, tokens, features, ends)
    lengths = set()
    for row, text in enumerate(tokens.tolist()):
        n = next((i for i, token in enumerate(text) if token in ends), len(text))
        text = text[: max(n, 1)]
        lengths.add(len(text))
        sequence = torch.tensor([PROMPT + text])
        log_p = model(input_ids=sequence).logits[0].log_softmax(1)
        losses = [-log_p[2 + i, token].item() for i, token in enumerate(text)]
        own = sae.encode(residual_stream(model, sequence, LAYER)[0])[3:, features[row]]
        assert perplexity[row].item() == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
        assert acts[row].item() == pytest.approx(own.mean().item(), rel=1e-4, abs=1e-5)
    assert len(lengths) > 1
    assert (acts > 0).any()


def test_what_the_biases_raise_is_not_promoted():
    model, rows = tiny_model(), directions(3)
    promoted = steer.promoted_tokens(model, rows, 4)
    model.gpt_neox.final_layer_norm.bias += 5 * torch.randn(16)
    assert torch.equal(steer.promoted_tokens(model, rows, 4), promoted)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_promoted_tokens_go_through_final_norm_and_unembedding(family):
    model, rows = tiny_model(family), directions(3)
    centred = rows if family == "llama" else rows - rows.mean(1, keepdim=True)
    normed = centred / centred.square().mean(1, keepdim=True).sqrt()
    logits = normed @ model.get_output_embeddings().weight.T
    assert steer.promoted_tokens(model, rows, 4).tolist() == logits.topk(4).indices.tolist()


# --- one run


class Letters:
    """A tokenizer of printable ASCII, a token for each character; number 96 ends a text."""

    eos_token_id = 96
    all_special_ids = (96,)

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) - 32 for character in text]}

    def decode(self, ids, **_):
        return "".join(chr(32 + i) for i in ids)


def tiny_setup():
    model = tiny_model()
    model.generation_config.eos_token_id = model.config.eos_token_id = 96
    return Setup(model, Letters(), LAYER, tiny_sae())


SHORT = {"strength": [3.0, 30.0], "prompts": ["It is", "I think"], "new_tokens": 6}


def by_key(texts):
    return {(text.feature, text.prompt, text.kind, text.strength): text for text in texts}


@pytest.fixture(scope="module")
def three_features():
    return steer.steer_run(tiny_setup(), [3, 9, 30], Settings(**SHORT))


def test_a_run_has_every_kind_of_text_once_for_each_feature_prompt_and_strength(three_features):
    texts = by_key(three_features)
    assert len(texts) == len(three_features)
    kinds = [("original", 0.0)]
    kinds += [(kind, strength) for kind in ("steered", "control") for strength in (3.0, 30.0)]
    expected = {
        (feature, prompt, *kind)
        for feature in (3, 9, 30)
        for prompt in SHORT["prompts"]
        for kind in kinds
    }
    assert set(texts) == expected
    for (feature, prompt, kind, _), text in texts.items():
        original = texts[feature, prompt, "original", 0.0]
        assert text.echo is None if kind == "original" else text.echo == text.act - original.act
    assert len({text.text for text in three_features}) > len(three_features) / 2


def test_what_is_written_for_a_feature_does_not_depend_on_its_company(three_features):
    alone = steer.steer_run(tiny_setup(), [9], Settings(**SHORT))
    others = steer.steer_run(tiny_setup(), [40, 9, 2, 30], Settings(**SHORT), batch_size=2)
    together = by_key(three_features)
    for texts in (alone, [text for text in others if text.feature == 9]):
        assert len(texts) == 2 * 5
        for key, text in by_key(texts).items():
            assert text.text == together[key].text
            assert text.act == pytest.approx(together[key].act, rel=1e-3, abs=1e-4)


def test_features_prompts_and_seeds_have_draws_of_their_own(three_features):
    other_seed = steer.steer_run(tiny_setup(), [3, 9, 30], Settings(**SHORT, seed=1))
    originals = [text for text in three_features + other_seed if text.kind == "original"]
    assert len({text.text for text in originals}) == 2 * 3 * 2


def test_strength_zero_changes_nothing_at_all():
    settings = Settings(**{**SHORT, "strength": [0.0]})
    texts = by_key(steer.steer_run(tiny_setup(), [3, 9], settings))
    for (feature, prompt, *_), text in texts.items():
        original = texts[feature, prompt, "original", 0.0]
        for measure in ("text", "act", "perplexity", "promoted"):
            assert getattr(text, measure) == getattr(original, measure)
        assert text.echo in (None, 0.0)


def test_the_share_of_promoted_tokens_is_of_those_in_the_text(monkeypatch):
    written = torch.tensor([[1, 2, 96, 5]])
    monkeypatch.setattr(steer, "generate", lambda *_: written)
    write = (tiny_setup(), Settings(new_tokens=4), [3], "I", "steered", 1.0, torch.zeros(1, 16))
    (text,) = steer.write_texts(*write, promoted=[[5, 2, 1, 50, 60]])
    assert text.promoted == pytest.approx(2 / 5)
    assert text.text == chr(33) + chr(34)


def test_a_text_ends_at_any_of_the_models_end_tokens(monkeypatch):
    setup = tiny_setup()
    written = torch.tensor([[1, 2, 50, 5], [96, 1, 1, 1], [1, 2, 3, 4]])
    monkeypatch.setattr(steer, "generate", lambda *_: written)
    write = (Settings(new_tokens=4), [3, 4, 5], "I", "steered", 1.0, torch.zeros(3, 16))
    setup.model.generation_config.eos_token_id = [96, 50]
    texts = steer.write_texts(setup, *write, promoted=[[1]] * 3)
    assert [len(text.text) for text in texts] == [2, 0, 4]


def test_no_space_is_lost_between_the_prompt_and_its_continuation(monkeypatch):
    """As in SentencePiece's vocabularies, where a piece decoded by itself loses its space."""
    words = ["▁I", "▁think", "▁that", "▁the", "▁king", "s", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    setup = Setup(tiny_model(), fast, LAYER, tiny_sae())
    monkeypatch.setattr(steer, "generate", lambda *_: torch.tensor([[3, 4, 5]]))
    write = (setup, Settings(new_tokens=3), [3], "I think that", "original", 0.0)
    (text,) = steer.write_texts(*write, torch.zeros(1, 16), promoted=[[1]])
    assert text.prompt + text.text == "I think that the kings"


# --- rate


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("ANSWER: 4", 4),
        ("4", 4),
        ("ANSWER: 4.", 4),
        ("**ANSWER: 5**", 5),
        ("ANSWER: <2>", 2),
        ("Text B is about food, A is not.\nANSWER: 1\n", 1),
        ("ANSWER: 2\nNo, on second thoughts:\nANSWER: 4", 4),
        ("<think>ANSWER: 2</think>ANSWER: 3", 3),
        ("ANSWER: 3/5", None),
        ("Rating: 2", None),
        ("Text B mentions 3 dogs", None),
        ("ANSWER: -1", None),
        ("ANSWER: 0", None),
        ("ANSWER: 6", None),
        ("ANSWER: 12", None),
        ("ANSWER: 4.5", None),
        ("ANSWER: 4 or 5", None),
        ("ANSWER: B", None),
        ("ANSWER:", None),
        ("", None),
    ],
)
def test_a_rating_is_one_number_from_1_to_5_and_nothing_is_guessed(reply, rating):
    assert steer.parse_rating(reply) == rating
    assert steer.parse_swapped_rating(reply) == (None if rating is None else 6 - rating)


def text_of(feature=0, kind="steered", **others):
    """A Text in which only what is said matters."""
    filled = {
        "prompt": "a",
        "strength": 0.0 if kind == "original" else 5.0,
        "text": "",
        "asked": True,
    }
    filled = {**filled, "act": 0.0, "perplexity": 10.0, "promoted": 0.0, "echo": 0.0, **others}
    return Text(feature, kind=kind, **filled)


def shown_texts(prompt):
    """Texts A and B, as a judge is shown them."""
    return [json.loads(re.search(rf"^text {name}: (.*)$", prompt, re.M)[1]) for name in "AB"]


def test_swapping_the_texts_turns_the_rating_back():
    original = text_of(kind="original", prompt="I", text=" am\n")
    text = text_of(prompt="I", text=' "eat"', explanation="food")
    for swap, reply in ((False, "5"), (True, "1")):
        prompt, parse = steer.rating_question(text, original, swap)
        shown = ['I "eat"', "I am\n"] if swap else ["I am\n", 'I "eat"']
        assert shown_texts(prompt) == shown
        assert '"food"' in prompt
        assert parse(f"ANSWER: {reply}") == 5
        assert parse("ANSWER: 3") == 3
        assert parse("nonsense") is None


def planted(n=60, prompts=("a", "b", "c")):
    """Texts; the steered one holds the word of its explanation, more often the higher the score."""
    generator, texts = np.random.default_rng(0), []
    for feature in range(n):
        score = round(generator.uniform(0.3, 1.0), 3)
        for prompt in prompts:
            common = {"prompt": prompt, "explanation": f"word{feature}", "autointerp_score": score}
            steered = f" word{feature}" if generator.random() < score else " no"
            for kind, text in (("original", " nothing"), ("steered", steered), ("control", " hum")):
                texts.append(text_of(feature, kind, text=text, **common))
    return texts


def holds_word(text):
    return float(text.explanation is not None and text.explanation in text.text.split())


def word_judge(prompt):
    """Rates by whether the word of the explanation is in one text and not in the other."""
    word = re.search(r'"(word\d+)"', prompt)[1]
    a, b = (word in text.split() for text in shown_texts(prompt))
    return f"ANSWER: {3 + 2 * b - 2 * a}"


def judge_of(chat, tmp_path, name="wise"):
    return evaluate.Judge(chat.url, name, tmp_path / "answers.jsonl")


def prompts_of(chat):
    return [body["messages"][0]["content"] for body in chat.requests]


def test_a_planted_success_rate_and_correlation_are_recovered(chat, tmp_path):
    texts, chat.answer = planted(), word_judge
    steer.rate(texts, [judge_of(chat, tmp_path)], seed=0)
    steered = [text for text in texts if text.kind == "steered"]
    expected = [holds_word(text) for text in steered]
    assert [steer.success(text) for text in steered] == expected
    assert set(steer.outcomes(texts, "control", steer.success)) == {0.0}
    found = steer.correlation(texts, steer.success)
    biserial = stats.pointbiserialr(expected, [text.autointerp_score for text in steered])
    assert found["by_text"]["r"] == pytest.approx(biserial.statistic)
    assert found["by_text"]["p"] == pytest.approx(biserial.pvalue)
    assert found["by_text"]["r"] > 0.2
    assert not any(text.ratings for text in texts if text.kind == "original")


def test_the_order_of_the_texts_is_random_unless_fixed(chat, tmp_path):
    texts, chat.answer = planted(), word_judge
    steer.rate(texts, [judge_of(chat, tmp_path)], seed=0)
    first = ["nothing" in shown_texts(prompt)[0] for prompt in prompts_of(chat)]
    assert 0.4 < np.mean(first) < 0.6
    outcomes = [steer.success(text) for text in texts if text.kind == "steered"]
    chat.requests.clear()
    texts = planted()
    steer.rate(texts, [judge_of(chat, tmp_path / "..", "fixed")], seed=0, fixed_order=True)
    assert all("nothing" in shown_texts(prompt)[0] for prompt in prompts_of(chat))
    assert [steer.success(text) for text in texts if text.kind == "steered"] == outcomes


def test_questions_depend_on_nothing_but_their_text(chat, tmp_path):
    chat.answer = word_judge
    judge = judge_of(chat, tmp_path)
    texts = planted()
    steer.rate([text for text in texts if text.feature % 3 == 0], [judge], seed=0)
    asked = len(chat.requests)
    more = planted()
    more.reverse()
    steer.rate(more, [judge], seed=0)
    assert len(set(prompts_of(chat))) == len(chat.requests) == 3 * asked
    again = planted()
    steer.rate(again, [judge_of(chat, tmp_path)], seed=0)
    assert len(chat.requests) == 3 * asked, "a Judge remembers"
    assert again == more[::-1]


def test_the_order_has_nothing_to_do_with_the_draws_of_the_text():
    order, draws = [], []
    for feature in range(400):
        key = (0, feature, "a")
        order.append(steer.random_generator(*key, "steered", 5.0, "order").random())
        draws.append(steer.random_generator(*key, "draws").random(4, dtype=np.float32))
    assert all(abs(np.corrcoef(order, column)[0, 1]) < 0.2 for column in np.array(draws).T)


def test_features_without_an_explanation_are_not_rated_but_counted(chat, tmp_path):
    texts, chat.answer = planted(12), word_judge
    for text in texts:
        if text.feature < 4 or text.feature >= 10:
            text.explanation, text.autointerp_score = None, None
        text.asked = text.feature < 10
    steer.rate(texts, [judge_of(chat, tmp_path)], seed=0)
    (entry,) = steer.summarise(texts)
    successes = sum(holds_word(text) for text in texts)
    assert entry["success"]["rate"] == pytest.approx(successes / 18)
    assert entry["success_of_all"]["rate"] == pytest.approx(successes / 30)
    assert (entry["success"]["n"], entry["success_of_all"]["n"]) == (18, 30)
    assert (entry["texts"], entry["features"], entry["explained"]) == (36, 12, 6)
    assert entry["success_by_feature"]["features"] == 6
    of_all = entry["success_of_all_by_feature"]
    assert of_all["features"] == 10, "nobody was asked to explain the other two"
    assert of_all["steered"]["value"] == pytest.approx(successes / 30)


# --- compare


def rated(values, first=0, score=None, control=None):
    """Texts of features `first` and on, rated as `values`, a list of outcomes for each feature."""
    texts = []
    for number, outcomes in enumerate(values):
        common = {"feature": first + number, "explanation": "a word"}
        if score is not None:
            common["autointerp_score"] = score[number]
        for value in outcomes:
            texts.append(text_of(**common, ratings={"judge": 5 if value else 1}))
        for value in () if control is None else control[number]:
            texts.append(text_of(**common, kind="control", ratings={"judge": 5 if value else 1}))
    return texts


def test_success_is_a_mean_rating_of_4_and_none_without_ratings():
    for ratings, expected in (({"a": 4}, 1), ({"a": 3, "b": 5}, 1), ({"a": 3, "b": 4}, 0)):
        assert steer.success(text_of(ratings=ratings)) == expected
    assert steer.success(text_of(ratings={"a": None, "b": 5})) == 1
    assert steer.success(text_of(ratings={"a": None})) is None
    assert steer.success(text_of()) is None


def test_rates_have_wilson_intervals():
    z = stats.norm.ppf(0.975)
    for successes, n in ((0, 10), (3, 10), (10, 10), (57, 900)):
        found = steer.rate_with_interval([1.0] * successes + [0.0] * (n - successes))
        rate = successes / n
        middle = rate + z * z / 2 / n
        half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
        ends = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
        assert found["interval"] == pytest.approx(ends, abs=1e-9)
        assert (found["rate"], found["n"]) == (rate, n)
    assert steer.rate_with_interval([]) == {"rate": None, "interval": None, "n": 0}


def random_outcomes(n, rate, seed, texts=3):
    return (np.random.default_rng(seed).random((n, texts)) < rate).tolist()


def test_rates_by_feature_have_the_intervals_of_the_theory():
    steered, control = random_outcomes(400, 0.5, 1), random_outcomes(400, 0.25, 2)
    found = steer.rates_by_feature(rated(steered, control=control), steer.success)
    a, b = np.mean(steered, 1), np.mean(control, 1)
    error_a, error_b = a.std() / 20, b.std() / 20
    assert found["features"] == 400
    ratio = a.mean() / b.mean()
    ratio_error = ((a - ratio * b) / b.mean()).std() / 20  # to first order
    for name, value, error in (
        ("steered", a.mean(), error_a),
        ("control", b.mean(), error_b),
        ("difference", (a - b).mean(), (a - b).std() / 20),
        ("ratio", ratio, ratio_error),
    ):
        assert found[name]["value"] == pytest.approx(value)
        ends = [value - 1.96 * error, value + 1.96 * error]
        assert found[name]["interval"] == pytest.approx(ends, abs=0.5 * error), name


def test_an_interval_is_the_middle_95_percent_of_the_resampled_values():
    resampled = np.random.default_rng(0).permutation(1000).astype(float)
    found = steer.with_interval(7.0, np.array([*resampled, np.nan, np.nan]))
    assert found == {"value": 7, "interval": [25, 974]}
    resampled[resampled > 900] = np.inf
    assert steer.with_interval(np.nan, resampled) == {"value": None, "interval": [25, None]}


def test_texts_of_a_feature_that_end_alike_make_its_interval_no_smaller():
    once = random_outcomes(60, 0.4, 3, texts=1)
    many = [values * 9 for values in once]
    one, nine = (
        steer.rates_by_feature(rated(values, control=values), steer.success)
        for values in (once, many)
    )
    assert one == nine
    low, high = nine["steered"]["interval"]
    texts = steer.rate_with_interval(np.ravel(many).astype(float).tolist())["interval"]
    assert high - low > 2 * (texts[1] - texts[0])


def test_a_ratio_to_controls_that_never_succeed_is_null():
    found = steer.rates_by_feature(rated([[1], [0], [1]], control=[[0], [0], [0]]), steer.success)
    assert found["ratio"]["value"] is None
    assert found["difference"]["value"] == pytest.approx(2 / 3)
    json.dumps(found, allow_nan=False)
    nothing = steer.rates_by_feature(rated([[0], [0]], control=[[0], [0]]), steer.success)
    assert nothing["ratio"] == {"value": None, "interval": [None, None]}
    assert steer.rates_by_feature(rated([[1], [0]]), steer.success) is None


def test_the_figures_that_the_study_printed_come_out():
    """6.3% of 900 and 13.0% of 555 texts: p = 2.3e-5; r = 0.060 and 0.144: z = 1.6, p = 0.12."""
    a, b = rated([[i < 57] for i in range(900)]), rated([[i < 72] for i in range(555)])
    result = steer.compare(a, b, steer.success)
    assert result["chi_squared"]["p"] == pytest.approx(2.3e-5, rel=0.01)
    assert result["n"] == [900, 555]
    line = {"p": 0, "interval": [0, 0], "slope": 0, "slope_error": 0}
    first, second = {**line, "r": 0.060, "n": 900}, {**line, "r": 0.144, "n": 555}
    found = steer.lines_differ(first, second)["correlations"]
    assert found["z"] == pytest.approx(1.6, abs=0.05)
    assert found["p"] == pytest.approx(0.12, abs=0.005)


def test_the_ratio_of_two_settings_has_the_interval_of_the_theory():
    values = random_outcomes(300, 0.3, 1), random_outcomes(200, 0.5, 2)
    found = steer.compare(*map(rated, values), steer.success)["ratio"]
    a, b = (np.mean(some, 1) for some in values)
    ratio = b.mean() / a.mean()
    # To first order, with features of both sides drawn independently.
    error = ratio * np.hypot(a.std() / 300**0.5 / a.mean(), b.std() / 200**0.5 / b.mean())
    assert found["value"] == pytest.approx(ratio)
    assert found["interval"] == pytest.approx([ratio - 1.96 * error, ratio + 1.96 * error], rel=0.1)
    never = steer.compare(rated([[0], [0]]), rated([[1], [0]]), steer.success)
    assert never["ratio"]["value"] is None
    json.dumps(never, allow_nan=False)


def test_features_that_could_not_be_explained_are_failures_in_the_comparison_of_all():
    a = rated(random_outcomes(60, 0.4, 1))
    explained = random_outcomes(40, 0.8, 2)
    b = rated(explained)
    b += [text_of(feature) for feature in range(40, 60) for _ in range(3)]
    b += [text_of(60, asked=False)]
    result = steer.compare(a, b, steer.success)
    assert (result["features"], result["of_all"]["features"]) == ([60, 40], [60, 60])
    padded = steer.compare(a, rated([*explained, *[[0, 0, 0]] * 20]), steer.success)
    for name in ("rates", "ratio", "permutation_p"):
        assert result["of_all"][name] == padded[name] != result[name]
    lines = steer.sentence(result).splitlines()
    for line, found in ((lines[0], result), (lines[-1], result["of_all"])):
        assert steer.cell(found["ratio"]) in line
        assert f"over features p = {found['permutation_p']:.2g}" in line
    assert "all features" in lines[-1]
    assert steer.compare(a, b, steer.echoes)["of_all"] is None


def test_texts_of_a_feature_do_not_count_as_independent():
    a = [values * 9 for values in random_outcomes(30, 0.3, 5, texts=1)]
    b = [values * 9 for values in random_outcomes(30, 0.55, 7, texts=1)]
    result = steer.compare(rated(a), rated(b), steer.success)
    assert result["chi_squared"]["p"] < 0.01 < result["permutation_p"]


def test_a_setting_whose_random_directions_succeed_as_often_has_no_advantage():
    controls = random_outcomes(150, 0.1, 1), random_outcomes(150, 0.4, 2)
    a = rated(random_outcomes(150, 0.1, 3), control=controls[0])
    b = rated(random_outcomes(150, 0.4, 4), control=controls[1])
    result = steer.compare(a, b, steer.success)
    assert result["permutation_p"] < 0.005
    assert result["over_control"]["permutation_p"] > 0.05
    assert result["over_control"]["differences"] == pytest.approx([0, 0], abs=0.06)
    better = rated(random_outcomes(150, 0.7, 5), control=controls[1])
    assert steer.compare(a, better, steer.success)["over_control"]["permutation_p"] < 0.005
    assert steer.compare(rated([[1]]), rated([[0]]), steer.success)["over_control"] is None


def test_the_permutation_test_is_fair_without_a_difference_and_finds_one():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        found.append(steer.permutation_test(*generator.binomial(3, 0.4, (2, 20))))
    assert 0.35 < np.mean(found) < 0.75
    assert np.mean(np.array(found) < 0.1) < 0.25
    apart = generator.binomial(3, 0.2, 40), generator.binomial(3, 0.8, 40)
    assert steer.permutation_test(*apart) < 0.01
    assert steer.permutation_test([1.0, 1.0], [1.0, 1.0]) == 1
    assert steer.permutation_test([0.0], [1.0] * 5) is None, "one feature is no sample"
    far_apart = steer.permutation_test(np.zeros(50), np.ones(50))
    assert far_apart == pytest.approx(2 / (steer.RESAMPLES + 1)), "the smallest that it can give"


def test_correlations_and_slopes_of_two_settings_are_told_apart():
    generator = np.random.default_rng(1)
    score = generator.uniform(0, 1, 300)
    flat = rated((generator.random((300, 3)) < 0.5).tolist(), score=score)
    steep = rated((generator.random((300, 3)) < score[:, None]).tolist(), score=score)
    result = steer.compare(flat, steep, steer.success)
    for differ in (result["differ"], result["differ_by_feature"]):
        assert differ["correlations"]["p"] < 0.01
        assert differ["slopes"]["p"] < 0.01
    values = [steer.success(text) for text in steep]
    of_texts, second = np.repeat(score, 3), result["correlations"][1]
    line = stats.linregress(of_texts, values)
    assert second["by_text"]["slope"] == pytest.approx(line.slope)
    assert second["by_text"]["slope_error"] == pytest.approx(line.stderr)
    low, high = second["by_text"]["interval"]
    assert low < second["by_text"]["r"] < high
    assert second["spearman"]["r"] == pytest.approx(stats.spearmanr(of_texts, values)[0])
    means = np.reshape(values, (300, 3)).mean(1)
    assert second["by_feature"]["r"] == pytest.approx(stats.pearsonr(score, means)[0])
    assert second["by_feature"]["n"] == 300
    same = steer.compare(steep, steep, steer.success)["differ"]
    assert same["correlations"]["p"] == same["slopes"]["p"] == 1


def test_correlations_by_feature_do_not_grow_with_the_number_of_texts():
    score = np.random.default_rng(2).uniform(0, 1, 40)
    values = random_outcomes(40, 0.5, 2, texts=1)
    once = steer.correlation(rated(values, score=score), steer.success)
    often = steer.correlation(rated([v * 25 for v in values], score=score), steer.success)
    assert often["by_text"]["p"] < once["by_text"]["p"], "texts over texts, as the study has it"
    assert (often["by_text"]["n"], often["by_feature"]["n"]) == (1000, 40)
    for name, value in once["by_feature"].items():
        assert often["by_feature"][name] == pytest.approx(value)


def test_a_comparison_without_spread_is_none_and_no_crash():
    alike = rated([[True], [True], [True], [True]], score=[0.1, 0.2, 0.3, 0.4])
    assert steer.correlation(alike, steer.success) is None
    assert steer.correlation([], steer.success) is None
    assert steer.compare([], rated([[True]]), steer.success) is None
    result = steer.compare(rated([[True]]), rated([[True]]), steer.success)
    assert result["chi_squared"] is None
    assert result["permutation_p"] is None
    assert "p =" not in steer.sentence(result)


def test_krippendorffs_alpha_by_known_values():
    """The example of Krippendorff (2011): four observers, twelve units, interval metric."""
    observers = ["123321412   ", "1233224125 3", " 3332342251 ", "12332441251 "]
    units = [[int(row[i]) for row in observers if row[i] != " "] for i in range(12)]
    assert steer.krippendorff_alpha(units) == pytest.approx(0.849, abs=0.001)
    assert steer.krippendorff_alpha([[1, 1], [4, 4]]) == 1
    assert steer.krippendorff_alpha([[3]]) is None
    assert steer.krippendorff_alpha([[3, 3], [3, 3]]) is None


def test_the_summary_has_the_means_of_each_strength():
    texts = [text_of(0, "original", perplexity=7.0, echo=None)]
    texts += [text_of(1, "original", perplexity=9.0, echo=None)]
    measures = {
        ("steered", 5.0): [(1.0, 20.0, 0.4), (-2.0, 30.0, 0.2)],
        ("control", 5.0): [(0.5, 11.0, 0.1), (0.0, 12.0, 0.0)],
        ("steered", 9.0): [(3.0, 50.0, 0.6), (1.0, 90.0, 0.8)],
        ("control", 9.0): [(-1.0, 40.0, 0.2), (-1.0, 60.0, 0.0)],
    }
    for (kind, strength), rows in measures.items():
        for feature, (echo, perplexity, promoted) in enumerate(rows):
            values = {"echo": echo, "perplexity": perplexity, "promoted": promoted}
            texts.append(text_of(feature, kind, strength=strength, **values))
    weak, strong = steer.summarise(texts)
    assert (weak["strength"], strong["strength"]) == (5, 9)
    assert (weak["echo"], weak["echo_control"]) == (-0.5, 0.25)
    assert (weak["perplexity"], weak["perplexity_control"]) == (25, 11.5)
    assert (strong["perplexity"], strong["perplexity_original"]) == (70, 8)
    assert (strong["promoted"], strong["promoted_control"]) == pytest.approx((0.7, 0.1))
    assert (weak["echoes"]["rate"], weak["echoes_control"]["rate"]) == (0.5, 0.5)
    assert strong["echoes_by_feature"]["difference"]["value"] == 1
    assert weak["success"]["n"] == 0
    assert weak["success_by_feature"] is None
    assert weak["texts"] == 2


# --- the command


@pytest.fixture
def runs(model_folder, tmp_path):
    """Folders of two SAEs of somebody else: files name their model, hook and context."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / f"sae{seed}")
        hook = f"blocks.{LAYER}.hook_resid_post"
        metadata = {"model_name": str(model_folder), "hook_name": hook}
        tiny_sae(seed).save(folders[-1], {**metadata, "context_size": 16, "prepend_bos": False})
    return folders


def command(folders, out, *more):
    flags = ["--n", 6, "--new-tokens", 5, "--batch-size", 4, "--out", out, "--device", "cpu"]
    steer.main([str(argument) for argument in (*folders, *flags, *more)])


def result_of(folder):
    return json.loads((folder / "steering.json").read_text())


def explain(folder, features, scores=None, words=None):
    """An autointerp.json, as evaluate.py writes it."""
    rows = []
    for number, feature in enumerate(features):
        score = 1.0 if scores is None else scores[number]
        word = f"word{feature}" if words is None else words[number]
        rows.append({"feature": feature, "explanation": word, "score": score})
    content = {"sae": evaluate.fingerprint(folder), "features": rows}
    (folder / "autointerp.json").write_text(json.dumps(content))


def test_the_command_without_a_judge(runs, tmp_path, capsys):
    command(runs, tmp_path / "report", "--strength", 0, 4)
    result = result_of(runs[0])
    texts = [Text(**row) for row in result["rows"]]
    assert len(texts) == 6 * 3 * (1 + 2 * 2)
    assert [entry["strength"] for entry in result["summary"]] == [0, 4]
    comparison = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [found["strength"] for found in comparison["comparisons"]] == [0, 4]
    assert {found["outcome"] for found in comparison["comparisons"]} == {"echoes"}
    assert comparison["runs"][next(iter(comparison["runs"]))] == result["summary"]
    assert (tmp_path / "report" / "rates.png").stat().st_size > 1000
    assert not (tmp_path / "report" / "scores.png").exists()
    assert "| echoes " in capsys.readouterr().out


def test_a_run_of_train_pythia_is_steered_too(run_folder, tmp_path):
    command(run_folder, tmp_path / "report", "--mode", "rms", "--strength", 1)
    result = result_of(run_folder[0])
    assert result["settings"]["rms"] > 0
    assert len(result["rows"]) == 6 * 3 * 3
    first = (run_folder[0] / "steering.json").read_text()
    (run_folder[0] / "steering.json").unlink()
    command(run_folder[:1], tmp_path / "report", "--mode", "rms", "--strength", 1)
    assert (run_folder[0] / "steering.json").read_text() == first, "alone as in company"


@pytest.mark.usefixtures("no_pictures")
def test_rms_is_measured_on_text_where_saes_are_trained(runs, tmp_path):
    tokens = torch.randint(0, 96, (4096,), generator=torch.Generator().manual_seed(0))
    tokens.to(torch.uint16).numpy().tofile(tmp_path / "tokens.bin")
    command(runs[:1], tmp_path / "report", "--mode", "rms", "--data", tmp_path / "tokens.bin")
    rms = result_of(runs[0])["settings"]["rms"]
    run = steer.read_run(runs[0])
    model, _ = steer.load_model(run.model, torch.device("cpu"))
    resid = residual_stream(model, tokens[:4096].view(-1, 16), LAYER)[:, 1:]
    assert rms == pytest.approx(resid.square().sum(2).mean().sqrt().item(), rel=0.05)


def test_a_text_too_short_to_measure_the_norm_on_is_refused_by_its_flag(runs, tmp_path, refusal):
    np.arange(8, dtype=np.uint16).tofile(tmp_path / "short.bin")
    line = [runs[0], "--out", tmp_path / "report", "--device", "cpu"]
    said = refusal(steer.main, [*line, "--mode", "rms", "--data", tmp_path / "short.bin"])
    assert said.startswith("--data")


@pytest.mark.usefixtures("no_pictures")
def test_a_larger_n_asks_the_judge_only_about_what_is_new(runs, chat, tmp_path):
    explain(runs[0], range(40))
    chat.answer = lambda prompt: "ANSWER: 4"
    flags = ("--judge", "wise", "--base-url", chat.url)
    command(runs[:1], tmp_path / "report", *flags, "--n", 4)
    few = {row["feature"] for row in result_of(runs[0])["rows"]}
    asked = len(chat.requests)
    command(runs[:1], tmp_path / "report", *flags, "--n", 9)
    many = {row["feature"] for row in result_of(runs[0])["rows"]}
    assert few < many
    assert len(set(prompts_of(chat))) == len(chat.requests)
    assert asked > 0
    (runs[0] / "steering.json").unlink()
    command(runs[:1], tmp_path / "report", *flags, "--n", 2)
    assert len(set(prompts_of(chat))) == len(chat.requests)


@pytest.mark.usefixtures("no_pictures")
def test_texts_of_the_same_settings_are_not_written_again(runs, tmp_path, monkeypatch):
    written = []
    steer_run = steer.steer_run

    def record(setup, features, *others):
        written.append(features)
        return steer_run(setup, features, *others)

    monkeypatch.setattr(steer, "steer_run", record)
    command(runs[:1], tmp_path / "report", "--features", 3, 5)
    first = result_of(runs[0])
    command(runs[:1], tmp_path / "report", "--features", 5, 9, 3)
    command(runs[:1], tmp_path / "report", "--features", 3, 5)
    assert written == [[3, 5], [9]]
    assert result_of(runs[0]) == first
    assert not any(row["asked"] for row in first["rows"]), "there is no autointerp.json"
    for changed in (["--temperature", 0.5], ["--strength", 4], ["--seed", 1]):
        command(runs[:1], tmp_path / "report", "--features", 3, 5, *changed)
        assert written[-1] == [3, 5]
    sae = SAE.load(runs[0])
    with torch.no_grad():
        sae.b_enc += 1
    sae.save(runs[0], sae.metadata)
    command(runs[:1], tmp_path / "report", "--features", 3, 5, *changed)
    assert written[-1] == [3, 5], "another SAE has other texts"


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_command_goes_on_after_the_texts_that_are_finished(
    runs, tmp_path, monkeypatch
):
    flags = ("--features", 3, 5, 9, "--batch-size", 1)
    command(runs[:1], tmp_path / "report", *flags)
    whole = (runs[0] / "steering.json").read_text()
    (runs[0] / "steering.json").unlink()
    written = []
    steer_run = steer.steer_run

    def interrupt(setup, features, *others):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(features)
        return steer_run(setup, features, *others)

    monkeypatch.setattr(steer, "steer_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command(runs[:1], tmp_path / "report", *flags)
    assert {row["feature"] for row in result_of(runs[0])["rows"]} == {3, 5}
    written.clear()
    command(runs[:1], tmp_path / "report", *flags)
    assert written == [[9]]
    assert (runs[0] / "steering.json").read_text() == whole


@pytest.mark.usefixtures("no_pictures")
def test_texts_of_other_settings_are_kept_in_another_file(runs, tmp_path):
    files = []
    for strength in (1, 2, 3):
        command(runs[:1], tmp_path / "report", "--features", 3, "--strength", strength)
        files.append((runs[0] / "steering.json").read_text())
    assert [(runs[0] / f"steering_{n}.json").read_text() for n in (1, 2)] == files[:2]


@pytest.mark.usefixtures("no_pictures")
def test_an_older_file_is_gone_on_from_and_one_of_another_precision_is_not(runs, tmp_path):
    def texts_after(dtype):
        content = result_of(runs[0])
        for row in content["rows"]:
            row["text"] = "as it was"
            del row["asked"]
        del content["settings"]["dtype"]
        if dtype:
            content["settings"]["dtype"] = dtype
        (runs[0] / "steering.json").write_text(json.dumps(content))
        command(runs[:1], tmp_path / "report", "--features", 3)
        result = result_of(runs[0])
        assert result["settings"]["dtype"] == "torch.float32"
        return {row["text"] for row in result["rows"]}

    command(runs[:1], tmp_path / "report", "--features", 3)
    assert texts_after(None) == texts_after("torch.float32") == {"as it was"}
    assert "as it was" not in texts_after("torch.bfloat16")


@pytest.mark.usefixtures("no_pictures")
def test_ratings_stay_until_a_judge_rates_again_or_the_explanation_is_another(
    runs, chat, tmp_path, capsys
):
    def ratings():
        rows = [row for row in result_of(runs[0])["rows"] if row["kind"] != "original"]
        return {row["feature"]: row["ratings"] for row in rows}

    features = ("--features", 3, 5, "--base-url", chat.url)
    command(runs[:1], tmp_path / "report", *features)
    assert not any(row["asked"] for row in result_of(runs[0])["rows"])
    explain(runs[0], [3, 5])
    chat.answer = lambda prompt: "ANSWER: 3"
    command(runs[:1], tmp_path / "report", *features, "--judge", "one", "--fixed-order")
    judged = result_of(runs[0])
    command(runs[:1], tmp_path / "report", *features)
    assert result_of(runs[0]) == judged, "as to draw the pictures anew"
    command(runs[:1], tmp_path / "report", *features, "--judge", "two")
    assert ratings() == {3: {"two": 3}, 5: {"two": 3}}, "not a mean of two judges"
    assert all(row["asked"] for row in result_of(runs[0])["rows"])
    (runs[0] / "autointerp.json").unlink()
    command(runs[:1], tmp_path / "report", *features)
    assert set(ratings()) == {3, 5}
    assert all(ratings().values()), "nothing says that they are wrong"
    explain(runs[0], [3, 5], words=["word3", "another"])
    command(runs[:1], tmp_path / "report", *features)
    assert ratings() == {3: {"two": 3}, 5: {}}
    assert "6 texts have another explanation" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_judge_that_breaks_off_loses_no_text(runs, chat, tmp_path, refusal):
    explain(runs[0], [3, 5])
    chat.faults = [(401, {}, "who are you?")] * 100
    flags = ["--judge", "wise", "--base-url", chat.url, "--n", 2, "--out", tmp_path / "report"]
    line = [runs[0], *flags, "--device", "cpu", "--new-tokens", 5]
    assert "401" in refusal(steer.main, line)
    rows = result_of(runs[0])["rows"]
    assert len(rows) == 2 * 3 * 3
    chat.faults, chat.answer = [], lambda prompt: "ANSWER: 5"
    steer.main([str(argument) for argument in line])
    again = result_of(runs[0])
    assert [row["text"] for row in again["rows"]] == [row["text"] for row in rows]
    assert again["summary"][0]["success"]["n"] == 6
    chat.faults = [(401, {}, "who are you?")] * 100
    assert "401" in refusal(steer.main, [*line, "--judge", "another"])
    assert result_of(runs[0]) == again, "and no rating"


def test_two_judges_rate_and_agree(runs, chat, tmp_path, capsys):
    for folder in runs:
        explain(folder, range(6), scores=[0.5, 0.7, None, 0.9, 1.0, 0.8])

    def by_length(prompt):
        a, b = (len(text) for text in shown_texts(prompt))
        return f"ANSWER: {3 + (b > a) - (a > b)}"

    chat.answer = by_length
    flags = ("--judge", "one", "two", "--base-url", chat.url)
    command(runs, tmp_path / "report", *flags)
    assert (tmp_path / "report" / "scores.png").exists()
    result = result_of(runs[0])
    for row in result["rows"]:
        judges = set() if row["kind"] == "original" else {"one", "two"}
        assert set(row["ratings"]) == judges
    alpha = result["summary"][0]["krippendorff_alpha"]
    assert alpha is None or alpha == 1
    assert "| success " in capsys.readouterr().out
    asked = len(chat.requests)
    command(runs, tmp_path / "report", *flags)
    assert len(chat.requests) == asked


@pytest.mark.usefixtures("no_pictures")
def test_features_are_drawn_from_those_in_autointerp_json(runs, tmp_path):
    explained = set(range(0, 64, 3))
    explain(runs[0], sorted(explained))
    command(runs[:1], tmp_path / "report", "--n", 10)
    steered = {row["feature"] for row in result_of(runs[0])["rows"]}
    assert len(steered) == 10
    assert steered < explained
    assert steered != set(sorted(explained)[:10])


def test_features_that_their_decoder_direction_does_not_raise_are_left_out_before_any_work(
    runs, tmp_path, capsys, monkeypatch, refusal
):
    sae = SAE.load(runs[0])
    with torch.no_grad():
        sae.encoder[3] = -sae.W_dec[3]
    sae.save(runs[0], sae.metadata)
    command(runs[:1], tmp_path / "report", "--mode", "preact", "--features", 3, 5)
    assert {row["feature"] for row in result_of(runs[0])["rows"]} == {5}
    output = capsys.readouterr().out
    assert "note: 1 of 2 features of" in output
    length = steer.steering_vectors(sae, [5], "preact", 5.0).norm().item()
    assert f"has length {length:.3g}" in output
    monkeypatch.setattr(steer, "load_model", None)
    line = [runs[0], "--mode", "preact", "--features", 3, "--out", tmp_path / "report"]
    assert "--mode preact" in refusal(steer.main, line)


@pytest.mark.usefixtures("no_pictures")
def test_equal_settings_are_told_apart_and_nothing_counts_twice(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "again")
    folders = (runs[0], tmp_path / "again", runs[0])
    command(folders, tmp_path / "report", "--strength", 4, 4, "--features", 3, 5, 3)
    assert len(result_of(runs[0])["rows"]) == 2 * 3 * 3
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert len(found["runs"]) == 2
    (comparison,) = found["comparisons"]
    assert comparison["rates"][0] == comparison["rates"][1]


def test_an_sae_that_does_not_fit_its_model_is_refused(runs, model_folder, tmp_path):
    metadata = {"model_name": str(model_folder), "context_size": 16}
    for d_in, hook, message in ((16, "blocks.9.hook_resid_post", "--layer 9"), (8, None, "width")):
        hook = hook or f"blocks.{LAYER}.hook_resid_post"
        sae = SAE(d_in, 32, "relu")
        torch.nn.init.normal_(sae.W_dec)
        sae.save(tmp_path / "other", {**metadata, "hook_name": hook})
        with pytest.raises(UserError, match=message):
            command([tmp_path / "other"], tmp_path / "report")


def test_explanations_of_another_sae_are_refused(runs, tmp_path):
    explain(runs[0], [3])
    shutil.copy(runs[0] / "autointerp.json", runs[1])
    with pytest.raises(UserError, match="another SAE"):
        command(runs[1:], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "features",
    [5, [5], [{"feature": "a", "explanation": "", "score": 1}], [{"feature": 3}], [{}]],
)
def test_an_autointerp_file_that_is_not_whole_is_named(features, runs, tmp_path):
    content = {"sae": evaluate.fingerprint(runs[0]), "features": features}
    (runs[0] / "autointerp.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"autointerp\.json"):
        command(runs[:1], tmp_path / "report")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", ""], "--prompts"),
        (["--features", 64], "--features"),
        (["--strength", "nan"], "--strength"),
        (["--data", "book.txt"], "--data"),
        (["--top-p", 2], "--top-p"),
        (["--new-tokens", 70], "--new-tokens 70"),
        (["--base-url", "http://a", "http://b", "--judge", "one"], "--base-url"),
        (["--judge", "a", "a"], "--judge"),
        (["--judge", "a", "b", "--base-url", "http://a", "http://b"], "--api-key-env: give a var"),
    ],
)
def test_a_command_line_that_cannot_work_names_the_flag_and_writes_nothing(
    flags, message, runs, tmp_path, refusal
):
    line = [*runs, "--out", tmp_path / "report", "--device", "cpu", *flags]
    assert message in refusal(steer.main, line)
    assert not (runs[0] / "steering.json").exists()


def test_the_default_strength_is_the_studys_for_the_mode():
    for mode, strength in (("fixed", 5), ("rms", 0.6), ("preact", 5)):
        assert steer.parse(["RUN", "--mode", mode]).strength == [strength]
        assert steer.parse(["RUN", "--mode", mode, "--strength", "0", "2"]).strength == [0, 2]


def test_each_of_two_judges_is_asked_at_its_address_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_B", "secret")
    line = ["RUN", "--judge", "a", "b", "--base-url", "http://a", "http://b"]
    args = steer.parse([*line, "--api-key-env", "KEY_A_IS_NOT_SET", "KEY_B"])
    judges = steer.open_judges(args, tmp_path / "answers.jsonl")
    found = [(judge.model, judge.url.partition("/chat")[0], judge.key) for judge in judges]
    assert found == [("a", "http://a", ""), ("b", "http://b", "secret")]
    shared = steer.parse(["RUN", "--judge", "a", "b", "c", "--api-key-env", "KEY_B"])
    judges = steer.open_judges(shared, tmp_path / "answers.jsonl")
    assert [(judge.model, judge.key) for judge in judges] == [(name, "secret") for name in "abc"]


# --- table and pictures


def some_results(n=2, judged=False):
    """Results of n runs at two strengths."""
    results = []
    for number in range(n):
        generator = np.random.default_rng(number)
        texts = [text_of(feature, "original", echo=None) for feature in range(40)]
        for strength in (0.6, 1.0):
            for kind in ("steered", "control"):
                for feature in range(40):
                    echo = generator.normal() + (kind == "steered") * strength - 1
                    perplexity = 10 * (1 + strength) * (1 + (kind == "steered"))
                    values = {"strength": strength, "echo": echo, "perplexity": perplexity}
                    text = text_of(feature, kind, autointerp_score=(feature % 15) / 14, **values)
                    if judged:
                        text.ratings = {"judge": 5 if echo > 0 else 1}
                    texts.append(text)
        results.append(steer.Result(f"topk, k{number}, l2 1e-05", texts, steer.summarise(texts)))
    return results


def test_the_table_shows_rates_by_feature_beside_random_directions():
    results = some_results()
    lines = steer.table(results, steer.echoes).splitlines()
    assert len(lines) == 2 + 2 * 2
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    rates = results[0].summary[0]["echoes_by_feature"]
    for cell, name in zip(cells[3:], ("steered", "control", "difference", "ratio")):
        low, high = rates[name]["interval"]
        assert cell == f"{rates[name]['value']:.2f} [{low:.2f}, {high:.2f}]"
    assert cells[0] == results[0].label
    unrated = steer.table(results, steer.success).splitlines()[2]
    assert unrated.count(" - ") == 5


@pytest.mark.parametrize("judged", [False, True])
def test_pictures_can_be_drawn(judged, tmp_path):
    results = some_results(judged=judged)
    steer.report(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.json",
        "rates.png",
        "scores.png",
    }


def test_the_axis_of_perplexity_has_marks_where_the_strengths_cost_the_same():
    results = some_results(1)
    for entry in results[0].summary:
        entry.update(perplexity=15.0, perplexity_control=16.0, perplexity_original=10.0)
    right = steer.plot_rates(results, steer.echoes).axes[1]
    low, high = right.get_xlim()
    assert {1, 2} <= {tick for tick in right.get_xticks() if low <= tick <= high}


def test_scores_fall_into_the_bins_of_the_study(monkeypatch):
    drawn = []
    rate_with_interval = steer.rate_with_interval

    def record(values):
        drawn.append(len(values))
        return rate_with_interval(values)

    texts = [text_of(n, autointerp_score=s) for n, s in enumerate([0, 0.5, 0.6, 0.79, 0.9, 1.0])]
    texts += [text_of(9, "original", echo=None)]
    texts += [text_of(9, "control")]
    result = steer.Result("one", texts, steer.summarise(texts))
    monkeypatch.setattr(steer, "rate_with_interval", record)
    steer.plot_scores([result], steer.echoes)
    assert drawn == [2, 1, 1, 0, 2]
