"""Which heads evict, and how much they keep, for the recipes of rules that evict."""

from __future__ import annotations

import torch

from ...caches.rule import Budget
from ...errors import PlanError
from ...models.subject import Subject
from ...types import Heads, HeadTable

Amount = float | HeadTable


def evicting(subject: Subject, heads: Heads | None, budget: Amount) -> tuple[Heads, Budget]:
    """The heads, with all that share keys with them, and their budget: the number given, or of a table one for each head.

    A table of numbers up to 1 holds shares, any other tokens. Of heads that share keys and values, the largest budget counts.

    Raises: PlanError if the table is of another model or has no number for a head, or is given as tokens that are not whole.
    """
    if not isinstance(budget, HeadTable):
        return subject.main.key_value_groups(subject.main.exists() if heads is None else heads), budget
    if budget.shape != subject.main.shape or budget.stack != subject.main.name:
        raise PlanError(
            f"the budgets are a table of {budget.shape[0]} layers x {budget.shape[1]} heads of {budget.stack}; "
            f"{subject.main.name} of this model has {subject.main.shape[0]} x {subject.main.shape[1]}"
        )
    chosen = subject.main.key_value_groups(budget.heads() if heads is None else heads)
    values = budget.values.clone()
    for site in subject.main.sites:
        own = values[site.layer, : site.heads].view(site.key_value_heads, site.groups)
        largest = own.nan_to_num(-torch.inf).amax(-1, keepdim=True)
        values[site.layer, : site.heads] = largest.expand(-1, site.groups).reshape(-1)
    each = values[chosen.mask]
    if each.numel() and float(each.min()) == -torch.inf:
        missing = chosen.names()[int(each.argmin())]
        raise PlanError(f"the table of budgets has no number for {missing}; give it one, or leave the head out by `heads`")
    if each.numel() == 0 or float(each.max()) <= 1:
        return chosen, each
    if bool((each != each.round()).any()):
        raise PlanError(f"a budget of {float(each[each != each.round()][0]):g} is neither a share up to 1 nor a number of tokens")
    return chosen, each.long()


def about(budget: Amount) -> float | str:
    """What a plan notes of its budget."""
    return f"by {budget.name}" if isinstance(budget, HeadTable) else budget
