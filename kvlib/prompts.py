"""What a person may pass as prompts, as the token ids of each."""

from collections.abc import Mapping

from kvlib.errors import ConfigError
from kvlib.models import Reasoner, check_length


def listed(prompts) -> tuple[list, bool]:
    """The prompts, of plain lists, and whether there is one alone instead of a list."""
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        prompts = unpadded(prompts)
    prompts = plain(prompts)
    if isinstance(prompts, list | tuple):
        prompts = [plain(prompt) for prompt in prompts]
    single = isinstance(prompts, str) or (bool(prompts) and all(type(p) is int for p in prompts)) or is_chat(prompts)
    found = [prompts] if single else prompts
    if not isinstance(found, list | tuple) or not found:
        raise ConfigError(f"prompts is {prompts!r}; pass a string, chat messages, token ids, or a list of these")
    return list(found), single


def unpadded(batch: Mapping) -> list:
    """The ids that the attention mask of a tokenizer's batch does not leave out: of a prompt, or of each."""
    ids, mask = plain(batch["input_ids"]), plain(batch.get("attention_mask"))
    if mask is None or not ids:
        return ids
    try:
        if isinstance(ids[0], int):
            return [i for i, seen in zip(ids, mask, strict=True) if seen]
        return [[i for i, seen in zip(*row, strict=True) if seen] for row in zip(ids, mask, strict=True)]
    except (TypeError, ValueError) as error:
        raise ConfigError("attention_mask is not of the shape of input_ids; pass both as the tokenizer gave") from error


def plain(x):
    """Lists instead of tensors, arrays and columns."""
    return x.tolist() if hasattr(x, "tolist") else x


def is_chat(x) -> bool:
    return isinstance(x, list | tuple) and bool(x) and all(isinstance(m, Mapping) and "role" in m for m in x)


def needs_tokenizer(prompt) -> bool:
    return isinstance(prompt, str) or is_chat(prompt)


def encoded(prompt, i: int, reasoner: Reasoner) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = reasoner.encode(prompt)
    elif is_chat(prompt):
        if reasoner.tokenizer.chat_template is None:
            raise ConfigError(f"prompt {i} is a chat, and the tokenizer has no chat template; pass a string")
        ids = reasoner.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    elif isinstance(prompt, list | tuple) and all(type(token) is int for token in prompt):
        ids = prompt
    else:
        raise ConfigError(f"prompt {i} is {prompt!r}; use a string, chat messages (role, content), or token ids")
    n = len(reasoner.model.get_input_embeddings().weight)
    if not ids:
        what = f"({prompt!r}) has no token that the model knows" if prompt else "is empty"
        raise ConfigError(f"prompt {i} {what}; it needs a token at least")
    check_length(reasoner.model.config, len(ids), f"prompt {i}")
    strange = next((token for token in ids if not 0 <= token < n), None)
    if strange is not None:
        raise ConfigError(f"prompt {i} has the token id {strange}, and the model knows {n}; use its own tokenizer")
    return tuple(ids)
