"""The tree of what texts begin with, against sets of beginnings; and serving requests from it, against each request alone."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

from headwise.attention import paged_torch
from headwise.caches import Arena, Sequences
from headwise.caches.prefix_tree import PrefixTree, Shelf
from headwise.errors import InputError, PlanError, UnsupportedModelError
from headwise.models.caches.prefix_cache import PrefixCache

LAYERS, HEADS = 2, 2  # of the tiny models with grouped heads


def beginnings(texts, size):
    """All whole chunks of texts, each with all that is before it."""
    return {tuple(text[: i + size]) for text in texts for i in range(0, len(text) - size + 1, size)}


def path_of(chunk):
    return path_of(chunk.parent) + chunk.tokens if chunk.parent is not None else ()


def check_counts(tree, texts, tokens):
    """texts: those of the tree; tokens: what each of them is."""
    found = {path_of(chunk): chunk for chunk in tree}
    assert len(found) == len(tree)
    assert len({chunk.slot for chunk in tree}) == len(tree)
    for path, chunk in found.items():
        assert chunk.count == sum(tuple(own[: len(path)]) == path for own in tokens if len(own) >= len(path))
    assert {path for path, chunk in found.items() if chunk.count} == beginnings(tokens, tree.chunk)
    assert tree.idle == sum(not chunk.count for chunk in tree)
    assert tree.idle <= tree.spare
    for text, own in zip(texts, tokens, strict=True):
        assert [t for chunk in text.chunks for t in chunk.tokens] + text.tail == own
        assert len(text.tail) < tree.chunk
        assert text.chunks == tree.match(own)
    assert tree.texts == len(texts)


@pytest.mark.parametrize(("size", "spare"), [(1, 0), (2, 0), (3, 4), (4, 1)])
def test_a_thousand_steps_against_sets(size, spare):
    rng = np.random.default_rng(size)
    tree, texts, tokens = PrefixTree(size, spare), [], []
    arena = Arena(size, packed=False)
    tree.shelves = [Shelf(arena, 3)]

    def shelve(new):
        for chunk in new:
            pages = arena.take(3)
            tree.shelves[0].put(chunk.slot, pages)
            arena.release(pages)

    for _ in range(1000):
        action, place = rng.integers(4), int(rng.integers(max(len(texts), 1)))
        if action == 0 or not texts:
            own = rng.integers(0, 2, rng.integers(0, 14)).tolist()
            before = tree.match(own)
            text, new = tree.insert(own)
            assert text.chunks == [*before, *new]
            shelve(new)
            texts.append(text)
            tokens.append(own)
        elif action == 1:
            more = rng.integers(0, 2, rng.integers(0, 5)).tolist()
            shelve(tree.append(texts[place], more))
            tokens[place] = tokens[place] + more
        elif action == 2 and len(texts) < 12:
            texts.append(tree.fork(texts[place]))
            tokens.append(list(tokens[place]))
        else:
            tree.remove(texts.pop(place))
            tokens.pop(place)
        check_counts(tree, texts, tokens)
        assert arena.held == 3 * len(tree)
        assert all((tree.shelves[0].table[chunk.slot] >= 0).all() for chunk in tree)
        assert (tree.shelves[0].table >= 0).sum() == arena.held
    for text in texts:
        tree.remove(text)
    tree.evict()
    assert len(tree) == arena.held == 0
    assert not tree.root.children
    assert (arena.refs == 0).all()


def test_an_edit_unshares_what_is_behind_it():
    size, rng = 4, np.random.default_rng(0)
    base = rng.integers(0, 50, 30).tolist()
    for p in range(30):
        tree = PrefixTree(size)
        first, _ = tree.insert(base)
        second, new = tree.insert([*base[:p], 99, *base[p + 1 :]])
        shared = [a is b for a, b in zip(first.chunks, second.chunks, strict=True)]
        assert shared == [i < p // size for i in range(30 // size)]
        assert len(new) == 30 // size - min(p // size, 30 // size)


def test_chunks_longest_unused_go_first():
    tree = PrefixTree(1, spare=3)
    for own in ([1, 2], [3], [1, 4]):
        text, _ = tree.insert(own)
        tree.remove(text)
    assert {path_of(chunk) for chunk in tree} == {(3,), (1,), (1, 4)}  # 1 was used again, 2 was not
    text, new = tree.insert([3, 5])
    assert len(new) == 1
    tree.remove(text)
    assert {path_of(chunk) for chunk in tree} == {(1,), (3,), (3, 5)}
    tree.evict(1)
    assert {path_of(chunk) for chunk in tree} == {(3,)}
    with pytest.raises(InputError, match="chunks of 0 tokens"):
        PrefixTree(0)


def test_a_shelf_holds_and_follows_its_pages():
    arena = Arena(2, packed=False)
    own, shelf = Sequences(arena, 1), Shelf(arena, 1)
    own.begin(1)
    number = torch.arange(20, dtype=torch.int32)[None, None]
    own.append([0], {"number": number}, [[0]])
    shelf.put(1, own.table[0, :, 7])
    own.clear()
    arena.trim()
    assert arena.held == len(arena.refs) == 1
    assert arena.pools["number"][shelf.table[1, 0]].tolist() == [14, 15]
    shelf.drop(5)
    shelf.drop(1)
    arena.empty()
    assert arena.nbytes == 0
    kept = Shelf(arena, 1)
    kept.put(0, arena.take(1))
    del kept
    assert arena.refs.tolist() == [1]  # what was taken; the shelf's own hold is gone


# ---- requests ----------------------------------------------------------------------------------------------------------


def model_of(name):
    (family,) = [f for f in families.ALL if f.name == name]
    return family.model().double()


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 95, n).tolist() for n in lengths]


def alone(model, prompt, count, **options):
    ids = torch.tensor([prompt])
    given = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, len(prompt) :].tolist()


def ragged(begin=70):
    beginning, *tails = texts_of((begin, 5, 20, 1, 33, 1))
    return [beginning + tails[0], beginning[:40] + tails[1], beginning + tails[2], tails[3], beginning[:32], tails[4], beginning]


OPTIONS = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk", [8, 16])
def test_requests_get_what_they_get_alone(name, chunk):
    """Ragged, some a beginning of others, in two batches of which the second finds chunks of the first, generated ones too."""
    model, prompts = model_of(name), ragged()
    wanted = [alone(model, prompt, 20) for prompt in prompts]
    with PrefixCache(model, chunk, spare=100) as cache:
        assert cache.generate(prompts, **OPTIONS) == wanted
        first = cache.computed
        unique = len(beginnings([p[:-1] for p in prompts], chunk)) * chunk
        assert first == unique + sum((len(p) - 1) % chunk for p in prompts)
        longer = [p + w + [9] for p, w in zip(prompts, wanted, strict=True)]
        assert cache.generate(longer[:3], **OPTIONS) == [alone(model, prompt, 20) for prompt in longer[:3]]
        assert cache.computed - first == sum(len(p) - 1 - (len(p) - 2) // chunk * chunk for p in longer[:3])
    assert model.config._attn_implementation != "headwise"


def test_one_request_is_the_models_own_generation():
    model, prompts = model_of("llama"), ragged()
    with PrefixCache(model, 16) as cache:
        for prompt in prompts:
            assert cache.generate([torch.tensor(prompt)], **OPTIONS) == [alone(model, prompt, 20)]
        sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        torch.manual_seed(1)
        ids = torch.tensor(prompts[:1])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **sampled)[:, ids.shape[1] :].tolist()
        torch.manual_seed(1)
        assert cache.generate(prompts[:1], **sampled) == wanted
        assert cache.held == 0


def test_memory_is_that_of_unique_tokens():
    """To the page: each whole chunk once, each tail by itself; and nothing when all have ended."""
    model, prompts = model_of("llama"), ragged()
    for chunk in (8, 16):
        with PrefixCache(model, chunk) as cache:
            batch = cache.open(prompts)
            held = [prompt[:-1] for prompt in prompts]
            pages = len(beginnings(held, chunk)) + sum(len(own) % chunk > 0 for own in held)
            assert cache.held == pages * LAYERS * HEADS
            assert len(cache.tree) == len(beginnings(held, chunk))
            assert cache.tree.texts == len(prompts)
            size = pages * LAYERS * HEADS * chunk * 2 * 8 * 8
            assert size <= cache.bytes() <= size * 8 / 7 + 4096
            cache.release(batch)
            assert cache.held == len(cache.tree) == cache.bytes() == 0
            batch = cache.open(prompts)
        assert cache.held == len(cache.tree) == cache.tree.texts == cache.bytes() == 0  # closing ends what is in progress
        with pytest.raises(PlanError, match="closed"):
            batch.cache.inputs([[5]] * 7)


def test_shared_keys_are_read_once_for_all(monkeypatch):
    """Counted where keys are read: of the shared beginning, a b-th of what requests read without a tree."""
    model, counted = model_of("llama"), []
    run = paged_torch._run

    def noted(pool, pages, tokens):
        counted.append(tokens)
        return run(pool, pages, tokens)

    def none(*_):
        return iter(())

    monkeypatch.setattr(paged_torch, "_run", noted)
    monkeypatch.setattr(paged_torch, "_alike", none)
    *beginnings, a, b, c, d, e, f = texts_of((97, 97, *[7] * 6))
    prompts = [beginnings[i % 2] + tail for i, tail in enumerate((a, b, c, d, e, f))]  # those of one beginning do not come together
    with PrefixCache(model, 16) as cache:
        batch = cache.open(prompts)
        counted.clear()
        with torch.no_grad():
            found = model(**batch.cache.inputs(batch.ids[:, -1:])).logits[:, -1]
        shared, own = 96, 104 - 96
        assert sum(counted) == 2 * LAYERS * HEADS * (2 * shared + 6 * own)  # keys and values
        rows = torch.tensor([prompts[i] for i in batch.order])
        assert torch.allclose(found, model(rows, use_cache=False).logits[:, -1], atol=1e-12, rtol=0)
        counted.clear()
        batch.cache.free([0, 1, 2, 3, 4])
        with torch.no_grad():
            model(**batch.cache.inputs([[5]]))
        assert sum(counted) == 2 * LAYERS * HEADS * 105
        cache.release(batch)


def test_rows_that_fork_and_go_leave_the_tree_as_it_is():
    model, prompts = model_of("llama"), ragged()
    with PrefixCache(model, 16) as cache:
        batch = cache.open(prompts)

        def bits():
            return [
                pool[torch.from_numpy(shelf.table[[chunk.slot for chunk in cache.tree]].astype(np.int64))].clone()
                for shelf in cache.tree.shelves
                for pool in shelf.arena.pools.values()
            ]

        before = bits()
        batch.cache.fork(0, 2)
        with torch.no_grad():
            for token in range(3, 40):
                model(**batch.cache.inputs([[token]] * batch.cache.rows))
        batch.cache.free([0, 3])  # which moves pages
        assert all(torch.equal(*pair) for pair in zip(before, bits(), strict=True))
        cache.release(batch)
        assert cache.held == 0


def test_an_error_ends_the_requests_that_it_meets():
    model, prompts = model_of("llama"), ragged()

    def fails(_, scores):
        raise MemoryError

    with PrefixCache(model, 16, spare=3) as cache:
        with pytest.raises(MemoryError):
            cache.generate(prompts, logits_processor=[fails], **OPTIONS)
        assert cache.tree.texts == 0
        assert cache.held == cache.tree.idle * LAYERS * HEADS == 3 * LAYERS * HEADS
        with pytest.raises(InputError, match="at least one token"):
            cache.generate([prompts[0], []])
        (hook,) = [model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))]
        with pytest.raises(KeyError):
            cache.open([[5] * 40, *prompts])
        hook.remove()
        assert cache.tree.texts == 0
        assert cache.generate(prompts[:2], **OPTIONS) == [alone(model, prompt, 20) for prompt in prompts[:2]]
    with pytest.raises(PlanError, match="closed"):
        cache.generate(prompts)
    latent = next(f for f in families.ALL if f.name == "deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="one latent"):
        PrefixCache(latent.model())
