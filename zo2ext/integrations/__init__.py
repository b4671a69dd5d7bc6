"""Zeroth-order training with the Trainers of transformers and TRL."""
