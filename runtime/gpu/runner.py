"""Tensors of one engine on one GPU: weights, KV cache, forward pass, sampling.

Knows nothing of requests beyond the batch it is given. All work goes to one stream in order, so a
batch may be launched while the one before still runs: its tokens are where the next one reads
them before the host knows them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from runtime.config import EngineConfig
from runtime.engine.batch import PendingTokens, ScheduledBatch, TokenMasks
from runtime.engine_api import Measure
from runtime.environment import cpu_environment, gpu_environment
from runtime.gpu.device import Device
from runtime.gpu.graphs import StepGraphs, StepShape
from runtime.gpu.limits import BatchLimits
from runtime.gpu.llama import GpuLlama, Unfinished, activation_bytes
from runtime.gpu.logprobs import LogprobBuffers, logprob_bytes
from runtime.gpu.memory import WorkMemory, allocate_slab, device_memory, settle_freed
from runtime.gpu.prompt_logprobs import launch_prompt_logprobs
from runtime.gpu.rows import Rows
from runtime.gpu.sampling import GpuSampler, PendingChoice, PendingSample
from runtime.gpu.staging import BatchDescription, BatchStaging, describe
from runtime.gpu.step_sizes import PREFILL_TOKENS_ALONE, mixed_sizes, tokens_beside
from runtime.gpu.warm_up import PROMPTS, warm_up_batches, warm_up_masks
from runtime.gpu.weights import GpuWeights, StreamedWeights
from runtime.kernels.batch_inputs import ModelInputs, expand_batch
from runtime.kernels.cache import KernelCache
from runtime.kernels.chunk_attention import tile_size
from runtime.memory.kv_plan import CONTEXT_BYTES, KvSizes, plan_kv
from runtime.memory.slab import Slab
from runtime.memory.weights import OnProgress
from runtime.model.config import ModelConfig
from runtime.model.description import check_dtype, read_model
from snapshots.loader import LoadReport
from snapshots.profiles import StepSize


class Context(Protocol):
    """What the driver needs to compute in this process, on its way; see `runtime.gpu.context`."""

    def wait(self) -> None:
        """Return when it is there, or raise LoadFailed."""


class GpuRunner:
    """Brings a model into a GPU's memory and out again, and runs batches in between.

    Args:
        model_config: The model's shape.
        config: Limits of the engine.
        weights: Where the tensors come from; each load puts them where the first one did.
        eos_token_ids: The model's own end-of-sequence tokens.
        device: "cuda", or "cpu" in tests.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        weights: StreamedWeights,
        eos_token_ids: frozenset[int] = frozenset(),
        device: str = "cuda",
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._model_config = model_config
        self._config = config
        self._weights = weights
        self._dtype = weights.dtype
        self._device = Device(device)
        most = max(PREFILL_TOKENS_ALONE, tokens_beside(config.max_num_seqs))
        budget = min(config.max_num_batched_tokens, most)
        limits = BatchLimits(
            mixed_sizes=mixed_sizes(budget, is_gpu=self._device.is_gpu),
            num_seqs=min(config.max_num_seqs, budget),
            num_blocks_each=-(-self._wanted_len // config.block_size),
            tile_size=tile_size(self._dtype),
        )
        self._kv_plan = plan_kv(config, self._kv_sizes(limits))
        self._limits = limits
        self._model: GpuLlama | None = None
        self._kv_slab: Slab | None = None
        self._kv_cache = torch.empty(0)
        self.kernels = KernelCache()
        self._num_compilations: int | None = None  # until it was warm
        self._work = WorkMemory(self._device)
        self._rows = Rows(limits.num_seqs)
        self._block_tables = torch.zeros(
            limits.num_rows, limits.num_blocks_each, dtype=torch.int32, device=device
        )
        self._inputs = ModelInputs.allocate(limits.num_tokens, limits.num_records, device)
        self._staging = BatchStaging(limits, self._device)
        self._logprobs = LogprobBuffers(limits, model_config.vocab_size, self._work)
        self._sampler = GpuSampler(
            limits, model_config.vocab_size, self._device, self._work, self._logprobs
        )
        self._graphs = StepGraphs(self._run, self._limits, self._device)

    @classmethod
    def open(
        cls, snapshot_dir: Path, config: EngineConfig, context: Context, measure: Measure
    ) -> Self:
        """Read a snapshot's configuration and header; weights come later.

        Args:
            snapshot_dir: The snapshot.
            config: Limits of the engine.
            context: Waited for when everything is read that needs no GPU.
            measure: Times the parts.

        Raises:
            LoadFailed: The engine cannot run this model, or not with this configuration.
            SnapshotDamaged: A file is missing or not what the manifest says.
            OutOfMemory: The GPU has no room for weights and a KV cache.
        """
        with measure("open"):
            description = read_model(snapshot_dir)
            weights = GpuWeights(snapshot_dir, "cuda")
            check_dtype(config, weights.dtype)
            weights.prefetch()  # while the context is made, which takes as long as some reading
        try:
            with measure("context"):
                context.wait()
            with measure("buffers"):
                return cls(description.config, config, weights, description.eos_token_ids)
        except BaseException:
            weights.release()
            raise

    @property
    def weights_bytes(self) -> int:
        """GPU memory held for weights, now."""
        return self._weights.held_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """GPU memory held for KV blocks, now."""
        slab = self._kv_slab
        return slab.num_bytes if slab is not None and slab.is_mapped else 0

    @property
    def kept_bytes(self) -> int:
        """GPU memory still held after a `release`, estimated; 0 while the weights are there."""
        if self.weights_bytes or self._model is None or not self._device.is_gpu:
            return 0
        return CONTEXT_BYTES + self._device.work_bytes()

    @property
    def kept_reason(self) -> str:
        """What a GPU still holds after a `release`."""
        if not self.kept_bytes:
            return ""
        work_mib = self._device.work_bytes() >> 20
        return (
            f"the driver's context, kernels, {self.num_graphs} CUDA graphs and {work_mib} MiB of "
            "work memory stay on the GPU, so that a wake only reads the weights"
        )

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""
        return self._kv_plan.max_model_len

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one step can run."""
        return self._limits.num_tokens

    def max_prefill_tokens(self, num_decodes: int) -> int:
        """Return how many tokens of prompts a step should run: fewer when decodes wait for it."""
        return tokens_beside(num_decodes) - num_decodes if num_decodes else PREFILL_TOKENS_ALONE

    @property
    def max_in_flight(self) -> int:
        """Two: one batch is prepared while the one before runs."""
        return 2

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model_config.vocab_size

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the KV cache."""
        return self._kv_plan.num_blocks

    @property
    def num_late_compilations(self) -> int:
        """Kernels compiled since the engine was ready; more than 0 is a defect."""
        if self._num_compilations is None:
            return 0
        return self.kernels.num_compilations - self._num_compilations

    @property
    def num_graphs(self) -> int:
        """Shapes of steps that are CUDA graphs."""
        return self._graphs.num_captured

    def start_loading(self) -> None:
        """Begin to read weights, after a `release` to the same addresses as before.

        Until `load_weights` has ended, batches run, but their tokens mean nothing.

        Raises:
            OutOfMemory: The GPU has not enough free memory.
        """
        with self._device.computing():
            tensors = self._weights.start()
            self._work.restore()
            if self._model is None:
                self._model = GpuLlama(
                    self._model_config,
                    tensors,
                    limits=self._limits,
                    max_model_len=self.max_model_len,
                    work=self._work,
                )

    def load_weights(self, on_progress: OnProgress | None = None) -> LoadReport:
        """Return when all weights are read and verified.

        Raises:
            SnapshotDamaged: Bytes are not those that were built; nothing is held.
            OutOfMemory: The GPU has not enough free memory.
        """
        if not self.weights_bytes:
            self.start_loading()
        with self._device.computing():
            _, report = self._weights.load(on_progress)
        self._device.synchronize()
        return report

    def allocate_kv(self) -> int:
        """Allocate the KV cache; return its number of blocks."""
        if self._kv_slab is not None:
            self._kv_slab.map()
            return self.num_kv_blocks
        shape = self._model_config
        num_bytes = self.num_kv_blocks * self._config.block_size * self._bytes_per_token()
        self._kv_slab = allocate_slab(num_bytes, self._device.name)
        self._kv_cache = self._kv_slab.tensor.view(self._dtype).view(
            shape.num_layers,
            self.num_kv_blocks,
            2,
            shape.num_kv_heads,
            self._config.block_size,
            shape.head_dim,
        )
        return self.num_kv_blocks

    def warm_up(self) -> None:
        """Compile every kernel, so that nothing is compiled once requests come; once.

        Weights need not be there yet. Kernels that an earlier start has compiled need only be
        loaded, which no request waits for longer than this would take: then it ends with the
        reading of the weights, and other kernels are loaded when they are used, or in idle time.
        """
        if self._num_compilations is not None:
            return
        assert self._model is not None, "loading has started"
        with self._model.shortened(), self._graphs.suspended(), self._loading_products():
            self._run_kernels()
        self._num_compilations = self.kernels.num_compilations

    @contextmanager
    def _loading_products(self) -> Iterator[None]:
        """Have cuBLAS load its kernels meanwhile, which takes it as long as all others take Triton.

        It reads what is in the buffers and writes into them, which concerns nobody before the first
        batch.
        """
        assert self._model is not None, "loading has started"
        model = self._model

        def load() -> None:
            self._device.attach()
            with self._device.computing():
                for num_tokens in self._product_sizes():
                    model.run_products(num_tokens)
            self._device.synchronize()

        with ThreadPoolExecutor(1, "products") as pool:
            loading = pool.submit(load)
            yield
            loading.result()
        self._device.drop_workspaces()

    def _product_sizes(self) -> list[int]:
        """Return the sizes of steps with a usual prompt, the smaller first."""
        sizes = {min(num_tokens, self._limits.num_tokens) for num_tokens in PROMPTS}
        return sorted({self._graphs.shape_of(num_tokens, 1).num_tokens for num_tokens in sizes})

    def _run_kernels(self) -> None:
        assert self._model is not None, "loading has started"
        for batch in warm_up_batches(self._limits, self._config.block_size, self.max_model_len):
            if self.kernels.is_seeded and self._weights.is_read:
                return
            pending = self.launch(batch)
            pending.choose(warm_up_masks(batch, self.vocab_size))
            pending.wait()
            self._rows.retire(tuple(item.number for item in batch.sequences))
        with self._device.computing():
            self._model.compile_products()

    def environment(self) -> dict[str, str]:
        """Return what of machine and software its profile depends on."""
        return gpu_environment() if self._device.is_gpu else cpu_environment()

    def prefer_steps(self, steps: Sequence[StepSize]) -> None:
        """Capture the graphs of these shapes first, in this order."""
        self._graphs.prefer(StepShape(step.num_tokens, step.num_tiles) for step in steps)

    def used_steps(self) -> Sequence[StepSize]:
        """Return the shapes of steps that were run, most used first."""
        return [
            StepSize(num_tokens=shape.num_tokens, num_tiles=shape.num_tiles, count=count)
            for shape, count in self._graphs.most_used()
        ]

    def check_device(self) -> None:
        """Raise the driver's error if it has lost the context, after an illegal access for one.

        Nothing can be computed in this process then.
        """
        self._device.synchronize()

    def use_idle_time(self) -> bool:
        """Tidy up after a load, then capture one more CUDA graph, which takes some milliseconds.

        Returns:
            Whether a graph was captured.
        """
        self._weights.tidy()
        shape = self._graphs.next_missing()
        if shape is None:
            return False
        with self._device.computing():
            self._staging.send(BatchDescription(), shape)
            self._run(shape)
            self._graphs.capture(shape)
        self._device.synchronize()  # what was sent may be overwritten two batches later
        return True

    def release(self) -> int:
        """Give weights and KV memory back; return the bytes freed.

        Their addresses stay ours, and so do kernels and graphs: what comes back is fast at once.
        """
        freed_bytes = self.weights_bytes + self.kv_cache_bytes
        self._device.synchronize()
        self._weights.release()
        self._work.release()
        if self._kv_slab is not None and self._kv_slab.is_mapped:
            self._kv_slab.unmap()
        return freed_bytes

    def settle(self) -> None:
        """Let the driver finish with the memory it was given back, some 40 ms for 100 GiB.

        It does so when memory is next taken, however little, half a second or more later.
        """
        settle_freed(self._device.name)

    def launch(self, batch: ScheduledBatch) -> PendingTokens:
        """Launch a batch; sequences whose logits are not finite will be reported as faults."""
        self._rows.retire(batch.retired)
        with self._launching(batch):
            return self._launch(batch)

    def all_logits(self, batch: ScheduledBatch) -> Tensor:
        """Run a batch; return the logits of every token, fp32 [num_tokens, vocab_size]."""
        assert self._model is not None, "weights are loaded"
        self._rows.retire(batch.retired)
        with self._device.computing():
            described = describe(batch, self._rows, self._limits.tile_size)
            shape = StepShape(described.num_tokens, max(1, described.num_tiles))
            self._staging.send(described, shape)
            unfinished = self._run(shape)
            assert isinstance(unfinished, Unfinished), "the shape has tiles"
            tokens = torch.arange(described.num_tokens, device=self._device.name)
            parts = [
                self._model.logits(unfinished, rows)[:, : self.vocab_size].clone()
                for rows in tokens.split(self._limits.num_seqs)
            ]
            logits = torch.cat(parts)
        self._device.synchronize()  # the caller reads it in a stream of its own
        return logits

    @contextmanager
    def _launching(self, batch: ScheduledBatch) -> Iterator[None]:
        """Launch what is inside; if it fails, what the device knows of the batch is sent again."""
        with self._device.computing():
            try:
                yield
            except Exception:
                self._rows.forget_uploads(batch)
                raise

    def _launch(self, batch: ScheduledBatch) -> PendingTokens:
        assert self._model is not None, "weights are loaded"
        model = self._model
        described = describe(batch, self._rows, self._limits.tile_size)
        shape = self._graphs.shape_of(described.num_tokens, described.num_tiles)
        self._staging.send(described, shape)
        result = self._graphs.run(shape)
        num_sampled = len(described.sampled)
        prompt_logprobs = None
        if isinstance(result, Tensor):  # a step of decodes, in which there is no prompt
            logits = result[:num_sampled]
        else:
            prompt_logprobs = launch_prompt_logprobs(
                batch.sequences,
                lambda rows: model.logits(result, rows)[:, : self.vocab_size],
                buffers=self._logprobs,
                device=self._device,
            )
            logits = model.logits(result, self._staging.sampled_tokens[:num_sampled])

        def choose(masks: TokenMasks | None) -> PendingSample:
            with self._launching(batch):
                return self._sampler.launch(
                    logits,
                    described.sampled,
                    described.sampled_seqs,
                    rows=self._rows,
                    sampled=self._staging.sampled_seqs[:num_sampled],
                    batch_rows=self._inputs.rows,
                    seq_lens=self._inputs.seq_lens,
                    masks=masks,
                    prompt_logprobs=prompt_logprobs,
                )

        return PendingChoice(choose) if batch.is_constrained else choose(None)

    def _run(self, shape: StepShape) -> Tensor | Unfinished:
        """Launch the batch on the device; what a CUDA graph records.

        Returns:
            Logits of all sequences if all decode, else what all tokens are finished from.
        """
        assert self._model is not None, "weights are loaded"
        max_decodes = min(shape.num_tokens, self._limits.num_seqs)
        expand_batch(
            self._staging.num_records,
            self._staging.records,
            self._staging.numbers,
            self._block_tables,
            self._sampler.last_tokens,
            self._inputs,
            max_records=max_decodes + 1,
            block_size=self._config.block_size,
        )
        unfinished = self._model.forward(
            self._inputs,
            self._kv_cache,
            self._block_tables,
            num_tokens=shape.num_tokens,
            max_decodes=max_decodes,
            num_decodes=self._staging.num_decodes,
            tiles=self._staging.tiles[: shape.num_tiles] if shape.num_tiles else None,
        )
        return unfinished if shape.num_tiles else self._model.logits(unfinished, None)

    @property
    def _wanted_len(self) -> int:
        """The length limit before memory shrinks it, in tokens."""
        return self._config.max_model_len or self._model_config.max_position_embeddings

    def _bytes_per_token(self) -> int:
        return self._model_config.kv_elements_per_token * self._dtype.itemsize

    def _kv_sizes(self, limits: BatchLimits) -> KvSizes:
        shape = self._model_config
        return KvSizes(
            bytes_per_token=self._bytes_per_token(),
            weights_bytes=self._weights.total_bytes,
            activation_bytes=activation_bytes(shape, limits, self._dtype, self._wanted_len)
            + limits.num_rows * 4 * shape.vocab_size
            + logprob_bytes(limits, shape.vocab_size),
            machine_bytes=0,
            model_max_len=shape.max_position_embeddings,
            device=device_memory(self._device.name),
        )
