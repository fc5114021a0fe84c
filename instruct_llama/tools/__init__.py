"""Commands beside the stages: chat, doctor, studies over seeds, tested versions."""
