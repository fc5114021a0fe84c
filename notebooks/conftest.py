"""Notebooks run as tests, also on their own, at the tiny preset with one thread a worker (P41)."""

import os

os.environ.setdefault("INSTRUCT_LLAMA_PRESET", "tiny")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("INSTRUCT_LLAMA_STATIC", "1")
