"""Tasks on which language models are fine-tuned and evaluated, each declared in a few lines.

Tasks, prompts and scores are those of MeZO (Malladi et al., arXiv:2305.17333).
"""

from zo2ext.tasks.table import TASKS, get_task
from zo2ext.tasks.task import Example, Hub, Kind, Sizes, Task

__all__ = ["TASKS", "Example", "Hub", "Kind", "Sizes", "Task", "get_task"]
