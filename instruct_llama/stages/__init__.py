"""One module per stage: its losses and metrics as small functions, and `run(settings, inputs) -> StageResult`."""
