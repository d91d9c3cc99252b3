"""Write a checkpoint of a shape with random weights, as a hub would serve it.

    python -m benchmarks.random_checkpoint DEST --tokenizer DIR

DIR holds a tokenizer.json, and perhaps a chat template: a snapshot of any small model will do. Its
vocabulary is filled up to the shape's. Needs a GPU for the 8B, whose 16 GB take half a minute.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import LLAMA_3_1_8B, RandomWeights
from runtime.model.config import ModelConfig

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = LLAMA_3_1_8B | {"num_hidden_layers": arguments.layers}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_checkpoint(arguments.dest, config, arguments.tokenizer, device, seed=arguments.seed)


def write_checkpoint_apart(dest: Path, tokenizer_dir: Path, num_layers: int, seed: int = 0) -> None:
    """Write one of the 8B shape in a process that then leaves the GPU."""
    options = {"--tokenizer": tokenizer_dir, "--layers": num_layers, "--seed": seed}
    arguments = [str(part) for option in options.items() for part in option]
    subprocess.run([sys.executable, "-m", __name__, str(dest), *arguments], check=True)


def write_checkpoint(
    dest: Path, config: Mapping[str, object], tokenizer_dir: Path, device: str, *, seed: int = 0
) -> None:
    """Write config, tokenizer and weights in shards of a few gigabytes."""
    dest.mkdir(parents=True)
    extras = {"model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    (dest / "config.json").write_text(json.dumps({**config, **extras, **special}))
    (dest / "generation_config.json").write_text(json.dumps(special))
    shape = ModelConfig.from_hf(config)
    _write_tokenizer(dest, tokenizer_dir, shape.vocab_size)
    tensors, _ = RandomWeights(shape, device=device, seed=seed).load(None)
    _write_weights(dest, checkpoint_tensors(shape, tensors))


def _write_tokenizer(dest: Path, source: Path, vocab_size: int) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<filler_{token_id}>": token_id for token_id in range(len(vocab), vocab_size)}
    (dest / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, dest / name)


def checkpoint_tensors(
    shape: ModelConfig, fused: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under transformers' names, fused ones taken apart."""
    q_size, kv_size = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    parts = {
        "qkv_proj": {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), shape.intermediate_size),
    }
    for name, tensor in fused.items():
        prefix = "" if name.startswith("lm_head") else "model."
        fused_name = name.split(".")[-2]
        if fused_name in parts:
            sizes = parts[fused_name]
            for part, rows in zip(sizes, torch.split(tensor, [*sizes.values()]), strict=True):
                yield prefix + name.replace(fused_name, part), rows
        elif "embed_tokens" in name or "lm_head" in name:
            yield prefix + name, tensor[: shape.vocab_size]
        else:
            yield prefix + name, tensor


def _write_weights(dest: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors:
        if num_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        on_host = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(on_host, dest / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index_file = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (dest / "model.safetensors.index.json").write_text(json.dumps(index_file))


if __name__ == "__main__":
    main()
