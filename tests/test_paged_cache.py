"""Caches in pages against transformers' own, on models of several families in float64."""

from __future__ import annotations

import copy
import gc

import families
import numpy as np
import pytest
import torch
from families import inputs
from transformers import DynamicCache

from headwise.caches.rules.snap_kv import SnapKv
from headwise.errors import InputError, PlanError, ShapeError, UnsupportedModelError
from headwise.models.cache import cache_argument, cache_bytes
from headwise.models.caches.paged_cache import PagedCache
from headwise.models.subject import Subject
from headwise.plans import Plan
from headwise.stages.window import Window

NAMES = ("llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "phi")  # grouped heads, windows, softcaps, sinks, learned places
SINGLE = ("gemma2", "gpt_oss")  # whose own attention takes its softmax in float32
PAGES = (5, 16)  # copied to be read, and read where they are


def model_of(name):
    (family,) = [f for f in families.ALL if f.name == name]
    model = family.model().double()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model


def ids_of(rows=2, length=21, seed=1):
    return inputs("decoder", rows=rows, length=length, seed=seed)["input_ids"]


def generated(model, ids, count=9, **given):
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, **given}
    options.setdefault("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return model.generate(ids, **options).tolist()


def using(model, cache):
    return {str(cache_argument(model)): cache}


def logits(model, **given):
    with torch.no_grad():
        return model(**given).logits


def refs_are_table_entries(*caches):
    for stores in zip(*(cache.stores for cache in caches), strict=True):
        arena = stores[0].arena
        counted = np.zeros(len(arena.refs), dtype=int)
        for store in stores:
            table = store.sequences.table
            np.add.at(counted, table[table >= 0], 1)
        if (counted != arena.refs).any():
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_the_models_own_cache(name):
    """Greedy, ragged behind left padding, in chunks, with beams, sampled: token for token; and logits step by step."""
    model, ids = model_of(name), ids_of()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    variants = [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}, {"do_sample": True, "num_return_sequences": 2}]
    if name != "gemma2":  # which computes NaN for padded rows in float64 by itself
        variants.append({"attention_mask": mask})
    wanted = []
    for variant in variants:
        torch.manual_seed(3)
        wanted.append(generated(model, ids, **variant))
    own, steps = DynamicCache(config=model.config), []
    for chunk in ids.split([13, 1, 4, 1, 1, 1], 1):
        steps.append(logits(model, input_ids=chunk, **using(model, own)))
    for page in PAGES:
        for variant, tokens in zip(variants, wanted, strict=True):
            torch.manual_seed(3)
            with PagedCache(model, page) as cache:
                assert generated(model, ids, **variant, **using(model, cache)) == tokens, (page, variant)
                assert refs_are_table_entries(cache)
        with PagedCache(model, page) as cache:
            for chunk, step in zip(ids.split([13, 1, 4, 1, 1, 1], 1), steps, strict=True):
                found = logits(model, **cache.inputs(chunk))
                assert torch.allclose(found, step, atol=1e-6 if name in SINGLE else 1e-12, rtol=0)
    assert model.config._attn_implementation != "headwise"


@pytest.mark.parametrize("page", PAGES)
def test_ragged_rows_are_those_alone(page):
    """Rows come, go and fork in a manual loop; each reads just what it would alone."""
    model, rng = model_of("llama"), np.random.default_rng(0)
    texts, new = {}, iter(ids_of(rows=30, length=40, seed=4).tolist())

    def alone(text):
        return logits(model, input_ids=torch.tensor([text]), use_cache=False)[0, -1]

    with PagedCache(model, page) as cache:
        order = []
        for step in range(24):
            action = rng.integers(4) if order else 0
            if action == 0 and len(order) < 5:  # a request comes
                text, one = next(new)[: rng.integers(1, 40)], cache.sibling()
                logits(model, **one.inputs([text]))
                assert cache.add(one) == [len(order)]
                one.close()
                texts[step], order = list(text), [*order, step]
            elif action == 1:
                place = int(rng.integers(len(order)))
                assert cache.fork(place, 2) == [len(order), len(order) + 1]
                for i in (1000, 2000):
                    texts[step + i], order = list(texts[order[place]]), [*order, step + i]
            elif action == 2 and len(order) > 2:
                gone = rng.choice(len(order), 2, replace=False).tolist()
                cache.free(gone)
                order = [name for i, name in enumerate(order) if i not in gone]
            tokens = rng.integers(3, 95, (len(order), 1)).tolist()
            for name, (token,) in zip(order, tokens, strict=True):
                texts[name].append(token)
            found = logits(model, **cache.inputs(tokens))[:, -1]
            assert cache.lengths == [len(texts[name]) for name in order]
            assert cache.get_seq_length() == max(cache.lengths) or action != 2
            wanted = torch.stack([alone(texts[name]) for name in order])
            assert torch.allclose(found, wanted, atol=1e-12, rtol=0), step
            assert refs_are_table_entries(cache)
            assert cache.wasted < page * len(order) * 2 * 2  # less than a page for each row, head and layer
        cache.free(range(cache.rows))
        assert cache.rows == 0
        assert cache.bytes() == 0


