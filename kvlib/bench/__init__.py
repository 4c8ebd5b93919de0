"""Speed, correctness first: against Hugging Face's own loop, kvpress and the machine's ceilings."""
