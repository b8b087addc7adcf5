"""Score -> files and reports: files of scores, and rewards under attack."""
