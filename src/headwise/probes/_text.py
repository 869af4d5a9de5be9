"""Reasons, shared by probes, why a stack cannot be asked about tokens."""

from __future__ import annotations

from ..models.layout import Stack
from ..models.subject import NO_LANGUAGE_MODEL, Subject

NEEDLE_TOKENS = 256  # the least context that a needle with its distractors needs


def reads_tokens(subject: Subject, stack: Stack) -> str | None:
    """Whether the stack reads the row of token ids itself."""
    if stack.kind == "cross":
        return "cross-attention reads another sequence"
    if getattr(subject.model, "main_input_name", "input_ids") != "input_ids" or stack.name in ("vision", "audio"):
        return "it reads no tokens"
    if subject.layout.encoder_decoder:
        return "an encoder-decoder reads two token rows; this probe is for one"
    if "input_ids" not in subject.forward_names or any(s.name in ("vision", "audio") for s in needed_with(subject)):
        return "its forward needs more than token ids"
    return None


def needed_with(subject: Subject) -> list[Stack]:
    """Towers that must be fed in every forward pass (a dual encoder's vision tower, say); none where text alone is enough."""
    towers = [stack for stack in subject.layout.stacks.values() if stack.name in ("vision", "audio")]
    return [] if subject.main.causal else towers


def predicts_tokens(subject: Subject, stack: Stack) -> str | None:
    """Whether the model predicts the next token, and this stack is the one that does."""
    if not subject.is_language_model:
        return NO_LANGUAGE_MODEL
    if stack.name != subject.main.name:
        return f"only the {subject.main.name} is asked about predictions"
    return None


def finds_needles(subject: Subject, stack: Stack) -> str | None:
    """Whether needles can be asked for."""
    if subject.max_length < NEEDLE_TOKENS:
        return f"a context of {subject.max_length} tokens has no room for needles"
    return predicts_tokens(subject, stack)
