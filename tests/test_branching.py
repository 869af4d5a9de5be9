"""Texts whose paths run beside one another: masks, places, and generation with forks against one masked pass."""

from __future__ import annotations

import families
import pytest
import torch

from headwise.errors import InputError, UnsupportedModelError
from headwise.models.branching import Tags, branched, branched_logits, generate_branches
from headwise.models.subject import Subject

TAGS = Tags(*range(80, 90))
P, P_END, GOAL, GOAL_END, OUT, OUT_END, PATH, PATH_END, END, END_END = range(80, 90)


def subject(name="llama"):
    model = next(f for f in families.ALL if f.name == name).model().double()
    with torch.no_grad():
        model.get_output_embeddings().weight[80:90] = 0  # a model that was not trained to must not choose tags
    return Subject(model)


def block(*paths, goal=(OUT, 7, OUT_END, OUT, 8, OUT_END), conclusion=(9, 11)):
    inside = [token for path in paths for token in (PATH, *path, PATH_END)]
    return [P, GOAL, *goal, GOAL_END, *inside, END, *conclusion, END_END, P_END]


def logits(model, ids):
    return branched_logits(model, torch.tensor([ids]), TAGS)[0]


def plain(model, ids):
    with torch.no_grad():
        return model.model(torch.tensor([ids]), use_cache=False).logits[0]


def test_places_and_mask():
    text = [3, 4, *block((20, 21), (30,)), 50]
    found = branched(text, TAGS)
    start = 2 + 9  # after </Goal>
    assert found.position.tolist() == [
        *range(start),
        *range(start, start + 4),
        *range(start, start + 3),
        *range(start + 4, start + 10),
    ]
    shown = found.mask.dense(len(text), len(text))[0, 0]
    first, second = slice(start, start + 4), slice(start + 4, start + 7)
    hidden = torch.zeros_like(shown)
    hidden[first, second] = hidden[second, first] = True
    assert torch.equal(shown, ~hidden)


def test_a_block_within_a_path():
    inner = block((40,), (41, 42))
    text = [3, *block((20, *inner, 21), (30,)), 50]
    found = branched(text, TAGS)
    start = 1 + 9
    inner_start = start + 2 + 9  # <Path>, 20, and the inner goal
    inner_after = inner_start + 4 + len(inner) - 9 - 3 - 4  # its longest path, then conclusion and end
    after = inner_after + 2  # 21, </Path>
    assert found.position[-1] == after + 5
    assert found.mask.path.shape[0] == 2
    shown = found.mask.dense(len(text), len(text))[0, 0]
    inner_first, inner_second, other = text.index(40), text.index(41), text.index(30)
    assert not shown[inner_second, inner_first]
    assert not shown[other, inner_first]
    assert not shown[inner_first, other]
    assert shown[text.index(21), inner_first]
    assert shown[text.index(50)].all()


def test_one_path_is_plain_causal_and_plain_places():
    model, text = subject(), [3, 4, *block((20, 21, 22)), 50]
    assert branched(text, TAGS).position.tolist() == list(range(len(text)))
    assert torch.allclose(logits(model, text), plain(model, text), atol=1e-12)


def test_paths_do_not_see_each_other_and_the_conclusion_sees_all():
    model = subject()
    one, other = [3, *block((20, 21), (30, 31))], [3, *block((24, 25), (30, 31))]
    a, b = logits(model, one), logits(model, other)
    second = slice(one.index(30) - 1, one.index(30) + 3)
    assert torch.equal(a[second], b[second])
    assert not torch.allclose(a[second.stop], b[second.stop])
    assert not torch.allclose(plain(model, one)[second], plain(model, other)[second])


