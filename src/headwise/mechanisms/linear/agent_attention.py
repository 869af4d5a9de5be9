"""Agent attention: a few pooled queries read all tokens by softmax, and every token reads those few by softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Bias, Places, Stage
from ...card import Card
from ...errors import ShapeError
from .._caches import Cache, Recent
from .._mixer import Mixer, Projections, Real, Tokens, largest, shake
from ._through import read_through

CARD = Card(
    paper="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    room="linear",
    source=(
        "arXiv:2312.08874, sec. 4, and LeapLabTHU/Agent-Attention, agent_deit.py: queries pooled over the grid are agents; both "
        "reads have the scale 1 / sqrt(d) and biases (7 x 7 tables, interpolated, and those of rows, columns and a class token "
        "that comes first); a depthwise 3 x 3 convolution of values is added. Maps have biases, as in DeiT. A line of tokens is "
        "our own: pools, tables of 7 and convolutions of 3 along it. `insert` is the training-free form of agentsd/patch.py; "
        "agents are given to it, where the code merges tokens. Smaller keys and values, as in PVT, are left out"
    ),
)
TABLE = 7  # numbers along a side, from which biases are interpolated


@dataclass(frozen=True, eq=False)
class _Table(Bias):
    """Adds a table, (b or 1, h, n, m)."""

    table: Tensor

    def bias(self, places: Places) -> Tensor:
        return places.of_table(self.table).to(places.dtype)

    def given(self) -> torch.dtype:
        return self.table.dtype


class AgentAttention(Mixer):
    """softmax(q a^T / sqrt(d) + B2) softmax(a k^T / sqrt(d) + B1) v + DWC(v); agents a are pooled queries.

    Args:
        heads: of width / heads. agents: how many; of a grid a square number. grid: (rows, columns) of the tokens; None for a
            line of any length. class_token: a first token beside the grid, which is in no pool and in no convolution.
    """

    cannot = {"causal": "agents are pooled from all tokens", "decode": "agents are pooled from all tokens"}

    def __init__(
        self, width: int, heads: int, agents: int = 49, *, grid: tuple[int, int] | None = None, class_token: bool = False
    ) -> None:
        super().__init__()
        self.width, self.heads, self.agents, self.grid, self.class_token = width, heads, agents, grid, class_token
        self.side = round(agents**0.5)
        if agents < 1 or (grid is not None and self.side**2 != agents):
            raise ShapeError(f"agents {agents} must be 1 or more, and of a grid a square number")
        if class_token and grid is None:
            raise ShapeError("a class token stands before a grid; a line has none")
        self.projections = Projections(width, heads, bias=True)
        if grid is None:
            self.conv: nn.Conv1d | nn.Conv2d = nn.Conv1d(width, width, 3, groups=width)
        else:
            self.cannot = {**self.cannot, "padding": "a grid is read as a whole"}
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        sides = [TABLE] if grid is None else [TABLE, TABLE]
        self.biases = nn.ParameterDict()
        for name in ("agents", "tokens"):  # of agents reading tokens, of tokens reading agents
            self.biases[name] = nn.Parameter(torch.empty(heads, agents, *sides))
            if grid is not None:
                self.biases[f"{name}_rows"] = nn.Parameter(torch.empty(heads, agents, grid[0], 1))
                self.biases[f"{name}_columns"] = nn.Parameter(torch.empty(heads, agents, 1, grid[1]))
            if class_token:
                self.biases[f"{name}_class"] = nn.Parameter(torch.empty(heads, agents, 1))
        for bias in self.biases.values():
            nn.init.trunc_normal_(bias, std=0.02)

    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        if stages or cache is not None:
            raise ShapeError(f"agents are pooled from all tokens: no stage and no cache can be obeyed; got {stages}, {cache}")
        b, n = x.shape[:2]
        if attention_mask is not None and (attention_mask.shape != (b, n) or self.grid is not None):
            shape = tuple(attention_mask.shape)
            raise ShapeError(f"attention_mask is {shape}; it must be (batch, tokens) = {(b, n)}, and a grid has none")
        if self.grid is not None and n != self.grid[0] * self.grid[1] + self.class_token:
            raise ShapeError(f"{n} tokens are no grid {self.grid}" + (" and a class token" if self.class_token else ""))
        real = None if attention_mask is None else attention_mask.bool()
        q, k, v = self.projections.split(x)
        pooled, places = self._line(q, real) if self.grid is None else (self._of_grid(q), None)
        first, second = (self._bias(name, places).to(q.dtype) for name in ("agents", "tokens"))
        out = read_through(q, k, v, pooled.to(q.dtype), _Table(first), _Table(second.mT), real=real)
        return self.projections.merge(out + self._convolved(v, real))

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """It has none."""
        raise NotImplementedError(self.cannot["decode"])

    def _of_grid(self, q: Tensor) -> Tensor:
        """Adaptive average pools of the grid, a row of them after the other."""
        assert self.grid is not None
        of_grid = q[:, :, int(self.class_token) :].mT.flatten(1, 2).unflatten(-1, self.grid)
        return F.adaptive_avg_pool2d(of_grid, self.side).flatten(2).unflatten(1, (self.heads, -1)).mT

    def _line(self, q: Tensor, real: Real | None) -> tuple[Tensor, Tensor]:
        """The same of a line, whose pools are of tokens without padding; and interpolation of tables, (b or 1, TABLE, n)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        there = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device) if real is None else real
        place, count = there.cumsum(1) - 1, there.sum(1, keepdim=True)
        edges = torch.arange(self.agents + 1, device=q.device)[None] * count
        begins, ends = edges[:, :-1] // self.agents, -(-edges[:, 1:] // self.agents)
        inside = (place[:, None] >= begins[..., None]) & (place[:, None] < ends[..., None])
        pool = inside.to(wide) / (ends - begins).clamp(min=1)[..., None]
        at = ((place.to(wide) + 0.5) * TABLE / count.clamp(min=1) - 0.5).clamp(0, TABLE - 1)
        near = (1 - (at[:, None] - torch.arange(TABLE, device=q.device)[:, None]).abs()).clamp(min=0)
        kept = q if real is None else q.where(real[:, None, :, None], 0.0)
        return pool[:, None] @ kept.to(wide), near

    def _bias(self, name: str, places: Tensor | None) -> Float[Tensor, "b h agents n"]:
        table = self.biases[name]
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        if self.grid is None:
            assert places is not None
            return table @ places[:, None]
        found = F.interpolate(table, size=self.grid, mode="bilinear")
        found = (found + self.biases[f"{name}_rows"] + self.biases[f"{name}_columns"]).flatten(2)
        return (torch.cat([self.biases[f"{name}_class"], found], -1) if self.class_token else found)[None]

    def _convolved(self, v: Tensor, real: Real | None) -> Tensor:
        """Values, heads together, convolved over the grid or the line."""
        if self.grid is not None:
            of_grid = v[:, :, int(self.class_token) :].mT.flatten(1, 2).unflatten(-1, self.grid)
            out = self.conv(of_grid).flatten(2).unflatten(1, (self.heads, -1)).mT
            return F.pad(out, (0, 0, int(self.class_token), 0))
        rows = v.transpose(1, 2).flatten(2)
        if real is not None:
            rows = rows.where(real[..., None], 0.0)

        def run(near: Tensor) -> Tensor:
            mixed: Tensor = self.conv(F.pad(near, (0, 0, 0, 1)).mT)
            return mixed.mT

        return Recent(1).along(rows, real, run).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def insert(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    agents: Float[Tensor, "b h a d"],
    *,
    power: float = 0.3,
    shortcut: float = 0.075,
) -> Float[Tensor, "b h n d"]:
    """The training-free form, in place of a trained softmax attention: agents are queries of merged tokens.

    The second read's scale is d ** (-power / 2), and a part of the values is added. With agents half as many as queries or
    more it would save nothing, and is plain attention.
    """
    if 2 * agents.shape[2] >= q.shape[2]:
        return attend(q, k, v)
    return read_through(q, k, v, agents, scales=(None, q.shape[-1] ** (-power / 2))) + shortcut * v


