"""Data of ``zo2ext demo``: a tiny pretrained model, the grammar of its text, and a task."""
