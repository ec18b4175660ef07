"""Replays a batch's forward, backwards, norms and clipped sums as one CUDA graph.

An ordinary step of a base-size model keeps the host busier than the GPU: thousands of launches,
each from Python. A graph records them once for each kind of batch, and launches all of them at
once. Noise and the optimizer's update stay outside, so no replay repeats noise.

A graph repeats what it recorded: what the model's Python code decided then is decided for good, as
which layers run, and with which numbers. So:

- Two batches are of one kind if their tensors have the same names, shapes and types, the settings
  of torch that a forward depends on are the same, and all parameters, buffers and plain attributes
  of the model's modules are what they were. A batch of another kind is recorded anew.
- Replays 1, 2, 4, 8, ... of each graph are compared with the engine itself, at the same random
  state. A model that does something else from batch to batch is refused.

Batches run without a graph while their kind is new (the first `NUM_EAGER`), if they are empty, and
if there are `MAX_GRAPHS` already.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dpsgd_track.kernels.tensor_table import RecordedTables, recording_tables
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.privacy.engine import Engine

_logger = logging.getLogger(__name__)

NUM_EAGER = 2
"""Batches of a kind that run before it is recorded: they compile kernels and plan norms."""
MAX_GRAPHS = 8
"""Kinds of batches that are recorded. Each graph's memory is shared with the others."""
MANY_KINDS = 64
"""Kinds of batches without a replay after which the user is told."""

_PLAIN = (bool, int, float, str, type(None))
"""Types of the attributes of modules that are compared."""


class ReplayError(ValueError):
    """A batch cannot be recorded, or a replay is not what the model computes."""


@dataclass
class _Graph:
    """A recorded batch: the tensors that it reads, and those that it writes."""

    cuda: torch.cuda.CUDAGraph
    inputs: Batch
    record: SampleRecord
    sums: dict[str, Tensor]
    path: int
    tables: RecordedTables
    state: int
    """Hash of the model's state that was recorded; see `Replays`."""
    num_replays: int = 0

    def replay(self, batch: Batch) -> None:
        """Compute the record and the sums of a batch of this kind."""
        for own, given in zip(self.inputs.tensors(), batch.tensors(), strict=True):
            own.copy_(given, non_blocking=True)
        self.cuda.replay()


