"""generate: with the state and without, the same tokens; from batches padded anywhere."""

import pytest
import torch
from tiny import FORWARD, build, padding

from lmu_hf import LMUCache, LMUForCausalLM

SETTINGS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"do_sample": False, "num_beams": 3},
    "returned_beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled_beams": {"do_sample": True, "num_beams": 2},
}


def generate(model, tokens, seed=0, **kwargs):
    torch.manual_seed(seed)
    mask = kwargs.pop("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, attention_mask=mask, max_new_tokens=9, **kwargs)


@pytest.fixture
def model():
    # Logits far enough apart for rounding never to choose the token.
    return build(LMUForCausalLM, "deep", initializer_range=1.0)


@pytest.fixture
def tokens():
    return torch.randint(1, 11, (3, 7))


@pytest.mark.parametrize("settings", SETTINGS)
def test_state_changes_nothing(model, tokens, settings):
    found = generate(model, tokens, **SETTINGS[settings])
    assert torch.equal(found, generate(model, tokens, use_cache=False, **SETTINGS[settings]))


@pytest.mark.parametrize("name", FORWARD)
def test_greedy_is_the_most_likely_token_of_the_full_forward(name, tokens):
    model = build(LMUForCausalLM, name, initializer_range=1.0)
    found = generate(model, tokens, do_sample=False)
    logits = model(found).logits[:, 6:-1]
    assert torch.equal(found[:, 7:], logits.argmax(-1))


@pytest.mark.parametrize("settings", ["greedy", "beams"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_batches(model, tokens, side, use_cache, settings):
    mask = padding(side, 7, [7, 4, 2])
    padded = tokens.masked_fill(~mask, 0)
    found = generate(model, padded, attention_mask=mask.long(), use_cache=use_cache, **SETTINGS[settings])
    for row in range(3):
        alone = generate(model, tokens[row : row + 1, mask[row]], **SETTINGS[settings])[0, mask[row].sum() :]
        assert torch.equal(found[row, 7 : 7 + len(alone)], alone)


def test_goes_on_from_a_state(model, tokens):
    whole = generate(model, tokens, do_sample=False)
    first = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    # The last token has been chosen, but has not been read.
    assert first.past_key_values.get_seq_length() == 10
    mask = torch.ones_like(first.sequences)
    then = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(then, whole)


def test_prefill_in_chunks(model, tokens):
    expected = generate(model, tokens, do_sample=False)
    cache = LMUCache(3)
    assert torch.equal(generate(model, tokens, do_sample=False, prefill_chunk_size=3, past_key_values=cache), expected)


def test_embeddings_in_place_of_tokens(model, tokens):
    expected = generate(model, tokens, do_sample=False)[:, 7:]
    embeds = model.get_input_embeddings()(tokens)
    found = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), max_new_tokens=9, do_sample=False)
    assert torch.equal(found, expected)


def test_logits_to_keep(model, tokens):
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_shifted_labels(model, tokens):
    loss = model(tokens, labels=tokens).loss
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(tokens, shift_labels=shifted).loss, loss)
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


def test_state_is_returned_outside_training(model, tokens):
    assert model(tokens).past_key_values.get_seq_length() == 7
    assert model(tokens, use_cache=False).past_key_values is None
    assert model.train()(tokens).past_key_values is None


def test_what_would_need_a_rollback_is_refused(model, tokens):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens, prompt_lookup_num_tokens=2)
