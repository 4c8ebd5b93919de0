"""What policies need fitted to a model: `kvlib.fit` from texts, `python -m kvlib.train` from traces."""
