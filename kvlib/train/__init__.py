"""What policies need fitted to a model: `fit` from texts, `python -m kvlib.train` from traces."""


def __getattr__(name: str):
    if name == "fit":  # at first use, because it needs torch
        from kvlib.train.fitting import fit

        return fit
    raise AttributeError(f"module 'kvlib.train' has no attribute {name!r}")
