"""Matrix atom sharing: the layers' projections are combinations of matrices that all of them share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import Tokens, largest
from ..build import named
from ..model import LanguageModel
from ..transformer import Transformer
from . import _slow
from ._conversion import plain

CARD = Card(
    paper="Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
    year=2025,
    room="heads",
    source=(
        "arXiv:2508.04581: W_l = sum_s c_ls D_s, a dictionary for each of Q, K, V and O, atoms as large as the matrices. "
        "Conversion: the leading singular vectors of all layers' matrices, no mean taken off, then a low-rank rest that is fitted "
        "for the inputs that layers see (by a Cholesky factor of their second moments). In training the paper draws a layer's "
        "coefficients from an embedding of it by three linear layers of a size that is not told; here they are trained "
        "themselves. Atoms begin so that each W_l has the variance of a linear map's usual start"
    ),
    status="coefficients are trained directly, instead of as the output of a small network that is thrown away after training",
)
NAMES = {"q": "q", "k": "k", "v": "v", "o": "out"}


class Atoms(nn.Module):
    """A dictionary of matrices (atoms, out, in)."""

    def __init__(self, atoms: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(atoms, out_features, in_features) * (3 * in_features) ** -0.5)


class AtomLinear(nn.Module):
    """A linear map whose weight is a combination of shared atoms, plus, after a conversion, a low-rank rest of its own.

    Args:
        atoms: the dictionary, which others hold too. rank: of the rest; 0 for none.
    """

    def __init__(self, atoms: Atoms, *, rank: int = 0) -> None:
        super().__init__()
        self.atoms = atoms
        count, self.out_features, self.in_features = atoms.matrices.shape
        self.coefficients = nn.Parameter(F.normalize(torch.randn(count), dim=0))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank)) if rank else None
        self.down = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5) if rank else None
        self.bias = None

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix, made of the atoms; once for all tokens of a pass."""
        made = torch.tensordot(self.coefficients, self.atoms.matrices, 1)
        return made if self.up is None or self.down is None else made + self.up @ self.down

    def forward(self, x: Tokens) -> Tokens:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight)