def oracle(mixer: AgentAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): pools, biases, both reads and convolutions in loops."""
    maps, n, skip, d = mixer.projections, len(x), int(mixer.class_token), mixer.width // mixer.heads
    rows, columns = (1, n) if mixer.grid is None else mixer.grid
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))
    high, side = (1, mixer.agents) if mixer.grid is None else (mixer.side, mixer.side)

    def ends(i: int, size: int, parts: int) -> range:
        return range(i * size // parts, ((i + 1) * size + parts - 1) // parts)

    def mixed(place: int, size: int) -> list[float]:
        at = min(max((place + 0.5) * TABLE / size - 0.5, 0.0), TABLE - 1.0)
        low = int(at)
        return [(1 - (at - low)) * (p == low) + (at - low) * (p == low + 1) for p in range(TABLE)]

    agents = []
    for i in range(high):
        for j in range(side):
            own = [skip + r * columns + c for r in ends(i, rows, high) for c in ends(j, columns, side)]
            agents.append(torch.stack([q[t] for t in own]).mean(0))

    def bias(name: str, head: int, a: int, t: int) -> Any:
        if t < skip:
            return mixer.biases[f"{name}_class"][head, a, 0]
        r, c = divmod(t - skip, columns)
        table, along = mixer.biases[name][head, a], mixed(c, columns)
        if mixer.grid is None:
            return sum(table[p] * along[p] for p in range(TABLE))
        down = mixed(r, rows)
        found = sum(table[i, p] * down[i] * along[p] for i in range(TABLE) for p in range(TABLE))
        return found + mixer.biases[f"{name}_rows"][head, a, r, 0] + mixer.biases[f"{name}_columns"][head, a, 0, c]

    read = []
    for head in range(mixer.heads):
        own_d = slice(head * d, (head + 1) * d)
        gathered = []
        for a, agent in enumerate(agents):
            scores = torch.stack([agent[own_d] @ k[t, own_d] / d**0.5 + bias("agents", head, a, t) for t in range(n)])
            gathered.append(torch.exp(scores) @ v[:, own_d] / torch.exp(scores).sum())
        for t in range(n):
            scores = torch.stack([q[t, own_d] @ g[own_d] / d**0.5 + bias("tokens", head, a, t) for a, g in enumerate(agents)])
            read.append(torch.exp(scores) @ torch.stack(gathered) / torch.exp(scores).sum())
    out = torch.stack(read).unflatten(0, (mixer.heads, n)).transpose(0, 1).flatten(1)
    conv_bias: Any = mixer.conv.bias
    near, kernel = [], mixer.conv.weight[:, 0].unflatten(1, (-1, 3)) if mixer.grid is None else mixer.conv.weight[:, 0]
    for t in range(n):
        total = torch.zeros(mixer.width, dtype=x.dtype)
        if t >= skip:
            r, c = divmod(t - skip, columns)
            total = total + conv_bias
            for i in range(kernel.shape[1]):
                for j in range(3):
                    row, column = r + i - kernel.shape[1] // 2, c + j - 1
                    if 0 <= row < rows and 0 <= column < columns:
                        total = total + kernel[:, i, j] * v[skip + row * columns + column]
        near.append(total)
    return (out + torch.stack(near)) @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[AgentAttention]:
    """Settings that the conformance checks run."""
    made = [AgentAttention(heads * size, heads, 9), AgentAttention(heads * size, heads // 2, 2)]
    for mixer in made:
        shake(mixer.biases.values(), seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> AgentAttention:
    """The paper's: 49 agents, along a line."""
    return AgentAttention(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    for first, grid in ((False, (5, 8)), (True, (3, 13))):
        made = AgentAttention(16, 2, 4, grid=grid, class_token=first).double()
        shake(made.biases.values(), seed=1)
        wanted = oracle(made, x[0], torch.ones(40, 40, dtype=torch.bool))
        yield f"a grid {grid}{' after a class token' if first else ''} is read as by loops", largest(made(x)[0] - wanted)
    line = AgentAttention(16, 2, 3).double()
    shake(line.biases.values(), seed=1)
    wanted = oracle(line, x[0], torch.ones(40, 40, dtype=torch.bool))
    yield "a line is read as by loops", largest(line(x)[0] - wanted)
    q, k, v, agents = (torch.randn(1, 3, n, 8, dtype=torch.float64) for n in (30, 30, 30, 5))
    first_map, second_map = ((a @ b.mT / 8**0.5).softmax(-1) for a, b in ((agents, k), (q, agents)))
    both = second_map @ first_map
    yield "generalised linear attention: its features are two softmaxes", largest(read_through(q, k, v, agents) - both @ v)
    yield "rows of both together sum to one", largest(both.sum(-1) - 1)
    yield "their rank is no more than the number of agents", float(torch.linalg.svdvals(both)[..., 5].max())
    one = read_through(q, k, v, agents[:, :, :1])
    yield "one agent: all tokens read the same", largest(one - one[:, :, :1])
    order = torch.randperm(5)
    yield "agents in another order change nothing", largest(read_through(q, k, v, agents[:, :, order]) - both @ v)
    scores = q @ agents.mT * 8**-0.15
    trained = scores.softmax(-1) @ first_map @ v + 0.075 * v
    yield "inserted without training: another scale, and a part of the values", largest(insert(q, k, v, agents) - trained)
    many = torch.cat([agents] * 3, 2)
    plain = F.scaled_dot_product_attention(q, k, v)
    yield "inserted with half as many agents as tokens: plain attention", largest(insert(q, k, v, many) - plain)
    eye = torch.eye(8, dtype=torch.float64).expand(1, 3, -1, -1)
    efficient = q.softmax(-1) @ (k.softmax(2).mT @ v)
    by_eye = read_through(q, k, v, eye, scales=(1.0, 1.0))
    yield "agents of an identity matrix, scale one: efficient attention", largest(by_eye - efficient)
    usual = sized(2, 8, 40)
    yield (
        "49 agents, biases of deviation 0.02",
        float(usual.agents != 49) + max(0.0, abs(float(usual.biases["agents"].std()) - 0.02) - 0.002),
    )
