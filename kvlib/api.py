"""One call: `generate` decodes with a transformers model under a KV budget, and leaves the model as it was."""

import difflib
import html
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from kvlib.config import checked
from kvlib.engine import noise
from kvlib.engine.decoder import Decoder, Request, completions, decoder_for
from kvlib.engine.fast import why_not_fast
from kvlib.engine.probe import probe
from kvlib.engine.rows import Kept
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.fitted import fill
from kvlib.models import Reasoner, from_pretrained
from kvlib.models import load_reasoner as load_model
from kvlib.policies import Policy, check_options, make_policy
from kvlib.prompts import encoded, listed, needs_tokenizer, plain

KV_BUDGET = 512
CALLED_HERE = {
    "do_sample": "temperature (0 is greedy)",
    "num_return_sequences": "n_samples",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "eos_token_id": "eos_ids",
    "stop": "stop_strings",
    "batch_size": "n_rows",
    "streamer": "stream",
    "policy_kwargs": "policy_options",
    "device": "model.to(device)",
}
"""What some settings of transformers and other libraries are called here."""
HARMLESS = {"do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "eos_token_id"}
HARMLESS |= {"stop_strings", "bos_token_id", "pad_token_id", "transformers_version", "use_cache"}
HARMLESS |= {"cache_implementation", "_from_model_config"}
"""Settings of a generation_config that kvlib has too, or that change no token."""


@dataclass(frozen=True)
class Generation:
    """text: without special tokens, None where there is no tokenizer. tokens: generated ids. stop: "eos", "length", or
    the string that ended it, with which its tokens end. held: slots per KV head in use after each token; rounds:
    evictions; kept, with trace=True: after each round, the number of tokens seen and the positions that survived, by
    layer and KV head (one where they share).
    """

    text: str | None
    tokens: tuple[int, ...] = field(repr=False)
    stop: str
    held: tuple[int, ...] = field(repr=False)
    rounds: int
    kept: tuple[tuple[int, Kept], ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        shown = " ".join(map(str, self.tokens)) if self.text is None else self.text
        told = f"{len(self.tokens)} tokens, stopped by {self.stop!r}; at most {max(self.held)} slots held"
        told += f", {self.rounds} rounds of eviction"
        style = "white-space: pre-wrap; margin: 0"
        return f'<pre style="{style}">{html.escape(shown)}</pre><small>{html.escape(told)}</small>'


def generate(
    model: nn.Module | Reasoner | str,
    prompts,
    *,
    policy: str | Policy | type[Policy] = "rkv",
    kv_budget: int | None = KV_BUDGET,
    max_new_tokens: int | None = None,
    tokenizer=None,
    policy_options: Mapping | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    n_samples: int = 1,
    n_rows: int = 8,
    eos_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    trace: bool = False,
    stream: Callable[[int, str], None] | None = None,
    progress: bool = True,
    **unknown,
) -> Generation | list[Generation] | list[list[Generation]]:
    """Decode prompts with at most kv_budget slots per KV head and row, evicting by the policy.

    model: a causal LM of transformers, what `load_model` gives, or a name that it takes; afterwards it is as it was.
    prompts: a string (encoded as it is), chat messages (through the template), token ids, a list of these, or a
    tokenizer's batch with its attention mask. policy: a preset, with policy_options, or a Policy; "full" takes no
    kv_budget. max_new_tokens, temperature (0 is greedy), top_p, top_k, eos_ids and stop_strings are by default those
    of the model's generation_config. n_rows: prompts decoded side by side; more than these wait. A row's noise depends
    on seed, its prompt and the sample only. trace: record Generation.kept. stream(i, piece): called with the new text
    of sample i (prompt i // n_samples) every few tokens. progress: a bar, where it takes some seconds.

    Returns a Generation for one prompt, a list in order for a list, and a list for each where n_samples > 1.
    Raises ConfigError for what cannot run, FloatingPointError if numbers are not finite.
    """
    check_names(unknown)
    chosen = chosen_policy(policy, policy_options)
    kv_budget = budget_of(chosen, kv_budget)
    stop_strings = None if stop_strings is None else texts_of(stop_strings)
    checked("n_samples", n_samples)
    checked("n_rows", n_rows, "batch_size")
    asked, single = listed(prompts)
    reasoner = entered(model, tokenizer, bool(stop_strings or stream) or any(map(needs_tokenizer, asked)))
    settings = reasoner.model.generation_config
    stop_strings = texts_of(settings.stop_strings or ()) if stop_strings is None else stop_strings
    max_new_tokens = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
    if max_new_tokens is None:
        raise ConfigError("max_new_tokens is not given, nor does the model's generation_config say it; pass e.g. 512")
    checked("max_new_tokens", max_new_tokens)
    sampling = sampling_of(settings, temperature, top_p, top_k)
    if n_samples > 1 and sampling.temperature == 0:
        raise ConfigError(f"at temperature 0 the {n_samples} samples are all the same; pass temperature=0.6, say")
    warn_of_defaults(settings)
    ids = [encoded(prompt, i, reasoner) for i, prompt in enumerate(asked)]
    requests = requests_of(ids, n_samples, checked("seed", seed))
    decoder = decoder_for(
        reasoner.model,
        fitted_policy(chosen, policy, reasoner),
        kv_budget,
        requests,
        n_rows=min(n_rows, len(requests)),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=reasoner.eos_ids if eos_ids is None else ids_of(eos_ids),
        answer_id=reasoner.answer_id,
        trace=trace,
    )
    made = decoded(decoder, requests, reasoner.tokenizer, stop_strings, stream, progress)
    by_prompt = [made[i : i + n_samples] for i in range(0, len(made), n_samples)]
    results = [samples[0] for samples in by_prompt] if n_samples == 1 else by_prompt
    return results[0] if single else results


def requests_of(prompts: list[tuple[int, ...]], n_samples: int, seed: int) -> list[Request]:
    """n_samples of each prompt in turn; noise depends on the seed, the prompt, and how often it came before."""
    drawn, requests = Counter(), []
    for i, prompt in enumerate(prompts):
        for sample in range(n_samples):
            name = f"prompts[{i}]" + (f", sample {sample}" if n_samples > 1 else "")
            requests.append(Request(name, prompt, noise.key(seed, prompt, drawn[prompt])))
            drawn[prompt] += 1
    return requests


def fit(
    policy: str,
    model: nn.Module | Reasoner | str,
    texts: Sequence[str],
    *,
    tokenizer=None,
    out: Path | str | None = None,
    policy_options: Mapping | None = None,
) -> Policy:
    """The preset with what it needs fitted to this very model from texts; see kvlib.train.fitting.fit."""
    from kvlib.train import fitting  # trainers, which nothing else here needs

    reasoner = entered(model, tokenizer, needs_tokenizer=True)
    return fitting.fit(policy, reasoner.model, reasoner.tokenizer, texts, out, **(policy_options or {}))


def decoded(
    decoder: Decoder, requests: list[Request], tokenizer, stop_strings: list[str], stream: Callable | None, shown: bool
) -> list[Generation]:
    """What the requests give, in their order; whatever ends this, the model is as it was."""
    number = {request.id: i for i, request in enumerate(requests)}
    made: list[Generation | None] = [None] * len(requests)
    n_max = decoder.rows.max_new_tokens
    told: dict[str, str] = defaultdict(str)
    counted: Counter[str] = Counter()

    def text_of(tokens: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    def tell(name: str, tokens: Sequence[int], ended: bool) -> None:
        n = n_max if ended else len(tokens)
        bar.update(n - counted[name])
        counted[name] = n
        if stream:
            # A character of several tokens is told when it is whole.
            text, before = text_of(tokens) if ended else text_of(tokens).rstrip("\ufffd"), told[name]
            if len(text) > len(before):
                stream(number[name], text[len(before) :])
                told[name] = text

    def watch(seen: list[tuple[Request, list[int]]]) -> dict[str, int]:
        stops = {}
        for request, tokens in seen:
            if n := stopped_after(tokens, counted[request.id], tokenizer, stop_strings):
                stops[request.id] = n
            tell(request.id, tokens[:n], ended=False)
        return stops

    try:
        with tqdm(total=len(requests) * n_max, unit="token", delay=3, disable=not shown or stream is not None) as bar:
            for done in completions(decoder, requests, watch=watch if stop_strings or stream or shown else None):
                stop = done.stop
                if stop == "stopped":
                    stop = next(s for s in stop_strings if s in tokenizer.decode(done.tokens))
                made[number[done.request.id]] = Generation(
                    text_of(done.tokens), done.tokens, stop, done.held, done.rounds, done.kept
                )
                tell(done.request.id, done.tokens, ended=True)
    finally:
        decoder.close()
    return made


def stopped_after(tokens: list[int], n_before: int, tokenizer, stop_strings: list[str]) -> int | None:
    """After how many tokens the first stop string is complete, if that was not so after n_before; else None."""
    if not stop_strings:
        return None
    # A token holds a byte at least, so a string that ends now began within its length in bytes.
    start = max(0, n_before - max(len(stop.encode()) for stop in stop_strings))

    def holds(n: int) -> bool:
        return any(stop in tokenizer.decode(tokens[start:n]) for stop in stop_strings)

    return next((n for n in range(n_before + 1, len(tokens) + 1) if holds(n)), None) if holds(len(tokens)) else None


def check_names(unknown: Mapping) -> None:
    """Raise ConfigError for a setting that `generate` does not have, with the nearest that it has."""
    for name in unknown:
        known = list(generate.__kwdefaults__)
        near = CALLED_HERE.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
        hint = f"use {near}" if near else f"it has {', '.join(known)}"
        raise ConfigError(f"kvlib.generate has no setting {name!r}; {hint}")


def chosen_policy(policy: str | Policy | type[Policy], options: Mapping | None) -> Policy:
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ConfigError(f"policy_options is {options!r}; use a dict such as {{'buffer': 64}}")
    if isinstance(policy, str):
        return make_policy(policy, **options)
    kind = policy if isinstance(policy, type) else type(policy)
    if not issubclass(kind, Policy):
        raise ConfigError(f"policy is {policy!r}; use the name of a preset, such as 'rkv', or a kvlib.Policy")
    check_options(kind, options, kind.__name__)
    if policy is kind:
        return policy(**options)
    return replace(policy, **options) if options else policy


def budget_of(policy: Policy, kv_budget: int | None) -> int | None:
    """The budget of the decoder; None for a policy that never evicts, which the default does not contradict."""
    if policy.evicts and kv_budget is not None:
        return checked("kv_budget", kv_budget)
    return None if kv_budget == KV_BUDGET else kv_budget  # what contradicts the policy is refused by the decoder


def entered(model: nn.Module | Reasoner | str, tokenizer, needs_tokenizer: bool) -> Reasoner:
    """The model with its tokenizer, which is looked for where the model came from, if one is needed."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    if not (tokenizer is None or hasattr(tokenizer, "convert_tokens_to_ids")):
        raise ConfigError(f"tokenizer is {tokenizer!r}; pass a tokenizer of transformers")
    if isinstance(model, str):
        model = load_model(model)
    if isinstance(model, Reasoner):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    if not isinstance(model, nn.Module) or not hasattr(model, "generation_config"):
        raise ConfigError(
            f"model is a {type(model).__name__}; use a causal LM of transformers, what load_model gives, or a name"
        )
    if why_not_fast(model):
        probe(model)
    if tokenizer is None and (needs_tokenizer or model.generation_config.stop_strings):
        if not model.name_or_path:
            raise ConfigError("the model does not say where its tokenizer is; pass tokenizer=...")
        tokenizer = tokenizer_of(model.name_or_path)
    eos = model.generation_config.eos_token_id
    return Reasoner(model, tokenizer, () if eos is None else ids_of(eos))


def tokenizer_of(place: str):
    """The tokenizer where a model came from: a folder, or a name of the hub. Raises ConfigError."""
    folder = Path(place)
    # Of a folder without one, transformers may make a tokenizer that knows no word.
    if folder.is_dir() and not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        raise ConfigError(
            f"there is no tokenizer in {folder.absolute()}, where the model came from; pass tokenizer=..."
        )
    return from_pretrained(AutoTokenizer, place, place)


def fitted_policy(policy: Policy, asked: object, reasoner: Reasoner) -> Policy:
    """The policy with what it needs of this model. Raises ConfigError that says how that is made."""
    missing = [need for need in policy.needs if getattr(policy, need) is None]
    if "separators" in missing and reasoner.tokenizer is None:
        raise ConfigError(f"policy {type(policy).__name__} finds its separators in the tokenizer; pass tokenizer=...")
    made = [need for need in missing if need != "separators"]
    if made and not reasoner.sha256:
        name = asked if isinstance(asked, str) else type(policy).__name__.lower()
        raise ConfigError(
            f"policy {type(policy).__name__} needs the {made[0]} of this model; make it with `policy = "
            f'kvlib.fit("{name}", model, texts)` and pass policy=policy'
        )
    paths = any(isinstance(getattr(policy, need), str) for need in policy.needs)
    return fill(policy, reasoner.model.name_or_path, reasoner) if missing or paths else policy


def texts_of(stop_strings: object) -> list[str]:
    texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop_strings is {stop_strings!r}; use a string that is not empty, or a list of these")
    return list(texts)


def ids_of(eos_ids: int | Sequence[int]) -> tuple[int, ...]:
    eos_ids = plain(eos_ids)
    ids = tuple(map(plain, eos_ids)) if isinstance(eos_ids, Iterable) else (eos_ids,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_ids is {eos_ids!r}; use a token id, or a list of these")
    return ids


def sampling_of(settings, temperature: float | None, top_p: float | None, top_k: int | None) -> Sampling:
    """What the caller asks for, else what the model's generation_config does; greedy where neither samples."""
    if temperature is None and not settings.do_sample:
        temperature = 0.0
    if temperature == 0 and not (top_p is None and top_k is None):
        raise ConfigError("top_p and top_k change nothing at temperature 0; pass a temperature, 0.6 for example")
    found = {}
    for name, given, off in (("temperature", temperature, 1.0), ("top_p", top_p, 1.0), ("top_k", top_k, 0)):
        value = next(x for x in (given, getattr(settings, name), off) if x is not None)
        found[name] = checked(name, float(value) if isinstance(value, float) else value)  # numpy's too
    return Sampling(**found)


def warn_of_defaults(settings) -> None:
    """Say which of the generation_config's settings are not applied."""
    lacked = {name: value for name, value in settings.to_diff_dict().items() if name not in HARMLESS}
    lacked = {name: value for name, value in lacked.items() if not name.startswith(("output_", "return_"))}
    if lacked:
        told = ", ".join(f"{name}={value}" for name, value in sorted(lacked.items()))
        warnings.warn(f"the model's generation_config asks for {told}, which kvlib does not apply", stacklevel=3)
