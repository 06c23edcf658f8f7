"""What matrices meet on calibration text, and rounding to four bits that goes by it."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
import torch
from edgert.export.calibration_text import load_domains
from edgert.export.moments import Moments
from edgert.export.onnx_graph import Graph
from edgert.export.onnx_weights import Weights
from edgert.export.quantise import dequantise, q4_0, q4_0_for, remedies
from edgert.export.torch_decoder import TorchDecoder
from onnx_directories import exported
from tiny_models import NAMES, tiny

from edgert import _native
from edgert.onnx_interface import code_bits, matrices
from edgert.tokenizer import Tokenizer


def gguf(name: str) -> _native.GgufFile:
    return _native.GgufFile(str(tiny(name).path))


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_of_a_layer_has_a_moment_of_its_inputs(name: str) -> None:
    found = Moments(gguf(name))
    for matrix, _, cols in matrices(tiny(name).spec):
        if matrix.startswith("blk."):
            first = matrix.removesuffix(".weight").split("+")[0] + ".weight"
            moment = found.of(first)
            assert moment.shape == (cols, cols)
            assert np.linalg.eigvalsh(moment.astype(np.float64))[0] > -1e-5 * np.trace(moment)
            assert np.trace(moment) > 0


def test_moments_are_of_the_states_that_the_model_has() -> None:
    """Of the last layer's attention: its normed inputs, as a decoder with all weights in memory has them."""
    file = gguf("qwen3")
    decoder, spec = TorchDecoder(file), tiny("qwen3").spec
    found = Moments(file)
    last = spec.n_layers - 1
    total, count = torch.zeros(spec.dim, spec.dim), 0
    with torch.no_grad():
        for stream in Moments(file)._streams:  # what enters the first layer
            x = stream
            for i in range(last):
                x = decoder.layer(i, x)
            x = decoder._norm(x, f"blk.{last}.attn_norm")[0]
            total, count = total + x.T @ x, count + len(x)
    expected = (total / count).numpy()
    assert np.abs(found.of(f"blk.{last}.attn_q.weight") - expected).max() < 1e-4 * np.abs(expected).max()


def test_text_of_all_domains_is_met() -> None:
    file = gguf("llama")
    tokenizer = Tokenizer.from_gguf(file.metadata)
    lengths = [stream.shape[1] for stream in Moments(file)._streams]
    assert len(lengths) >= len(load_domains(tokenizer))
    assert max(lengths) <= 256


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_products_suffer_less_than_by_rounding_each_value(name: str) -> None:
    """Errors of products with inputs of the second moment that text has, of all matrices of four bits of a
    graph; values of 8 bits are rounded one by one."""
    file, graph = gguf(name), onnx.load(exported(name, "int4") / "model.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    moments, ours, plain = Moments(file), 0.0, 0.0
    for matrix, rows, cols in matrices(tiny(name).spec):
        names = [part + ".weight" for part in matrix.removesuffix(".weight").split("+")]
        x = np.concatenate([file.dequantize(part) for part in names])
        codes = next(stored[n] for n in (matrix, matrix + ".3d") if n in stored and stored[n].ndim == 3)
        if code_bits(matrix, cols, "int4") == 8:
            values = codes.astype(np.float32) - 128
            scales = stored[matrix + ".scales"].repeat(32, 1)
            assert np.abs(values.reshape(rows, cols) * scales - x).max() <= 0.51 * scales.max()
            continue
        values = np.stack([codes & 15, codes >> 4], -1).reshape(rows, cols).astype(np.float32) - 8
        moment = moments.of(names[0])
        for error, rounded in (("ours", values * stored[matrix + ".scales"].repeat(32, 1)), ("plain", None)):
            off = (dequantise(q4_0(x), "Q4_0", cols) if rounded is None else rounded) - x
            loss = float(np.einsum("rc,cd,rd", off, moment, off))
            ours, plain = (ours + loss, plain) if error == "ours" else (ours, plain + loss)
    assert 0 < ours < 0.8 * plain


def test_what_four_bits_hold_is_kept() -> None:
    """Weights that are such codes already stay what they are, whatever they meet."""
    rng = np.random.default_rng(0)
    x = dequantise(q4_0(rng.standard_normal((40, 96), np.float32)), "Q4_0", 96)
    states = rng.standard_normal((200, 96), np.float32)
    kept = dequantise(q4_0_for(x, remedies(states.T @ states)), "Q4_0", 96)
    assert np.abs(kept - x).max() < 1e-6


def test_a_matrix_that_meets_nothing_is_rounded_all_the_same() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    found = dequantise(q4_0_for(x, remedies(np.zeros((64, 64), np.float32))), "Q4_0", 64)
    assert np.abs(found - x).max() < 0.5


def test_layers_are_calibrated_in_the_order_of_the_graph() -> None:
    """Asking for a layer that is gone is a mistake of the exporter's, not a silent zero."""
    moments = Moments(gguf("llama"))
    moments.of("blk.1.attn_q.weight")
    with pytest.raises(KeyError):
        moments.of("blk.0.attn_q.weight")
    Weights(gguf("llama"), "int4", Graph(io.BytesIO(), "x"), lambda n: None).matrix(["blk.0.ffn_down.weight"])
