"""Names of files that several parts know: in a run's folder, and in its checkpoints."""

ARGUMENTS_FILE = "arguments.json"  # what a command was given
STATE_FILE = "zo_state.json"  # where a Trainer's run stands
TRAINER_STATE_FILE = "trainer_state.json"  # transformers' own
