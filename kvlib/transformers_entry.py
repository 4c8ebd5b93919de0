"""The same decoding through transformers: `model.generate(..., custom_generate=kvlib.custom_generate(...))`."""

import inspect
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from kvlib.api import KV_BUDGET, budget_of, chosen_policy, entered, fitted_policy
from kvlib.config import check_names
from kvlib.engine import noise
from kvlib.engine.decoder import Request, completions, decoder_for
from kvlib.engine.sampling import Sampling
from kvlib.errors import ConfigError
from kvlib.policies import Policy
from kvlib.prompts import unpadded

READ = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
"""What transformers hands over beside the prompt and kvlib reads, or makes anew."""


def custom_generate(
    *called: object,
    policy: str | Policy | type[Policy] = "rkv",
    kv_budget: int | None = KV_BUDGET,
    policy_options: Mapping | None = None,
    tokenizer=None,
    **unknown: object,
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A decoding for model.generate, pipelines and harnesses; policy, kv_budget and tokenizer as in kvlib.generate.

    Sampling draws its seed from torch, so that torch.manual_seed fixes it. Streamers and stopping criteria are
    honoured, a few tokens late and to the token. Raises ConfigError for beams, assistants, and logits processors other
    than temperature, top-k and top-p.
    """
    if called:
        raise ConfigError(
            "kvlib.custom_generate makes what model.generate calls; pass custom_generate="
            "kvlib.custom_generate(policy=..., kv_budget=...)"
        )
    check_names(unknown, list(custom_generate.__kwdefaults__), "setting of kvlib.custom_generate")
    chosen = chosen_policy(policy, policy_options)
    budget = budget_of(chosen, kv_budget)

    def decode(
        model: nn.Module, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """input_ids `[B, P]`, padded on either side where attention_mask says so -> `[B, P + new tokens]`, padded."""
        hidden = arguments_of_generate()
        check_supported(model_kwargs, generation_config, hidden.get("assistant_model"))
        sampling = sampling_of(logits_processor, generation_config.do_sample)
        P = input_ids.shape[1]
        prompts = [tuple(ids) for ids in unpadded({**model_kwargs, "input_ids": input_ids})]
        if not all(prompts):
            raise ConfigError("a prompt is empty; kvlib reads input_ids, not inputs_embeds, and a token at least")
        seed = int(torch.randint(2**31, ())) if sampling.temperature else 0
        requests = [Request(f"prompts[{row}]", prompt, noise.key(seed, row)) for row, prompt in enumerate(prompts)]
        reasoner = entered(model, tokenizer, needs_tokenizer="separators" in chosen.needs)
        n_new = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)) - P
        batch = Batch(requests, input_ids, n_new, stopping_criteria, generation_config, hidden.get("streamer"))
        decoder = decoder_for(
            model,
            fitted_policy(chosen, policy, reasoner),
            budget,
            requests,
            max_new_tokens=n_new,
            sampling=sampling,
            eos_ids=batch.eos_ids,
            answer_id=reasoner.answer_id,
        )
        try:
            for _ in completions(decoder, requests, watch=batch.watch):
                pass
        finally:
            decoder.close()
        sequences = batch.finished()
        return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences

    return decode


class Batch:
    """Hands the tokens of rows in step to transformers' streamer and criteria, one by one, as its own loop would."""

    def __init__(
        self, requests: list[Request], input_ids: Tensor, n_new: int, criteria: StoppingCriteriaList, config, streamer
    ):
        B, P = input_ids.shape
        self.names = [request.id for request in requests]
        eos, pad = config._eos_token_tensor, config._pad_token_tensor
        self.eos_ids = () if eos is None else tuple(eos.flatten().tolist())
        self.pad = 0 if pad is None else int(pad)  # transformers takes an end id where there is one
        self.sequences = torch.cat([input_ids, input_ids.new_full((B, n_new), self.pad)], 1)
        self.criteria = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        self.streamer, self.n_prompt, self.n_told = streamer, P, 0
        self.made: list[list[int]] = [[] for _ in range(B)]
        self.stopped = torch.zeros(B, dtype=torch.bool)

    def watch(self, seen: list[tuple[Request, list[int]]]) -> dict[str, int]:
        for request, tokens in seen:
            self.made[self.names.index(request.id)] = tokens
        ended: list[int] = []
        while self.n_told < max(map(len, self.made)) and not self.stopped.all():
            self._tell()
            # Rows that end one by one are padded, which takes an end id; else all go on until all have stopped.
            if self.eos_ids or self.stopped.all():
                ended = self.stopped.nonzero()[:, 0].tolist()
                for row in ended:
                    self.made[row] = self.made[row][: self.n_told]
        return {self.names[row]: len(self.made[row]) for row in ended}

    def _tell(self) -> None:
        """The next token of every row."""
        t = self.n_told
        column = torch.tensor([tokens[t] if t < len(tokens) else self.pad for tokens in self.made])
        self.sequences[:, self.n_prompt + t] = column.to(self.sequences.device)
        self.n_told += 1
        if self.streamer is not None:
            self.streamer.put(column)
        for criterion in self.criteria:
            so_far = self.sequences[:, : self.n_prompt + self.n_told]
            self.stopped |= torch.as_tensor(criterion(so_far, None), device="cpu").expand_as(self.stopped)

    def finished(self) -> Tensor:
        if self.streamer is not None:
            self.streamer.end()
        return self.sequences[:, : self.n_prompt + self.n_told]


def arguments_of_generate() -> dict:
    """The streamer and the assistant given to model.generate, which it does not hand to a callable of one's own."""
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model")}


def check_supported(model_kwargs: Mapping, config, assistant) -> None:
    """Raise ConfigError for what model.generate was asked and kvlib does not do."""
    mode = config.get_generation_mode(assistant)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(f"kvlib decodes by greedy search or sampling, not by {mode.value.replace('_', ' ')}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ConfigError(f"kvlib does not return what {name} asks for; leave it out")
    other = [name for name, value in model_kwargs.items() if name not in READ and value is not None]
    if other:
        raise ConfigError(f"kvlib decodes from input_ids and attention_mask, and was given {', '.join(other)} too")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("past_key_values holds tokens already; kvlib reads the whole prompt, so leave it out")


def sampling_of(processors, do_sample: bool | None) -> Sampling:
    """Temperature, top-k and top-p, in this order and nothing else."""
    kinds = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}
    names = [kinds.get(type(p)) for p in processors]
    if names != [name for name in kinds.values() if name in names]:
        raise ConfigError(
            "kvlib applies temperature, top-k and top-p, once each and in this order, and was given "
            f"{', '.join(type(p).__name__ for p in processors)}; switch others off, for example with "
            "repetition_penalty=1.0"
        )
    found = {name: getattr(p, name) for name, p in zip(names, processors, strict=True)}
    return Sampling(**{"temperature": 1.0, **found}) if do_sample else Sampling(0.0)