@pytest.mark.parametrize("page", PAGES)
def test_where_pages_are_changes_nothing(page):
    """Pools whose pages are shuffled, with NaN in all that holds nothing: the same bits."""
    model, ids = model_of("qwen3"), ids_of(rows=3, length=23)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2, :2] = 0, 0
    caches = PagedCache(model, page), PagedCache(model, page)
    for cache in caches:
        logits(model, input_ids=ids, attention_mask=mask, **using(model, cache))
    for store in caches[1].stores:
        arena, own = store.arena, store.sequences
        spare = 4
        total = len(arena.refs) + spare
        where = np.random.default_rng(1).permutation(total)[: len(arena.refs)]
        for name, pool in arena.pools.items():
            made = torch.full((total, *pool.shape[1:]), torch.nan, dtype=pool.dtype)
            made[torch.from_numpy(where)] = pool
            arena.pools[name] = made
        refs = np.zeros(total, dtype=np.int32)
        refs[where] = arena.refs
        arena.refs = refs
        own.moved(where.astype(np.int32))
        for (row, head), length in np.ndenumerate(own.lengths):
            behind = own.table[row, head, length // page] if length % page else None
            if behind is not None:
                for pool in arena.pools.values():
                    pool[behind, length % page :] = torch.nan
    for token in (5, 6, 7):
        steps = [logits(model, **cache.inputs([[token]] * 3)) for cache in caches]
        assert steps[0].isfinite().all()
        assert torch.equal(*steps)
    for cache in caches:
        cache.close()


def test_a_fork_leaves_the_bits_of_its_parent():
    model, ids = model_of("llama"), ids_of(rows=1, length=27)
    with PagedCache(model, 16) as cache:
        logits(model, **cache.inputs(ids))
        pages = sum(store.arena.held for store in cache.stores)
        before = [store.sequences.read(name, [0, 1]).clone() for store in cache.stores for name in ("k", "v")]
        table = [store.sequences.table[0].copy() for store in cache.stores]
        child = cache.sibling()
        child.add(cache)
        child.fork(0, 2)
        assert sum(store.arena.held for store in cache.stores) == pages
        logits(model, **child.inputs([[4], [5], [6]]))
        after = [store.sequences.read(name, [0, 1]) for store in cache.stores for name in ("k", "v")]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert all((own == store.sequences.table[0]).all() for own, store in zip(table, cache.stores, strict=True))
        assert sum(store.arena.held for store in cache.stores) == pages + 3 * 2 * 2  # its last page, for each row and head
        assert refs_are_table_entries(cache, child)
        copied = copy.deepcopy(cache)
        assert torch.equal(logits(model, **copied.inputs([[8]])), logits(model, **cache.inputs([[8]])))
        assert copied.lengths == cache.lengths == [28]


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}])
def test_samples_and_beams_hold_a_prompt_once(options):
    """From the first token on, though `generate` repeats the prompt before anything is read."""
    model, ids = model_of("llama"), ids_of(rows=1, length=80)
    sizes, held = [], []

    def noted(_, scores):
        sizes.append(cache.bytes())
        held.append(cache.stores[0].arena.held)
        return scores

    torch.manual_seed(0)
    wanted = generated(model, ids, **options)
    torch.manual_seed(0)
    with PagedCache(model, 16) as cache:
        assert generated(model, ids, logits_processor=[noted], **options, **using(model, cache)) == wanted
        assert held[0] == 2 * 5
        assert held[1] == 2 * (5 + 4)
        assert cache.wasted < 4 * 2 * 2 * 16
    token = 2 * 8 * 8
    assert max(sizes) <= 2 * 2 * 16 * token * (5 + 2 * 4)  # beams: those before and after a step


