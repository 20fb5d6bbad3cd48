"""The recurrent state as cache: however a sequence is cut, padded, reordered or moved, nothing changes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, FORWARD, build, cut, inputs, padding, poison
from transformers import DynamicCache

from lmu_hf import LMUCache, LMUForCausalLM, LMUForSequenceClassification, LMUForTokenClassification, LMUModel

# The same float32 sums in another order, through up to three layers.
CLOSE = {"rtol": 0, "atol": 1e-5}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", FORWARD)
def test_step_by_step_equals_at_once(name):
    model = build(LMUModel, name)
    batch = inputs(model)
    whole = model(**batch)
    cache = LMUCache(len(model.layers))
    for t in range(15):
        outputs = model(**cut(batch, steps=slice(t, t + 1)), past_key_values=cache)
        assert outputs.past_key_values is cache
        close(outputs.last_hidden_state[:, 0], whole.last_hidden_state[:, t])
        close(outputs.pooler_output, model(**cut(batch, steps=slice(0, t + 1))).pooler_output)
    assert cache.get_seq_length() == 15
    assert cache.count.tolist() == [15] * 4


@pytest.mark.parametrize("name", FORWARD)
def test_chunks_equal_at_once_with_gradients(name):
    model = build(LMUModel, name).double()
    batch = inputs(model)

    def gradients(outputs, pooled):
        model.zero_grad()
        (outputs.pow(2).sum() + pooled.sin().sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = model(**batch)
    expected = gradients(whole.last_hidden_state, whole.pooler_output)
    cache, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 12), (12, 15)):
        outputs = model(**cut(batch, steps=slice(start, stop)), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.last_hidden_state)
    close(torch.cat(parts, dim=1), whole.last_hidden_state)
    for found, right in zip(gradients(torch.cat(parts, dim=1), outputs.pooler_output), expected, strict=True):
        # In float64, where 6e-14 was seen: cut elsewhere, sums have another order, and in float32 that is all there is of the
        # small ones among gradients of up to 18.
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", FORWARD)
def test_padding_never_changes_a_row(name, side, whole_mask):
    model = build(LMUModel, name)
    batch = inputs(model)
    mask = padding(side, 15, [15, 6, 1, 9])
    poisoned = poison(batch, mask)
    cache, parts = LMUCache(len(model.layers)), []
    for start, stop in ((0, 5), (5, 6), (6, 15)):
        given = mask[:, :stop] if whole_mask else mask[:, start:stop]
        outputs = model(**cut(poisoned, steps=slice(start, stop)), attention_mask=given, past_key_values=cache)
        parts.append(outputs.last_hidden_state)
    found = torch.cat(parts, dim=1)
    for row in range(4):
        alone = model(**cut(batch, slice(row, row + 1), mask[row]), use_cache=True)
        close(found[row, mask[row]], alone.last_hidden_state[0])
        assert (found[row, ~mask[row]] == 0).all()
        close(outputs.pooler_output[row], alone.pooler_output[0])
        for state, single in zip(cache, alone.past_key_values, strict=True):
            for a, b in zip(state.tensors(), single.tensors(), strict=True):
                close(a[row], b[0])
    assert cache.count.tolist() == [15, 6, 1, 9]


@pytest.mark.parametrize("name", FORWARD)
def test_size_does_not_grow(name):
    model = build(LMUModel, name).requires_grad_(False)
    cache = LMUCache(len(model.layers))
    sizes = []
    for steps in (1, 1, 2000):
        model(**inputs(model, steps=steps), past_key_values=cache)
        sizes.append({key: tensor.shape for key, tensor in cache.state_dict().items()})
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.fixture
def started():
    """A model, the cache of four rows, the rows' next steps and what follows from these."""
    model = build(LMUModel, "mean", num_hidden_layers=2).requires_grad_(False)
    first, then = inputs(model), inputs(model, steps=3)
    mask = padding("left", 15, [15, 6, 1, 9])
    cache = model(**first, attention_mask=mask, use_cache=True).past_key_values
    return model, cache, then, model(**then, past_key_values=cache.copy()).pooler_output


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([3, 3, 0, 1])), [3, 3, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, False, True])), [0, 3]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_rows(started, change, rows):
    model, cache, then, expected = started
    change(cache)
    assert cache.batch_size == len(rows)
    close(model(**cut(then, torch.tensor(rows)), past_key_values=cache).pooler_output, expected[rows])


