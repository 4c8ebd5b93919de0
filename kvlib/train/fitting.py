"""fit(policy, model, tokenizer, texts): a preset with the field that it needs fitted to a model object."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from kvlib.errors import ConfigError
from kvlib.fitted import save_fitted, separator_ids
from kvlib.models import weights_sha256
from kvlib.policies import Policy, make_policy
from kvlib.train.calibration import query_statistics
from kvlib.train.gate import train_gate
from kvlib.train.labels import features_and_labels
from kvlib.train.predictor import train_head
from kvlib.train.traces import MIN_THINKING, Trace


def fit(
    policy: str, model: nn.Module, tokenizer, texts: Sequence[str], out: Path | str | None = None, **options
) -> Policy:
    """The preset `policy` with these options, and what it needs to know of the model fitted to this very object.

    texts: what the model reads while it is watched, best outputs of its own on the task at hand, prompt included.
    triattention takes means over their tokens (those of the tiny model: 23,057); trimkv's gate and dynts' predictor
    are trained on them (the tiny model's: some hundred texts), dynts' on texts with `<think>` where the prompt ends,
    if the model has it, and `</think>` where the answer begins. All in memory, a gate with `[L, HQ, T, T]` of a text.
    model: of transformers, on any device and with any attention implementation; afterwards it is as it was.
    out: a folder, or a path that ends in .safetensors, to write the fitted module into. The file names the weights of
    `model.name_or_path`, so for weights changed since they were loaded it is not to be used.
    Raises ConfigError for a preset that needs nothing, and for texts that cannot be used.
    """
    preset = make_policy(policy, **options)
    if not preset.needs:
        raise ConfigError(f"policy {policy!r} needs nothing fitted; use it as it is")
    if preset.needs == ("separators",):
        return dataclasses.replace(preset, separators=separator_ids(tokenizer))
    (need,) = preset.needs
    traces = [tokenizer(text)["input_ids"] for text in ([texts] if isinstance(texts, str) else texts)]
    if not traces or min(map(len, traces)) < 2:
        raise ConfigError(f"{policy!r} cannot be fitted to an empty text; give longer ones")
    if out is not None and not model.name_or_path:
        raise ConfigError("the model's name_or_path is empty, so a file could not say whose it is; leave out `out`")
    sha256 = None if out is None else weights_sha256(model.name_or_path)
    if need == "predictor":
        module = _predictor(model, tokenizer, traces)
    else:
        module = query_statistics(model, traces) if need == "calibration" else train_gate(model, traces)
    if out is not None:
        save_fitted(need, module, Path(out), sha256, n_traces=len(traces))
    return dataclasses.replace(preset, **{need: module.to(next(model.parameters()).device)})


def _predictor(model: nn.Module, tokenizer, traces: Sequence[Sequence[int]]) -> nn.Module:
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>"))
    data = []
    for i, ids in enumerate(traces):
        n_prompt = ids.index(begin) + 1 if begin in ids else 0
        answer_at = ids.index(end) + 1 if end in ids else len(ids)
        if answer_at == len(ids) or answer_at - 1 - n_prompt < MIN_THINKING:
            raise ConfigError(
                f"text {i} is no finished trace: dynts learns what an answer attends to, so each text must hold "
                f"{MIN_THINKING} tokens or more of thinking, the token </think>, and the answer behind it"
            )
        labelled = features_and_labels(model, Trace(tuple(ids), n_prompt, answer_at))
        data.append(tuple(part.cpu() for part in labelled))
    return train_head(data, device=str(next(model.parameters()).device))
