"""What a plan is judged by: quality, allocated bytes and speed, of the model as it runs at the moment."""

from ._evaluate import Evaluation, evaluate
from ._task import Task

__all__ = ["Evaluation", "Task", "evaluate"]
