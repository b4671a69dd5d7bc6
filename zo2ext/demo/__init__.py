"""What ``zo2ext demo`` needs: a tiny pretrained model, the grammar of its text, and a task."""