@pytest.mark.parametrize("rows", [[1, 3], [-1, 1], torch.tensor([False, True, False, True])])
def test_reset_of_rows(started, rows):
    model, cache, then, expected = started
    before = cache.copy()
    cache.reset(rows)
    found = model(**then, past_key_values=cache).pooler_output
    close(found[[0, 2]], expected[[0, 2]])
    close(found[[1, 3]], model(**cut(then, torch.tensor([1, 3]))).pooler_output)
    close(model(**then, past_key_values=before).pooler_output, expected)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.has_previous_state()) == (-1, 0, False)
    close(model(**then, past_key_values=cache).pooler_output, model(**then).pooler_output)


@pytest.mark.parametrize("rows", [[4], [-5], [0.5], torch.tensor([True, False])])
def test_reset_of_rows_that_are_not_there(started, rows):
    with pytest.raises(ValueError, match="rows: expected"):
        started[1].reset(rows)


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_save_and_load(started, form, tmp_path):
    model, cache, then, expected = started
    path = tmp_path / "state"
    if form == "torch":
        torch.save(cache.state_dict(), path)
        loaded = LMUCache.from_state_dict(torch.load(path, weights_only=True))
    else:
        save_file(cache.state_dict(), path)
        loaded = LMUCache.from_state_dict(load_file(path))
    assert repr(loaded) == repr(cache)
    assert torch.equal(model(**then, past_key_values=loaded).pooler_output, expected)
    with pytest.raises(ValueError, match="state_dict of an LMUCache, found the names .'kernel'."):
        LMUCache.from_state_dict({"kernel": torch.ones(1)})


def test_an_empty_cache_can_be_saved():
    loaded = LMUCache.from_state_dict(LMUCache(3).state_dict())
    assert len(loaded) == 3
    assert list(loaded) == [None] * 3


def test_moves_between_devices(started):
    tensors = started[1].to("meta").state_dict()
    assert all(tensor.is_meta for name, tensor in tensors.items() if name != "seen")


def test_detached_state_ends_the_graph():
    model = build(LMUModel, "deep")
    cache = model(**inputs(model), use_cache=True).past_key_values
    assert cache.states[0].memory.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.detach_().state_dict().values())


def test_memory_stays_float32_under_bfloat16():
    model = build(LMUModel, "deep")
    batch = inputs(model)
    expected = model(**batch).pooler_output
    half = model.bfloat16()
    cache = LMUCache(3)
    for t in range(15):
        outputs = half(**cut(batch, steps=slice(t, t + 1)), past_key_values=cache)
    assert cache.states[0].memory.dtype == torch.float32
    assert outputs.pooler_output.dtype == torch.bfloat16
    # 8 bits per rounding in each of three layers.
    assert (outputs.pooler_output.float() - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", ["both_ways", "backwards"])
def test_models_that_read_from_the_end_have_no_state(name):
    model = build(LMUModel, name)
    assert model(**inputs(model)).past_key_values is None
    for given in ({"use_cache": True}, {"past_key_values": LMUCache(2)}):
        with pytest.raises(ValueError, match="reads each sequence from its end"):
            model(**inputs(model), **given)


def test_what_cannot_be_done_says_why(started):
    model, cache, then, _ = started
    with pytest.raises(ValueError, match="past_key_values: expected 4 rows, .* found 2; start the next"):
        model(**cut(then, slice(0, 2)), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: expected LMUCache.2., found LMUCache.layers=1"):
        model(**then, past_key_values=LMUCache(1))
    with pytest.raises(ValueError, match="attention_mask: expected .batch, time.=.4, 3. or, .* .4, 18., found .4, 7."):
        model(**then, past_key_values=cache, attention_mask=torch.ones(4, 7))
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="recurrent states, not keys"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(NotImplementedError, match="no assistant"):
        cache.activate_past_recording()
    assert not cache.is_croppable
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing runs every layer twice"):
        model(**then, past_key_values=cache)


@pytest.mark.parametrize("cls", [LMUModel, LMUForSequenceClassification, LMUForTokenClassification, LMUForCausalLM])
def test_another_kind_of_cache_is_refused(cls):
    model = build(cls, "tokens")
    batch = inputs(model)
    for mask in ({}, {"attention_mask": torch.ones(4, 15)}):
        with pytest.raises(ValueError, match="past_key_values: expected LMUCache.1., found DynamicCache"):
            model(**batch, **mask, past_key_values=DynamicCache())


def test_every_configuration_is_covered():
    assert {*FORWARD, "both_ways", "backwards"} == set(CONFIGS)
