"""The DynTS importance predictor (arXiv 2601.18383, section 3): labels from answer attention, head, training."""

from kvlib.train.head import (
    FILE,
    HeldOut,
    ImportanceHead,
    evaluate_head,
    load_predictor,
    save_predictor,
    train_head,
)
from kvlib.train.labels import Trace, features_and_labels, label_traces
from kvlib.train.recipe import Profile, collect_traces, load_profile, plan, stage_traces, train_predictor

__all__ = [
    "FILE",
    "HeldOut",
    "ImportanceHead",
    "Profile",
    "Trace",
    "collect_traces",
    "evaluate_head",
    "features_and_labels",
    "label_traces",
    "load_predictor",
    "load_profile",
    "plan",
    "save_predictor",
    "stage_traces",
    "train_head",
    "train_predictor",
]
