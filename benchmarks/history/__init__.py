"""The records of many commits: their trend on one page, and as the input of github-action-benchmark."""
