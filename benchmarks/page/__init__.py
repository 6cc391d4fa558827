"""Self-contained pages of measured figures: one HTML file with its charts inside, without scripts."""
