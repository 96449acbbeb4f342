"""Losses compared by paired runs over seeds, tuning, and our MMoE beside that of MTReclib."""
