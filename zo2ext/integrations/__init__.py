"""Trainers of transformers and TRL with zeroth-order steps."""
