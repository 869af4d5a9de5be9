"""One training step: as it is written, or as a CUDA graph that is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import LanguageModel
from .optimizer import CLIP
from .problems import IGNORE, Batch

WARM_UP = 3  # steps before recording, in which libraries and the optimizer set up what they keep
Step = Callable[[Batch], Tensor]  # does one step on a batch and returns its loss, which it does not wait for


def loss_of(model: LanguageModel, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """The mean loss of what is asked, in float32."""
    with torch.autocast(batch.ids.device.type, autocast, enabled=autocast is not None):
        logits = model(batch.ids)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)


class PlainStep:
    """Forward, backward, clip, update, as they are written."""

    def __init__(self, model: LanguageModel, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: Batch) -> Tensor:
        """See `Step`."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.work(batch)

    def work(self, batch: Batch) -> Tensor:
        """A step from gradients of None: what is recorded. Nothing in it may ask the GPU for a number."""
        loss = loss_of(self.model, batch, self.autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return loss.detach()


class CapturedStep:
    """The same step with its launches recorded: the first few run as written, on a stream of their own; later ones are replayed.

    What can't be recorded runs as written from then on. captured: whether it is recorded; why: if it is not, what stood
    against it.
    """

    def __init__(self, plain: PlainStep) -> None:
        self.plain = plain
        self.captured, self.why = False, "fewer steps than it takes to record them"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: Batch | None = None
        self._loss: Tensor | None = None
        self._done, self._failed = 0, False
        self._stream = torch.cuda.Stream()

    def __call__(self, batch: Batch) -> Tensor:
        """See `Step`."""
        if self._failed:
            return self.plain(batch)
        if self._done < WARM_UP:
            return self._warm_up(batch)
        if self._graph is None:
            self._record(batch)
            if self._failed:
                return self.plain(batch)
        assert self._given is not None
        assert self._graph is not None
        assert self._loss is not None
        if batch.ids.shape != self._given.ids.shape:
            return self.plain(batch)
        self._given.ids.copy_(batch.ids)
        self._given.targets.copy_(batch.targets)
        self._graph.replay()
        return self._loss.clone()

    def _warm_up(self, batch: Batch) -> Tensor:
        """A step as written, on the stream that will be recorded."""
        self._done += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.plain(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> None:
        """Records a step without running it."""
        self._given = Batch(batch.ids.clone(), batch.targets.clone())
        self.plain.optimizer.zero_grad(set_to_none=True)  # so that gradients are made inside, in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self.plain.work(self._given)
        except Exception as error:  # whatever a mechanism does that a graph can't hold
            self._failed, self.why = True, _told(error)
            self._given = self._loss = None
            self.plain.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            return
        self._graph, self.captured, self.why = graph, True, ""


def step_for(model: LanguageModel, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None, capture: bool) -> Step:
    """A captured step on a GPU if it is wanted, else a plain one."""
    plain = PlainStep(model, optimizer, autocast)
    on_gpu = plain.parameters[0].device.type == "cuda"
    return CapturedStep(plain) if capture and on_gpu else plain


def told(step: Step) -> tuple[bool, str]:
    """Whether a step is captured, and if not, why."""
    if isinstance(step, CapturedStep):
        return step.captured, step.why
    return False, "steps are captured on a GPU only, unless that is switched off"


def _told(error: BaseException) -> str:
    """The first line of the first error: later ones only follow from it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
