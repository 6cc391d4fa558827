"""Configurations: recipes by name, command lines, JSON, and the settings that every system shares."""
