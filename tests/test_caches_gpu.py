"""Rules of how heads are cached, on a GPU: a model of two layers of an 8-billion-parameter model's shape."""

from __future__ import annotations

import pytest
import torch
import transformers

from headwise.caches.rules.snap_kv import SnapKv
from headwise.models.cache import HeadCache, cache_argument, cache_bytes, cache_of
from headwise.models.subject import Subject
from headwise.plans import Plan
from headwise.stages.sink import Sink
from headwise.stages.window import Window

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LAYERS = 2


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=1000, max_position_embeddings=65536, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return Subject(model)


def prompt(rows, length, seed=1):
    return torch.randint(3, 900, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()


def read(subject, ids):
    with torch.no_grad():
        return subject.model(input_ids=ids, use_cache=True, logits_to_keep=1)


def steps(subject, ids, following):
    """Logits after a prompt and after each further token, and the cache."""
    out = read(subject, ids)
    found = [out.logits[:, -1]]
    name = cache_argument(subject.model)
    for token in following.split(1, 1):
        with torch.no_grad():
            out = subject.model(input_ids=token, **{name: cache_of(out)})
        found.append(out.logits[:, -1])
    return torch.stack(found).float(), cache_of(out)


def test_room_for_everything_reads_as_the_model(subject):
    """All heads in one launch over pages, against the model's own attention in bfloat16."""
    ids, following = prompt(2, 1500), prompt(2, 70, 2)
    wanted, _ = steps(subject, ids, following)
    with Plan.empty(subject).use(subject.main.exists(), SnapKv(1.0))(subject):
        found, cache = steps(subject, ids, following)
    assert isinstance(cache, HeadCache)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("which", ["streaming", "snap_kv"])
def test_new_tokens_read_what_is_held(subject, which):
    """In place, against the same reads put together from views in float32."""
    half = subject.heads([(layer, head) for layer in range(LAYERS) for head in range(32) if head % 8 < 4])
    rule = (Window(300) | Sink(20),) if which == "streaming" else (SnapKv(torch.arange(100, 100 + half.count())),)
    plan, ids, following = Plan.empty(subject).use(half, *rule), prompt(2, 1500), prompt(2, 20, 2)
    with plan(subject):
        found, cache = steps(subject, ids, following)
        with subject.tap(lambda call, out: None):  # what taps see is read from views
            wanted, _ = steps(subject, ids, following)
    assert all(layer.store.in_place for layer in cache.layers)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_quarter_of_the_tokens_takes_a_quarter_of_the_memory(subject):
    """Budgets of 2 to 60 % by head, 25 % in the mean, at 32k tokens: by the allocator, while reading and afterwards."""
    ids = prompt(1, 32768)
    budgets = torch.tensor([0.02, 0.04, 0.08, 0.1, 0.2, 0.4, 0.56, 0.6]).repeat_interleave(4).repeat(LAYERS)
    assert abs(float(budgets.mean()) - 0.25) < 1e-6
    allocated, peak, counted = {}, {}, {}
    for name, plan in {
        "full": Plan.empty(subject),
        "quarter": Plan.empty(subject).use(subject.main.exists(), SnapKv(budgets)),
    }.items():
        with plan(subject):
            read(subject, ids[:, :256])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cache = cache_of(read(subject, ids))
            torch.cuda.synchronize()
            allocated[name], peak[name] = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
            counted[name] = cache_bytes(cache)
            del cache
    print(allocated, peak, counted)
    assert counted["quarter"] <= 0.27 * counted["full"]
    assert allocated["quarter"] <= 0.27 * counted["full"] + 2**20
    assert peak["quarter"] <= peak["full"]