class Replays:
    """Adds batches to an engine on one GPU, and replays them where their kind has been recorded."""

    def __init__(self, engine: Engine) -> None:
        """
        Raises:
            ReplayError: the engine is sharded, or not on a GPU.
        """
        device = next(engine.model.parameters()).device
        if not engine.sharder.repeats_batches:
            raise ReplayError(
                "capture=True: expected a model on one GPU, got one under FSDP2, whose gathered "
                "parameters are freed and allocated by the host within each step. Leave it out."
            )
        if device.type != "cuda":
            raise ReplayError(
                f"capture=True: expected a model on a GPU, got one on {device.type}, which has no "
                "graphs to replay. Leave it out."
            )
        self.engine, self._device = engine, device
        self._graphs: dict[object, _Graph] = {}
        self._last: dict[object, _Graph] = {}
        """Graph of the last batch of each call."""
        self._num_seen: Counter[object] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._has_told = False

    @property
    def num_replays(self) -> int:
        """Batches that were replayed so far."""
        return sum(graph.num_replays for graph in self._graphs.values())

    def add(self, batch: Batch) -> SampleRecord:
        """Add a micro-batch's clipped sum, whole or not at all.

        Raises:
            ReplayError: the step needs the host, or a replay has found something else than the
                engine. The batch is not added.
        """
        if len(batch) == 0:
            return self.engine.add(batch)
        call = self._call_of(batch)
        likely = self._last.get(call)
        if likely is not None:
            # The GPU begins while the host looks at the model.
            random_state = self._replay(likely, batch)
            if likely.state == self._state():
                return self._added(likely, batch, random_state)
            torch.cuda.set_rng_state(random_state, self._device)
        kind = call, self._state()
        if kind not in self._graphs:
            self._num_seen[kind] += 1
            if self._num_seen[kind] <= NUM_EAGER or len(self._graphs) >= MAX_GRAPHS:
                self._tell_of_many_kinds()
                return self.engine.add(batch)
            self._graphs[kind] = self._recorded(batch, kind[1])
        graph = self._last[call] = self._graphs[kind]
        return self._added(graph, batch, self._replay(graph, batch))

    def _call_of(self, batch: Batch) -> object:
        """Properties that make the kind of a batch, besides the model."""
        engine = self.engine
        shapes = [(t.shape, t.dtype, t.device) for t in batch.tensors()]
        settings = (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            engine.max_grad_norm,
            engine.clipping,
        )
        return len(batch.args), tuple(batch.inputs), tuple(shapes), settings

    def _state(self) -> int:
        """Hash of what a forward reads of the model, apart from the values of its tensors."""
        found: list[object] = []
        for module in self.engine.model.modules():
            own = vars(module)
            found += [item for item in own.items() if isinstance(item[1], _PLAIN)]
            for tensor in chain(own["_parameters"].values(), own["_buffers"].values()):
                found.append(None if tensor is None else tensor.data_ptr())
        return hash(tuple(found))

    def _recorded(self, batch: Batch, state: int) -> _Graph:
        """Record a batch of a new kind. Nothing is computed, and nothing added."""
        engine = self.engine
        inputs = batch.mapped(lambda name, t: t.clone())
        self._warm_up(inputs)
        cuda = torch.cuda.CUDAGraph()
        try:
            with (
                _without_collector(),
                engine.without_host(),
                engine.sharder.aside() as sums,
                recording_tables(self._device) as tables,
                torch.cuda.graph(cuda, pool=self._pool, capture_error_mode="thread_local"),
            ):
                record = engine.add(inputs)
        except RuntimeError as error:
            self._end_failed_recording()
            raise ReplayError(
                "capture=True: expected a step that the GPU runs without the host, got one that "
                f"cannot be recorded: {str(error).splitlines()[0]} A model that reads values of "
                "tensors (.item(), if tensor:), or layers that are done sample by sample (see "
                "why()), cannot be. Leave capture out."
            ) from error
        tables.write()
        path = 0 if engine.capture is None else engine.capture.path
        _logger.info("recorded a CUDA graph for batches of %d samples", len(batch))
        return _Graph(cuda, inputs, record, dict(sums), path, tables, state)

    def _end_failed_recording(self) -> None:
        """Give the GPU's generator a state of its own again: a recording that fails leaves it in
        one that no draw may use."""
        generator = torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(generator.clone_state())

    def _warm_up(self, batch: Batch) -> None:
        """Run a batch as it will be recorded, on a stream of its own, and drop what it adds."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._computed(batch, torch.cuda.get_rng_state(self._device))
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _computed(
        self, batch: Batch, random_state: Tensor
    ) -> tuple[SampleRecord, dict[str, Tensor]]:
        """Results of the engine for a batch from a random state, which is restored afterwards."""
        engine, before = self.engine, torch.cuda.get_rng_state(self._device)
        torch.cuda.set_rng_state(random_state, self._device)
        try:
            with engine.without_host(), engine.sharder.aside() as sums:
                record = engine.add(batch)
                return record, dict(sums)
        finally:
            torch.cuda.set_rng_state(before, self._device)

    def _replay(self, graph: _Graph, batch: Batch) -> Tensor:
        """Start a replay; returns the random state before it."""
        self._own_sums()
        random_state = torch.cuda.get_rng_state(self._device)
        graph.replay(batch)
        return random_state

    def _added(self, graph: _Graph, batch: Batch, random_state: Tensor) -> SampleRecord:
        """Add what a graph's last replay has computed for `batch`."""
        graph.num_replays += 1
        if graph.num_replays.bit_count() == 1:
            self._compare(graph, batch, random_state)
        engine = self.engine
        if engine.capture is not None:
            engine.capture.path = graph.path
        engine.sharder.put(graph.sums)
        engine.sharder.commit()
        return _copied(graph.record)

    def _own_sums(self) -> None:
        """Copy sums of earlier batches that are still those of a graph, which overwrites them."""
        recorded = {id(t) for graph in self._graphs.values() for t in graph.sums.values()}
        sums = self.engine.sharder.sums
        for name, total in sums.items():
            if id(total) in recorded:
                sums[name] = total.clone()

    def _compare(self, graph: _Graph, batch: Batch, random_state: Tensor) -> None:
        """Raise unless the engine computes for `batch` what the graph's last replay has."""
        record, sums = self._computed(batch, random_state)
        rows, wanted_rows = _rows(graph.record), _rows(record)
        tolerance = 0.05 if _is_low(self.engine) else 1e-3
        problems = [what for what in rows if not _agree(rows[what], wanted_rows[what], tolerance)]
        whole = torch.stack([total.float().norm() for total in sums.values()]).norm()
        for name, total in sums.items():
            found = graph.sums.get(name)
            is_close = found is not None and bool(
                (found - total).float().norm() <= tolerance * (total.float().norm() + 0.01 * whole)
            )
            if not is_close:
                problems.append(f"clipped sum of {name}")
        if problems or graph.sums.keys() != sums.keys():
            raise ReplayError(
                "capture=True: expected a replay to compute what the model does, got another "
                f"{', '.join(problems[:3]) or 'set of parameters'}. The model's Python code does "
                "something else from batch to batch, such as leaving out layers at random. Leave "
                "capture out."
            )

    def _tell_of_many_kinds(self) -> None:
        if len(self._num_seen) >= MANY_KINDS and not self.num_replays and not self._has_told:
            self._has_told = True
            _logger.warning(
                "capture=True: no two of %d batches were alike, so none was replayed. Pad inputs "
                "to few lengths; with private.loader, give physical_batch_size.",
                len(self._num_seen),
            )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Context in which no garbage is collected: to free an old graph would end a recording."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rows(record: SampleRecord) -> Mapping[str, Tensor]:
    assert record.norm_B is not None
    return {
        "losses": record.loss_B,
        "gradient norms": record.norm_B,
        "clip factors": record.factors_B,
    }


def _agree(found_B: Tensor, wanted_B: Tensor, tolerance: float) -> bool:
    """True if both are finite for the same samples, and equal there up to rounding."""
    is_finite_B = wanted_B.isfinite()
    difference_B = (found_B - wanted_B).abs() - tolerance * wanted_B.abs()
    is_close_B = torch.where(is_finite_B, difference_B <= tolerance * 1e-3, ~found_B.isfinite())
    return bool(is_close_B.all())


def _is_low(engine: Engine) -> bool:
    """True if gradients have 16 bits."""
    dtypes = engine.capture.dtypes if engine.capture is not None else set()
    return any(dtype.itemsize == 2 for dtype in dtypes)


def _copied(record: SampleRecord) -> SampleRecord:
    """The record in memory of its own, by one copy for all of its tensors of a type."""
    by_parameter = record.norm_by_parameter_B or {}
    tensors = [*_rows(record).values(), *by_parameter.values()]
    copies: list[Tensor] = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    loss_B, norm_B, factor_B, *roots = copies
    return SampleRecord(loss_B, norm_B, factor_B, dict(zip(by_parameter, roots, strict=True)))
