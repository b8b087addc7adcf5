"""Score -> TRL: the adapters that a trainer sees. No model is run here."""
