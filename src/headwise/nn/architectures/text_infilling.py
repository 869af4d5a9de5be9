"""Text infilling: a decoder that writes what is missing from a text, blank by blank, reading the text on both sides of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention import attend
from ...card import Card
from ...errors import InputError, ShapeError
from ...mechanisms import Cache, Projections
from ...mechanisms._mixer import Tokens, largest
from ...stages.causal import Causal
from ..build import named
from ..model import Caches, LanguageModel
from . import _slow

CARD = Card(
    paper="Text Infilling",
    year=2019,
    room="softmax",
    source=(
        "arXiv:1901.00158 and the authors' code: no encoder, layers read the template's embeddings as they are, offsets begin anew "
        "in each segment, blanks are filled from left to right and what fills one becomes text. In their training the answer to "
        "blank b, from 0, is in segment 2b + 1 and in their generation always in 1, though earlier blanks are filled in both; here "
        "it is in the segment that its blank has then. Their templates' padding is read, here it is not. An answer for which no "
        "blank is left goes on where the text ends, which is ours. Keys and values of the template are made anew at each step, as "
        "theirs are. Dropouts, beam search and label smoothing are left out"
    ),
    exempt={
        "bytes": "how much is kept depends on what the text says: of the present answer more than of the template; see identities"
    },
)
EPSILON = 1e-8


def segment_positions(blanks: Sequence[bool]) -> list[tuple[int, int]]:
    """(segment, offset) of each token of a template: segments change between blanks and text, offsets count within them."""
    made: list[tuple[int, int]] = []
    for at, blank in enumerate(blanks):
        segment, offset = made[-1] if made else (0, -1)
        made.append((segment, offset + 1) if not at or blank == blanks[at - 1] else (segment + 1, 0))
    return made


def sinusoids(places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Of places (...), (..., width): sines, then cosines, of place * 10000^(-k / (width / 2 - 1)), k = 0, 1, ..., width / 2 - 1."""
    wide = torch.promote_types(dtype, torch.float32)
    rates = 10000.0 ** (-torch.arange(width // 2, device=places.device, dtype=wide) / (width // 2 - 1))
    angles = places.to(wide)[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


class Marks(NamedTuple):
    """Tokens of their own: what stands for a blank, what begins and what ends an answer."""

    blank: int
    begin: int
    end: int


@dataclass(frozen=True)
class Pass:
    """One answer of each row of a batch, and the template as it is while that is written.

    own: offsets of new tokens within it; -1 at others. earlier: the same of the keys kept, where it goes on. places: of the new
    tokens. template: its tokens, and their places; -1 at padding. last: rows of which this is the last answer so far.
    """

    own: Int[Tensor, "b n"]
    earlier: Int[Tensor, "b slots"] | None
    places: Int[Tensor, "b n"]
    template: tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]] | None
    last: Bool[Tensor, " b"]


class Texts(Cache):
    """The tokens of each row, and the offsets of those whose keys and values are kept: the present answer's."""

    def __init__(self, marks: Marks | None, stride: int) -> None:
        self.marks, self.stride = marks, stride
        self.ids: Tensor | None = None
        self.real: Tensor | None = None
        self.kept: Tensor | None = None  # (b, slots)

    def __len__(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`: of positions, none."""
        return (self.ids,)

    def extend(self, ids: Tensor, attention_mask: Tensor | None) -> list[Pass]:
        """Adds new tokens, and says in which passes they are read."""
        b, n, old = *ids.shape, len(self)
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.ids is not None and self.real is not None:
            ids, real = torch.cat([self.ids, ids], 1), torch.cat([self.real, real], 1)
        self.ids, self.real = ids, real
        count = real.cumsum(1) - 1
        if self.marks is None:
            answer, offset = torch.ones_like(ids), count
        else:
            begins = (ids == self.marks.begin) & real
            answer, offset = begins.cumsum(1), count - torch.where(begins, count, 0).cummax(1).values
        offset = offset.where(real & (answer > 0), -1)
        before, now = answer[:, old - 1] if old else answer.new_zeros(b), answer[:, -1]
        steps = [int(not old)] if self.marks is None else range(int((now - before).max()) + 1)
        passes = []
        for step in steps:
            wanted = before + step
            own = offset.where(answer == wanted[:, None], -1)[:, -n:]
            if self.marks is None or bool((own >= 0).any()):
                segment, template = self._laid_out(wanted)
                places = segment * self.stride + own.clamp(min=0)
                passes.append(Pass(own, None if step else self.kept, places, template, wanted == now))
        if passes:
            kept = offset.where(answer == now[:, None], -1)[:, -n:]
            if self.kept is not None:
                kept = torch.cat([self.kept.where((before == now)[:, None], -1), kept], 1)
            self.kept = kept
        return passes

    def _laid_out(self, answers: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The segments (b, 1) of some answers, one a row, and each row's template by then."""
        assert self.ids is not None
        assert self.real is not None
        if self.marks is None:
            return torch.zeros_like(answers)[:, None], None
        segments, tokens, places = [], [], []
        for row, real, answer in zip(self.ids.tolist(), self.real.tolist(), answers.tolist(), strict=True):
            text, segment = template_for(
                split([t for t, there in zip(row, real, strict=True) if there], self.marks), answer, self.marks
            )
            rest = [-1] * (len(row) - len(text))  # so that shapes do not depend on what texts say
            tokens.append([token for token, _, _ in text] + [0] * len(rest))
            places.append([at * self.stride + offset for _, at, offset in text] + rest)
            segments.append([segment])
        made = [torch.tensor(of, device=answers.device) for of in (segments, tokens, places)]
        return made[0], (made[1], made[2])


def split(tokens: Sequence[int], marks: Marks) -> list[list[int]]:
    """The template, and each answer with the token that begins it."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == marks.begin:
            parts.append([])
        parts[-1].append(token)
    return parts


def template_for(parts: list[list[int]], answer: int, marks: Marks) -> tuple[list[tuple[int, int, int]], int]:
    """(token, segment, offset) of what an answer reads, counted from 1, and the segment that it is in itself."""
    fills = [part[1:] for part in parts[1:answer]]
    fills = [fill[: fill.index(marks.end)] if marks.end in fill else fill for fill in fills]
    text: list[tuple[int, bool]] = []
    for token in parts[0]:
        if token == marks.blank and fills:
            text += [(filled, False) for filled in fills.pop(0)]
        else:
            text.append((token, token == marks.blank))
    text += [(filled, False) for fill in fills for filled in fill]
    blanks = [blank for _, blank in text]
    found = segment_positions([*blanks, True])  # as if a blank were at the end, where there is none
    return [(token, *at) for (token, _), at in zip(text, found, strict=False)], found[[*blanks, True].index(True)][0]


class AnswerKeys(Cache):
    """A layer's keys and values of the present answer."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.new: tuple[Tensor, Tensor] | None = None  # of the passes since

    def __len__(self) -> int:
        return len(self.texts)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.k, self.v)

    def add(self, k: Tensor, v: Tensor, rows: Tensor) -> None:
        """Takes rows of new keys and values (b, h, n, d)."""
        rows = rows[:, None, None, None]
        self.new = (k, v) if self.new is None else (torch.where(rows, k, self.new[0]), torch.where(rows, v, self.new[1]))

    def keep(self, slots: Tensor) -> None:
        """Joins what was added with what is kept, of which only some slots stay."""
        if self.new is not None:
            k, v = self.new
            if self.k is not None and self.v is not None:
                k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            self.k, self.v, self.new = k[:, :, slots], v[:, :, slots], None


class Layer(nn.Module):
    """Attention to the answer so far, attention to the template, and a feed-forward layer, each behind a norm."""

    def __init__(self, width: int, heads: int, hidden: int, *, reads: bool) -> None:
        super().__init__()
        self.own = Projections(width, heads)
        self.read = Projections(width, heads) if reads else None
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.own_norm, self.feed_norm = (nn.LayerNorm(width, eps=EPSILON) for _ in range(2))
        self.read_norm = nn.LayerNorm(width, eps=EPSILON) if reads else None

    def forward(self, x: Tokens, memory: Tokens | None, at: Pass, cache: AnswerKeys) -> Tokens:
        """x: the new tokens. memory: embeddings of the template."""
        q, k, v = self.own.split(self.own_norm(x))
        cache.add(k, v, at.last)
        offsets = at.own
        if at.earlier is not None and cache.k is not None and cache.v is not None:
            k, v, offsets = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2), torch.cat([at.earlier, offsets], 1)
        x = x + self.own.merge(attend(q, k, v, Causal(), query_positions=at.own.clamp(min=0), key_positions=offsets))
        if memory is not None and at.template is not None and self.read is not None and self.read_norm is not None:
            q = self.read.split(self.read_norm(x))[0]
            _, k, v = self.read.split(memory)
            x = x + self.read.merge(attend(q, k, v, query_positions=torch.zeros_like(at.own), key_positions=at.template[1]))
        made: Tokens = x + self.down(F.relu(self.up(self.feed_norm(x))))
        return made


class TemplateDecoder(LanguageModel):
    """A decoder of rows that hold a template, and after it an answer to each of its blanks.

    Args: hidden: of the feed-forward layers. marks: None for texts without template. stride: how far segments are apart.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, *, context: int, hidden: int, marks: Marks | None, stride: int
    ) -> None:
        super().__init__()
        if width % heads or width % 2 or width < 4:
            raise ShapeError(f"width {width} must be a multiple of {heads} heads, and an even number of at least 4")
        if marks is not None and (len(set(marks)) < 3 or not all(0 <= mark < vocabulary for mark in marks)):
            raise ShapeError(f"{marks} must be different ones of {vocabulary} tokens")
        self.vocabulary, self.width, self.context, self.marks, self.stride = vocabulary, width, context, marks, stride
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, reads=marks is not None) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocabulary"]:
        """See `LanguageModel.forward`. A pass over the row for each answer; logits at the template, which is given, are zeros."""
        goes_on = caches is not None
        caches = self.new_caches() if caches is None else caches
        caches.advance(ids, attention_mask)
        texts, kept = cast(Texts, caches.layers[0]), cast(list[AnswerKeys], caches.layers[1:])
        weight = self.embedding.weight
        logits = weight.new_zeros(*ids.shape, self.vocabulary)
        for at in texts.extend(ids, attention_mask):
            x = self.embedding(ids) * self.width**0.5 + sinusoids(at.places, self.width, weight.dtype)
            memory = None
            if at.template is not None:
                memory = self.embedding(at.template[0]) + sinusoids(at.template[1].clamp(min=0), self.width, weight.dtype)
            for layer, cache in zip(self.layers, kept, strict=True):
                x = layer(x, memory, at, cache)
            logits = torch.where((at.own >= 0)[..., None], F.linear(self.norm(x), weight), logits)
        if goes_on and texts.kept is not None:
            slots = (texts.kept >= 0).any(0)
            texts.kept = texts.kept[:, slots]
            for cache in kept:
                cache.keep(slots)
        return logits

    def new_caches(self) -> Caches:
        """See `LanguageModel.new_caches`: the tokens, and for each layer keys and values of the present answer."""
        texts = Texts(self.marks, self.stride)
        return Caches([texts, *(AnswerKeys(texts) for _ in self.layers)])

    @torch.no_grad()
    def fill(self, template: Tensor, longest: int) -> Tensor:
        """A template (n,) with the likeliest tokens in its blanks, from left to right, at most `longest` in each.

        Raises: InputError if the model was built for texts without blanks.
        """
        if self.marks is None:
            raise InputError("a model without marks knows no blanks; build it with `marks`")
        marks, caches, piece = self.marks, self.new_caches(), template
        answers: list[list[int]] = []
        for _ in range(int((template == marks.blank).sum())):
            answer: list[int] = []
            piece = torch.cat([piece, piece.new_tensor([marks.begin])])
            while True:
                logits = self(piece[None], caches=caches)[0, -1]
                logits[[marks.blank, marks.begin]] = -torch.inf
                token = int(logits.argmax()) if len(answer) < longest else marks.end
                piece = piece.new_tensor([token])
                if token == marks.end:
                    break
                answer.append(token)
            answers.append(answer)
        filled = [token for old in template.tolist() for token in (answers.pop(0) if old == marks.blank else [old])]
        return template.new_tensor(filled)


@named
def text_infilling(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    hidden: int | None = None,
    marks: Sequence[int] | None = (0, 1, 2),
    stride: int = 256,
) -> TemplateDecoder:
    """A decoder for rows of a template with blanks and, after it, an answer to each: `text BLANK text BEGIN answer END BEGIN ...`.

    Tokens of an answer read those before them in it, and all of the template, on both sides of the blank, with earlier answers in
    their places. A token's place is told by its segment, which changes between text and blanks, and its offset in that.

    Args:
        hidden: of the feed-forward layers; four times the width by default. marks: the tokens BLANK, BEGIN and END; None for a
            plain decoder: rows are then one answer, without a template and without attention to one.
        stride: the place of a token is stride * segment + offset; offsets beyond it are taken for those of the next segment.
    """
    hidden, of = 4 * width if hidden is None else hidden, None if marks is None else Marks(*marks)
    return TemplateDecoder(vocabulary, width, layers, heads, context=context, hidden=hidden, marks=of, stride=stride)


def oracle(model: TemplateDecoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), an answer at a time."""
    tokens, c, marks = ids.tolist(), model.width, model.marks
    starts = [0] if marks is None else [at for at, token in enumerate(tokens) if token == marks.begin]
    logits = torch.zeros(len(tokens), model.vocabulary, dtype=model.embedding.weight.dtype)
    text, blanks = ([], []) if marks is None else (tokens[: (starts or [len(tokens)])[0]], [])
    blanks = [marks is not None and token == marks.blank for token in text]

    def place(segment: int, offset: int) -> Tensor:
        rates = [10.0 ** (-4 * k / (c / 2 - 1)) for k in range(c // 2)]
        angles = torch.tensor([(segment * model.stride + offset) * rate for rate in rates], dtype=torch.float64)
        return torch.cat([torch.sin(angles), torch.cos(angles)])

    def norm(x: Tensor, by: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * by.weight + by.bias

    def attention(by: Any, x: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (_slow.heads_of(z, linear, by.heads) for z, linear in ((x, by.q), (keys, by.k), (keys, by.v)))
        return _slow.attention_rows(q, k, v, visible).flatten(1) @ by.out.weight.T

    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        where: list[tuple[int, int]] = []
        segment = 0
        for at in range(len(text)):
            changed = at > 0 and blanks[at] != blanks[at - 1]
            segment += changed
            where.append((segment, 0 if changed or not at else where[-1][1] + 1))
        here = where[blanks.index(True)][0] if True in blanks else segment + (len(text) > 0)
        x = torch.stack([model.embedding.weight[ids[at]] * c**0.5 + place(here, at - start) for at in range(start, stop)])
        for layer in cast(Any, model.layers):
            h = norm(x, layer.own_norm)
            x = x + attention(layer.own, h, h, _slow.causal(stop - start))
            if text:
                memory = torch.stack([model.embedding.weight[token] + place(*at) for token, at in zip(text, where, strict=True)])
                x = x + attention(layer.read, norm(x, layer.read_norm), memory, torch.ones(len(x), len(memory)))
            h = norm(x, layer.feed_norm) @ layer.up.weight.T + layer.up.bias
            x = x + (h * (h > 0)) @ layer.down.weight.T + layer.down.bias
        logits[start:stop] = norm(x, model.norm) @ model.embedding.weight.T
        if marks is not None:
            fill = tokens[start + 1 : stop]
            fill = fill[: fill.index(marks.end)] if marks.end in fill else fill
            at, over = (blanks.index(True), 1) if True in blanks else (len(text), 0)
            text, blanks = text[:at] + fill + text[at + over :], blanks[:at] + [False] * len(fill) + blanks[at + over :]
    return logits


def examples() -> list[TemplateDecoder]:
    """Settings that the conformance checks run: of few tokens, so that a text at random has blanks and answers."""
    made = [
        text_infilling(9, 32, 2, 4, context=64, hidden=24),
        text_infilling(7, 16, 3, 2, context=64, marks=(3, 6, 1), stride=11),
        text_infilling(23, 32, 2, 4, context=64, marks=None),
    ]
    for model in made:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, float(parameter.detach().mean()), 0.3)
    return made


def kept(model: TemplateDecoder, tokens: int, answer: int = 0) -> int:
    """After so many tokens, `answer` of them of the present answer: all tokens, and in each layer keys and values of these."""
    return tokens + 2 * model.width * len(model.layers) * answer


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> TemplateDecoder:
    """A plain decoder of the paper's layers, for texts that have no marks; give `marks` for those that have."""
    return text_infilling(vocabulary, width, layers, heads, **{"context": tokens, "marks": None, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    found = segment_positions([False, False, True, True, True, True, False, False, True, True, False])
    told = [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4], [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 0]
    yield "segments and offsets of the authors' example", float(found != list(zip(*told, strict=True)))

    model = text_infilling(23, 32, 2, 4).double()
    blank, begin, end = cast(Marks, model.marks)
    plain = text_infilling(23, 32, 2, 4, marks=None).double()
    plain.load_state_dict({name: part for name, part in model.state_dict().items() if name in plain.state_dict()})
    alone = torch.tensor([[begin, 5, 9, 7, 7, 3]])
    yield "without a template it is a plain decoder, whose places are ordinary sinusoids", largest(model(alone) - plain(alone))

    left, middle, right = [3, 4, 5], [6, 7], [8, 9]
    first, second = [begin, 11, 12, end], [begin, 13, 14, 15, end]
    row = torch.tensor([[*left, blank, *middle, blank, *right, *first, *second]])
    out = model(row)
    filled = torch.tensor([[*left, 11, 12, *middle, blank, *right, *second]])
    yield "an answer given is as good as text", largest(out[:, -5:] - model(filled)[:, -5:])
    other = row.clone()
    other[:, -5 + 1] = 16
    at = row.shape[1] - 9
    yield "an answer does not know what later ones say", largest((out - model(other))[:, : at + 5])
    for words, place in (("right", 8), ("left", 0)):
        other = row.clone()
        other[:, place] = 16
        changed = (out - model(other))[0, at:].abs().amax(-1)
        yield f"every token of an answer knows the text on the {words}", float(changed.min() < 1e-6)
    turned = torch.tensor([[*left, blank, *middle, blank, *right, *second, *first]])
    apart = (model(turned)[:, at : at + 1] - out[:, at + 4 : at + 5]).abs().max()
    yield "and which blank it fills", float(apart < 1e-6)

    caches = model.new_caches()
    for token in row.split(1, 1):
        model(token, caches=caches)
    yield (
        "caches hold the tokens, and keys and values of the present answer alone",
        float(abs(caches.nbytes // 8 - kept(model, row.shape[1], len(second)))),
    )
    text, wanted = row[0, :9], row[:, :9]
    for _ in range(2):
        wanted = torch.cat([wanted, torch.tensor([[begin]])], 1)
        for step in range(4):
            logits = model(wanted)[0, -1].detach()
            logits[[blank, begin]] = -torch.inf
            token = int(logits.argmax()) if step < 3 else end
            wanted = torch.cat([wanted, torch.tensor([[token]])], 1)
            if token == end:
                break
    parts = [part[1:-1] for part in split(wanted[0].tolist(), Marks(blank, begin, end))[1:]]
    by_hand = left + parts[0] + middle + parts[1] + right
    yield "filled text is that of full passes", float(model.fill(text, 3).tolist() != by_hand)
    with torch.device("meta"):
        paper = text_infilling(10000, 512, 6, 8)
    layer = 8 * 512**2 + 2 * 4 * 512**2 + 4 * 512 + 512 + 3 * 2 * 512
    yield "places have no parameters", float(abs(paper.parameter_count - 10000 * 512 - 6 * layer - 2 * 512))
