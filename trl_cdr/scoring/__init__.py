"""(prompt, completion) -> Score. Uses torch and transformers; knows neither TRL nor datasets."""
