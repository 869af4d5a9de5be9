"""What a scan found, in sentences with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..types import HeadTable
from .experiments import Causality, PruningCurve
from .roles import ROLES

Finding = dict[str, Any]  # title, text, numbers, heads


def _finding(title: str, text: str, heads: Sequence[str] = (), **numbers: Any) -> Finding:
    return {"title": title, "text": text, "heads": list(heads), "numbers": numbers}


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def role_findings(tables: Mapping[str, HeadTable]) -> list[Finding]:
    """One finding for each role that some head has."""
    found = []
    for role in ROLES:
        if role.probe not in tables or role.name == "retrieval":
            continue
        table = tables[role.probe]
        heads = table > role.bound
        total = table.heads().count()
        if not heads:
            best, value = table.ranking()[0]
            name = f"L{best[0]}H{best[1]}"
            found.append(
                _finding(
                    f"No {role.name} head", f"The nearest is {name} with {value:.2f} (bound {role.bound:g}).", [name], largest=value
                )
            )
            continue
        ranked = [f"L{h[0]}H{h[1]}" for h, value in table.ranking() if value > role.bound]
        largest = float(table.values.nan_to_num(-1).max())
        found.append(
            _finding(
                f"{heads.count()} {role.name} head{'s' if heads.count() > 1 else ''}",
                f"{_some(ranked)}: {'each ' if len(ranked) > 1 else ''}{role.about}; "
                f"{table.unit} above {role.bound:g}, the largest {largest:.2f}.",
                ranked, count=heads.count(), of=total, largest=largest,
            )
        )  # fmt: skip
    return found


def retrieval_finding(table: HeadTable, causality: Causality | None) -> Finding:
    """Who does the retrieval, and what happens without them."""
    heads = table > 0.1
    total = table.heads().count()
    if not heads:
        return _finding(
            "No retrieval heads",
            f"No head points at more than a tenth of a needle; "
            f"{table.about['answered']} of {table.about['prompts']} needles were answered.",
        )
    ranked = [f"L{h[0]}H{h[1]}" for h, value in table.ranking() if value > 0.1]
    text = f"{_some(ranked)} point at the needle while it is copied."
    numbers: dict[str, Any] = {
        "count": heads.count(),
        "of": total,
        "answered": table.about["answered"],
        "prompts": table.about["prompts"],
    }
    if causality is not None:
        text += (
            f" Closing them takes exact needle recall from {causality.base:.2f} to {causality.chosen:.2f}; "
            f"closing as many other heads, drawn at random, leaves {causality.random_median:.2f} "
            f"(median of {len(causality.random)} draws)."
        )
        numbers |= {"recall": causality.base, "recall_closed": causality.chosen, "recall_random_median": causality.random_median}
    return _finding(f"{heads.count()} of {total} heads do the retrieval ({heads.count() / total:.0%})", text, ranked, **numbers)


def pruning_finding(curve: PruningCurve, unit: str) -> Finding:
    """How many heads can go."""
    data = curve.to_dict()
    go, random = data["removable"], data["removable_random"]
    text = (
        f"Closing heads by {curve.by.replace('_', ' ')}, {go['1%']} go before {unit} rises by 1 %, "
        f"{go['3%']} before 3 %, {go['10%']} before 10 %. "
        f"In random order {random['1%']:g}, {random['3%']:g} and {random['10%']:g}. Gates only: no weights are removed yet."
    )
    return _finding(f"{go['3%']} heads can go for 3 %", text, removable=go, removable_random=random)


def agreement_finding(gradient: HeadTable, ablation: HeadTable) -> Finding:
    """Whether the cheap importance ranks heads as the exact one does."""
    rho = gradient.spearman(ablation)
    size = ablation.__class__(ablation.values.abs(), ablation.name, ablation.stack)
    absolute = gradient.spearman(size)
    word = "agree" if rho > 0.7 else "agree in part" if rho > 0.3 else "hardly agree"
    ranked = [f"L{h[0]}H{h[1]}" for h, _ in ablation.ranking()[:5]]
    text = (
        f"Rank correlation {rho:.2f} between the gradient of a head's gate and the exact rise of the loss without it "
        f"({absolute:.2f} with its size). Taken away alone, {_some(ranked)} cost most."
    )
    return _finding(f"Gradient and exact importance {word}", text, ranked, spearman=rho, spearman_absolute=absolute)


def massive_finding(table: HeadTable) -> Finding:
    """Massive activations, if any."""
    rows, ratios = table.about["massive"], table.about["largest_ratio_by_layer"]
    if not rows:
        return _finding(
            "No massive activations",
            f"The largest activation is {max(ratios):.0f} times its layer's median; the bound is {table.about['ratio']:g}.",
            largest_ratio=max(ratios),
        )
    first = rows[0]
    text = (
        f"Channel {first['channel']} of token {first['token']} after layer {first['layer']} reaches {first['value']:.0f}, "
        f"{first['ratio']:.0f} times the median."
    )
    return _finding(f"{len(rows)} massive activations", text, count=len(rows), largest_ratio=max(ratios))


def plan_finding(
    recipe: str, without: Mapping[str, Any], under: Mapping[str, Any], full: Sequence[str], total: int, random: Sequence[float]
) -> Finding:
    """What the recommended plan costs and keeps."""
    freed = 1 - under["kv_bytes"] / without["kv_bytes"]
    unit = "bits_per_byte" if "bits_per_byte" in without else "loss"
    rise = under[unit] / without[unit] - 1
    text = (
        f"Full caches for {len(full)} of {total} heads, sinks and a window for the rest: "
        f"the cache of {without['kv_tokens']} tokens shrinks from {without['kv_bytes'] / 2**20:.1f} to "
        f"{under['kv_bytes'] / 2**20:.1f} MiB, {unit.replace('_', ' ')} changes by {rise:+.2%}"
    )
    numbers: dict[str, Any] = {"freed": freed, "kv_bytes": without["kv_bytes"], "kv_bytes_with": under["kv_bytes"], "rise": rise}
    if "needle" in without:
        text += f", exact needle recall goes from {without['needle']:.2f} to {under['needle']:.2f}"
        numbers |= {"needle": without["needle"], "needle_with": under["needle"]}
    if random:
        text += f". Given to random heads, the same budget leaves a recall of {sorted(random)[len(random) // 2]:.2f}"
        numbers["needle_random"] = list(random)
    return _finding(f"{recipe} frees {freed:.0%} of the cache", text + ".", full, **numbers)
