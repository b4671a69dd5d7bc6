"""What is recorded: one record per direction of every step, and the file that keeps them."""
