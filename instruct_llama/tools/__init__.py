"""Commands around the stages: chat, doctor, studies, tested versions."""
