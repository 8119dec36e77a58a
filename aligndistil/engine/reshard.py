"""A checkpoint for another number of processes, another ZeRO stage or other offloading than it was written with.

Every weight and its moments are put together from the files of all processes, which stay on the disk, and each process
of this run takes its part. The numbers are the same to the bit. (DeepSpeed's own way, its universal checkpoint, writes
everything a second time, unpickles it, does not know ZeRO stage 0, and at stage 3 gives all parameters the weight
decay of the first group.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
Read = Callable[[str], Any]
"""What a file of a checkpoint holds; its tensors may be mapped into memory."""


class SavedStates:
    """What one DeepSpeed engine wrote: of every trained parameter, by name, its float32 weight and AdamW's moments."""

    def __init__(self, folder: Path, zero_stage: int, trained: Iterable[str], read: Read) -> None:
        """`trained` are the names of the trained parameters, in the order of the module."""
        model = read(str(min(folder.glob("*model_states.pt"))))
        self.lr_scheduler: dict[str, Any] = model["lr_scheduler"]
        self.counters = {name: model[name] for name in ("global_steps", "global_samples", "skipped_steps")}
        self._pieces: dict[tuple[str, str], list[Tensor]] = {}
        files = sorted(folder.glob("*optim_states.pt"), key=_rank)
        shards = [read(str(path))["optimizer_state_dict"] for path in files]
        if zero_stage == 0:
            self.step = self._add_whole(model, trained)
        elif zero_stage == 3:
            self.step = self._add_stage_3(shards, model["param_shapes"])
        else:
            self.step = self._add_stage_1_or_2(shards)

    def get(self, name: str, state: str, numel: int) -> Tensor:
        """(numel,) one state of a parameter of so many elements."""
        found = torch.cat([piece.flatten() for piece in self._pieces[name, state]])
        if len(found) != numel:
            raise RuntimeError(f"the checkpoint has {len(found)} elements of {name}, which has {numel}")
        return found

    def _add(self, name: str, states: Mapping[str, Tensor]) -> None:
        for state, piece in states.items():
            self._pieces.setdefault((name, state), []).append(piece)

    def _add_whole(self, model: Mapping[str, Any], trained: Iterable[str]) -> Tensor:
        weights, moments = model["module"], model["optimizer"]["state"]
        # The optimizer knows numbers, not names, and has what is decayed first.
        names = sorted(trained, key=lambda name: weights[name].ndim < 2)
        for i, name in enumerate(names):
            self._add(name, {WEIGHT: weights[name], **{key: moments[i][key] for key in MOMENTS}})
        return _step(moments[0])

    def _add_stage_1_or_2(self, shards: list[dict[str, Any]]) -> Tensor:
        for shard in shards:
            moments = shard["base_optimizer_state"]["state"]
            for group, places in enumerate(shard["param_slice_mappings"]):
                flat = {WEIGHT: shard["single_partition_of_fp32_groups"][group]}
                flat |= {key: moments[group][key] for key in MOMENTS}
                for name, place in places.items():
                    end = place.start + place.numel
                    self._add(name, {key: value[place.start : end] for key, value in flat.items()})
        return _step(shards[0]["base_optimizer_state"]["state"][0])

    def _add_stage_3(self, shards: list[dict[str, Any]], shapes: list[Mapping[str, torch.Size]]) -> Tensor:
        for rank, shard in enumerate(shards):
            moments = shard["optimizer_state_dict"]["state"]
            for group, names in enumerate(shapes):
                flat = {WEIGHT: shard["fp32_flat_groups"][group]}
                flat |= {key: moments[group][key] for key in MOMENTS}
                start = 0
                for name, shape in names.items():
                    share = -(-shape.numel() // len(shards))  # the last process's is filled up with zeros
                    end = start + min(share, max(0, shape.numel() - rank * share))
                    self._add(name, {key: value[start:end] for key, value in flat.items()})
                    start += share
        return _step(shards[0]["optimizer_state_dict"]["state"][0])


def take(engine: Any, saved: SavedStates) -> None:
    """Give a DeepSpeed engine the weights, moments, learning rate and counters that another one wrote. Collective."""
    optimizer = engine.optimizer
    adamw = optimizer.optimizer if engine.zero_optimization_stage() else optimizer
    parameters = trained_parameters(engine)
    if engine.zero_optimization_stage() == 3:
        _take_stage_3(optimizer, adamw, parameters, saved)
    elif engine.zero_optimization_stage() == 0:
        for name, p in parameters.items():
            whole = {key: saved.get(name, key, p.numel()).view_as(p) for key in (WEIGHT, *MOMENTS)}
            p.data.copy_(whole.pop(WEIGHT))
            adamw.state[p] = {key: value.clone().to(p.device) for key, value in {"step": saved.step, **whole}.items()}
    else:
        _take_stage_1_or_2(optimizer, adamw, parameters, saved)
    engine.lr_scheduler.load_state_dict(saved.lr_scheduler)
    for group, rate in zip(adamw.param_groups, saved.lr_scheduler["_last_lr"], strict=True):
        group["lr"] = rate
    for name, count in saved.counters.items():
        setattr(engine, name, count)


def trained_parameters(engine: Any) -> dict[str, Any]:
    """By name, in the order of the module."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _take_stage_1_or_2(
    optimizer: Any, adamw: torch.optim.Optimizer, parameters: Mapping[str, Any], saved: SavedStates
) -> None:
    flats = [group["params"][0] for group in adamw.param_groups]
    _make_room(adamw, flats, saved)
    for name, p in parameters.items():
        if (part := p._hp_mapping) is None:  # nothing of it is kept by this process
            continue
        own, place = part.lp_fragment_address, part.hp_fragment_address
        kept = {WEIGHT: flats[part.param_group_index].data, **adamw.state[flats[part.param_group_index]]}
        for key in (WEIGHT, *MOMENTS):
            whole = saved.get(name, key, p.numel())
            kept[key].narrow(0, place.start, place.numel).copy_(whole.narrow(0, own.start, own.numel))
    optimizer.update_lp_params()


def _take_stage_3(
    optimizer: Any, adamw: torch.optim.Optimizer, parameters: Mapping[str, Any], saved: SavedStates
) -> None:
    from deepspeed import comm, zero

    flats = optimizer.fp32_partitioned_groups_flat
    _make_room(adamw, flats, saved)
    rank, ranks = comm.get_rank(), comm.get_world_size()
    names = {id(p): name for name, p in parameters.items()}
    for flat, group in zip(flats, optimizer.fp16_groups, strict=True):
        kept, start = {WEIGHT: flat.data, **adamw.state[flat]}, 0
        for p in group:
            share = -(-p.ds_numel // ranks)
            for key in (WEIGHT, *MOMENTS):
                whole = saved.get(names[id(p)], key, p.ds_numel)
                part = whole[rank * share : (rank + 1) * share]
                kept[key].narrow(0, start, len(part)).copy_(part)
            start += share
            with zero.GatheredParameters([p], modifier_rank=0):
                if rank == 0:
                    p.data.copy_(saved.get(names[id(p)], WEIGHT, p.ds_numel).view_as(p))


def _make_room(adamw: torch.optim.Optimizer, flats: Iterable[Tensor], saved: SavedStates) -> None:
    for flat in flats:
        state = adamw.state[flat]
        state["step"] = saved.step.clone().to(flat.device)  # where fused AdamW looks for it
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(flat.data))


def _rank(file: Path) -> int:
    """`bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt` is 3."""
    return int(re.findall(r"pp_rank_(\d+)_", file.name)[0])


def _step(moments: Mapping[str, Any]) -> Tensor:
    return torch.as_tensor(moments["step"], dtype=torch.float32)
