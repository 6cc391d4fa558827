"""Trainings: one folder per system, the engine that they share, and configurations."""
