"""Score -> files and reports. No model is run here."""