@named
def masa(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    atoms: int | None = None,
    projections: str = "qkvo",
    groups: Sequence[int] | None = None,
    rank: int = 0,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **options: Any,
) -> Transformer:
    """A decoder whose attention projections are combinations of `atoms` matrices for all layers together.

    S (c^2 + L) numbers for each projection instead of L c^2. Caches and reading are as without.

    Args:
        atoms: of each dictionary; a third of the layers by default, which saves two thirds. projections: which of q, k, v and o are
            shared ("qkv" leaves the output's alone). groups: first layers of runs with dictionaries of their own; one by default.
        rank: of what each layer adds of its own. kv_heads, head_dim: as for `Attention`. options: as for `Transformer`.

    Raises: ShapeError if a run of layers has no atom, or if a projection is none.
    """
    atoms = max(1, layers // 3) if atoms is None else atoms
    starts = [0] if groups is None else sorted(groups)
    if atoms < 1 or starts[:1] != [0] or starts[-1] >= layers or not set(projections) <= set(NAMES):
        told = f"{atoms} atoms, groups {starts} of {layers} layers, projections {projections!r}"
        raise ShapeError(f"{told}: at least one atom, groups that begin with 0, and some of the letters q, k, v, o are due")
    mixer = ("softmax", {"kv_heads": kv_heads, "head_dim": head_dim})
    model = Transformer(vocabulary, width, layers, heads, mixer=mixer, context=context, **options)
    shared: dict[str, Atoms] = {}
    for layer, block in model.layers():
        own = cast(Attention, block.mixer).projections
        if layer in starts:
            for letter in projections:
                linear = getattr(own, NAMES[letter])
                shared[letter] = Atoms(atoms, linear.out_features, linear.in_features)
        for letter in projections:
            setattr(own, NAMES[letter], AtomLinear(shared[letter], rank=rank))
    return model


def fit(
    model: LanguageModel,
    atoms: int,
    *,
    projections: str = "qkvo",
    groups: Sequence[int] | None = None,
    rank: int = 0,
    ids: Int[Tensor, "b n"] | None = None,
) -> Transformer:
    """A plain decoder's projections as combinations of few atoms, the best in the sum of squares; all else stays.

    Args:
        atoms, projections, groups: as for `masa`. rank: of the rest that each layer keeps of its own. ids: tokens to fit the
            rest for: what counts then is what a layer's inputs make of it, not all entries alike.

    Raises: UnsupportedModelError for a model that is no plain `Transformer`. ShapeError if its projections have biases.
    """
    of = plain(model)
    if of.shape["bias"]:
        raise ShapeError("projections with a bias have no combination of atoms here; convert a model without")
    options = {**of.options, "kv_heads": of.shape["kv_heads"], "head_dim": of.shape["head_dim"]}
    made = masa(*of.sizes, atoms=atoms, projections=projections, groups=groups, rank=rank, **options)
    made.to(next(model.parameters())).train(model.training)
    old, new = model.state_dict(), made.state_dict()
    made.load_state_dict({name: old[name] for name in new if name in old}, strict=False)
    starts = [0] if groups is None else sorted(groups)
    moments = None if ids is None or not rank else _moments(cast(Transformer, model), ids)
    mine = [cast(Attention, block.mixer).projections for _, block in made.layers()]
    with torch.no_grad():
        for start, stop in zip(starts, [*starts[1:], len(mine)], strict=True):
            for letter in projections:
                name = NAMES[letter]
                target = torch.stack([getattr(of.projections[layer], name).weight for layer in range(start, stop)])
                linears = [cast(AtomLinear, getattr(own, name)) for own in mine[start:stop]]
                _principal(linears, target)
                for layer, (linear, weight) in enumerate(zip(linears, target, strict=True), start):
                    _rest(linear, weight, None if moments is None else moments[letter == "o"][layer])
    return made


def _principal(linears: Sequence[AtomLinear], target: Float[Tensor, "layers out in"]) -> None:
    """The atoms that leave the least of the matrices in the sum of squares, and each one's coefficients."""
    flat = target.flatten(1).double()
    u, s, vt = torch.linalg.svd(flat, full_matrices=False)
    atoms, have = linears[0].atoms.matrices, min(len(linears[0].coefficients), len(s))
    atoms.zero_()
    atoms[:have] = vt[:have].unflatten(1, target.shape[1:]).to(atoms)
    for linear, row in zip(linears, u * s, strict=True):
        linear.coefficients.zero_()
        linear.coefficients[:have] = row[:have].to(atoms)


def _rest(linear: AtomLinear, weight: Tensor, moment: Tensor | None) -> None:
    """Fits up @ down to what the atoms leave: in the sum of squares, or for inputs of a second moment (in, in)."""
    if linear.up is None or linear.down is None:
        return
    linear.up.zero_()
    left = (weight - linear.weight).double()
    factor = torch.eye(left.shape[1], dtype=torch.float64, device=left.device)
    if moment is not None:
        lift = 1e-6 * float(moment.diagonal().mean())
        factor = torch.linalg.cholesky(moment.double() + lift * factor)
    u, s, vt = torch.linalg.svd(left @ factor, full_matrices=False)
    rank = linear.up.shape[1]
    linear.up.copy_(u[:, :rank] * s[:rank])
    linear.down.copy_(torch.linalg.solve_triangular(factor, vt[:rank], upper=False, left=False))


@torch.no_grad()
def _moments(model: Transformer, ids: Tensor) -> dict[bool, list[Tensor]]:
    """{whether of the output's map: the mean of x x^T over tokens, layer by layer}."""
    found: dict[bool, list[Tensor]] = {False: [], True: []}

    def watch(is_output: bool) -> Any:
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1).double()
            found[is_output].append(x.T @ x / len(x))

        return seen

    hooks = []
    for _, block in model.layers():
        own = cast(Attention, block.mixer).projections
        hooks += [own.q.register_forward_pre_hook(watch(False)), own.out.register_forward_pre_hook(watch(True))]
    try:
        model.encode(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary). Atoms are applied to the tokens one by one, and what they give is combined."""

    def through(x: Tensor, linear: Any) -> Tensor:
        if not isinstance(linear, AtomLinear):
            return x @ linear.weight.T
        out = x.new_zeros(len(x), linear.out_features)
        for coefficient, atom in zip(linear.coefficients, linear.atoms.matrices, strict=True):
            out = out + coefficient * (x @ atom.T)
        return out if linear.up is None or linear.down is None else out + (x @ linear.down.T) @ linear.up.T

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer = cast(Attention, _slow.mixer_of(model, at))
        p, base = mixer.projections, _slow.base_of(mixer)
        q, k, v = (through(x, f).unflatten(-1, (-1, p.head_dim)) for f in (p.q, p.k, p.v))
        read = _slow.attention_rows(_slow.turned(q, base), _slow.turned(k, base), v, _slow.visible_to(model, at, len(x)))
        return through(read.flatten(1), p.out)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        masa(23, 32, 4, 4, context=64, atoms=2),
        masa(23, 32, 4, 4, context=64, atoms=2, groups=[0, 2], projections="qkv", kv_heads=2, rank=3, windows=9),
    ]
    for name, parameter in made[1].named_parameters():
        if name.endswith("up"):
            nn.init.normal_(parameter, std=0.2)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold: keys and values of every layer, as without sharing."""
    numbers = 0
    for layer, block in model.layers():
        of = cast(Attention, block.mixer).projections
        numbers += 2 * of.kv_heads * of.head_dim * _slow.slots(model, layer, tokens)
    return numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """All four projections, a third as many atoms as layers."""
    return masa(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    model = Transformer(23, 32, 4, 4, mixer=("softmax", {"kv_heads": 2})).double()
    yield "as many atoms as layers give the model back", largest(fit(model, 4)(ids) - model(ids))
    weights = torch.stack([cast(Attention, block.mixer).projections.k.weight for _, block in model.layers()]).detach()
    values = torch.linalg.svdvals(weights.flatten(1))
    made = fit(model, 2)
    left = torch.stack([cast(Attention, block.mixer).projections.k.weight for _, block in made.layers()]).detach() - weights
    off = left.square().sum() - values[2:].square().sum()
    yield "what atoms leave is the sum of the other squared singular values", abs(float(off))
    rest = fit(model, 2, rank=16)  # as many as keys have dimensions
    keys = [cast(Attention, block.mixer).projections.k.weight for _, block in rest.layers()]
    yield "a rest of full rank gives the matrices back", largest(torch.stack(keys) - weights)
    alike = copy.deepcopy(model)
    with torch.no_grad():
        for factor, (_, block) in enumerate(alike.layers(), 1):
            own, first = (cast(Attention, b.mixer).projections for b in (block, cast(Any, model.blocks[0])))
            for name in NAMES.values():
                getattr(own, name).weight.copy_(factor * getattr(first, name).weight)
    yield "layers that are multiples of one another need one atom", largest(fit(alike, 1)(ids) - alike(ids))

    one = masa(23, 32, 2, 4, atoms=2).double()
    linears = [cast(Any, block.mixer).projections.q for _, block in one.layers()]
    one(ids).square().sum().backward()
    apart = copy.deepcopy(one)
    for linear, (_, block) in zip(linears, apart.layers(), strict=True):
        own = cast(Any, block.mixer).projections
        own.q = nn.Linear(32, 32, bias=False).double()
        own.q.weight = nn.Parameter(linear.weight.detach())
    apart.zero_grad()
    apart(ids).square().sum().backward()
    wanted = [cast(Any, block.mixer).projections.q.weight.grad for _, block in apart.layers()]
    summed = sum(linear.coefficients[0] * grad for linear, grad in zip(linears, wanted, strict=True))
    yield "an atom's gradient is the sum of the layers', by their coefficients", largest(linears[0].atoms.matrices.grad[0] - summed)

    with torch.device("meta"):
        full = Transformer(64, 1536, 24, 24, hidden=0).parameter_count
        fewer = masa(64, 1536, 24, 24, hidden=0).parameter_count
    yield (
        "24 layers of width 1536: 4 (S c^2 + S L) parameters instead of 4 L c^2",
        float(abs(full - fewer - 4 * 24 * 1536**2 + 4 * (8 * 1536**2 + 8 * 24))),
    )
