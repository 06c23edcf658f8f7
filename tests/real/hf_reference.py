"""The reference for real weights: float32 transformers on the dequantised tensors of a GGUF file.

Written from the GGUF metadata and the `gguf` package alone, so that it shares no line with the
engine it judges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_reader import Reader
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Reference:
    """``hidden`` is small and worth keeping; ``logits`` makes [rows, vocab] from some of its rows."""

    def __init__(self, path: Path) -> None:
        reader = Reader(path)
        self.meta: dict[str, Any] = {
            k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.ggml.tok")
        }
        self.arch = self.meta["general.architecture"]
        config = {"llama": self._llama_config, "gemma3": self._gemma3_config}[self.arch]()
        config.update(
            hidden_size=self._key("embedding_length"),
            intermediate_size=self._key("feed_forward_length"),
            num_hidden_layers=self._key("block_count"),
            num_attention_heads=self._key("attention.head_count"),
            num_key_value_heads=self._key("attention.head_count_kv"),
            max_position_embeddings=self._key("context_length"),
            rms_norm_eps=self._key("attention.layer_norm_rms_epsilon"),
            tie_word_embeddings=True,
        )
        state = dict(self._tensor(t, config) for t in reader.tensors)
        config["vocab_size"] = state["model.embed_tokens.weight"].shape[0]
        if self.arch == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**config))
        else:
            model = Gemma3ForCausalLM(Gemma3TextConfig(**config))
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
        self._model = model.eval()

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), dim], after the last norm."""
        with torch.inference_mode():
            return self._model.model(torch.tensor([tokens])).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._model.lm_head(hidden)

    def _key(self, name: str) -> Any:
        return self.meta[f"{self.arch}.{name}"]

    def _llama_config(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": self._key("rope.freq_base")}
        return {"rope_parameters": rope, "head_dim": self._key("rope.dimension_count")}

    def _gemma3_config(self) -> dict[str, Any]:
        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": self._key("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
        layers = range(1, self._key("block_count") + 1)
        return {
            "rope_parameters": rope,
            "head_dim": self._key("attention.key_length"),
            "query_pre_attn_scalar": self._key("attention.key_length"),
            "sliding_window": self._key("attention.sliding_window"),
            "layer_types": ["sliding_attention" if i % 6 else "full_attention" for i in layers],
        }

    def _tensor(self, tensor: Any, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
        """Name and values in transformers' terms."""
        shape = [int(n) for n in reversed(tensor.shape)]
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if self.arch == "gemma3" and tensor.name.endswith("norm.weight"):
            data = data - 1  # transformers multiplies by 1 + weight
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            names = {"token_embd": "embed_tokens", "output_norm": "norm"}
            return f"model.{names[parts[0]]}.weight", torch.from_numpy(data)
        if self.arch == "llama" and parts[2] in ("attn_q", "attn_k"):
            # llama.cpp turns neighbouring pairs, transformers the two halves of a head.
            heads = config["num_attention_heads" if parts[2] == "attn_q" else "num_key_value_heads"]
            pairs = data.reshape(heads, shape[0] // heads // 2, 2, shape[1])
            data = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)
        plain = "post_attention_layernorm" if self.arch == "llama" else "pre_feedforward_layernorm"
        name = {**NAMES, "ffn_norm": plain}[parts[2]]
        return f"model.layers.{parts[1]}.{name}.weight", torch.from_numpy(data)
