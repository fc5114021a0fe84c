"""One module a stage: its mathematics as small functions, and `run(settings, inputs) -> StageResult`."""
