"""What onnxruntime-genai wants beside an exported graph: its own view of the graph and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgert.models import ModelSpec
from onnx import numpy_helper

from edgert.tokenizer import Tokenizer

GENAI = "genai.onnx"


def write_genai(
    directory: Path, graph: onnx.ModelProto, spec: ModelSpec, context: int, tokenizer: Tokenizer
) -> None:
    """The graph as onnxruntime-genai runs it: without inputs that it does not know, with one row of
    logits."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    fixed = {
        "filled": np.array([-1], np.int32),
        "rows": np.array([-1]),
        "more_states": np.zeros((1, 0, spec.dim), np.float32),
        "flash": np.array(False),
        "window_start": np.zeros(1, np.int32),
    }
    inputs = [i for i in model.graph.input if i.name not in fixed]
    constants = [fixed[i.name] for i in model.graph.input if i.name in fixed]
    names = [i.name for i in model.graph.input if i.name in fixed]
    model.graph.initializer.extend(map(numpy_helper.from_array, constants, names))
    outputs = [o for o in model.graph.output if o.name == "logits" or "_out." in o.name]
    for old, kept in ((model.graph.input, inputs), (model.graph.output, outputs)):
        copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in kept]
        del old[:]
        old.extend(copies)
    for node in [n for n in model.graph.node if n.name.split(".")[0] == "queries"]:
        model.graph.node.remove(node)
    for output in model.graph.output:
        if output.name == "logits":
            # By this 1 it knows that the logits are those of the last token alone.
            output.type.tensor_type.shape.dim[1].dim_value = 1
    (directory / GENAI).write_bytes(model.SerializeToString())
    config = _genai_config(spec, context, tokenizer)
    (directory / "genai_config.json").write_text(json.dumps(config, indent=1))
    bos = tokenizer.encode("")[:1]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos)}
    if bos:
        settings["bos_token"] = tokenizer.id_to_piece(bos[0])
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _genai_config(spec: ModelSpec, context: int, tokenizer: Tokenizer) -> dict[str, Any]:
    ends = sorted(tokenizer.eos_ids)
    kinds = {"gemma3": "gemma3_text"}
    return {
        "model": {
            "type": kinds.get(spec.family, spec.family),
            "vocab_size": spec.vocab_size,
            "context_length": context,
            "bos_token_id": tokenizer.bos_id or 0,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GENAI,
                "head_size": spec.head_dim,
                "hidden_size": spec.dim,
                "num_attention_heads": spec.n_heads,
                "num_hidden_layers": spec.n_layers,
                "num_key_value_heads": spec.layers[0].n_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "position_ids": "positions",
                    "past_key_names": "k.%d",
                    "past_value_names": "v.%d",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "k_out.%d",
                    "present_value_names": "v_out.%d",
                },
            },
        },
        "search": {"max_length": context, "past_present_share_buffer": True, "do_sample": False},
    }
