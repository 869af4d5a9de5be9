"""MixAttention: layers with windows and layers without, of which many read the keys and values of an earlier one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import largest
from ...mechanisms.following import KeyFollower
from ..build import named
from ..transformer import Transformer
from . import _slow

CARD = Card(
    paper="Inference-Friendly Models With MixAttention",
    year=2024,
    room="heads",
    source=(
        "arXiv:2409.15012, sec. 3, and the 13 layers in the documentation of the authors' framework, llm-foundry, which are those "
        "of Character.AI's post; the paper's other variants (offset, pairs, a last layer with a window) can be given as layouts. A "
        "window of w shows i - j <= w as there, so w + 1 tokens, one more than `windows` of a Transformer says. The framework "
        "keeps whole caches and masks them; here they keep what windows let them read"
    ),
)

# One layer: "full" or "window"; with the layer whose keys and values it reads, or how many layers back that stands (negative)
Kind: TypeAlias = str | Sequence[str | int]


@named
def mix_attention(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    window: int = 1024,
    layout: Sequence[Kind] | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    bias: bool = False,
    **options: Any,
) -> Transformer:
    """A decoder of windows and full reads, in which layers share caches: rings of the last tokens, and few that grow.

    Its cache holds 2 kv_heads head_dim (N_full tokens + N_window min(tokens, window + 1)) numbers, N counting layers that make
    keys and values. Those that read others' have queries and outputs only, and read keys as they are kept, rotated.

    Args:
        window: how far back layers with a window read; the query's own place comes on top, as in the paper.
        layout: for each layer "full" or "window", or such a word and whose keys and values it reads: a layer's number, or,
            negative, how many layers back, as in ["window", -1]. A layer that reads others' names their maker in the end. By
            default a full layer, then again and again two windows of two and three layers and a full layer that reads the first.
        kv_heads, head_dim, bias: as for `Attention`. options: as for `Transformer`.

    Raises: ShapeError for a layout of another length, a layer that reads no earlier one, or a full layer that would read a window.
    """
    kinds, follows = _read(recipe(layers) if layout is None else layout)
    if len(kinds) != layers:
        raise ShapeError(f"a layout of {len(kinds)} entries for {layers} layers; give one for each")
    if window < 0:
        raise ShapeError(f"a window of {window}; it is how far back a layer reads, 0 for its own place alone")
    for layer, owner in follows.items():
        if kinds[layer] == "full" and kinds[owner] == "window":
            raise ShapeError(f"layer {layer} reads all, and layer {owner} keeps a window of {window}; let it read a full one")
    own: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "bias": bias}
    mixers: list[Any] = [
        KeyFollower(width, heads, head_dim=head_dim, bias=bias) if layer in follows else ("softmax", own) for layer in range(layers)
    ]
    windows = [window + 1 if kind == "window" else None for kind in kinds]
    return Transformer(vocabulary, width, layers, heads, mixer=mixers, context=context, windows=windows, follows=follows, **options)


def recipe(layers: int) -> list[Kind]:
    """The layout of 13 layers of the authors' framework, cut or repeated to another depth."""
    again: list[Kind] = ["window", ["window", -1], "window", ["window", -1], ["window", -1], ["full", 0]]
    return ["full", *(again[layer % len(again)] for layer in range(layers - 1))]


