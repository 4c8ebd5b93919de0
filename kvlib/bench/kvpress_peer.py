"""The peer of kvlib.bench.arms: kvpress' DecodingPress, decoding on command. Runs in a Python of its own.

kvpress pins an older transformers, so this file imports nothing of kvlib. Settings come as the first JSON line on
stdin; then each command line is answered by one JSON line. The loop is that of kvpress' own pipeline
(KVPressTextGenerationPipeline.generate_answer), for a batch.
"""

import importlib.metadata
import json
import sys
import time

import torch
from kvpress import DecodingPress, KnormPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar


class Peer:
    def __init__(self, settings: dict):
        torch.set_num_threads(settings["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype="auto", attn_implementation="sdpa"
        ).eval()
        by_norm = settings["policy"] == "knorm"
        self.press = DecodingPress(
            base_press=KnormPress() if by_norm else SnapKVPress(window_size=settings["n_obs"], kernel_size=5),
            compression_interval=settings["interval"],
            target_size=settings["keep"],
            hidden_states_buffer_size=0 if by_norm else settings["interval"],
        )
        self.prompts = torch.tensor(settings["prompts"])

    def start(self) -> None:
        """Prefill, as the pipeline: without compression. The first token."""
        self.press.reset()
        self.cache, self.live = DynamicCache(), []
        logits = self.model(self.prompts, past_key_values=self.cache, logits_to_keep=1).logits
        self.tokens = [logits[:, -1].argmax(-1, keepdim=True)]

    def advance(self, n: int) -> float:
        """Decode n tokens in every row; seconds in the model's calls, compression included."""
        forward = 0.0
        for _ in range(n):
            position = self.prompts.shape[1] + len(self.tokens) - 1
            started = time.perf_counter()
            logits = self.model(
                self.tokens[-1],
                past_key_values=self.cache,
                position_ids=torch.full_like(self.tokens[-1], position),
                logits_to_keep=1,
            ).logits
            forward += time.perf_counter() - started
            self.tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            self.live.append(self.cache.get_seq_length())
        return forward

    def serve(self, commands) -> None:
        # The press stays on the model: leaving its context would empty its buffers.
        with torch.inference_mode(), self.press(self.model):
            for line in commands:
                command = json.loads(line)
                if command["do"] == "start":
                    self.start()
                    answer = {}
                elif command["do"] == "advance":
                    answer = {"forward": self.advance(command["n"])}
                else:
                    answer = {"tokens": torch.cat(self.tokens, 1).tolist(), "live": sum(self.live) / len(self.live)}
                print(json.dumps(answer), flush=True)


def main() -> None:
    disable_progress_bar()
    peer = Peer(json.loads(sys.stdin.readline()))
    names = ("kvpress", "torch", "transformers")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in names}}), flush=True)
    peer.serve(sys.stdin)


if __name__ == "__main__":
    main()
