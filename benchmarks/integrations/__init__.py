"""What one line of `oner_fast.integrations` gains in other projects' code: precision, time, and memory."""