def _read(layout: Sequence[Kind]) -> tuple[list[str], dict[int, int]]:
    """Each layer's kind, and the makers of those that share."""
    kinds: list[str] = []
    follows: dict[int, int] = {}
    for layer, entry in enumerate(layout):
        kind, *of = [entry] if isinstance(entry, str) else entry
        if kind not in ("full", "window") or len(of) > 1 or not all(isinstance(owner, int) for owner in of):
            raise ShapeError(f"layer {layer} of the layout is {entry!r}; give 'full' or 'window', alone or with a layer's number")
        kinds.append(str(kind))
        for owner in map(int, of):
            at = owner if owner >= 0 else layer + owner
            if not 0 <= at < layer:
                raise ShapeError(f"layer {layer} can't read the keys of layer {at}, which does not come before it")
            follows[layer] = follows.get(at, at)
    return kinds, follows


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time, by the layout and window that the model was built from."""
    n, made = len(ids), {}
    layout = model.config.get("layout") or recipe(len(model.blocks))
    far = model.config.get("window", 1024)
    inclusive = torch.tensor([[0 <= i - j <= far for j in range(n)] for i in range(n)])

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer: Any = _slow.mixer_of(model, at)
        entry: Any = layout[layer]
        word, owner = (entry, None) if isinstance(entry, str) else (entry[0], entry[1])
        of: Any = mixer if owner is not None else mixer.projections
        base = _slow.base_of(mixer)
        if owner is None:
            k, v = (_slow.heads_of(x, linear, of.kv_heads) for linear in (of.k, of.v))
            made[layer] = _slow.turned(k, base), v
        else:
            made[layer] = made[owner if owner >= 0 else layer + owner]  # links of a chain hand on what they read
        q = _slow.turned(_slow.heads_of(x, of.q, model.heads), base)
        read = _slow.attention_rows(q, *made[layer], inclusive if word == "window" else _slow.causal(n))
        return _slow.merged(read, of.out)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    own: list[Kind] = ["window", ["window", 0], "full", ["window", 1], ["full", -2]]
    made = [
        mix_attention(23, 32, 7, 4, context=64, window=5, kv_heads=2),
        mix_attention(23, 32, 5, 4, context=64, window=9, layout=own, bias=True, tied=False),
        mix_attention(23, 32, 3, 4, context=64, window=0, layout=["full", "window", ["window", 0]], head_dim=6),
    ]
    _slow.shake_norms(made)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: layers that own keys keep all, or window + 1 of them."""
    layout = model.config.get("layout") or recipe(len(model.blocks))
    full, rings = (sum(1 for entry in layout if entry == word) for word in ("full", "window"))
    of = cast(Attention, model.blocks[0].mixer).projections
    return int(2 * of.kv_heads * of.head_dim * (full * tokens + rings * min(tokens, model.config.get("window", 1024) + 1)))


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """The 13 layers' layout at this depth, with windows of 1024 or an eighth of the texts, where those are shorter."""
    window = max(1, min(1024, tokens // 8))
    return mix_attention(vocabulary, width, layers, heads, **{"context": tokens, "window": window, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 12))
    kinds, follows = _read(recipe(13))
    owners = [layer for layer in range(13) if layer not in follows]
    yield "of 13 layers 0, 1, 3, 7, 9 make keys and values", float(owners != [0, 1, 3, 7, 9])
    yield (
        "three of them read all, by the keys of the first",
        float([layer for layer in range(13) if kinds[layer] == "full"] != [0, 6, 12] or {follows[6], follows[12]} != {0}),
    )
    yield "and windows by the nearest before them", float([follows[n] for n in (2, 4, 5, 8, 10, 11)] != [1, 3, 3, 7, 9, 9])
    with torch.device("meta"):
        deep = mix_attention(32, 64, 13, 4, hidden=0, context=4096)
    for n in (100, 1025, 4096):
        part = kept(deep, n) / (13 * 2 * 64 * n)
        yield f"its cache of {n} tokens is 1 n + 4 min(n, 1025) of 13 n", abs(part - (n + 4 * min(n, 1025)) / (13 * n))

    plain = Transformer(23, 32, 3, 4).double()
    wide = mix_attention(23, 32, 3, 4, window=11, layout=["window"] * 3).double()
    wide.load_state_dict(plain.state_dict())
    yield "windows as long as the text, and nothing shared: the usual stack", largest(wide(ids) - plain(ids))
    narrow = mix_attention(23, 32, 3, 4, window=4, layout=["window"] * 3).double()
    narrow.load_state_dict(plain.state_dict())
    ours = Transformer(23, 32, 3, 4, windows=5).double()
    ours.load_state_dict(plain.state_dict())
    yield "a window of w is one of w + 1 tokens, the query's own among them", largest(narrow(ids) - ours(ids))

    chain = mix_attention(23, 32, 3, 4, window=3, layout=["window", ["window", -1], ["window", -1]]).double()
    root = mix_attention(23, 32, 3, 4, window=3, layout=["window", ["window", 0], ["window", 0]]).double()
    root.load_state_dict(chain.state_dict())
    yield "a layer that reads one that reads another's reads that", largest(root(ids) - chain(ids))

    # two layers that make keys and two that share: w = 2 reaches 4 tokens back from the last, whatever is shared
    reach = mix_attention(23, 32, 4, 4, window=2, layout=["window", ["window", -1], "window", ["window", -1]]).double()
    felt = [_felt(reach, ids[:1], 11 - back) for back in (5, 4)]
    yield "sharing adds no reach: w times the layers that make keys, and a token farther is not felt", felt[0]
    yield "while one just that far is", float(felt[1] == 0)
    alone = mix_attention(23, 32, 2, 4, window=0, layout=["window", "window"]).double()
    yield "a window of 0 reads its own token alone", _felt(alone, ids[:1], 10)
    lost = mix_attention(23, 32, 3, 4, layout=["full"] * 3).parameter_count
    lost -= mix_attention(23, 32, 3, 4, layout=["full", ["full", 0], ["window", 0]]).parameter_count
    yield "layers that share have no maps to keys and values", float(abs(lost - 2 * 2 * 32 * 32))
    try:
        mix_attention(23, 32, 2, 4, layout=["window", ["full", 0]])
        refused = False
    except ShapeError:
        refused = True
    yield "a full layer can't read what a window keeps", float(not refused)


def _felt(model: Transformer, ids: Tensor, at: int) -> float:
    """How much the last token's logits change with the token at a place."""
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % model.vocabulary
    with torch.no_grad():
        return largest((model(other) - model(ids))[:, -1])
