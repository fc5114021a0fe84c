"""The decoder (llama), its adapters and 4-bit storage (lora), and sampling from it (sampling)."""