def test_paths_in_another_order_give_the_same():
    model = subject()
    one, other = [3, *block((20, 21), (30, 31, 32), (33,))], [3, *block((33,), (20, 21), (30, 31, 32))]
    a, b = logits(model, one), logits(model, other)
    for path in (20, 30, 33):
        i, j = one.index(path), other.index(path)
        assert torch.allclose(a[i - 1 : i + 2], b[j - 1 : j + 2], atol=1e-12)
    assert torch.allclose(a[-5:], b[-5:], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ([*block((20,))[:9], 5, *block((20,))[9:]], "would leak"),
        ([PATH, 4], "<Path> stands"),
        ([P, GOAL, GOAL_END, END], "behind no path"),
        ([3, P_END], "not begun"),
        ([P, GOAL, GOAL_END, PATH, 4, P_END], "without a conclusion"),
        ([P, GOAL, GOAL_END, PATH, 4, PATH_END, PATH_END], "would leak"),
    ],
)
def test_tags_out_of_place(text, what):
    with pytest.raises(InputError, match=what):
        branched(text, TAGS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_generation_with_forks_is_greedy_under_the_mask(name):
    """Every token that was chosen is the likeliest of one masked pass over the text that came out."""
    model = subject(name)
    goal = [OUT, 7, OUT_END, OUT, 8, OUT_END, OUT, 9, OUT_END]
    prompt = [3, 4, 5, P, GOAL, *goal, GOAL_END]
    made = generate_branches(model, torch.tensor([prompt]), TAGS, max_new_tokens=60, max_path_tokens=9, prime=lambda i: (60 + i,))
    text = list(made.ids)
    assert text[: len(prompt)] == prompt
    assert [text.count(tag) for tag in (PATH, PATH_END, END)] == [3, 3, 1]
    place = branched(text, TAGS).position
    found, start = logits(model, text), len(prompt)
    given = {i for i, token in enumerate(text) if token in (PATH, END)} | {i + 1 for i, token in enumerate(text) if token == PATH}
    assert [text[i + 1] for i in sorted(given) if text[i] == PATH] == [60, 61, 62]
    begin, last = [i for i, t in enumerate(text) if t == PATH], [i for i, t in enumerate(text) if t == PATH_END]
    checked = 0
    for i in range(start, len(text)):
        forced = text[i] == PATH_END and i - begin[last.index(i)] == 9
        if i in given or forced:
            continue
        row = found[i - 1].clone()
        if any(b < i <= e for b, e in zip(begin, last, strict=True)):
            row[P] = -torch.inf
        assert int(row.argmax()) == text[i], i
        checked += 1
    assert checked > 20
    longest = max(e - b for b, e in zip(begin, last, strict=True)) + 1
    assert place[text.index(END)] == place[start] + longest
    after = len(text) - 1 - text.index(END)
    assert made.steps == longest + after - 1  # <Path> and what follows it are one call, the last token is not read
    assert made.parallelism > 1.4


def test_paths_that_end_earlier_wait():
    """The conclusion stands behind the longest, whatever the others' lengths; blocks are not begun within paths."""
    model = subject()
    weight = model.model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        weight[PATH_END] = torch.randn(32, generator=generator, dtype=torch.float64) * 0.06
        weight[P] = torch.randn(32, generator=generator, dtype=torch.float64) * 0.06
    prompt = [3, P, GOAL, *[OUT, OUT_END] * 4, GOAL_END]
    made = generate_branches(
        model, torch.tensor([prompt]), TAGS, max_new_tokens=100, max_path_tokens=12, prime=lambda i: (30 + i,), end=(P, PATH_END)
    )
    text = list(made.ids)
    begin, last = [i for i, t in enumerate(text) if t == PATH], [i for i, t in enumerate(text) if t == PATH_END][:4]
    lengths = [e - b + 1 for b, e in zip(begin, last, strict=True)]
    assert len(set(lengths)) > 1
    assert lengths[-1] < max(lengths)
    place, found = branched(text[: text.index(END) + 1], TAGS).position, logits(model, text[: text.index(END) + 1])
    assert place[-1] == place[begin[0]] + max(lengths)
    kept = 0
    for b, e in zip(begin, last, strict=True):
        for i in range(b + 2, e + 1):
            row = found[i - 1].clone()
            kept += int(row.argmax()) == P
            row[P] = -torch.inf
            assert int(row.argmax()) == text[i] or i - b == 12
    assert kept
    assert int(found[text.index(END)].argmax()) == text[text.index(END) + 1]


def test_forks_share_pages(monkeypatch):
    """While paths run, the prefix is held once."""
    model, pages = subject(), []
    from headwise.caches import LayerStore

    join = LayerStore.join

    def noted(store, before, counts):
        (sequences,) = store.sequences.values()
        pages.append((sequences.arena.held, sequences.table[..., 0].ravel().tolist()))
        join(store, before, counts)

    monkeypatch.setattr(LayerStore, "join", noted)
    prompt = [3] * 130 + [P, GOAL, OUT, 7, OUT_END, OUT, 8, OUT_END, OUT, 8, OUT_END, OUT, 8, OUT_END, GOAL_END]
    generate_branches(model, torch.tensor([prompt]), TAGS, max_new_tokens=40, max_path_tokens=6)
    for held, first in pages:
        assert held <= 2 * (2 + 4 * 2)  # two key/value heads: two whole pages of the prefix, and four rows' own ends
        assert len(set(first)) == 2


def test_errors():
    model = subject()
    with pytest.raises(InputError, match="one at a time"):
        generate_branches(model, torch.tensor([[3], [4]]), TAGS)
    with pytest.raises(InputError, match="within a path"):
        generate_branches(model, torch.tensor([[P, GOAL, GOAL_END, PATH, 4]]), TAGS)
    prompt = [P, GOAL, OUT, OUT_END, OUT, OUT_END, GOAL_END]
    with pytest.raises(InputError, match="not as many"):
        generate_branches(model, torch.tensor([prompt]), TAGS, prime=lambda i: (7,) * i)
    with pytest.raises(UnsupportedModelError, match="cannot branch"):
        generate_branches(subject("mistral"), torch.tensor([[3, 4]]), TAGS)
    assert model.model.config._attn_implementation == "sdpa"