def test_waste_is_less_than_a_page_a_sequence():
    model, ids = model_of("gpt2"), ids_of(rows=3, length=33)
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, :7] = 0, 0
    for page in (1, 7, 16, 64):
        with PagedCache(model, page) as cache:
            logits(model, input_ids=ids, attention_mask=mask, **using(model, cache))
            for _ in range(17):
                logits(model, **cache.inputs([[3]] * 3))
                expected = [-length % page for length in cache.lengths]
                assert cache.wasted == sum(expected) * 4 * 2
            assert cache.held_bytes == sum(-(-length // page) for length in cache.lengths) * page * 4 * 2 * 2 * 8 * 8
            assert cache.held_bytes <= cache.bytes() <= cache.held_bytes * 17 / 16
            assert cache_bytes(cache) == cache.bytes()


def test_an_error_in_a_call_is_taken_back():
    model, ids = model_of("llama"), ids_of()
    subject = Subject(model)

    def tap(call, out):
        if call.site.layer == 1:
            raise MemoryError

    with PagedCache(subject, 16) as cache:
        with subject.tap(tap), pytest.raises(MemoryError):
            logits(model, **cache.inputs(ids))
        assert cache.get_seq_length() == 0
        logits(model, **cache.inputs(ids))
        cache.fork(0)
        wanted = logits(model, **copy.deepcopy(cache).inputs([[4]] * 3))
        for count in (1, 3):
            with subject.tap(tap), pytest.raises(MemoryError):
                logits(model, **cache.inputs([[4] * count] * 3))
            assert cache.lengths == [21] * 3
        assert torch.equal(logits(model, **cache.inputs([[4]] * 3)), wanted)
        for layer in cache.layers:
            layer.crop(2)
        assert cache.lengths == [20] * 3
        first = ids[[0, 1, 0]]
        again = logits(model, **cache.inputs(first[:, 20:]))
        whole = logits(model, input_ids=first, use_cache=False)[:, -1:]
        assert torch.allclose(again, whole, atol=1e-12, rtol=0)


def test_masks_of_a_plan_hold_in_pages():
    model, ids = model_of("llama"), ids_of()
    subject = Subject(model)
    plan = Plan.empty(subject).use(subject.heads("L0H0,L0H1,L1H3"), Window(5))
    with plan(subject):
        wanted = generated(model, ids)
        with PagedCache(subject, 16) as cache:
            assert generated(model, ids, **using(model, cache)) == wanted
            logits(model, **cache.inputs([[4]] * 2))
            plan.apply(subject)
            with pytest.raises(PlanError, match="filled under another plan"):
                logits(model, **cache.inputs([[4]] * 2))
            plan.remove(subject)
    with Plan.empty(subject).use(subject.main.exists(), SnapKv(8))(subject), pytest.raises(PlanError, match="how heads are cached"):
        PagedCache(subject)


def test_the_model_is_as_before_when_the_cache_is_gone():
    model, ids = model_of("llama"), ids_of()
    named = model.config._attn_implementation
    cache = PagedCache(model, 16)
    assert model.config._attn_implementation == "headwise"
    sibling = cache.sibling()
    cache.close()
    assert model.config._attn_implementation == "headwise"
    logits(model, **sibling.inputs(ids))
    with pytest.raises(PlanError, match="closed"):
        logits(model, **cache.inputs(ids))
    with pytest.raises(PlanError, match="closed"):
        cache.fork(0)
    del sibling
    gc.collect()
    assert model.config._attn_implementation == named
    subject = Subject(model)
    with Plan.empty(subject).use(subject.heads("L0H0"), Window(5))(subject):
        under = PagedCache(subject)
        under.close()
        assert model.config._attn_implementation == "headwise"
    assert model.config._attn_implementation == named


def test_what_it_refuses():
    model, ids = model_of("llama"), ids_of()
    with PagedCache(model) as cache, PagedCache(model) as other:
        logits(model, **cache.inputs(ids))
        with pytest.raises(ShapeError, match="holds 2 rows, tokens of 3 came"):
            logits(model, input_ids=torch.tensor([[4]] * 3), **using(model, cache))
        with pytest.raises(InputError, match="no row 2; the cache holds 2"):
            cache.fork(2)
        with pytest.raises(InputError, match="no row -1"):
            cache.free([-1])
        with pytest.raises(InputError, match="siblings only"):
            cache.add(other)
        with pytest.raises(InputError, match="at least one prompt"):
            cache.generate([])
        with pytest.raises(InputError, match="at least one token"):
            cache.generate([[3], []])
    with pytest.raises(InputError, match="page of 0"):
        PagedCache(model, 0)
    seq2seq = next(f for f in families.ALL if f.kind == "seq2seq")
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        PagedCache(seq2seq.model())
    latent = next(f for f in families.ALL if f.name == "deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="one latent"):
        PagedCache(latent.model())


def test_texts_that_end_end():
    """Of several prompts, each up to its own end."""
    model = model_of("llama")
    prompts = [row[:n] for row, n in zip(ids_of(rows=3, length=30).tolist(), (30, 11, 1), strict=True)]
    alone = [generated(model, torch.tensor([p]), 12, min_new_tokens=None)[0][len(p) :] for p in prompts]
    end = [alone[0][3], alone[1][5]]
    cut = [row[: min(i for i, t in enumerate([*row, end[0]]) if t in end) + 1] for row in alone]
    with PagedCache(model, 16) as cache:
        found = cache.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=end)
        assert found == cut
        assert {len(row) for row in found} != {12}
        assert cache.generate([torch.tensor(prompts[1])], max_new_tokens=12, do_sample=False) == [alone[1]]
