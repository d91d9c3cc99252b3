"""Tensors of one engine that embeds: weights, forward pass, pooling. On the CPU or on a GPU.

Knows nothing of calls beyond the texts it is given.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from runtime.config import EngineConfig
from runtime.cpu.builder import PartBuilder
from runtime.cpu.linear import is_packing_faster
from runtime.cpu.packing import Packer
from runtime.cpu.threads import usable_cores
from runtime.engine.pooling import Pooled, PoolingMode, PoolingRequest
from runtime.engine_api import NothingCompiled
from runtime.environment import cpu_environment, gpu_environment
from runtime.errors import LoadFailed
from runtime.linux import resident_bytes
from runtime.memory.slab import trim_malloc
from runtime.memory.weights import OnProgress, SnapshotWeights, Weights
from runtime.model.bert_config import BertConfig, is_bert
from runtime.model.config import ModelConfig
from runtime.model.description import check_dtype
from runtime.model.files import read_configs
from runtime.pooling.models import Bert, LlamaEmbedder, TextModel
from runtime.pooling.packed import PackedTexts
from runtime.pooling.pool import finish, pool
from snapshots.loader import LoadReport

MAX_CPU_STEP_TOKENS = 2048  # products are at full speed; a cancelled call costs one step at most
NOT_FINITE = "the model computed a vector that is not finite"

ModelMaker = Callable[[PartBuilder], TextModel]


class PoolingRunner(NothingCompiled):
    """Brings a model into memory and out again, and embeds texts in between.

    Args:
        model: Makes the model out of its weights.
        shape: The model's shape.
        config: Limits of the engine, and how it pools.
        weights: Where the tensors come from.
        device: "cpu" or "cuda".

    Raises:
        LoadFailed: The length asked for is above the model's, or the pooling is not known.
    """

    def __init__(
        self,
        model: ModelMaker,
        shape: BertConfig | ModelConfig,
        config: EngineConfig,
        weights: Weights,
        device: str = "cpu",
    ) -> None:
        if config.max_model_len > shape.max_position_embeddings:
            raise LoadFailed(
                f"max_model_len={config.max_model_len} is above the model's own limit of "
                f"{shape.max_position_embeddings}: lower it, or leave it out"
            )
        if config.pooling not in list(PoolingMode):
            raise LoadFailed(
                f"pooling {config.pooling!r} is not known: use one of {', '.join(PoolingMode)}"
            )
        self._make_model = model
        self._shape = shape
        self._config = config
        self._weights = weights
        self._device = device
        self._mode = PoolingMode(config.pooling)
        self._is_packed = device == "cpu" and is_packing_faster(weights.dtype)
        self._num_cores = usable_cores()
        self._model: TextModel | None = None
        self._packer: Packer | None = None
        self._has_answered = False

    @classmethod
    def open(cls, snapshot_dir: Path, config: EngineConfig, device: str = "cpu") -> Self:
        """Read a snapshot's configuration and header; weights come later.

        Raises:
            LoadFailed: The engine cannot run this model, or not with this configuration.
            SnapshotDamaged: A file is missing or not what the manifest says.
        """
        hf_config, _ = read_configs(snapshot_dir)
        model, shape = _described(hf_config)
        weights = _open_weights(snapshot_dir, device)
        check_dtype(config, weights.dtype)
        return cls(model, shape, config, weights, device)

    @property
    def weights_bytes(self) -> int:
        """Memory held for weights, packed copies included, now."""
        return self._weights.held_bytes + (self._packer.packed_bytes if self._packer else 0)

    @property
    def kv_cache_bytes(self) -> int:
        """None: nothing is kept between texts."""
        return 0

    @property
    def kept_reason(self) -> str:
        """What a GPU still holds after a `release`."""
        return "" if not self.kept_bytes else "the context of the CUDA driver"

    @property
    def kept_bytes(self) -> int:
        """GPU memory still held after a `release`."""
        if self.weights_bytes or self._device == "cpu" or not self._has_answered:
            return 0
        return torch.cuda.memory_reserved()

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""
        return self._config.max_model_len or self._shape.max_position_embeddings

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one step should run."""
        return MAX_CPU_STEP_TOKENS if self._device == "cpu" else self._config.max_num_batched_tokens

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._shape.vocab_size

    @property
    def embedding_size(self) -> int:
        """Numbers in a vector."""
        return self._shape.hidden_size

    def start_loading(self) -> None:
        """Do nothing: nothing could be done beside it."""

    def load_weights(self, on_progress: OnProgress | None = None) -> LoadReport:
        """Read and verify weights.

        Raises:
            SnapshotDamaged: Bytes are not those that were built; nothing is held.
        """
        torch.set_num_threads(self._num_cores)
        tensors, report = self._weights.load(on_progress)
        with torch.inference_mode():
            model = self._make_model(PartBuilder(tensors, is_packed=self._is_packed))
        self._model = model
        self._has_answered = False
        if self._is_packed:
            self._packer = Packer(
                model.packables, num_threads=self._num_cores, discard=self._weights.discard
            )
        return report

    def environment(self) -> dict[str, str]:
        """Return what of machine and software its profile depends on."""
        return cpu_environment() if self._device == "cpu" else gpu_environment()

    def allocate_kv(self) -> int:
        """Do nothing; return the number of blocks, which is 0."""
        return 0

    def warm_up(self) -> None:
        """Do nothing: nothing is compiled."""

    def release(self) -> int:
        """Give the weights' memory back; return by how many bytes the process, or GPU, shrank."""
        held_bytes, resident_before = self.weights_bytes, resident_bytes()
        self._model = None
        self._packer = None
        self._weights.release()
        if self._device != "cpu":
            torch.cuda.empty_cache()
            return held_bytes
        trim_malloc()
        return max(0, resident_before - resident_bytes())

    def embed(self, texts: Sequence[PoolingRequest]) -> list[Pooled]:
        """Return what became of each text; one whose vector is not finite fails alone."""
        assert self._model is not None, "weights are loaded"
        if self._packer is not None and not self._packer.is_done and self._has_answered:
            self._packer.pack_group()
        with torch.inference_mode():
            packed = PackedTexts.pack([text.token_ids for text in texts], self._device)
            vectors = pool(self._model.forward(packed), packed, self._mode).cpu()
            finished = finish(
                vectors, [text.dimensions for text in texts], normalize=self._config.normalize
            )
        self._has_answered = True
        return [
            _pooled(text, vector, is_sound=is_sound)
            for text, vector, is_sound in zip(
                texts, finished, vectors.isfinite().all(dim=1).tolist(), strict=True
            )
        ]


def _pooled(text: PoolingRequest, vector: Tensor, *, is_sound: bool) -> Pooled:
    if not is_sound:
        return Pooled(key=text.key, embedding=b"", error=NOT_FINITE)
    return Pooled(key=text.key, embedding=vector.numpy().astype("<f4").tobytes())


def _described(config: Mapping[str, Any]) -> tuple[ModelMaker, BertConfig | ModelConfig]:
    if is_bert(config):
        encoder = BertConfig.from_hf(config)
        return lambda builder: Bert(encoder, builder), encoder
    decoder = ModelConfig.from_hf(config)
    return lambda builder: LlamaEmbedder(decoder, builder), decoder


def _open_weights(snapshot_dir: Path, device: str) -> Weights:
    if device == "cpu":
        return SnapshotWeights(snapshot_dir)
    # Only where there is a GPU: what is beside it imports Triton.
    weights: Weights = importlib.import_module("runtime.gpu.weights").GpuWeights(
        snapshot_dir, device
    )
    return weights
